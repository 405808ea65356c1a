"""What the memory of this GPU does at best: the roofs that a kernel's bytes per second are compared with."""

from dataclasses import dataclass
from functools import cache

import torch
from gpu_timing import cache_bytes, copies_beyond_cache, device_times, gigabytes_per_second


@dataclass(frozen=True)
class Roofs:
    """GB/s of three plain operations on tensors of one size, every byte read or written counted once."""

    dtype: str
    rows: int
    classes: int
    copy_gb_s: float
    read_gb_s: float
    two_reads_one_write_gb_s: float

    def gb_s(self, name: str) -> float:
        """Return the roof "copy", "read" or "two_reads_one_write"."""
        return float(getattr(self, f"{name}_gb_s"))


def moved_bytes(reads: int, writes: int, rows: int, classes: int, dtype: torch.dtype) -> int:
    """Return the least traffic: each input read once, each output written once."""
    return (reads + writes) * rows * classes * dtype.itemsize


@cache
def measure_roofs(rows: int, classes: int, dtype: torch.dtype) -> Roofs:
    """Measure the roofs on the current GPU for tensors (rows, classes); once in a process."""
    count = copies_beyond_cache(moved_bytes(1, 0, rows, classes, dtype), cache_bytes())
    shape = (rows, classes)
    # Random numbers: zeros can move faster than what a training run holds.
    a = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(count)]
    b = [torch.randn(shape, device="cuda", dtype=dtype) for _ in range(count)]
    out = [torch.empty(shape, device="cuda", dtype=dtype) for _ in range(count)]
    calls_per_sample = 1 if moved_bytes(2, 0, rows, classes, dtype) > 4e7 else 16

    def rate(reads: int, writes: int, operation: str) -> float:
        calls = {
            "copy": [lambda i=i: out[i].copy_(a[i]) for i in range(count)],
            "read": [lambda i=i: a[i].sum() for i in range(count)],
            "add": [lambda i=i: torch.add(a[i], b[i], out=out[i]) for i in range(count)],
        }[operation]
        times = device_times(calls, calls_per_sample=calls_per_sample)
        return round(gigabytes_per_second(moved_bytes(reads, writes, rows, classes, dtype), times.median_ms), 1)

    return Roofs(
        str(dtype).removeprefix("torch."), rows, classes, rate(1, 1, "copy"), rate(1, 0, "read"), rate(2, 1, "add")
    )
