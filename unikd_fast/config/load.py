"""Loading: from a JSON file and ``--set`` overrides to a frozen Config and its single runs."""

import copy
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from unikd_fast.config.explain import explain, nearest_key
from unikd_fast.config.schema import Config, method_names
from unikd_fast.data.detection.views import DetectionSettings
from unikd_fast.errors import ConfigError, FileError
from unikd_fast.io import read_json
from unikd_fast.methods import METHODS

_MAY_CHANGE: Any = {
    "json_schema": True,
    "run": {
        "dir",
        "nodes",
        "timeout_minutes",
        "trackers",
        "log_every_steps",
        "checkpoint_every_steps",
        "keep_checkpoints",
        "async_checkpoints",
        "test_logits",
        "probe",
        "show_head",
    },
    "data": {"root", "unlabeled_root", "workers", "dali_threads"},
    "teacher": {"cache": {"dir"}, "min_accuracy": True},
    "train": {"accumulation_steps"},
    "deepspeed": True,
}


def config_hash(config: Config) -> str:
    """Return eight hex digits that identify the experiment: everything its result depends on, apart from rounding.

    A run may be resumed with everything else changed: where and how often it writes, how its data is read, what becomes
    of bad files, and how many micro-batches and shards its steps are split into.
    """
    content = config.model_dump(mode="json", exclude=_MAY_CHANGE)
    # What becomes of bad files changes nothing that was trained before one was met.
    content["data"] |= {"bad_images": "error", "max_bad_share": 0.001}
    if config.data.unlabeled_root is not None:
        content["data"]["unlabelled"] = True  # wherever they are
    # An experiment keeps its name when a method or a key is added that it does not have.
    content["distill"] = {key: value for key, value in content["distill"].items() if value is not None}
    if not content["distill"].get("mlkd", {}).get("second_grams", True):
        del content["distill"]["mlkd"]["second_grams"]
    for section, key in (("teacher", "image_size"), ("student", "image_size"), ("data", "digest")):
        if content[section] is not None and content[section][key] is None:
            del content[section][key]
    if config.data.detection == DetectionSettings():
        del content["data"]["detection"]
    for key in ("milestone_steps", "warmup_steps"):
        if not content["train"][key]:
            del content["train"][key]
    if content["teacher"] is not None and not content["teacher"]["ensemble"]:
        del content["teacher"]["ensemble"], content["teacher"]["weight"]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def run_path(config: Config, label: str, seed: int) -> str:
    """Return where one of the runs of :func:`run_configs` writes, relative to the experiment's folder.

    Example:
        >>> run_path(comparison, "UniKD, FDP only", 0)
        'seed-0/unikd-fdp-only'
    """
    if config.compare is None:
        return "."
    return f"seed-{seed}/{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')}"


def cache_dir(config: Config) -> Path:
    """Return the folder of the teacher's outputs of a single run.

    Example:
        >>> cache_dir(load_config("configs/digits_cached.json"))
        PosixPath('caches/digits-unikd-seed0')
    """
    assert config.teacher is not None
    named = {"{method}": config.distill.label, "{seed}": str(config.run.seed)}
    folder = config.teacher.cache.dir
    for name, value in named.items():
        folder = folder.replace(name, value)
    return Path(folder)


# Keys that the schema itself has; DeepSpeed must not be given them twice.
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
    compared = [methods_of(config, settings) for settings in config.compare.runs.values()] if config.compare else []
    unused = config.distill.unused_sections(chain(*(compared or [config.distill.methods])))
    if unused:
        raise ConfigError(
            f"{source}: distill.{unused[0]} holds settings of distill.method = {unused[0]!r}, got "
            f"{config.distill.method!r}; remove them, or use the method"
        )
    single = config.compare is None and config.distill.method != "none"
    cache = config.teacher.cache if config.teacher is not None and single else None
    if cache is not None and cache.mode != "off" and cache.logits == "top_k":
        _check_top_k(config, source)
    if cache is not None and cache.mode != "off" and config.data.bad_images == "skip":
        raise ConfigError(
            f"{source}: teacher.cache.mode = {cache.mode!r} with data.bad_images = 'skip': the cache needs an output "
            "for every sample, even one that cannot be decoded; remove the bad files and set "
            "data.bad_images=error, or set teacher.cache.mode=off"
        )
    mixing = config.data.mixing
    if cache is not None and cache.mode != "off" and mixing.is_on:
        raise ConfigError(
            f"{source}: teacher.cache.mode = {cache.mode!r} with data.mixing.mixup_alpha = {mixing.mixup_alpha} and "
            f"cutmix_alpha = {mixing.cutmix_alpha}: the cache holds the teacher's outputs by sample, and a mixed image "
            "belongs to two; set teacher.cache.mode=off, or both alphas to 0"
        )
    return config


