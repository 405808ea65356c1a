"""The losses that are measured: sizes, inputs, what each must reach, and how wrong a result is against float64."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import loss_peers as peers
import torch
from measurement import Compute, leaves
from roofs import moved_bytes
from speed_targets import Target
from torch import Tensor

from unikd_fast import dkd_loss, gaussian_kl, softmax_kl, unikd_loss


def _softmax_kl(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return softmax_kl(student, teacher, temperature=peers.TEMPERATURE, **options)


def _jsd(student: Tensor, teacher: Tensor, **options: Any) -> Tensor:
    return softmax_kl(student, teacher, divergence="jsd", beta=0.5, **options)


def _dkd(student: Tensor, teacher: Tensor, labels: Tensor, **options: Any) -> Tensor:
    weights: dict[str, Any] = {"alpha": peers.DKD_ALPHA, "beta": peers.DKD_BETA}
    return dkd_loss(student, teacher, labels, temperature=peers.TEMPERATURE, **weights, **options)


def _unikd(student: Tensor, teacher: Tensor, *rest: Tensor, **options: Any) -> Tensor:
    mean_s, log_var_s, mean_t, log_var_t, labels = rest
    weights: dict[str, Any] = {"alpha": peers.UNIKD_ALPHA, "beta": peers.UNIKD_BETA, "temperature": peers.TEMPERATURE}
    return unikd_loss(student, teacher, labels, (mean_s, log_var_s), (mean_t, log_var_t), **weights, **options).total


@dataclass(frozen=True)
class Loss:
    """One loss in all its forms; the arguments are maps (N, K), then the labels if it has any."""

    ours: Compute  # takes impl and normalizer besides
    eager: Compute
    liger: Compute | None
    maps: int
    differentiable: tuple[int, ...]  # the maps that get a gradient
    labelled: bool = False


LOSSES = {
    "softmax_kl": Loss(_softmax_kl, peers.softmax_kl, peers.liger_softmax_kl, maps=2, differentiable=(0,)),
    "jsd": Loss(_jsd, peers.jsd, peers.liger_jsd, maps=2, differentiable=(0,)),
    "dkd": Loss(_dkd, peers.dkd, None, maps=2, differentiable=(0,), labelled=True),
    "gaussian_kl": Loss(gaussian_kl, peers.gaussian_kl, None, maps=4, differentiable=(0, 1)),
    "unikd": Loss(_unikd, peers.unikd, None, maps=6, differentiable=(0, 2, 3), labelled=True),
}

# The gradients are all that has to be kept; 5 % for what there is per row.
ONE_GRADIENT = Target("peak_over_gradients", "at_most", 1.05)
NO_WAITING = Target("waits_for_the_gpu", "at_most", 0)


@dataclass(frozen=True)
class Case:
    """One loss at one size, forward and gradient."""

    loss: str
    rows: int
    classes: int
    targets: tuple[Target, ...] = ()
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        return f"{self.loss} {self.rows}x{self.classes} {self.dtype_name}"

    @property
    def dtype_name(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    @property
    def gradient_bytes(self) -> int:
        return moved_bytes(0, len(LOSSES[self.loss].differentiable), self.rows, self.classes, self.dtype)

    @property
    def least_bytes(self) -> int:
        """Each map read once, each gradient written once; labels and row sums are a thousandth of that."""
        loss = LOSSES[self.loss]
        return moved_bytes(loss.maps, len(loss.differentiable), self.rows, self.classes, self.dtype)


def _roof(percent: float) -> Target:
    return Target("percent_of_copy_roof", "at_least", percent)


CASES = [
    Case("softmax_kl", 8192, 32768, (_roof(90), ONE_GRADIENT, NO_WAITING)),
    Case("softmax_kl", 65536, 1000, (_roof(90), ONE_GRADIENT, NO_WAITING)),
    Case("softmax_kl", 8192, 128256, (_roof(70), ONE_GRADIENT, NO_WAITING)),
    Case("softmax_kl", 512, 1000, (NO_WAITING,)),
    Case("softmax_kl", 64, 100, (NO_WAITING,)),
    Case("gaussian_kl", 65536, 1000, (ONE_GRADIENT, NO_WAITING)),
    Case("dkd", 65536, 1000, (ONE_GRADIENT, NO_WAITING)),
    Case("jsd", 8192, 32768, (ONE_GRADIENT, NO_WAITING)),
    Case(
        "unikd",
        512,
        1000,
        (
            # On the GPU alone, and as a loop that waits for the slower of processor and GPU.
            Target("ratio_eager", "at_least", 4.0),
            Target("ratio_compile", "at_least", 1.5),
            Target("call_ratio_eager", "at_least", 4.0),
            Target("call_ratio_compile", "at_least", 1.5),
            Target("launches", "at_most", 3),  # forward, backward, and the fill of what the programs' sums meet in
            ONE_GRADIENT,
            NO_WAITING,
        ),
    ),
]


def make_inputs(case: Case, *, device: str, seed: int = 0) -> list[Tensor]:
    """Return the arguments of the case's loss, those that get a gradient as leaves."""
    loss = LOSSES[case.loss]
    generator = torch.Generator(device).manual_seed(seed)
    shape = (case.rows, case.classes)
    inputs = [torch.randn(shape, generator=generator, device=device, dtype=case.dtype) for _ in range(loss.maps)]
    for i in loss.differentiable:
        inputs[i].requires_grad_()
    if loss.labelled:
        inputs.append(torch.randint(case.classes, (case.rows,), generator=generator, device=device))
    return inputs


