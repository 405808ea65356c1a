"""JSON in run folders: single objects, and the records of metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

from unikd_fast.errors import RunError

METRICS = "metrics.jsonl"


class RunFileError(RunError, ValueError):
    """A file of a run folder is damaged, or of another kind; the message says which and what to do."""

    exit_code = 2


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, none if there is no such file; a last line that a kill cut off is left out.

    Raises:
        RunFileError: a line before the last is no record.
    """
    path = folder / METRICS
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_text().splitlines(keepends=True), 1):
        if not line.endswith("\n"):
            break
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RunFileError(f"{path}: line {number} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise RunFileError(f"{path}: line {number} is no record, got {line.strip()[:80]}")
        records.append(record)
    return records


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        RunFileError: it cannot be parsed, or is no object.
    """
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise RunFileError(f"{path} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise RunFileError(f"{path} must be a JSON object, got {type(content).__name__}")
    return content
