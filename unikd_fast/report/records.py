"""JSON in run folders: single objects, and the records of metrics.jsonl."""

import json
from pathlib import Path
from typing import Any

from unikd_fast import io
from unikd_fast.errors import FileError, RunError

METRICS = "metrics.jsonl"


class RunFileError(RunError, ValueError):
    """A file of a run folder is damaged, or of another kind; the message says which and what to do."""

    exit_code = 2


def read_records(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, none if there is no such file; a last line that a kill cut off is left out.

    Raises:
        RunFileError: a line before the last is no record.
    """
    return read_lines(folder / METRICS)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a file that has one a line; see `read_records`."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RunFileError(f"{path}: line {number} is no JSON: {error}") from error
        if not isinstance(record, dict):
            raise RunFileError(f"{path}: line {number} is no record, got {line.strip()[:80].decode()}")
        records.append(record)
    return records


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        RunFileError: it cannot be read or parsed, or is not an object.
        FileNotFoundError: it is missing.
    """
    try:
        return io.read_json(path)
    except FileError as error:
        made_again = path.name == "result.json"
        remedy = (
            "remove it and continue the run with --resume auto" if made_again else "restore it, or leave the run out"
        )
        raise RunFileError(f"{error}; {remedy}") from error
