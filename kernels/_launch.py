"""Launch sizes, and what a launch needs besides its tensors: device, partial sums, strides.

The sizes follow fixed rules, one per bucket of K, so that the same input gives the same bits; nothing is autotuned.
They were chosen by `benchmarks/instruction_counts.py`, from instructions, registers and bytes in flight; no GPU has
confirmed them yet.
"""

import contextlib
import functools
import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Number of classes that a tile holds without spilling registers, in the forward KL, and half as many elsewhere; longer
# rows are read twice, block by block.
LARGEST_SINGLE_BLOCK = 8192
MAX_PROGRAMS = 2048
# Logits of more classes are copied as rows if their classes lie apart: often they have few rows side by side, as a
# channels-last map has channels, and tiles of them would leave most of a device idle.
MOST_STRIDED_CLASSES = 512
# The fewest pixels of an image for which tiles run along them.
LEAST_PIXELS = 16
# Classes that a lane keeps, of whole rows and of blocks, by the numbers that a kernel keeps for each.
CLASSES_OF_A_LANE = {1: (32, 16), 2: (32, 16), 3: (32, 8), 4: (16, 8), 5: (16, 8)}
# Threads of all programs that a multiprocessor holds if they read rows in blocks: 128 registers for each.
BLOCK_THREADS = 512
LOG2E = math.log2(math.e)
# Up to so many labels each program counts the labelled rows itself, which is cheaper than another launch.
COUNTED_IN_KERNEL = 4096


