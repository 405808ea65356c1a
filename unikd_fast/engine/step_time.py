"""Where the time of a step goes, measured over a few steps of the run itself, for step_time.json."""

import time
from pathlib import Path

import torch

from unikd_fast.report.run_files import StepTime, write_step_time, write_whole_step_time

FIRST, COUNT = 10, 10
"""The steps that are measured, counted from the process's first: the ones before warm up caches and kernels."""


class StepClock:
    """Notes when the parts of a step end. On a GPU by events, which nobody waits for until `write`.

    On a GPU a part's time is that between two points of its stream, in which the host may be late with launching: for a
    small network it is the launches that are measured. The parts of a step captured as a whole cannot be told apart.

    Args:
        device: of the step; None: notes nothing.
        whole: a step has no parts besides "data".
    """

    def __init__(self, device: torch.device | None, *, whole: bool = False) -> None:
        self._device, self._whole = device, whole
        self._steps = 0
        self._marks: list[tuple[str, float | torch.cuda.Event]] = []
        self._runs = False

    def start(self) -> None:
        """Before the first batch of a step."""
        self._steps += 1
        self._runs = self._device is not None and FIRST < self._steps <= FIRST + COUNT
        self.mark("")

    def mark(self, part: str) -> None:
        """What came since the last mark was this part, or more of it."""
        if not self._runs:
            return
        assert self._device is not None
        if self._device.type != "cuda":
            self._marks.append((part, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._marks.append((part, event))

    def write(self, folder: Path) -> None:
        """Writes step_time.json once all steps are measured, and once; waits for the device to have made them."""
        if self._device is None or self._steps < FIRST + COUNT or not self._marks:
            return
        spent = self._milliseconds()
        on_gpu = self._device.type == "cuda"
        hardware = torch.cuda.get_device_name(self._device) if on_gpu else f"CPU, {torch.get_num_threads()} threads"
        if self._whole:
            write_whole_step_time(folder, data_ms=spent["data"], step_ms=spent["step"], hardware=hardware)
        else:
            parts = ("data", "teacher", "student_forward", "loss", "backward", "optimiser")
            times = {f"{part}_ms": spent.get(part, 0.0) for part in parts}
            write_step_time(folder, StepTime(**times, hardware=hardware))
        self._marks, self._device = [], None

    def _milliseconds(self) -> dict[str, float]:
        """Of a step, by part."""
        spent: dict[str, float] = {}
        for (_, before), (part, after) in zip(self._marks, self._marks[1:], strict=False):
            if not part:  # between two steps
                continue
            if isinstance(before, float) or isinstance(after, float):
                assert isinstance(before, float) and isinstance(after, float)
                milliseconds = 1000 * (after - before)
            else:
                after.synchronize()
                milliseconds = before.elapsed_time(after)
            spent[part] = spent.get(part, 0.0) + milliseconds / COUNT
        return spent


UNTIMED = StepClock(None)
"""Notes nothing."""
