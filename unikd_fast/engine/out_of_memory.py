"""Which part of a run the memory was not enough for, and what would take less of it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch

from unikd_fast.errors import OutOfMemory, RunError

Part = Literal["teacher", "student", "optimiser", "method", "run"]

_REMEDIES: dict[Part, str] = {
    "teacher": "raise train.accumulation_steps, set teacher.precision = auto, or train from a cache of its outputs "
    "(teacher.cache.mode = read_write)",
    "student": "raise train.accumulation_steps, or set train.precision = bf16 or train.activation_checkpointing = true",
    "optimiser": "shard it over more processes (deepspeed.zero_optimization.stage = 1 to 3), or keep it on the CPU "
    "(deepspeed.zero_optimization.offload_optimizer, train.optimizer = cpu_adamw)",
    "method": "lower distill.width, set distill.fdp = direct for unikd with many classes, or take another method "
    "(distill.method)",
    "run": "raise train.accumulation_steps, shard the student (deepspeed.zero_optimization.stage = 3), set "
    "teacher.precision = auto, or take smaller networks",
}
# torch's allocator for the CPU, and the system's, say it in words.
_WORDS = ("can't allocate memory", "Cannot allocate memory", "out of memory")


def lacks_memory(error: Exception) -> bool:
    """Return whether this says that the memory of the device or of the host was not enough."""
    if isinstance(error, RunError):  # says already what to do
        return False
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or (isinstance(error, RuntimeError) and any(words in str(error) for words in _WORDS))


@contextmanager
def naming_part(part: Part) -> Iterator[None]:
    """Turns a lack of memory inside the block into an OutOfMemory that names the part and the remedies."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not lacks_memory(error):
            raise
        said = str(error).partition("\n")[0] or "MemoryError"
        raise OutOfMemory(f"out of memory in the {part}'s part: {said}; {_REMEDIES[part]}") from error
