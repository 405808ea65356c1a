"""How wrong the result of a measured fusion is, against the stage-wise form in float64."""

import math
from collections.abc import Mapping, Sequence

import torch
from fusion_cases import Case
from measurement import Compute, forward_and_gradients, leaves
from torch import Tensor

# Images at either end whose values are held against float64 where nothing is summed over images.
CHECKED_ENDS = 8


def checked_images(case: Case) -> list[slice]:
    """Return the images whose results are held against float64: all, or those at the ends where no image meets another.

    Those at the end lie at the largest offsets.
    """
    if case.backward or case.batch <= 2 * CHECKED_ENDS:
        return [slice(0, case.batch)]
    return [slice(0, CHECKED_ENDS), slice(case.batch - CHECKED_ENDS, case.batch)]


def in_parts(
    case: Case,
    compute: Compute,
    inputs: Sequence[Tensor],
    upstream: Tensor,
    dtype: torch.dtype | None = None,
    *,
    part_elements: int = 2**25,
) -> tuple[Tensor, ...]:
    """Return value and gradients for the checked images, computed by parts of them; all at once may not fit.

    Args:
        case: the case.
        compute: the computation.
        inputs: its arguments.
        upstream: gradient of its value.
        dtype: to compute in, None for that of the inputs.
        part_elements: numbers in the finest map of a part, at most.

    Returns:
        Value and features' gradients of these images, one after another; parameters' gradients, summed in float64.
    """
    step = max(part_elements // (case.width * case.pyramid.sizes[0] ** 2), 1)
    levels = len(case.pyramid.sizes)
    maps: list[list[Tensor]] = []
    sums: list[Tensor] = []
    for images in checked_images(case):
        for begin in range(images.start, images.stop, step):
            part = slice(begin, min(begin + step, images.stop))
            arguments = [
                (x.detach()[part] if i < levels else x.detach()).to(dtype or x.dtype).requires_grad_(x.requires_grad)
                for i, x in enumerate(inputs)
            ]
            found = forward_and_gradients(compute, arguments, upstream[part].to(dtype or upstream.dtype))
            maps.append(list(found[: levels + 1]))
            shares = [x.double() for x in found[levels + 1 :]]
            sums = [a + b for a, b in zip(sums, shares, strict=True)] if sums else shares
    return (*(torch.cat(pieces) for pieces in zip(*maps, strict=True)), *sums)


def at_checked_images(case: Case, result: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Return what of a result for the whole batch `in_parts` gives."""
    levels, images = len(case.pyramid.sizes), checked_images(case)
    return (*(torch.cat([x[part] for part in images]) for x in result[: levels + 1]), *result[levels + 1 :])


def errors_against(
    case: Case, inputs: Sequence[Tensor], result: tuple[Tensor, ...], truth: tuple[Tensor, ...]
) -> dict[str, float]:
    """Return ‖x - truth‖ / ‖truth‖ of the value and, backward, of the gradients of each kind of input taken together.

    Together, because the gradient of one gate's bias is a sum of numbers that cancel: its error belongs to their size,
    not to its own.
    """
    levels = len(case.pyramid.sizes)
    expanders = 2 * levels if case.form == "pooled" else 0
    kinds = ["value", *["features"] * levels, *["expanders"] * expanders]
    kinds += ["gates"] * (1 + len(leaves(inputs)) - len(kinds))
    off, whole = dict.fromkeys(kinds[: len(result)], 0.0), dict.fromkeys(kinds[: len(result)], 0.0)
    for kind, x, expected in zip(kinds, result, truth, strict=False):
        off[kind] += (x.double() - expected).square().sum().item()
        whole[kind] += expected.double().square().sum().item()
    return {f"{kind}_error": math.sqrt(off[kind] / whole[kind]) for kind in off}


def assert_no_worse_than_eager(case: Case, ours: Mapping[str, float], eager: Mapping[str, float]) -> None:
    """As `tests/support/numerics.py` has it: no further from float64 than eager, plus one rounding of the result."""
    rounding = {column: torch.finfo(torch.float32).eps for column in ours}
    rounding |= {"value_error": torch.finfo(case.result_dtype).eps, "features_error": torch.finfo(case.dtype).eps}
    for column in ours:
        allowed = eager[column] + rounding[column]
        assert ours[column] <= allowed, f"{case}: {column} {ours[column]:.2e}, allowed {allowed:.2e}"
