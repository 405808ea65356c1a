"""Loss terms, summed on the device and read by the host once per log line, and the metrics that are written."""

import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from tqdm import tqdm

from unikd_fast.config import Config
from unikd_fast.data.images import check_bad_share
from unikd_fast.data.loader import Loader
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.gradients import GradientWatch
from unikd_fast.engine.trackers import Trackers
from unikd_fast.errors import FileError, NonFiniteLoss
from unikd_fast.io import append_line, write_file
from unikd_fast.tasks import figures_of
from unikd_fast.values import Loss


class LossMeter:
    """Sums loss terms on the device and remembers the first step that was not finite, without a host read.

    Args:
        processes: processes that the mean is taken over.
        term_names: terms of the method's loss.
        watch: watch of the gradients. If None, only the losses are checked.
        skip: whether steps that are not finite are left out of the means, and are not an error.
    """

    def __init__(
        self,
        processes: Processes,
        term_names: Sequence[str],
        watch: GradientWatch | None = None,
        *,
        skip: bool = False,
    ) -> None:
        self._processes, self._watch, self._skip = processes, watch, skip
        self.columns = ("total", *term_names)
        device = processes.device
        self._sums = torch.zeros(len(self.columns) + 1, dtype=torch.float64, device=device)  # the last is their number
        self._bad_step = torch.full((), -1, dtype=torch.int64, device=device)
        self._bad_terms = torch.zeros(len(self.columns), dtype=torch.float64, device=device)

    def update(self, loss: Loss, step: int | Tensor, *, updated: bool = True) -> None:
        """Add the loss of a micro-batch, in place, so that a captured step can do so.

        Args:
            loss: loss of the micro-batch.
            step: number of the step; a captured step's is 0-d int64 on the device.
            updated: whether it was the last micro-batch of its step.
        """
        assert loss.terms.keys() == set(self.columns[1:]), f"the method states {self.columns}, got {list(loss.terms)}"
        values = {"total": loss.total, **loss.terms}
        row = torch.stack([values[column].detach() for column in self.columns]).double()
        finite = row.isfinite().all()
        if updated and self._watch is not None:
            finite = finite & self._watch.finite
        first = (self._bad_step < 0) & ~finite
        self._bad_step.copy_(torch.where(first, step, self._bad_step))
        self._bad_terms.copy_(torch.where(first, row, self._bad_terms))
        counted = torch.cat([row, row.new_ones(1)])
        self._sums += torch.where(finite, counted, 0.0) if self._skip else counted

    def read(self) -> dict[str, float]:
        """Return the mean of each term since the last read; all processes must call it.

        Raises:
            NonFiniteLoss: on every process: any process met a term or gradients that are not finite, and these steps
                are not skipped.
        """
        *sums, count, bad = self._processes.sum_(torch.cat([self._sums, (self._bad_step >= 0).double()[None]])).tolist()
        if bad and not self._skip:
            self._raise()
        self._sums.zero_()
        return {term: value / max(count, 1.0) for term, value in zip(self.columns, sums, strict=True)}

    def check(self) -> None:
        """Raise NonFiniteLoss where `read` would; all processes must call it."""
        if not self._skip and self._processes.sum_((self._bad_step >= 0).long()).item():
            self._raise()

    def describe_first(self) -> str:
        """Describe the first step that was not finite on any process, with terms and gradients; all must call it."""
        worst = "" if self._watch is None else self._watch.worst()
        found = self._processes.gather((int(self._bad_step), self._bad_terms.tolist(), worst))
        step, rank = min((step, rank) for rank, (step, _, _) in enumerate(found) if step >= 0)
        _, values, worst = found[rank]
        what = "gradients are" if all(map(math.isfinite, values)) else "loss is"
        terms = ", ".join(f"{term} {value:g}" for term, value in zip(self.columns, values, strict=True))
        return f"{what} not finite at step {step} on process {rank}: {terms}{worst and '; ' + worst}"

    def _raise(self) -> None:
        raise NonFiniteLoss(self.describe_first())


