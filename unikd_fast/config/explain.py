"""Schema violations as sentences, and the schema as a Markdown page."""

import difflib
import json
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ValidationError

from unikd_fast.config.schema import Config
from unikd_fast.errors import ConfigError

# Names that other programs use for a key, and ours: in the same section, or anywhere.
_NAMES_ELSEWHERE = {
    "amp": "train.precision",
    "arch": "model",
    "batch_size": "train.global_batch_size",
    "bf16": "train.precision",
    "bs": "train.global_batch_size",
    "checkpoint": "weights",
    "ckpt": "weights",
    "dataset": "data.name",
    "dtype": "train.precision",
    "ema": "train.ema_decay",
    "epochs": "train.total_epochs",
    "fp16": "train.precision",
    "grad_clip": "train.clip_grad_norm",
    "lr": "train.learning_rate",
    "mlflow": "run.trackers",
    "path": "data.root",
    "pretrained": "weights",
    "scheduler": "train.schedule",
    "t": "temperature",
    "tau": "temperature",
    "tensorboard": "run.trackers",
    "wandb": "run.trackers",
    "warmup": "train.warmup_epochs",
    "wd": "train.weight_decay",
}


def explain(error: ValidationError, model: type[BaseModel], source: str) -> ConfigError:
    """Rewrite every violation in a pydantic error in the terms of the configuration file."""
    lines = [f"{source}: {_explain_one(item, model)}" for item in error.errors()]
    return ConfigError("\n".join(dict.fromkeys(lines)))


def _explain_one(item: Any, model: type[BaseModel]) -> str:
    path = ".".join(str(part) for part in item["loc"] if not _is_union_tag(part))
    kind, value, context = item["type"], item.get("input"), item.get("ctx", {})
    if kind in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"unknown key {path!r}{nearest_key(path, model)}{_where_mixing_is(path)}"
    if kind in ("dataclass_type", "model_type"):
        return f"{path} = {value!r} is not a section; set its keys"
    if kind == "missing":
        return f"{path} is required but not set"
    if kind == "value_error":
        return str(context.get("error", item["msg"]))
    if kind == "string_pattern_mismatch":
        return f"{path} = {value!r} is empty, perhaps from an unset variable; give a value, or remove the key"
    allowed = item["msg"].replace("Input should be", "allowed:").replace("Input should", "it should")
    return f"{path} = {value!r} is not valid; {allowed}"


def _where_mixing_is(path: str) -> str:
    if not path.rpartition(".")[2].lower().startswith(("mixup", "cutmix")):
        return ""
    return (
        "; Mixup and CutMix are set in data.mixing, and not together with a cache of the teacher's outputs "
        "(teacher.cache), which cannot key a mixed view by its sample"
    )


def _is_union_tag(part: object) -> bool:
    # pydantic adds the union member it tried ("int", "literal['auto']") to the path.
    # Our own union tags have two words, which no key has.
    return isinstance(part, str) and (
        part in {"int", "float", "str"} or part.startswith(("literal[", "constrained-")) or " " in part
    )


def nearest_key(path: str, model: type[BaseModel]) -> str:
    """Return a hint with the nearest valid key: by its name elsewhere, in the same section, then anywhere."""
    known = list(all_keys(model))
    head, _, leaf = path.rpartition(".")
    siblings = {key.rpartition(".")[2]: key for key in known if key.rpartition(".")[0] == head}
    elsewhere = _NAMES_ELSEWHERE.get(leaf.lower())
    near = [key for key in (f"{head}.{elsewhere}", elsewhere) if key in known]
    near = near or [siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.75)]
    near = near or [key for key in known if key.rpartition(".")[2] == leaf]
    near = near or [siblings[name] for name in siblings if head and (leaf in name or name in leaf)]
    near = near or [siblings[name] for name in difflib.get_close_matches(leaf, siblings, n=1, cutoff=0.6)]
    near = near or difflib.get_close_matches(path, known, n=1, cutoff=0.6)
    near = near or [key for key in known if leaf in key.rpartition(".")[2]]
    return f"; the nearest valid key is {near[0]!r}" if near else f"; valid keys here: {', '.join(siblings.values())}"


def all_keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Return every dotted key of a schema, sections included."""
    return [key for key, _, _ in _walk(model)]


def _walk(model: type[BaseModel]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any] | None]]:
    """Yield every key of a schema with its JSON schema and, for a section, the section's own."""
    whole = model.model_json_schema(by_alias=True)

    def inside(section: dict[str, Any], prefix: str) -> Iterator[tuple[str, dict[str, Any], dict[str, Any] | None]]:
        for name, schema in section.get("properties", {}).items():
            options = [schema, *schema.get("anyOf", ())]
            names = [option["$ref"].rpartition("/")[2] for option in options if "$ref" in option]
            found = whole["$defs"][names[0]] if names else None
            yield prefix + name, schema, found
            if found is not None:
                yield from inside(found, f"{prefix}{name}.")

    return inside(whole, "")


HEADER = """# Configuration reference

Written by `make schema` from `unikd_fast/config/schema.py` and the settings of the components. Every key can be set on
the command line: `--set train.total_epochs=2`. Paths may hold `${VARIABLES}`.
"""


def reference() -> str:
    """Return one table per section: key, default, allowed values, meaning."""
    about = {"top level": Config.__doc__ or ""}
    rows: dict[str, list[str]] = {"top level": []}
    for key, schema, section in _walk(Config):
        parent = key.rpartition(".")[0] or "top level"
        if section is not None:
            about[key], rows[key] = section.get("description", ""), []
        if section is not None and schema.get("default") is not None:
            shown = "section"
        else:
            shown = f"`{json.dumps(schema['default'])}`" if "default" in schema else "required"
        meaning = _one_line(schema.get("description", ""))
        rows[parent].append(f"| `{key}` | {shown} | {_allowed(schema)} | {meaning} |")
    sections = sorted(rows, key=lambda name: (name == "top level", list(rows).index(name)))
    parts = [HEADER]
    for name in sections:
        text = _one_line(about[name].partition("\n\n")[0])
        parts += [
            f"## {name}",
            "",
            text,
            "",
            "| key | default | allowed | meaning |",
            "|---|---|---|---|",
            *rows[name],
            "",
        ]
    return "\n".join(parts)


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _allowed(schema: dict[str, Any]) -> str:
    options = schema.get("anyOf") or schema.get("oneOf") or [schema]
    return " or ".join(dict.fromkeys(filter(None, map(_one, options))))


def _one(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    bounds = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[bound]:.10g}" for bound, sign in bounds.items() if bound in schema]
    kind = schema.get("type", "section")
    return " ".join([kind, ", ".join(limits)]).strip()
