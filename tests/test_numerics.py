"""The yardstick of the numerics tests itself: it must catch what it is there for."""

import pytest
import torch
from torch import Tensor

from support.numerics import assert_no_worse_than_eager


def randn(*shape: int, seed: int = 0, grad: bool = False) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).requires_grad_(grad)


def test_accepts_another_summation_order() -> None:
    x = randn(1000, grad=True)
    assert_no_worse_than_eager(lambda v: v.sum(), lambda v: v.sum(), [x])
    assert_no_worse_than_eager(lambda v: v.flip(0).sum(), lambda v: v.sum(), [x])


def test_catches_a_worse_output() -> None:
    x = randn(1000)
    with pytest.raises(AssertionError, match="output 0: error"):
        assert_no_worse_than_eager(lambda v: (v.bfloat16() * 2).float(), lambda v: v * 2, [x])


def test_catches_a_wrong_gradient() -> None:
    x = randn(10, grad=True)
    with pytest.raises(AssertionError, match="gradient 0: error"):
        assert_no_worse_than_eager(lambda v: v * v.detach(), lambda v: v * v, [x])


def test_catches_a_missing_gradient() -> None:
    x, y = randn(3, grad=True), randn(3, grad=True)
    with pytest.raises(AssertionError, match="gradient 1: one of the two is None"):
        assert_no_worse_than_eager(lambda a, b: a + b.detach(), lambda a, b: a + b, [x, y])


def test_catches_nan_and_infinity() -> None:
    x = torch.tensor([0.0, 1.0])
    with pytest.raises(AssertionError, match="not finite"):
        assert_no_worse_than_eager(lambda v: v / v, lambda v: v, [x])
    with pytest.raises(AssertionError, match="where that is not finite"):
        assert_no_worse_than_eager(lambda v: v.log().clamp(min=-50), lambda v: v.log(), [x])


def test_catches_an_input_changed_in_place() -> None:
    with pytest.raises(AssertionError, match="changed in place"):
        assert_no_worse_than_eager(lambda v: v.mul_(1.5), lambda v: v * 1.5, [randn(3)])