def methods_of(config: Config, settings: dict[str, Any]) -> tuple[str, ...]:
    """Return the methods of a run of a comparison, as far as they are known before its settings are validated."""
    method = settings.get("distill.method", config.distill.method)
    return method_names(method) if isinstance(method, str | list | tuple) else ()


def _check_top_k(config: Config, source: str) -> None:
    for name, settings in config.distill.settings.items():
        if getattr(settings, "standardized", False):
            raise ConfigError(
                f"{source}: teacher.cache.logits = 'top_k' with distill.{name}.standardized = true, which needs all "
                "logits for their mean and standard deviation; set teacher.cache.logits=uint8 or fp16"
            )
        if not METHODS[name].accepts_top_k:
            raise ConfigError(
                f"{source}: teacher.cache.logits = 'top_k' with distill.method = {name!r}, which needs all logits; set "
                "teacher.cache.logits=uint8 or fp16"
            )
        if settings.temperature != 1:
            raise ConfigError(
                f"{source}: teacher.cache.logits = 'top_k' needs distill.{name}.temperature = 1, got "
                f"{settings.temperature}: at τ = 4 most of the probability lies outside the classes it keeps; set "
                "teacher.cache.logits=uint8 or fp16"
            )


def _check_run_names(config: Config, source: str) -> None:
    """Check that every run of a comparison has a folder of its own, different from the teacher's."""
    if config.compare is None:
        return
    seeds = config.compare.seeds
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"{source}: compare.seeds = {list(seeds)} names a seed twice; each is one run")
    taken = {"teacher": "the teacher's training"}
    for label, settings in config.compare.runs.items():
        for key, ours in (("run.seed", "compare.seeds"), ("run.dir", "the run.dir of the comparison")):
            if key in settings:
                raise ConfigError(
                    f"{source}: compare.runs[{label!r}] sets {key} to {settings[key]!r}, which {ours} decides; remove "
                    "it there"
                )
        name = run_path(config, label, seeds[0]).partition("/")[2]
        if not name or name in taken:
            used = f"is also that of {taken[name]}" if name else "would be empty"
            raise ConfigError(
                f"{source}: compare.runs[{label!r}] would write to a folder named {name!r}, which {used}; the name is "
                "made of the label's letters a to z and digits; choose another label"
            )
        taken[name] = f"compare.runs[{label!r}]"


def parse_override(text: str) -> tuple[str, Any]:
    """Parse a ``--set`` into key and value."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {text}: expected section.key=value, such as --set train.total_epochs=2")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value


def assign(raw: dict[str, Any], key: str, value: Any, source: str) -> None:
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


def override(config: Config, settings: dict[str, Any], source: str) -> Config:
    raw = config.model_dump(mode="json", by_alias=True)
    for key, value in settings.items():
        assign(raw, key, value, source)
    return validate(raw, source)


def run_configs(config: Config) -> Iterator[tuple[str, int, Config]]:
    """Yield the single runs of a comparison as (label, seed, config), or the one run itself."""
    if config.compare is None:
        yield "student", config.run.seed, config
        return
    for seed in config.compare.seeds:
        for label, settings in config.compare.runs.items():
            of_others = _without_sections(config, methods_of(config, settings))
            yield label, seed, override(config, {**of_others, **settings, "compare": None, "run.seed": seed}, label)


def teacher_config(config: Config) -> Config:
    """Return the run that trains the teacher of ``config``: its model and weights as a student without a teacher."""
    assert config.teacher is not None
    assert config.teacher.training is not None
    training = config.teacher.training
    settings: dict[str, Any] = {
        "compare": None,
        "teacher": None,
        "distill.method": "none",
        **_without_sections(config, ()),
        "student.model": config.teacher.model,
        "student.model_args": config.teacher.model_args,
        "student.image_size": config.teacher.image_size,
        "student.feature_nodes": config.teacher.feature_nodes,
        "student.weights": config.teacher.weights,
        "student.weights_key": config.teacher.weights_key,
        "data.train_samples": training.train_samples,
        "train.max_steps": None,
    }
    for key in ("total_epochs", "learning_rate", "global_batch_size"):
        if getattr(training, key) is not None:
            settings[f"train.{key}"] = getattr(training, key)
    return override(config, settings, "teacher.training")


def single_teachers(config: Config) -> list[Config]:
    """Return a configuration for each network of the teacher, which has this one alone."""
    assert config.teacher is not None
    alone = config.teacher.model_copy(update={"ensemble": (), "weight": 1.0})
    of_others = [
        alone.model_copy(update={"feature_nodes": None, **dict(member), "weight": 1.0})
        for member in config.teacher.ensemble
    ]
    return [config.model_copy(update={"teacher": teacher}) for teacher in (alone, *of_others)]


def _without_sections(config: Config, methods: tuple[str, ...]) -> dict[str, Any]:
    """Return settings that remove the sections of other methods."""
    return {f"distill.{name}": None for name in config.distill.unused_sections(methods)}


# Together with what is asked of a Config once it is loaded.
__all__ = [
    "cache_dir",
    "config_hash",
    "load_config",
    "override",
    "parse_config",
    "parse_override",
    "read_stored",
    "run_configs",
    "run_path",
    "single_teachers",
    "teacher_config",
]


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read, override and validate a configuration.

    Args:
        path: JSON file.
        overrides: list of ``"section.key=value"``; a value is JSON, otherwise a plain string.

    Raises:
        ConfigError: the configuration is invalid; the message gives path, value and remedy of every error.

    Example:
        >>> config = load_config("configs/digits.json", ["train.total_epochs=2"])
    """
    return parse_config(_read(Path(path)), overrides, name=Path(path).stem, source=str(path))


