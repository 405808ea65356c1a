"""The files of a run folder that hold test logits and step times, for those who write them and for the report.

Plain arrays and numbers go in and out, so that whoever has them can write them. What is missing reads as None; what is
there and damaged is an error.
"""

import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unikd_fast.io import write_file, write_json
from unikd_fast.report.records import RunFileError, read_json

TEST_LOGITS = "test_logits.safetensors"
STEP_TIME = "step_time.json"
_STEP_PARTS = ("data_ms", "teacher_ms", "student_forward_ms", "loss_ms", "backward_ms", "optimiser_ms")


class TestLogits(NamedTuple):
    """A network's outputs over a split, in its order.

    Args:
        logits: (N, K), fp16 or fp32.
        labels: (N,), int64, the true classes.
        split: its name, "test" or "val".
    """

    logits: NDArray[Any]
    labels: NDArray[np.int64]
    split: str


class StepTime(NamedTuple):
    """Where a training step's time goes, in milliseconds, and on what hardware."""

    data_ms: float
    teacher_ms: float
    student_forward_ms: float
    loss_ms: float
    backward_ms: float
    optimiser_ms: float
    hardware: str


def write_test_logits(folder: Path, logits: NDArray[Any], labels: NDArray[Any], *, split: str = "test") -> Path:
    """Writes test_logits.safetensors: ``logits`` (N, K) in fp16, ``labels`` (N,) in int64; returns its path.

    Where a logit is beyond the range of fp16 (65,504) all are kept in fp32: a run must not fail at its very end.

    Raises:
        ValueError: the shapes do not belong together, or the labels are no integers.
        FileError: the disk is full, or cannot be written to.
    """
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
    """The test logits in ``folder``; None if it has none.

    Raises:
        RunFileError: the file is cut off, or its tensors do not belong together.
    """
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


def write_step_time(folder: Path, times: StepTime) -> Path:
    """Writes step_time.json and returns its path."""
    path = folder / STEP_TIME
    write_json(path, times._asdict())
    return path


def write_whole_step_time(folder: Path, *, data_ms: float, step_ms: float, hardware: str) -> Path:
    """Writes the step_time.json of steps captured in one CUDA graph, whose parts nobody sees; returns its path."""
    path = folder / STEP_TIME
    content = {
        "captured": "the step is one CUDA graph (train.cuda_graph): only its whole is known",
        "data_ms": data_ms,
        "step_ms": step_ms,
        "hardware": hardware,
    }
    write_json(path, content)
    return path


def read_step_time(folder: Path) -> StepTime | None:
    """The step times in ``folder``; None if it has none, or those of captured steps, which have no parts.

    Raises:
        RunFileError: a part is missing, or is no time.
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
