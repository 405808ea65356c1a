"""Programs in a process of their own, which ends with the test that started it; the memory that this one takes."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

LIMIT_S = 240

# The alarm ends a process whose test was killed before it could end it, whatever the process is doing.
_HEAD = f"import signal; signal.alarm({LIMIT_S})\n"


@contextmanager
def running(program: str, *arguments: object) -> Iterator["subprocess.Popen[str]"]:
    """Run a program for as long as the block lasts, and never longer than LIMIT_S."""
    command = [sys.executable, "-c", _HEAD + program, *map(str, arguments)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with process:
        try:
            yield process
        finally:
            process.kill()


def finished(program: str, *arguments: object) -> tuple[int, str, str]:
    """Run a program to its end and return its exit code and what it wrote to stdout and to stderr."""
    with running(program, *arguments) as process:
        said, errors = process.communicate(timeout=LIMIT_S)
        return process.returncode, said, errors


class Peak:
    """Memory taken within a block."""

    bytes = 0


@contextmanager
def peak_of_memory() -> Iterator[Peak]:
    """Measure how far the memory of this process rises."""

    def high_water_mark() -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

    Path("/proc/self/clear_refs").write_text("5")
    before, peak = high_water_mark(), Peak()
    yield peak
    peak.bytes = high_water_mark() - before
