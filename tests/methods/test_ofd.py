"""OFD: margins against the integral they stand for, partial L2 against its cases, connectors against their formula."""

import math

import pytest
import torch
from torch import Tensor, nn

from support.build_method import build
from support.feature_levels import averaged, cross_entropy_of, features, frozen, normalised, step
from unikd_fast.methods import OFD
from unikd_fast.methods.ofd import negative_mean, partial_l2

STUDENT = [(3, 8, 8), (4, 8, 8), (5, 4, 4)]
TEACHER = [(2, 16, 16), (6, 16, 16), (7, 8, 8), (8, 2, 2)]


def norm_of(scales: list[float], shifts: list[float]) -> nn.BatchNorm2d:
    norm = nn.BatchNorm2d(len(scales))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor(scales))
        norm.bias.copy_(torch.tensor(shifts))
    return norm


def norms() -> list[nn.BatchNorm2d]:
    generator = torch.Generator().manual_seed(5)
    draws = [torch.randn(2, shape[0], generator=generator) for shape in TEACHER]
    return [norm_of(*draw.tolist()) for draw in draws]


def mean_below_zero(mean: float, std: float) -> float:
    """E[x | x < 0] of a normal, by summing over a fine grid."""
    x = torch.linspace(mean - 12 * std, 0.0, 2_000_001, dtype=torch.float64)
    density = (-((x - mean) / std).square() / 2).exp()
    return float((x * density).sum() / density.sum())


def test_margins_are_means_of_negative_values() -> None:
    pairs = [(1.0, 0.0), (0.5, 1.2), (2.0, -3.0), (-0.7, 0.4), (0.1, -5.0), (1.0, 3.0)]
    found = negative_mean(norm_of([s for s, _ in pairs], [m for _, m in pairs]))
    expected = [mean_below_zero(m, abs(s)) for s, m in pairs]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-5)  # as fine as the grid


def test_margins_of_rarely_negative_channels() -> None:
    # Φ(-3.09) = 0.0010008 and Φ(-3.1) = 0.00097: the rule of the published code changes between them.
    found = negative_mean(norm_of([1.0, 1.0, -2.0, 0.0, 0.0], [3.09, 3.1, 80.0, 0.5, -0.5]))
    assert found[0] == pytest.approx(mean_below_zero(3.09, 1.0), rel=1e-4)
    assert found[1:].tolist() == [-3.0, -6.0, 0.0, -0.5]
    plain = negative_mean(nn.BatchNorm2d(2, affine=False))
    torch.testing.assert_close(plain, torch.full((2,), -math.sqrt(2 / math.pi)))


def by_cases(s: float, t: float, m: float) -> float:
    if t > 0:
        return (t - s) ** 2
    wanted = t if t > m else m
    return (wanted - s) ** 2 if s > wanted else 0.0


def test_partial_l2_case_by_case() -> None:
    values = [-2.0, -1.0, -0.6, -0.5, -0.4, 0.0, 0.3, 2.0]
    pairs = [(s, t) for s in values for t in values]
    student, teacher = (torch.tensor(x).reshape(-1, 1, 1, 1) for x in zip(*pairs, strict=True))
    margin = torch.full((1, 1, 1), -0.5)
    for i, (s, t) in enumerate(pairs):
        found = partial_l2(student[i : i + 1], teacher[i : i + 1], margin)
        assert float(found) == pytest.approx(by_cases(s, t, -0.5), abs=1e-6), (s, t)
    # Summed over channels and pixels, averaged over samples.
    whole = partial_l2(student.reshape(4, 2, 4, 2), teacher.reshape(4, 2, 4, 2), margin)
    assert float(whole) == pytest.approx(sum(by_cases(s, t, -0.5) for s, t in pairs) / 4)


