"""FitNet: the hint against its formula, for each way to bring one level to the size of another."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from support.build_method import build
from support.feature_levels import cross_entropy_of, features, frozen, normalised, step
from unikd_fast.methods import FitNet

FINEST = (3, 16, 16)


def by_hand(x: Tensor, weight: Tensor, bias: Tensor, *, wanted: int) -> Tensor:
    """The convolution as a sum over the kernel's offsets."""
    size = x.shape[-1]
    if 2 * size == wanted:  # transposed: each pixel is spread over 4x4, two apart, and the rim of one is cut
        spread = x.new_zeros(len(x), weight.shape[1], wanted + 2, wanted + 2)
        for i in range(4):
            for j in range(4):
                part = torch.einsum("nchw,cd->ndhw", x, weight[:, :, i, j])
                spread[:, :, i : i + 2 * size : 2, j : j + 2 * size : 2] += part
        return spread[:, :, 1:-1, 1:-1] + bias[:, None, None]
    stride, kernel = (2, 3) if size == 2 * wanted else (1, 1 + size - wanted)
    padded = F.pad(x, [1, 1, 1, 1]) if stride == 2 else x
    last = stride * (wanted - 1) + 1
    windows = [
        torch.einsum("nchw,dc->ndhw", padded[:, :, i : i + last : stride, j : j + last : stride], weight[:, :, i, j])
        for i in range(kernel)
        for j in range(kernel)
    ]
    return torch.stack(windows).sum(0) + bias[:, None, None]


@pytest.mark.parametrize(("size", "wanted"), [(8, 4), (4, 8), (8, 8), (8, 5), (9, 3)])
def test_loss_and_gradients_match_the_formula(size: int, wanted: int) -> None:
    torch.manual_seed(0)
    student, teacher = [FINEST, (4, size, size)], [FINEST, (5, wanted, wanted), (6, 2, 2)]
    method = build(FitNet, student, teacher, weight=70.0)
    regressor = method.adapter.double()
    torch.nn.init.normal_(regressor.norm.weight)
    torch.nn.init.normal_(regressor.norm.bias)
    own, other = features(student, seed=1), features(teacher, seed=2)
    inputs = [own.logits, own.levels[1], *regressor.parameters()]
    loss = step(method, own, other)
    found = torch.autograd.grad(loss.total, inputs)

    convolution, norm = regressor.convolution, regressor.norm
    assert convolution.bias is not None
    regressed = by_hand(own.levels[1], convolution.weight, convolution.bias, wanted=wanted)
    assert regressed.shape == other.levels[1].shape
    hint = (normalised(regressed, norm.weight, norm.bias).clamp(min=0) - other.levels[1].detach()).square().mean()
    ce = cross_entropy_of(own.logits)
    torch.testing.assert_close(loss.terms, {"ce": ce.detach(), "hint": hint.detach()})
    torch.testing.assert_close(loss.total, ce + 70.0 * hint)
    torch.testing.assert_close(found, torch.autograd.grad(ce + 70.0 * hint, inputs), atol=1e-10, rtol=1e-7)


def test_the_level_is_counted_from_the_fine_end() -> None:
    student, teacher = [(4, 8, 8), (4, 4, 4), (4, 2, 2)], [(5, 8, 8), (5, 8, 8), (5, 4, 4), (5, 2, 2)]
    method = build(FitNet, student, teacher, level=0)
    method.adapter.double()
    own, other = features(student, seed=1), features(teacher, seed=2)
    step(method, own, other).total.backward()
    assert own.levels[0].grad is not None and own.levels[0].grad.abs().sum() > 0
    assert [level.grad is None for level in own.levels[1:]] == [True, True]
    assert method.target(frozen(other)).extra.data_ptr() == other.levels[0].data_ptr()


def test_a_zero_weight_leaves_the_other_term() -> None:
    shapes = [FINEST, (4, 8, 8)]
    method = build(FitNet, shapes, shapes, weight=0.0, label_smoothing=0.2)
    method.adapter.double()
    own, other = features(shapes, seed=1), features(shapes, seed=2)
    loss = step(method, own, other)
    smoothed = 0.8 * cross_entropy_of(own.logits) - 0.2 * own.logits.log_softmax(1).mean()
    torch.testing.assert_close(loss.total, smoothed)
    weighted = build(FitNet, shapes, shapes, weight=2.0)
    weighted.ce_weight = 0.0
    weighted.adapter.double().load_state_dict(method.adapter.state_dict())
    torch.testing.assert_close(step(weighted, own, other).total, 2.0 * loss.terms["hint"])


@pytest.mark.parametrize("level", [-1, 2])
def test_a_level_missing_in_one_network_is_refused(level: int) -> None:
    with pytest.raises(ValueError, match=rf"from 0 to 1, got {level}: the student has 3 levels and the teacher 2"):
        build(FitNet, [FINEST] * 3, [FINEST] * 2, level=level)


def test_a_level_that_cannot_be_enlarged_is_refused() -> None:
    with pytest.raises(ValueError, match="got 3 x 3 and 8 x 8 at level 1; use another level"):
        build(FitNet, [FINEST, (4, 3, 3)], [FINEST, (4, 8, 8)])