class Launch(NamedTuple):
    """The size of a launch over rows of K classes."""

    rows: int  # rows of a tile
    block_k: int  # classes of a tile
    single: bool  # whether a tile holds whole rows, or neighbouring pixels, but not a block of one row
    num_warps: int
    programs: int  # at most; each takes tiles in turn
    amd: bool = False
    pixels: int = 0  # the largest power of 2, up to 16, that divides an image's pixels if tiles run along them, else 0
    resident: int = 1  # programs for whose registers a multiprocessor must have room

    @property
    def options(self) -> dict[str, Any]:
        """Triton's compilation options.

        Its default for fusing products and sums is about to change. Without a register bound the assemblers spill to
        keep more threads resident than these launches have.
        """
        options: dict[str, Any] = {"num_warps": self.num_warps, "enable_fp_fusion": True}
        if self.amd:
            return options | {"waves_per_eu": 1}
        return options | {"maxnreg": min(65536 // (32 * self.num_warps * self.resident), 255) // 8 * 8}


class Device(NamedTuple):
    """The properties of a device that the sizes depend on."""

    multiprocessors: int
    warp_size: int
    l2_bytes: int
    amd: bool = False
    capability: int = 90  # NVIDIA's compute capability, 80, 90, 100, ...


@functools.lru_cache(maxsize=256)
def row_launch(classes: int, row_bytes: int, device: Device, *, numbers: int = 1) -> Launch:
    """Return the launch for kernels that reduce rows of logits.

    Args:
        classes: K.
        row_bytes: bytes of all logits read for one row.
        device: properties of the device.
        numbers: 1 to 5, how many numbers the kernel keeps per class, roughly, in terms of the forward KL: so much fewer
            classes fit into a lane's registers.
    """
    block = max(16, _next_power_of_2(classes))
    # The same kernel takes more registers there, and would spill.
    if not device.amd and numbers == 2 and device.capability < 90:
        numbers = 4
    elif numbers == 4 and device.capability >= 100:
        numbers = 5
    on_chip, in_blocks = CLASSES_OF_A_LANE[numbers]
    if block <= (LARGEST_SINGLE_BLOCK if numbers == 1 else LARGEST_SINGLE_BLOCK // 2):
        # What is done once a row, each warp does: the fewer warps, the fewer instructions, and one needs no barrier.
        # 16 classes a lane where twice as many would leave one program a multiprocessor, or each has its own address.
        if device.amd or block == LARGEST_SINGLE_BLOCK or (numbers > 1 and classes % 8):
            on_chip = 16
        of_a_warp = on_chip * device.warp_size
        rows = max(1, of_a_warp // 2 // block)  # of short rows half as much: what is kept for each adds up
        warps = max(1, rows * block // of_a_warp)
        return Launch(rows, block, True, warps, MAX_PROGRAMS, device.amd)
    # The second reading hits the L2 if few rows are in flight. Small programs do less once a row; where few rows fit,
    # larger ones have as many bytes in flight.
    resident = 4 if device.l2_bytes >= 4 * device.multiprocessors * row_bytes else 2
    threads = BLOCK_THREADS // resident
    programs = resident * device.multiprocessors
    if numbers == 5:  # more than 128 registers
        threads, programs, resident = BLOCK_THREADS // 4, 3 * device.multiprocessors, 2
    return Launch(1, threads * in_blocks, False, threads // device.warp_size, programs, device.amd, resident=resident)


def pixel_launch(pixels: int, classes: int, lane: int, device: Device, *, numbers: int = 1) -> Launch:
    """Return the launch for the same kernels on class maps, whose rows are pixels side by side.

    A lane has 16 bytes of neighbours and some of their classes: nothing is summed over lanes, and loads take whole
    sectors. All classes are read block by block, twice. One warp is a program: maps have fewer pixels than elements.

    Args:
        pixels: of an image.
        classes: K.
        lane: pixels of a lane, at most; fewer where they are loaded one by one, or many numbers are kept for each.
        device: properties of the device.
        numbers: as in `row_launch`.
    """
    alignment = math.gcd(pixels, 16)
    lane = min(lane, max(alignment, 2)) // (1 if numbers == 1 else 2)
    rows = min(device.warp_size * lane, _next_power_of_2(pixels))
    block = min(4, _next_power_of_2(classes)) if numbers == 1 else 1
    return Launch(rows, block, True, 1, MAX_PROGRAMS // 2, device.amd, alignment)


def elementwise_launch(classes: int, device: Device, threads: int = 128) -> Launch:
    """Return the launch for kernels that need no statistics of a row before its elements."""
    block = min(16 * threads, max(16, _next_power_of_2(classes)))
    rows = 16 * threads // block
    return Launch(rows, block, classes <= block, threads // device.warp_size, MAX_PROGRAMS, device.amd)


def _next_power_of_2(n: int) -> int:
    return 1 << (n - 1).bit_length()


def row_launch_for(s: "Rows", t: "Rows", *, numbers: int = 1) -> Launch:
    """Return `row_launch` for the logits of student and teacher on their device; `pixel_launch` if they are maps."""
    classes, device = s.tensor.shape[-1], describe(s.tensor.device)
    pixels = inner_rows(s, t)
    if s.class_stride > 1 and s.row_stride == 1 and pixels >= LEAST_PIXELS:
        alike = t.row_stride == 1 and t.tensor.dtype == s.tensor.dtype
        numbers = max(numbers, 1 if alike else 2)  # else the teacher's logits are moved from lane to lane
        return pixel_launch(pixels, classes, lane_of(s.tensor), device, numbers=numbers)
    row_bytes = classes * (s.tensor.element_size() + t.tensor.element_size())
    return row_launch(classes, row_bytes, device, numbers=numbers)


def elementwise_launch_for(x: Tensor, warps: int | None = None) -> Launch:
    """Return `elementwise_launch` for a tensor (N, K) on its device, of so many warps if they are given."""
    device = describe(x.device)
    threads = {} if warps is None else {"threads": warps * device.warp_size}
    return elementwise_launch(x.shape[-1], device, **threads)


def lane_of(student: Tensor) -> int:
    """Return the number of neighbouring classes that a lane takes: 16 bytes of the student's."""
    return 16 // student.element_size()


def care_for(classes: int, launch: Launch) -> int:
    """Return when rows are summed again without cancellation: 1 if they are close, 2 always, as few classes are cheap.

    0, never, is what `benchmarks/instruction_counts.py` counts with. 3 is without cancellation at once: of many pixels
    some are always close.
    """
    return 3 if launch.pixels else 2 if classes <= 32 else 1


def programs_for(launch: Launch, rows: int, device: torch.device) -> int:
    """Return the number of programs: at most one a tile, and on the CPU few, so that each takes several tiles."""
    limit = launch.programs if device.type == "cuda" else 3
    return max(1, min(launch.programs, limit, math.ceil(rows / launch.rows)))


@functools.cache
def describe(device: torch.device) -> Device:
    """Return the properties of a device; for the CPU, where nothing is timed, those of an H200."""
    if device.type != "cuda":
        return Device(132, 32, 50 * 2**20)
    p = torch.cuda.get_device_properties(device)
    l2_bytes = getattr(p, "L2_cache_size", 2**22)
    amd = torch.version.hip is not None
    return Device(p.multi_processor_count, getattr(p, "warp_size", 32), l2_bytes, amd, 10 * p.major + p.minor)


def on_device(x: Tensor) -> contextlib.AbstractContextManager[object]:
    """Make the tensor's device current for a launch."""
    if x.device.type == "cuda" and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def rows_of(x: Tensor) -> Tensor:
    """Return (..., K) as (N, K): a view where the strides allow it, else a copy."""
    return x if x.ndim == 2 else x.reshape(-1, x.shape[-1])


class Rows(NamedTuple):
    """Where a kernel finds row r of logits (..., K): at r // inner times `outer_stride` + r % inner times `row_stride`.

    One step does for all rows where their axes lie behind one another: then there is no outer stride.
    """

    tensor: Tensor  # (..., K), of which the kernel gets the address
    number: int  # of rows
    inner: int
    outer_stride: int | None
    row_stride: int
    class_stride: int

    def holds(self, gradient: Tensor | None) -> bool:
        """Tell whether a gradient of `gradient_like` has these strides; else it is dense in rows."""
        return gradient is None or gradient.stride() == self.tensor.stride()


def rows_in_place(student: Tensor, teacher: Tensor) -> tuple[Rows | None, Rows | None]:
    """Return both logits as rows where they are, or None where two steps do not reach them, or too many classes."""
    s, t = _rows(student), _rows(teacher)
    if s is not None and t is not None and s.outer_stride is not None and t.outer_stride is not None:
        t = t if s.inner == t.inner else None
    return s, t


def inner_rows(s: Rows, t: Rows) -> int:
    """Return the rows of the inner axis that both have in common."""
    return s.inner if t.outer_stride is None else t.inner


def logit_rows(student: Tensor, teacher: Tensor) -> tuple[Rows, Rows]:
    """Return both logits as rows: views where they can be, as in logits[:, :-1], else copies."""
    s, t = rows_in_place(student, teacher)
    return s or _dense_rows(student), t or _dense_rows(teacher)


def gradient_like(x: Tensor, rows: Rows | None) -> Tensor:
    """Return an empty gradient: with the strides of logits that are dense and read in place, else dense in rows."""
    if rows is not None and not x.is_contiguous():
        gradient = torch.empty_like(x)
        if gradient.stride() == x.stride():
            return gradient
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _dense_rows(x: Tensor) -> Rows:
    number, classes = math.prod(x.shape[:-1]), x.shape[-1]
    return Rows(x.contiguous(), number, number, None, classes, 1)


def _rows(x: Tensor) -> Rows | None:
    classes = x.shape[-1]
    axes: list[tuple[int, int]] = []  # (size, stride) of those that one step does not reach from another
    for size, stride in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1] == size * stride:
            axes[-1] = (axes[-1][0] * size, stride)
        else:
            axes.append((size, stride))
    if len(axes) > 2 or (classes > MOST_STRIDED_CLASSES and x.stride(-1) > 1):
        return None
    # The stride of an axis of one entry is arbitrary, and would be a constant of another kernel.
    inner, row_stride = axes[-1] if axes else (1, classes)
    outer_stride = axes[0][1] if len(axes) == 2 else None
    return Rows(x, math.prod(x.shape[:-1]), inner, outer_stride, row_stride, x.stride(-1) if classes > 1 else 1)


def flat(x: Tensor | None) -> Tensor | None:
    """Return (...,) as a dense (N,): an upstream gradient may be an expanded scalar."""
    return None if x is None else x.reshape(-1).contiguous()


def partial_sums(loss: Tensor | None, sums: int = MAX_PROGRAMS) -> Tensor | None:
    """Return the buffer in which programs form one number: a partial sum for each, then the ticket, 0.

    It lives as long as the call. A persistent ticket, 0 before and after each launch, would save the fill, one short
    launch; but it would lie in the memory pool that was current when it was made, and if that is a CUDA graph's, the
    graph is rejected or left with memory that it does not own.
    """
    if loss is None or loss.ndim > 0:
        return None
    return torch.zeros(sums + 1, dtype=torch.float32, device=loss.device)


def normalizer_of(
    logits: Tensor, reduction: str, ignore_mask: Tensor | None, normalizer: float | Tensor | None
) -> tuple[float, Tensor | None]:
    """Return the divisor of the sum over rows: a number, or a 0-d tensor that replaces it.

    0 stands for the number of rows: reading that here would make it a constant of a compiled graph.
    """
    if reduction in ("none", "sum"):
        return 1.0, None
    if isinstance(normalizer, Tensor):
        return 1.0, normalizer
    if normalizer is not None:
        return float(normalizer), None
    if ignore_mask is not None:
        return 1.0, (~ignore_mask).sum().clamp(min=1)
    return 0.0, None


def normalizer_or_rows(number: float, tensor: Tensor | None, rows: int) -> float | Tensor:
    """Return what a kernel divides by, from the result of `normalizer_of`."""
    return (number or float(max(rows, 1))) if tensor is None else tensor
