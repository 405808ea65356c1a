"""From the content of a file to a Config: against the schema, and its sections against each other."""

from itertools import chain
from typing import Any

from pydantic import ValidationError

from unikd_fast.config.explain import explain
from unikd_fast.config.methods import TOP_K_METHODS, method_names, unused_sections
from unikd_fast.config.names import run_path
from unikd_fast.config.schema import Config
from unikd_fast.errors import ConfigError

# What the schema states itself, and where: DeepSpeed must not be told twice.
OWNED_BY_US = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.global_batch_size",
    "gradient_accumulation_steps": "train.accumulation_steps",
    "gradient_clipping": "train.clip_grad_norm",
    "optimizer": "train.optimizer",
    "scheduler": "train.schedule",
    "torch_autocast": "train.precision",
    "fp16": "train.precision",
    "bf16": "train.precision",
    "bfloat16": "train.precision",
    "steps_per_print": "run.log_every_steps",
}


def validate(raw: dict[str, Any], source: str) -> Config:
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise explain(error, Config, source) from None
    _check_run_names(config, source)
    for key, ours in OWNED_BY_US.items():
        if key in config.deepspeed:
            raise ConfigError(
                f"{source}: deepspeed.{key} = {config.deepspeed[key]!r} repeats {ours}; remove it and set {ours}"
            )
    if config.distill.method != "none" and config.teacher is None:
        raise ConfigError(f"{source}: distill.method = {config.distill.method!r} needs a teacher; set teacher.model")
    if config.distill.ce_weight is not None and config.distill.method != "kd":
        raise ConfigError(
            f"{source}: distill.ce_weight = {config.distill.ce_weight} is a setting of distill.method = 'kd', got "
            f"{config.distill.method!r}; scale alpha and beta instead"
        )
    compared = [methods_of(config, settings) for settings in config.compare.runs.values()] if config.compare else []
    unused = unused_sections(config.distill, chain(*(compared or [config.distill.methods])))
    if unused:
        raise ConfigError(
            f"{source}: distill.{unused[0]} has the settings of distill.method = {unused[0]!r}, got "
            f"{config.distill.method!r}; remove it, or use the method"
        )
    single = config.compare is None and config.distill.method != "none"
    cache = config.teacher.cache if config.teacher is not None and single else None
    if cache is not None and cache.mode != "off" and cache.logits == "top_k":
        _check_top_k(config, source)
    if cache is not None and cache.mode != "off" and config.data.bad_images == "skip":
        raise ConfigError(
            f"{source}: teacher.cache.mode = {cache.mode!r} with data.bad_images = 'skip': the cache holds an output "
            "for every sample, also for one that cannot be decoded; remove the bad files and set "
            "data.bad_images=error, or set teacher.cache.mode=off"
        )
    mixing = config.data.mixing
    mixes = mixing.probability > 0 and (mixing.mixup_alpha > 0 or mixing.cutmix_alpha > 0)
    if cache is not None and cache.mode != "off" and mixes:
        raise ConfigError(
            f"{source}: teacher.cache.mode = {cache.mode!r} with data.mixing.mixup_alpha = {mixing.mixup_alpha} and "
            f"cutmix_alpha = {mixing.cutmix_alpha}: the cache holds the teacher's outputs by sample, and a mixed image "
            "belongs to two; set teacher.cache.mode=off, or both alphas to 0"
        )
    return config


def methods_of(config: Config, settings: dict[str, Any]) -> tuple[str, ...]:
    """Of a run of a comparison, as far as they can be told before its settings are validated."""
    method = settings.get("distill.method", config.distill.method)
    return method_names(method) if isinstance(method, str | list | tuple) else ()


def _check_top_k(config: Config, source: str) -> None:
    if config.distill.kd is not None and config.distill.kd.standardized:
        raise ConfigError(
            f"{source}: teacher.cache.logits = 'top_k' with distill.kd.standardized = true, which needs all logits for "
            "their mean and deviation; set teacher.cache.logits=uint8 or fp16"
        )
    whole = [name for name in config.distill.methods if name not in TOP_K_METHODS]
    if whole:
        raise ConfigError(
            f"{source}: teacher.cache.logits = 'top_k' with distill.method = {whole[0]!r}, which needs all logits; set "
            "teacher.cache.logits=uint8 or fp16"
        )
    if config.distill.temperature != 1:
        raise ConfigError(
            f"{source}: teacher.cache.logits = 'top_k' needs distill.temperature = 1, got "
            f"{config.distill.temperature}: at τ = 4 most of the probability lies outside the classes it "
            "keeps; set teacher.cache.logits=uint8 or fp16"
        )


def _check_run_names(config: Config, source: str) -> None:
    """Every run of a comparison has a folder of its own, none of which is the teacher's."""
    if config.compare is None:
        return
    seeds = config.compare.seeds
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{source}: compare.seeds = {list(seeds)} names a seed twice; each is one run")
    taken = {"teacher": "the teacher's training"}
    for label in config.compare.runs:
        name = run_path(config, label, seeds[0]).partition("/")[2]
        if not name or name in taken:
            used = f"is also that of {taken[name]}" if name else "would be empty"
            raise ConfigError(
                f"{source}: compare.runs[{label!r}] would write to a folder whose name, {name!r}, {used}; it is made "
                "of the label's letters a to z and digits; choose another label"
            )
        taken[name] = f"compare.runs[{label!r}]"