def errors_against_float64(
    case: Case, inputs: Sequence[Tensor], results: Mapping[str, tuple[Tensor, ...]], *, chunk_elements: int = 2**25
) -> dict[str, dict[str, float]]:
    """Return for each result (loss, *gradients) how far it is from the plain formula in float64 on the same numbers.

    Rows are independent and the number of rows is passed as the normaliser, so float64 is computed by parts of the
    rows: all at once would not fit.

    Returns:
        name -> loss_error |l - l64| / |l64|; gradient_error ‖g - g64‖ / ‖g64‖; max_error max|g - g64| / max|g64|.
    """
    loss = LOSSES[case.loss]
    step = max(chunk_elements // case.classes, 1)
    true_loss, squares, largest = 0.0, 0.0, 0.0
    off_squares = dict.fromkeys(results, 0.0)
    off_largest: dict[str, list[float]] = {name: [] for name in results}
    for begin in range(0, case.rows, step):
        part = slice(begin, begin + step)
        exact = [_exact(x, part) for x in inputs]
        value = loss.ours(*exact, impl="reference", normalizer=float(case.rows))
        true_loss += value.item()
        for position, expected in enumerate(torch.autograd.grad(value, leaves(exact)), start=1):
            squares += expected.square().sum().item()
            largest = max(largest, expected.abs().max().item())
            for name, result in results.items():
                difference = result[position][part].double() - expected
                off_squares[name] += difference.square().sum().item()
                off_largest[name].append(difference.abs().max().item())
    return {
        name: {
            "loss_error": abs(result[0].item() - true_loss) / abs(true_loss),
            "gradient_error": math.sqrt(off_squares[name] / squares),
            "max_error": torch.tensor(off_largest[name]).max().item() / largest,  # a NaN stays one
        }
        for name, result in results.items()
    }


def assert_no_worse_than_eager(
    case: Case, result: tuple[Tensor, ...], ours: Mapping[str, float], eager: Mapping[str, float]
) -> None:
    """As `tests/support/numerics.py` has it: no further from float64 than eager, plus one rounding of the result."""
    for column, dtype in (("loss_error", result[0].dtype), ("gradient_error", result[1].dtype)):
        allowed = eager[column] + torch.finfo(dtype).eps
        assert ours[column] <= allowed, f"{case}: {column} {ours[column]:.2e}, allowed {allowed:.2e}"


def _exact(x: Tensor, part: slice) -> Tensor:
    rows = x.detach()[part]
    return rows.double().requires_grad_(x.requires_grad) if x.is_floating_point() else rows
