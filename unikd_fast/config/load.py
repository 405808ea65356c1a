"""From a JSON file and ``--set`` overrides to a frozen Config."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from unikd_fast.config.check import validate
from unikd_fast.config.explain import explain
from unikd_fast.config.names import cache_dir, config_hash, run_path
from unikd_fast.config.override import assign, override, parse_override
from unikd_fast.config.runs import run_configs, teacher_config
from unikd_fast.config.schema import Config
from unikd_fast.errors import ConfigError, FileError
from unikd_fast.io import read_json

# With what is asked of a Config once it is loaded.
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
    "teacher_config",
]


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
    return parse_config(_read(Path(path)), overrides, name=Path(path).stem, source=str(path))


def parse_config(raw: dict[str, Any], overrides: Sequence[str] = (), *, name: str, source: str) -> Config:
    """As ``load_config``, from the content of a file.

    Args:
        raw: is left as it is.
        overrides: as of ``load_config``.
        name: takes the place of {name} in folders.
        source: what an error names.
    """
    raw = copy.deepcopy(raw)
    settings = dict(parse_override(text) for text in overrides)
    for key, value in settings.items():
        assign(raw, key, value, "--set")
    config = validate(raw, source)
    _check_collisions(config, settings)
    for _, _, single in run_configs(config):  # every run must be valid before the first one starts
        if single.teacher is not None and single.teacher.training is not None:
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
        ConfigError: it is damaged, or of another version.
        FileNotFoundError: it is missing.
    """
    try:
        return Config.model_validate(read_json(path))
    except FileError as error:
        raise ConfigError(f"{error}; put the configuration that the run was started with in its place") from error
    except ValidationError as error:
        raise explain(error, Config, str(path)) from None


def _read(path: Path) -> dict[str, Any]:
    try:
        if not path.is_file():
            raise ConfigError(f"--config {path}: no such file; the configurations that come along are in configs/")
        content = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}; give a file that can be read") from error
    try:
        raw = json.loads(_decode(content, path), object_pairs_hook=_no_duplicates)
    except json.JSONDecodeError as error:
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


def _check_collisions(config: Config, settings: dict[str, Any]) -> None:
    for label, own in config.compare.runs.items() if config.compare else ():
        for key in own:
            if key in settings:
                raise ConfigError(
                    f"--set {key}: compare.runs[{label!r}] sets {key} to {own[key]!r} itself; add --set compare=null "
                    "for a single run"
                )