def parse_config(raw: dict[str, Any], overrides: Sequence[str] = (), *, name: str, source: str) -> Config:
    """Parse the content of a configuration file, as ``load_config`` does.

    Args:
        raw: content of the file; left unchanged.
        overrides: overrides, as in ``load_config``.
        name: replacement of {name} in folders.
        source: name of the source in errors.
    """
    raw = copy.deepcopy(raw)
    settings = dict(parse_override(text) for text in overrides)
    for key, value in settings.items():
        assign(raw, key, value, "--set")
    _drop_sections_of_other_methods(raw, settings)
    config = validate(raw, source)
    _check_collisions(config, settings)
    for _, _, single in run_configs(config):  # every run must be valid before the first one starts
        if single.teacher is not None and single.teacher.is_trained:
            teacher_config(single)
    run_dir = config.run.dir.replace("{name}", name).replace("{hash}", config_hash(config))
    named: dict[str, Any] = {"run": config.run.model_copy(update={"dir": run_dir})}
    if config.teacher is not None:
        cache = config.teacher.cache
        cache = cache.model_copy(update={"dir": cache.dir.replace("{name}", name)})
        named["teacher"] = config.teacher.model_copy(update={"cache": cache})
    return config.model_copy(update=named)


def read_stored(path: Path) -> Config:
    """Read the config.json of a run folder.

    Raises:
        ConfigError: it is damaged, or was written by another version.
        FileNotFoundError: it is missing.
    """
    try:
        return Config.model_validate(read_json(path))
    except FileError as error:
        raise ConfigError(f"{error}; restore the configuration that the run was started with") from error
    except ValidationError as error:
        raise explain(error, Config, str(path)) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise ConfigError(f"--config {path}: no such file; give a file, or a shipped one by name, such as digits")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; give a file that can be read") from error
    text = _decode(content, path)
    try:
        raw = json.loads(text, object_pairs_hook=_no_duplicates)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits
        raise ConfigError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(raw, dict):
        raise ConfigError(f"{path}: expected a JSON object, got {type(raw).__name__}")
    return raw


def _decode(content: bytes, path: Path) -> str:
    encoding = json.detect_encoding(content)
    if not encoding.startswith("utf-8"):
        name = encoding[:6].upper()
        raise ConfigError(f"{path} is encoded in {name}, not in UTF-8; save it as UTF-8")
    try:
        return content.decode(encoding)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{path} is not UTF-8: byte {content[error.start]:#04x} in line {line}; save it as UTF-8"
        ) from error


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            raise ConfigError(f"key {key!r} is given twice, as {result[key]!r} and as {value!r}; remove one")
        result[key] = value
    return result


def _drop_sections_of_other_methods(raw: dict[str, Any], settings: dict[str, Any]) -> None:
    """Drop the sections of the file's method if ``--set`` chooses another one."""
    if "distill.method" not in settings or not isinstance(raw["distill"].get("method"), str | list):
        return
    chosen = method_names(raw["distill"]["method"])
    given = {key.split(".")[1] for key in settings if key.startswith("distill.")}
    for name in METHODS:
        if name not in given and name not in chosen:
            raw["distill"].pop(name, None)


def _check_collisions(config: Config, settings: dict[str, Any]) -> None:
    for label, own in config.compare.runs.items() if config.compare else ():
        for key in own:
            if key in settings:
                raise ConfigError(
                    f"--set {key}: compare.runs[{label!r}] itself sets {key} to {own[key]!r}; add --set compare=null "
                    "for a single run"
                )
