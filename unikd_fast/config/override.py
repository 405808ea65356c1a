"""Settings by dotted key: those of ``--set``, and those of a run of a comparison."""

import json
from typing import Any

from unikd_fast.config.check import validate
from unikd_fast.config.explain import nearest_key
from unikd_fast.config.schema import Config
from unikd_fast.errors import ConfigError


def parse_override(text: str) -> tuple[str, Any]:
    """The key and the value of a ``--set``."""
    key, separator, value = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"--set {text}: expected section.key=value, for example --set train.total_epochs=2")
    try:
        return key, json.loads(value)
    except json.JSONDecodeError:
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
