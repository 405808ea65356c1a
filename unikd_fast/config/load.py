"""From a JSON file and ``--set`` overrides to a frozen Config, and from a comparison to its single runs."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from unikd_fast.config.explain import explain, nearest_key
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


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Reads, overrides and validates a configuration.

    Args:
        path: a JSON file.
        overrides: ``"section.key=value"``; the value is JSON, or a plain string if it is not.

    Raises:
        ConfigError: with the path, the value and the remedy of everything that is wrong.

    Example:
        >>> config = load_config("configs/digits.json", ["train.total_epochs=2"])
    """
    raw = _read(Path(path))
    settings = dict(_parse_override(text) for text in overrides)
    for key, value in settings.items():
        _assign(raw, key, value, "--set")
    config = _validate(raw, str(path))
    _check_collisions(config, settings)
    for _, _, single in run_configs(config):  # every run must be valid before the first one starts
        if single.teacher is not None and single.teacher.training is not None:
            teacher_config(single)
    name = Path(path).stem
    run_dir = config.run.dir.replace("{name}", name).replace("{hash}", config_hash(config))
    named: dict[str, Any] = {"run": config.run.model_copy(update={"dir": run_dir})}
    if config.teacher is not None:
        cache = config.teacher.cache
        cache = cache.model_copy(update={"dir": cache.dir.replace("{name}", name)})
        named["teacher"] = config.teacher.model_copy(update={"cache": cache})
    return config.model_copy(update=named)


def config_hash(config: Config) -> str:
    """Eight hex digits that identify the experiment: everything but where it writes and how it is drawn."""
    elsewhere: Any = {"json_schema": True, "run": {"dir", "tensorboard"}, "teacher": {"cache": {"dir"}}}
    content = config.model_dump(mode="json", exclude=elsewhere)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def run_configs(config: Config) -> Iterator[tuple[str, int, Config]]:
    """The single runs of a comparison as (label, seed, config), or the one run itself."""
    if config.compare is None:
        yield "student", config.run.seed, config
        return
    for seed in config.compare.seeds:
        for label, settings in config.compare.runs.items():
            yield label, seed, override(config, {**settings, "compare": None, "run.seed": seed}, label)


def teacher_config(config: Config) -> Config:
    """The run that trains the teacher of ``config``: the teacher's model as a student that learns alone."""
    assert config.teacher is not None
    assert config.teacher.training is not None
    training = config.teacher.training
    settings: dict[str, Any] = {
        "compare": None,
        "teacher": None,
        "distill.method": "none",
        "distill.ce_weight": None,
        "student.model": config.teacher.model,
        "student.feature_nodes": config.teacher.feature_nodes,
        "student.weights": None,
        "data.train_samples": training.train_samples,
    }
    for key in ("total_epochs", "learning_rate", "global_batch_size"):
        if getattr(training, key) is not None:
            settings[f"train.{key}"] = getattr(training, key)
    return override(config, settings, "teacher.training")


def cache_dir(config: Config) -> Path:
    """The folder of the teacher's outputs of a single run.

    Example:
        >>> cache_dir(load_config("configs/digits_cached.json"))
        PosixPath('caches/digits_cached-unikd-seed0')
    """
    assert config.teacher is not None
    named = {"{method}": config.distill.method, "{seed}": str(config.run.seed)}
    folder = config.teacher.cache.dir
    for name, value in named.items():
        folder = folder.replace(name, value)
    return Path(folder)


def override(config: Config, settings: dict[str, Any], source: str) -> Config:
    raw = config.model_dump(mode="json", by_alias=True)
    for key, value in settings.items():
        _assign(raw, key, value, source)
    return _validate(raw, source)


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"--config {path}: no such file; the configurations that come along are in configs/")
    try:
        raw = json.loads(path.read_text(), object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ConfigError(f"key {key!r} is given twice, as {result[key]!r} and as {value!r}; remove one")
        result[key] = value
    return result


def _parse_override(text: str) -> tuple[str, Any]:
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {text}: expected section.key=value, for example --set train.total_epochs=2")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
        return key, value


def _assign(raw: dict[str, Any], key: str, value: Any, source: str) -> None:
    *sections, leaf = key.split(".")
    for index, section in enumerate(sections):
        inner = raw.get(section)
        if inner is None:
            inner = raw[section] = {}
        if not isinstance(inner, dict):
            path = ".".join(sections[: index + 1])
            raise ConfigError(f"{source} {key}: {path} is a value ({inner!r}), not a section{nearest_key(key, Config)}")
        raw = inner
    raw[leaf] = value


def _validate(raw: dict[str, Any], source: str) -> Config:
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        raise explain(error, Config, source) from None
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
    single = config.compare is None and config.distill.method != "none"
    cache = config.teacher.cache if config.teacher is not None and single else None
    if cache is not None and cache.mode != "off" and cache.logits == "top_k" and config.distill.temperature != 1:
        raise ConfigError(
            f"{source}: teacher.cache.logits = 'top_k' needs distill.temperature = 1, got "
            f"{config.distill.temperature}: at τ = 4 most of the probability lies outside the classes it "
            "keeps; set teacher.cache.logits=uint8 or fp16"
        )
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


def _check_collisions(config: Config, settings: dict[str, Any]) -> None:
    for label, own in config.compare.runs.items() if config.compare else ():
        for key in own:
            if key in settings:
                raise ConfigError(
                    f"--set {key}: compare.runs[{label!r}] sets {key} to {own[key]!r} itself; add --set compare=null "
                    "for a single run"
                )