def partial_of(student: Tensor, teacher: Tensor, margin: Tensor) -> Tensor:
    """The cases as mdistiller has them."""
    margin = margin[:, None, None]
    low = (student > margin) & (teacher <= margin)
    between = (student > teacher) & (teacher > margin) & (teacher <= 0)
    exact = between | (teacher > 0)
    loss = (student - margin) ** 2 * low.double() + (student - teacher) ** 2 * exact.double()
    return loss.mean(0).sum()


def test_loss_and_gradients_match_the_formula() -> None:
    """The last three of four levels; the teacher's are averaged down, and repeated where they are the smaller."""
    torch.manual_seed(0)
    method = build(OFD, STUDENT, TEACHER, norms(), weight=0.02)
    connectors = method.adapter.double().connectors
    for connector in connectors:
        nn.init.normal_(connector[1].weight)
        nn.init.normal_(connector[1].bias)
    own, other = features(STUDENT, seed=1), features(TEACHER, seed=2)
    inputs = [own.logits, *own.before_activation, *method.adapter.parameters()]
    loss = step(method, own, other)
    found = torch.autograd.grad(loss.total, inputs)

    before = [level.detach() for level in other.before_activation[1:]]
    targets = [averaged(before[0], 8), before[1], before[2].repeat_interleave(2, 2).repeat_interleave(2, 3)]
    expected = torch.zeros((), dtype=torch.float64)
    for level, (connector, target, norm) in enumerate(zip(connectors, targets, norms()[1:], strict=True)):
        mixed = torch.einsum("nchw,dc->ndhw", own.before_activation[level], connector[0].weight[:, :, 0, 0])
        margin = negative_mean(norm).double()
        partial = partial_of(normalised(mixed, connector[1].weight, connector[1].bias), target, margin)
        expected = expected + partial * 0.5 ** (2 - level)
    ce = cross_entropy_of(own.logits)
    torch.testing.assert_close(loss.terms, {"ce": ce.detach(), "partial_l2": expected.detach()})
    torch.testing.assert_close(loss.total, ce + 0.02 * expected)
    torch.testing.assert_close(found, torch.autograd.grad(ce + 0.02 * expected, inputs))


def test_a_zero_weight_leaves_the_other_term() -> None:
    method = build(OFD, STUDENT, TEACHER, norms(), weight=0.0, label_smoothing=0.2)
    method.adapter.double()
    own, other = features(STUDENT, seed=1), features(TEACHER, seed=2)
    loss = step(method, own, other)
    torch.testing.assert_close(loss.total, 0.8 * cross_entropy_of(own.logits) - 0.2 * own.logits.log_softmax(1).mean())
    weighted = build(OFD, STUDENT, TEACHER, norms(), weight=2.0)
    weighted.ce_weight = 0.0
    weighted.adapter.double().load_state_dict(method.adapter.state_dict())
    torch.testing.assert_close(step(weighted, own, other).total, 2.0 * loss.terms["partial_l2"])


def test_half_precision_is_cast_before_squaring_and_summing() -> None:
    method = build(OFD, TEACHER, TEACHER, norms())
    half = frozen(features(TEACHER, seed=2, dtype=torch.float16, scale=400.0))
    target = method.target(half)
    assert all(level.dtype == torch.float32 for level in target.extra)
    student = torch.zeros_like(half.before_activation[0])
    found = partial_l2(student, half.before_activation[0], method.margins[0])
    torch.testing.assert_close(found, partial_l2(student.float(), half.before_activation[0].float(), method.margins[0]))
    assert found > 65504


def test_connectors_start_as_published() -> None:
    torch.manual_seed(0)
    method = build(OFD, [(64, 2, 2)], [(512, 2, 2)], [nn.BatchNorm2d(512)])
    convolution = method.adapter.connectors[0][0]
    assert float(convolution.weight.detach().std()) == pytest.approx(math.sqrt(2 / 512), rel=0.02)  # of 32768 draws
    assert convolution.bias is None


def test_norms_of_another_width_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got widths \[2, 6, 7\] for levels of \[2, 6, 7, 8\] channels"):
        build(OFD, STUDENT, TEACHER, norms()[:3])
