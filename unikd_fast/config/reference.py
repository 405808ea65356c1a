"""The configuration reference as Markdown, from the schema's own docstrings."""

import json
from typing import Any, get_args

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from unikd_fast.config.schema import Config

HEADER = """# Configuration reference

Written by `make schema` from `unikd_fast/config/schema.py`. Every key can be set on the command line:
`--set train.total_epochs=2`. Paths may hold `${VARIABLES}`.
"""


def reference() -> str:
    """One table a section: key, default, allowed values, meaning."""
    return "\n".join([HEADER, *_section(Config, "")])


def _section(model: type[BaseModel], prefix: str) -> list[str]:
    inner: list[str] = []
    rows: list[str] = []
    schema = model.model_json_schema(by_alias=True)["properties"]
    for name, field in model.model_fields.items():
        key = prefix + (field.alias or name)
        nested = [t for t in (field.annotation, *get_args(field.annotation)) if isinstance(t, type)]
        sections = [t for t in nested if issubclass(t, BaseModel)]
        if sections:
            inner += _section(sections[0], key + ".")
        default = field.default
        if default is PydanticUndefined:
            shown = "required"
        elif isinstance(default, BaseModel):
            shown = "section"
        else:
            shown = f"`{json.dumps(default)}`"
        meaning = " ".join((field.description or "").split())
        rows.append(f"| `{key}` | {shown} | {_allowed(schema[field.alias or name])} | {meaning} |")
    title = prefix.rstrip(".") or "top level"
    about = " ".join((model.__doc__ or "").split())
    return [
        f"## {title}",
        "",
        about,
        "",
        "| key | default | allowed | meaning |",
        "|---|---|---|---|",
        *rows,
        "",
        *inner,
    ]


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
