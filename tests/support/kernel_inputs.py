"""What the tests of the kernels share: inputs, the four losses with one signature, and how exact they have to be.

All tests run through the public API on a GPU if there is one, else interpreted on the CPU. "Case 7" in the name or text
of a test is one of the twenty things that every kernel has to survive.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.numerics import assert_no_worse_than_eager
from unikd_fast import (
    Gaussian,
    QuantizedLogits,
    dkd_loss,
    gaussian_kl,
    softmax_kl,
    unikd_loss,
)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BACKEND = "inductor" if DEVICE == "cuda" else "aot_eager"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Rounding of a result where the kernel adds K terms tile by tile and eager PyTorch in an order of its own: either is
# within a few ε of the truth, and either may by luck be nearer.
UNITS = 8
# Which of the four parameters of `gaussians` want a gradient.
OF_STUDENT, ALL_FOUR = (True, True, False, False), (True,) * 4


def rows_for(classes: int) -> int:
    """Several tiles where tiles are small, two rows where they are large: the interpreter is slow."""
    return 67 if classes <= 100 else 5 if classes <= 1003 else 2


def randn(
    *shape: int, seed: int = 0, scale: float = 2.0, dtype: torch.dtype = torch.float32, grad: bool = False
) -> Tensor:
    x = scale * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(DEVICE, dtype).requires_grad_(grad)


def close_logits(classes: int, rows: int = 4) -> tuple[Tensor, Tensor]:
    """Return bf16 logits of a student and of its teacher, who gives class 0 a probability of 0.999."""
    teacher = randn(rows, classes, seed=2, scale=0.5)
    teacher[:, 0] = teacher[:, 1:].logsumexp(-1) + math.log(999)
    return (teacher + randn(rows, classes, seed=1, scale=0.02)).bfloat16(), teacher.bfloat16()


def labels_for(rows: int, classes: int, *, ignored: Sequence[int] = ()) -> Tensor:
    labels = torch.randint(0, classes, (rows,), generator=torch.Generator().manual_seed(7))
    labels[list(ignored)] = -100
    return labels.to(DEVICE)


def compare(function: Callable[..., Any], inputs: Sequence[Any], *, units: float = UNITS, **settings: Any) -> None:
    """Hold impl="fused" against impl="reference"; `function` takes `inputs`, `impl` and the settings."""
    assert_no_worse_than_eager(
        lambda *x: function(*x, impl="fused", **settings),
        lambda *x: function(*x, impl="reference", **settings),
        inputs,
        units=units,
    )


def quantized_kl(values: Tensor) -> Callable[..., Tensor]:
    """Return softmax KL as a function of the rest: in float64 the values stay as they are stored."""

    def compute(student: Tensor, scale: Tensor, offset: Tensor, **settings: Any) -> Tensor:
        return softmax_kl(student, QuantizedLogits(values, scale, offset), **settings)

    return compute


def objective(
    student: Tensor,
    teacher: Tensor,
    labels: Tensor,
    student_mean: Tensor,
    student_log_var: Tensor,
    teacher_mean: Tensor,
    teacher_log_var: Tensor,
    **settings: Any,
) -> tuple[Tensor, ...]:
    """Return the terms of `unikd_loss` that there are, of tensors alone."""
    pairs = Gaussian(student_mean, student_log_var), Gaussian(teacher_mean, teacher_log_var)
    return tuple(x for x in unikd_loss(student, teacher, labels, *pairs, **settings) if x is not None)


def total(*inputs: Any, **settings: Any) -> Tensor:
    return objective(*inputs, **settings)[0]


def gaussians(rows: int, classes: int, *, dtype: torch.dtype = torch.float32, grad: Sequence[bool]) -> list[Tensor]:
    """Return means of size 1 and log-variances of size 1/2 of student and teacher."""
    return [
        randn(rows, classes, seed=20 + i, scale=scale, dtype=dtype, grad=g)
        for i, (scale, g) in enumerate(zip((1, 0.5, 1, 0.5), grad, strict=True))
    ]


def labelled_logits(rows: int, classes: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return logits of student and teacher, and labels, of which one is ignored."""
    student, teacher = (randn(rows, classes, seed=seed, dtype=dtype) for seed in (1, 2))
    return [student.requires_grad_(), teacher, labels_for(rows, classes, ignored=(rows // 2,))]


def objective_inputs(
    rows: int, classes: int, dtype: torch.dtype = torch.float32, *, wanted: Sequence[bool] = OF_STUDENT
) -> list[Tensor]:
    return [*labelled_logits(rows, classes, dtype), *gaussians(rows, classes, dtype=dtype, grad=wanted)]


def without_gaussians(student: Tensor, teacher: Tensor, labels: Tensor, **settings: Any) -> tuple[Tensor, ...]:
    return unikd_loss(student, teacher, labels, **settings)[:4]


def long(*values: Any) -> Any:
    """Leave a set of parameters to the long rounds."""
    return pytest.param(*values, marks=pytest.mark.long)


@dataclass(frozen=True)
class Loss:
    """A loss as a function of tensors: `compute(*make(rows, classes, dtype), impl=..., **settings)`."""

    compute: Callable[..., Tensor]
    make: Callable[[int, int, torch.dtype], list[Tensor]]
    reduces: bool = True  # has the setting `reduction`


def _softmax(rows: int, classes: int, dtype: torch.dtype) -> list[Tensor]:
    return [randn(rows, classes, seed=1, dtype=dtype, grad=True), randn(rows, classes, seed=2, dtype=dtype)]


def _dkd(rows: int, classes: int, dtype: torch.dtype) -> list[Tensor]:
    return [*_softmax(rows, classes, dtype), labels_for(rows, classes)]


def _gaussian(rows: int, classes: int, dtype: torch.dtype) -> list[Tensor]:
    return gaussians(rows, classes, dtype=dtype, grad=OF_STUDENT)


def _unikd(rows: int, classes: int, dtype: torch.dtype) -> list[Tensor]:
    return [*_dkd(rows, classes, dtype), *_gaussian(rows, classes, dtype)]


LOSSES: dict[str, Loss] = {
    "softmax_kl": Loss(softmax_kl, _softmax),
    "gaussian_kl": Loss(gaussian_kl, _gaussian),
    "dkd_loss": Loss(dkd_loss, _dkd),
    "unikd_loss": Loss(total, _unikd, reduces=False),
}


# One loss for each way in which `FusedLoss` is used: with a result a row, and with two that carry gradients.
some_losses = pytest.mark.parametrize("name", ["softmax_kl", "unikd_loss", long("gaussian_kl"), long("dkd_loss")])
every_loss = pytest.mark.parametrize("name", LOSSES)
# Gradients in bf16 take the way of those in fp32, in forward; those in fp16 are computed in backward.
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, long(torch.bfloat16), torch.float16])


def drawn(check: Callable[[Any], None], examples: int) -> None:
    """Call `check(data)` on so many examples, the same ones each time."""
    settings(max_examples=examples, deadline=None, derandomize=True)(given(data=st.data())(check))()


def leaves_of(inputs: Sequence[Tensor]) -> list[Tensor]:
    return [x for x in inputs if x.requires_grad]


# numpy, which interprets the kernels, warns where a GPU gives inf or NaN.
quiet = pytest.mark.filterwarnings("ignore::RuntimeWarning")


class Graphs:
    """A backend that counts the graphs it is given; dynamo may give it one twice while it is compiling."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return torch._dynamo.lookup_backend(BACKEND)(graph, inputs)


def capture(step: Callable[[], list[Tensor]]) -> tuple[Any, list[Tensor]]:
    """Capture a computation as a CUDA graph, after it has been warmed up; give the graph and its outputs."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = step()
    return graph, outputs
