"""Readers and writers of a run folder's files: JSON, records of metrics.jsonl, test logits and step times."""

import json
import math
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

from unikd_fast import io
from unikd_fast.errors import FileError, RunError
from unikd_fast.io import write_file, write_json
from unikd_fast.tasks import figures_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

METRICS = "metrics.jsonl"
_NUMBERS = {"step", "epoch", "images_per_s", "data_wait_share", "memory_gib"}
_SETTINGS: dict[str, type] = {
    "data.name": str,
    "data.num_classes": int,
    "data.train_samples": int,
    "student.model": str,
    "teacher.model": str,
    "train.max_steps": int,
    "train.total_epochs": int,
}


class RunFileError(RunError, ValueError):
    """A file of a run folder is damaged or of another kind; the message says which one and what to do."""

    exit_code = 2


def read_records(folder: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, or none if there is no such file; a last line cut off by a kill is dropped.

    Raises:
        RunFileError: a line before the last is not a record, or does not hold a number where one belongs.
    """
    path = folder / METRICS
    records = read_lines(path)
    for number, record in enumerate(records, 1):
        for key in _NUMBERS & record.keys():
            if not is_number(record[key]):
                raise RunFileError(f"{path}: line {number}: {key} must be a number, got {record[key]!r}")
    return records


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the objects in a file with one JSON object per line; see `read_records`."""
    if not path.exists():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if not line.endswith(b"\n"):
            break
        try:
            record = json.loads(line)
        except ValueError as error:
            raise RunFileError(f"{path}: line {number} is not JSON: {error}") from error
        if not isinstance(record, dict):
            raise RunFileError(f"{path}: line {number} is not a record, got {line.strip()[:80].decode()}")
        records.append(record)
    return records


def read_json(path: Path) -> dict[str, Any]:
    """Return the object in a JSON file.

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


def read_result(path: Path) -> dict[str, Any]:
    """Return the result of a finished run.

    Raises:
        RunFileError: it cannot be read, or is not the result of a run.
        FileNotFoundError: it is missing.
    """
    result = read_json(path)
    kinds = {"label": str, "seed": int, "method": object, "model": str, "test_is_val": bool, "best": dict, "last": dict}
    if missing := [key for key in kinds if key not in result]:
        raise RunFileError(f"{path} lacks {', '.join(missing)}; was it written by this version of unikd_fast?")
    for key, kind in kinds.items():
        _require(path, key, result[key], kind)
    _require(path, "unlabelled", result.get("unlabelled", 0), int)
    _require_cost(path, result.get("cost"))
    for which in ("best", "last"):
        _require(path, f"{which}.test", result[which].get("test"), dict)
        if result[which].get("epoch") is not None:
            _require_finite(path, f"{which}.epoch", result[which]["epoch"])
        known = figures_of(result[which]["test"])
        for split, figure in ((split, figure) for split in ("val", "test") for figure in known.all):
            figures = result[which].get(split, {})
            _require(path, f"{which}.{split}", figures, dict)
            if figure in figures or (split == "test" and figure in known.required):
                _require_finite(path, f"{which}.{split}.{figure}", figures.get(figure))
        by_class = result[which]["test"].get(known.by_class, {})
        _require(path, f"{which}.test.{known.by_class}", by_class, dict)
        for name, value in by_class.items():
            _require_finite(path, f"{which}.test.{known.by_class}.{name}", value)
    return result


def _require_finite(path: Path, key: str, value: object) -> None:
    if not (is_number(value) and math.isfinite(value)):
        raise RunFileError(f"{path}: {key} must be a finite number, got {value!r}")


def _require_cost(path: Path, cost: object) -> None:
    if cost is None:
        return
    _require(path, "cost", cost, dict)
    found: dict[str, Any] = dict(cost) if isinstance(cost, dict) else {}
    _require(path, "cost.latency_ms", found.get("latency_ms"), dict)
    _require(path, "cost.hardware", found.get("hardware"), str)
    figures: dict[str, Any] = {f"cost.{key}": found.get(key) for key in _COSTS}
    figures |= {f"cost.latency_ms.{size}": found["latency_ms"].get(size) for size in ("1", "32")}
    for key, value in figures.items():
        if not (is_number(value) and 0 <= value < math.inf):
            raise RunFileError(f"{path}: {key} must be a finite number that is not negative, got {value!r}")


def read_config(path: Path) -> dict[str, Any]:
    """Return the configuration of a run, of which a report reads some sections.

    Raises:
        RunFileError: it cannot be read, or a section is not an object.
        FileNotFoundError: it is missing.
    """
    config = read_json(path)
    _require(path, "student", config.get("student"), dict)
    for section in ("data", "teacher", "distill", "train", "compare"):
        _require(path, section, config.get(section) or {}, dict)
    for name, kind in _SETTINGS.items():
        section, key = name.split(".")
        value = (config.get(section) or {}).get(key)
        if value is not None or (kind is str and (section == "student" or config.get(section))):
            _require(path, name, value, kind)
    compare = config.get("compare") or {}
    _require(path, "compare.runs", compare.get("runs", {}), dict)
    _require(path, "compare.seeds", compare.get("seeds", []), list)
    for label, settings in compare.get("runs", {}).items():
        _require(path, f"compare.runs.{label}", settings, dict)
    for seed in compare.get("seeds", []):
        _require(path, "compare.seeds", seed, int)
    return config


_COSTS = ("image_size", "parameters", "bytes", "multiply_adds")


def is_number(value: object) -> TypeGuard[float]:
    """Return whether a JSON value is a number; true and false are not.

    Example:
        >>> is_number(0.5), is_number(True), is_number("1")
        (True, False, False)
    """
    return isinstance(value, int | float) and not isinstance(value, bool)


def _require(path: Path, key: str, value: object, kind: type) -> None:
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        names = {str: "a text", int: "a whole number", bool: "true or false", dict: "an object", list: "a list"}
        raise RunFileError(f"{path}: {key} must be {names[kind]}, got {value!r}")


TEST_LOGITS = "test_logits.safetensors"
PICTURE = "detections.png"
"""File of a run folder: a few images of the test split, above as annotated, below as detected."""
STEP_TIME = "step_time.json"
_STEP_PARTS = ("data_ms", "teacher_ms", "student_forward_ms", "loss_ms", "backward_ms", "optimiser_ms")


class TestLogits(NamedTuple):
    """A network's outputs on a split, in the order of its samples.

    Args:
        logits: (N, K), fp16 or fp32.
        labels: (N,), int64, the true classes.
        split: name of the split, "test" or "val".
    """

    logits: "NDArray[Any]"
    labels: "NDArray[np.int64]"
    split: str


class StepTime(NamedTuple):
    """Where the time of a training step goes, in milliseconds, and on what hardware."""

    data_ms: float
    teacher_ms: float
    student_forward_ms: float
    loss_ms: float
    backward_ms: float
    optimiser_ms: float
    hardware: str


def write_test_logits(folder: Path, logits: "NDArray[Any]", labels: "NDArray[Any]", *, split: str = "test") -> Path:
    """Write test_logits.safetensors, ``logits`` (N, K) in fp16 and ``labels`` (N,) in int64, and return its path.

    If a logit is beyond the range of fp16 (65,504), all are kept in fp32, so that a run does not fail at its very end.

    Raises:
        ValueError: the shapes do not match, or the labels are not integers.
        FileError: the disk is full or cannot be written to.
    """
    import numpy as np
    from safetensors.numpy import save

    if logits.ndim != 2 or labels.shape != logits.shape[:1]:
        raise ValueError(
            f"write_test_logits: logits must be (N, K) and labels (N,), got {logits.shape} and {labels.shape}"
        )
    if not np.issubdtype(labels.dtype, np.integer):
        raise ValueError(f"write_test_logits: labels must be integers, got {labels.dtype}")
    wide = np.abs(logits, where=np.isfinite(logits), out=np.zeros(logits.shape, np.float32)).max(initial=0.0)
    kept = logits.astype(np.float16 if wide <= np.finfo(np.float16).max else np.float32)
    path = folder / TEST_LOGITS
    tensors = {"logits": np.ascontiguousarray(kept), "labels": np.ascontiguousarray(labels.astype(np.int64))}
    write_file(path, save(tensors, metadata={"split": split}))
    return path


def read_test_logits(folder: Path) -> TestLogits | None:
    """Return the test logits in ``folder``, or None if it has none.

    Raises:
        RunFileError: the file is cut off, or its tensors do not match.
    """
    import numpy as np
    from safetensors import SafetensorError, safe_open

    path = folder / TEST_LOGITS
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="np") as file:
            split = (file.metadata() or {}).get("split", "test")
            logits, labels = file.get_tensor("logits"), file.get_tensor("labels")
    except SafetensorError as error:
        raise RunFileError(f"{path} cannot be read: {error}; delete it, or run the evaluation again") from error
    if logits.ndim != 2 or not logits.size or labels.shape != logits.shape[:1]:
        raise RunFileError(f"{path}: logits must be (N, K) and labels (N,), got {logits.shape} and {labels.shape}")
    if not (np.issubdtype(labels.dtype, np.integer) and labels.min() >= 0 and labels.max() < logits.shape[1]):
        span = f"{labels.min()} to {labels.max()} ({labels.dtype})"
        raise RunFileError(f"{path}: labels must be integers from 0 to {logits.shape[1] - 1}, got {span}")
    return TestLogits(logits, labels.astype(np.int64, copy=False), split)


def read_picture(folder: Path) -> bytes | None:
    """Return the PNG of detections in ``folder``, or None if it has none.

    Raises:
        RunFileError: the file is not a PNG, or is cut off.
    """
    from PIL import Image

    path = folder / PICTURE
    if not path.exists():
        return None
    content = path.read_bytes()
    try:
        with Image.open(BytesIO(content), formats=["PNG"]) as image:
            image.load()
    except (OSError, ValueError, SyntaxError) as error:
        raise RunFileError(f"{path} cannot be read: {error}; delete it, or run the evaluation again") from error
    return content


def write_step_time(folder: Path, times: StepTime) -> Path:
    """Write step_time.json and return its path."""
    path = folder / STEP_TIME
    write_json(path, times._asdict())
    return path


def write_whole_step_time(folder: Path, *, data_ms: float, step_ms: float, hardware: str) -> Path:
    """Write step_time.json for steps captured in one CUDA graph, which cannot be broken down; return its path."""
    path = folder / STEP_TIME
    content = {
        "captured": "the step is one CUDA graph (train.cuda_graph): only its total is known",
        "data_ms": data_ms,
        "step_ms": step_ms,
        "hardware": hardware,
    }
    write_json(path, content)
    return path


def read_step_time(folder: Path) -> StepTime | None:
    """Return the step times in ``folder``, or None if it has none or those of captured steps, which have no parts.

    Raises:
        RunFileError: a part is missing or is not a duration.
    """
    path = folder / STEP_TIME
    if not path.exists():
        return None
    content = read_json(path)
    if "captured" in content:
        return None
    for part in _STEP_PARTS:
        value = content.get(part)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < math.inf:
            raise RunFileError(f"{path}: {part} must be a number of milliseconds, got {value!r}")
    times = {part: float(content[part]) for part in _STEP_PARTS}
    return StepTime(**times, hardware=str(content.get("hardware", "unknown")))