class MetricsWriter:
    """metrics.jsonl, trackers and the terminal, on the first process; silent on the others.

    All processes must create it; an error is raised on all of them.

    Args:
        folder: run folder.
        processes: processes of the run.
        label: label used in log messages.
        total_steps: number of steps of the run, for the progress bar and the ETA.
        start_step: first step; records of later steps, left by an interrupted run, are removed.
        track: function that starts the trackers. If None, there are none.
        hidden: prefix of metrics that are recorded but not printed. If None, all are printed.
    """

    def __init__(
        self,
        folder: Path,
        processes: Processes,
        *,
        label: str,
        total_steps: int,
        start_step: int,
        track: Callable[[], Trackers] | None = None,
        hidden: str | None = None,
    ) -> None:
        self._path = folder / "metrics.jsonl"
        self._label, self._total, self._start, self._hidden = label, total_steps, start_step, hidden
        self._active = processes.is_first
        self._explained: set[str] = set()
        self._began = time.perf_counter()
        self._bar: Any = None
        self._trackers: Trackers | None = None
        self._finished = False
        processes.from_first(lambda: self._begin(folder, track))

    def _begin(self, folder: Path, track: Callable[[], Trackers] | None) -> None:
        kept = [record for record in read_metrics(folder) if record["step"] <= self._start]
        write_file(self._path, "".join(json.dumps(record) + "\n" for record in kept))
        if track is not None:
            self._trackers = track()
        if sys.stderr.isatty():
            # It fits into 80 columns; the rest is in metrics.jsonl.
            self._bar = tqdm(
                total=self._total,
                initial=self._start,
                desc=textwrap.shorten(self._label, 24, placeholder="..."),
                leave=False,
                dynamic_ncols=True,
                bar_format="{desc} {percentage:3.0f}% {bar} {n_fmt}/{total_fmt}{postfix}",
            )

    def advance(self, step: int) -> None:
        if self._bar is not None:
            self._bar.update(step - self._bar.n)

    def write(self, kind: str, step: int, values: dict[str, Any]) -> None:
        """Write a record: a line of metrics.jsonl, its numbers to trackers, and a line or a postfix on the terminal.

        Raises:
            FileError: the disk is full.
        """
        if not self._active:
            return
        append_line(self._path, json.dumps({"kind": kind, "step": step, **values}))
        if self._trackers is not None:
            self._trackers.log(kind, step, values)
        shown = [name for name in values if not self._hidden or not name.startswith(self._hidden)]
        # Without the figures of single classes, which may be many.
        text = "  ".join(f"{name} {_short(values[name])}" for name in shown if not isinstance(values[name], dict))
        if kind == "train":
            text += f"  eta {self._eta(step)}"
        if self._bar is not None and kind == "train":
            self._bar.set_postfix_str(f"loss {values['total']:.3g}, {self._eta(step)} left")
        else:
            tqdm.write(f"[{self._label}] step {step}/{self._total}  {text}", file=sys.stderr)

    def explain(self, text: str) -> None:
        """Print an explanation on the terminal, below the metrics that it is about; the same one is printed once."""
        if self._active and text not in self._explained:
            self._explained.add(text)
            tqdm.write(f"[{self._label}] {text}", file=sys.stderr)

    def _eta(self, step: int) -> str:
        seconds = (time.perf_counter() - self._began) / max(1, step - self._start) * (self._total - step)
        return time.strftime("%H:%M:%S", time.gmtime(seconds)) if seconds < 86400 else f"{seconds / 86400:.1f} days"

    def finish(self, step: int, result: dict[str, Any]) -> None:
        """Show trackers the result of the run, which is finished."""
        self._finished = True
        if self._trackers is not None:
            self._trackers.log("result", step, result)

    def close(self) -> None:
        """Close the progress bar and the trackers."""
        if self._bar is not None:
            self._bar.close()
        if self._trackers is not None:
            self._trackers.close(finished=self._finished)


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """Return the records of metrics.jsonl, without a last line that was cut off by a kill.

    Raises:
        FileError: a line is not a record; names it.
    """
    path = folder / "metrics.jsonl"
    if not path.exists():
        return []
    return [
        _record(line, f"{path}: line {number}")
        for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1)
        if line.endswith(b"\n")
    ]


def _record(line: bytes, place: str) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(line)
        if record["kind"] == "evaluation":  # a resumed run chooses the best among them
            record |= {key: float(record[key]) for key in figures_of(record).required}
        return {**record, "step": int(record["step"]), "kind": str(record["kind"])}
    except (ValueError, TypeError, KeyError) as error:
        raise FileError(f"{place} is damaged ({error}); remove it") from error


def memory_gib(device: torch.device) -> float:
    """Return the peak device memory, or on a CPU the resident memory of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return psutil.Process().memory_info().rss / 2**30


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


_NAMED = 5


def bad_sample_record(config: Config, loader: Loader, processes: Processes) -> dict[str, Any] | None:
    """Return what the metrics record at the end of an epoch, or None if no sample was skipped; all must call it.

    After a resume in the middle of an epoch only the rest of it is counted.

    Raises:
        DataError: on every process: more samples than data.max_bad_share were skipped.
    """
    if config.data.bad_images == "error":
        return None
    names = [name for own in processes.gather([image.name for image in loader.bad_samples]) for name in own]
    if not names:
        return None
    samples = loader.schedule.samples_per_epoch
    check_bad_share(len(names), names, "training", samples=samples, max_share=config.data.max_bad_share)
    return {"skipped": len(names), "samples": samples, "files": sorted(set(names))[:_NAMED]}
