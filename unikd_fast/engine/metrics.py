"""Loss terms summed on the device, read by the host once per log line, and the places they are written to."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from tqdm import tqdm

from unikd_fast.engine.processes import Processes
from unikd_fast.errors import NonFiniteLoss
from unikd_fast.losses import LossTerms

TERMS = ("total", "ce", "feature_kl", "logit_kl", "anchor")


class LossMeter:
    """Sums loss terms on the device and remembers the first non-finite step, without a host read.

    Args:
        processes: the mean is over all of them.
    """

    def __init__(self, processes: Processes) -> None:
        self._processes = processes
        device = processes.device
        self._sums = torch.zeros(len(TERMS), dtype=torch.float64, device=device)
        self._count = 0
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._bad_terms = torch.zeros(len(TERMS), dtype=torch.float64, device=device)

    def update(self, terms: LossTerms, step: int) -> None:
        zero = terms.total.new_zeros(())
        row = torch.stack([zero if t is None else t.detach() for t in terms]).double()
        first = (self._bad_step < 0) & ~row.isfinite().all()
        self._bad_step = torch.where(first, step, self._bad_step)
        self._bad_terms = torch.where(first, row, self._bad_terms)
        self._sums += row
        self._count += 1

    def read(self) -> dict[str, float]:
        """Mean of each term since the last read; all processes must call it.

        Raises:
            NonFiniteLoss: on every process, if any process met a non-finite term.
        """
        packed = torch.cat([self._sums, self._sums.new_tensor([self._count]), (self._bad_step >= 0).double()[None]])
        *sums, count, bad = self._processes.sum_(packed).tolist()
        if bad:
            self._raise()
        self._sums.zero_()
        self._count = 0
        return {term: value / max(count, 1.0) for term, value in zip(TERMS, sums, strict=True)}

    def check(self) -> None:
        """Raises NonFiniteLoss, on every process, if any process met a non-finite term; all must call it."""
        if self._processes.sum_((self._bad_step >= 0).long()).item():
            self._raise()

    def _raise(self) -> None:
        found = self._processes.gather((int(self._bad_step), self._bad_terms.tolist()))
        step, values, rank = min((s, v, r) for r, (s, v) in enumerate(found) if s >= 0)
        terms = ", ".join(f"{term} {value:g}" for term, value in zip(TERMS, values, strict=True))
        raise NonFiniteLoss(f"loss is not finite at step {step} on process {rank}: {terms}")


class MetricsWriter:
    """metrics.jsonl, TensorBoard events and the terminal, on the first process; silent on the others.

    Args:
        folder: run folder.
        label: name of the run, before its lines.
        total_steps: for the progress bar and the ETA.
        start_step: where this process starts; records of later steps, left by an interrupted run, are removed.
    """

    def __init__(
        self, folder: Path, processes: Processes, *, label: str, total_steps: int, start_step: int, tensorboard: bool
    ) -> None:
        self._path = folder / "metrics.jsonl"
        self._label, self._total, self._start = label, total_steps, start_step
        self._active = processes.is_first
        self._began = time.perf_counter()
        self._bar: Any = None
        self._events: Any = None
        if not self._active:
            return
        kept = [record for record in read_metrics(folder) if record["step"] <= start_step]
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(json.dumps(record) + "\n" for record in kept))
        temporary.replace(self._path)
        self._file = self._path.open("a", buffering=1)
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._events = SummaryWriter(folder / "tensorboard", purge_step=start_step + 1)
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, desc=label, unit="step", leave=False)

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """One record: a line of metrics.jsonl, a scalar per number, and one line or a postfix on the terminal."""
        if not self._active:
            return
        self._file.write(json.dumps({"kind": kind, "step": step, **values}) + "\n")
        if self._events is not None:
            for name, value in values.items():
                if isinstance(value, int | float):
                    self._events.add_scalar(f"{kind}/{name}", value, step)
        text = "  ".join(f"{name} {_short(value)}" for name, value in values.items())
        if kind == "train":
            text += f"  eta {self._eta(step)}"
        if self._bar is not None and kind == "train":
            self._bar.set_postfix_str(text)
        else:
            tqdm.write(f"[{self._label}] step {step}/{self._total}  {text}", file=sys.stderr)

    def _eta(self, step: int) -> str:
        seconds = (time.perf_counter() - self._began) / max(1, step - self._start) * (self._total - step)
        return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._active:
            self._file.close()
        if self._events is not None:
            self._events.close()


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl; a last line cut off by a kill is left out."""
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    whole = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [json.loads(line) for line in whole]


def memory_gib(device: torch.device) -> float:
    """Peak device memory, or the resident memory of this process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)
