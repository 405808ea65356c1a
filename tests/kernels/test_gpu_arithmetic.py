"""A case or two of each kernel with a GPU's arithmetic; `gpu_arithmetic` says how to run all tests so."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import test_gaussian_kl as of_gaussians
import test_pooled_fusion as of_fusion
import torch
import triton
import triton.language as tl
from test_unikd_anchor_and_labels import with_anchor
from triton.runtime.interpreter import InterpreterBuilder

from support.gpu_arithmetic import gpu_arithmetic
from support.kernel_inputs import ALL_FOUR, compare, gaussians, labels_for, objective_inputs, quiet, randn
from unikd_fast import dkd_loss, gaussian_kl, softmax_kl
from unikd_fast.kernels import _divergence_device

pytestmark = [quiet, pytest.mark.skipif(torch.cuda.is_available(), reason="kernels run on the GPU itself")]


@pytest.fixture(autouse=True)
def arithmetic() -> Iterator[None]:
    with gpu_arithmetic():
        yield


@triton.jit
def _exp_kernel(x_ptr, ours_ptr, plain_ptr, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i)
    tl.store(ours_ptr + i, _divergence_device.exp(x))
    tl.store(plain_ptr + i, tl.exp(x))


def exponentials(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eˣ of the kernels and of Triton."""
    ours, plain = torch.empty_like(x), torch.empty_like(x)
    _exp_kernel[(1,)](x, ours, plain, x.numel())
    return ours, plain


def test_exp_is_accurate_over_its_range() -> None:
    x = torch.linspace(-87, 88, 4096)
    exact = x.double().exp()
    ulp = torch.from_numpy(np.spacing(exact.float().numpy())).double()
    ours, plain = ((y - exact).abs().div(ulp).max().item() for y in exponentials(x))
    assert ours <= 3
    assert plain > 20  # what the kernels had, and that the arithmetic is a GPU's


def test_exp_beyond_the_range() -> None:
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, 1e38, -1e38, 3e38, -3e38])
    assert str(exponentials(x)[0].tolist()) == str([torch.inf, 0.0, torch.nan, 1.0, torch.inf, 0.0, torch.inf, 0.0])


def test_gpu_arithmetic_is_deterministic() -> None:
    x = torch.linspace(-5, 5, 64)
    first, second = exponentials(x), exponentials(x)
    with gpu_arithmetic(seed=1):
        other = exponentials(x)
    for a, b, c in zip(first, second, other, strict=True):
        assert torch.equal(a, b)
        assert not torch.equal(a, c)


def test_interpreter_is_restored() -> None:
    inside = dict(vars(InterpreterBuilder))
    with gpu_arithmetic():
        assert vars(InterpreterBuilder)["create_exp"] is not inside["create_exp"]
    assert dict(vars(InterpreterBuilder)) == inside


@pytest.mark.parametrize(
    "chosen",
    [
        {},
        {"divergence": "reverse"},
        {"divergence": "jsd", "beta": 0.3},
        {"standardized": True, "temperature": 2.0},
        {"divergence": "reverse", "temperature": 1e6},
        {"divergence": "jsd", "beta": 0.3, "temperature": 1e6, "standardized": True},
    ],
    ids=str,
)
def test_softmax_kl(chosen: dict[str, Any]) -> None:
    inputs = [randn(5, 100, seed=seed, grad=True) for seed in (1, 2)]
    compare(softmax_kl, inputs, **chosen)


@pytest.mark.parametrize("divergence", ["forward", "reverse"])
def test_both_gradients_of_two_classes(divergence: str) -> None:
    """Where q - p is half cancelled, and what one class gains the other loses."""
    for seed in (1000, 1004, 1008):
        inputs = [randn(1, 2, seed=seed + i, scale=1.0, grad=True) for i in range(2)]
        compare(softmax_kl, inputs, divergence=divergence, temperature=4.0)


@pytest.mark.parametrize("chosen", [{"alpha": 1.0, "beta": 0.0}, {"standardized": True}], ids=str)
@pytest.mark.parametrize("classes", [100, 4097])
def test_dkd(classes: int, chosen: dict[str, Any]) -> None:
    inputs = [randn(5, classes, seed=1, grad=True), randn(5, classes, seed=2), labels_for(5, classes)]
    compare(dkd_loss, inputs, **chosen)


def test_gaussian_kl() -> None:
    compare(gaussian_kl, gaussians(5, 100, grad=ALL_FOUR), reduction="none")
    of_gaussians.test_extremes()


def test_unikd_loss() -> None:
    """With variances of e^±30 of the anchor too."""
    pair = [randn(5, 20, seed=30 + i, scale=0.5) for i in range(2)]
    pair[1][0, 0], pair[1][1, 1] = -30.0, 30.0
    compare(with_anchor, [*objective_inputs(5, 20, wanted=ALL_FOUR), *(x.requires_grad_() for x in pair)])


def test_pooled_fusion() -> None:
    of_fusion.assert_no_worse(of_fusion.inputs("ratio 2", 2, images=1))
