"""WKD: the transport against a linear programme and the published iterations, the features against Gaussians."""

from typing import Any

import numpy as np
import pytest
import torch
from scipy.linalg import sqrtm
from scipy.optimize import linprog
from torch import Tensor
from torch.nn import functional as F

from support.build_method import build
from support.feature_levels import BATCH, CLASSES, LABELS, SAMPLES, cross_entropy_of, features, frozen, step
from support.loss_inputs import randn
from support.numerics import relative_error
from unikd_fast.methods import WKD, Needs
from unikd_fast.methods.wkd import CosineDecay, cell_statistics, class_costs, grid_cells, transport_cost
from unikd_fast.values import StudentOutput

STUDENT, TEACHER = [(3, 8, 8), (4, 7, 7)], [(2, 14, 14), (5, 7, 7)]
CLASSIFIER = randn(CLASSES, 6, seed=20)


def wkd(student: Any = STUDENT, teacher: Any = TEACHER, **options: Any) -> WKD:
    torch.manual_seed(0)
    method: WKD = build(WKD, student, teacher, 6, 6, CLASSIFIER, num_classes=CLASSES, **options)
    if method.adapter is not None:
        method.adapter.double()
    return method


def costs_by_hand(sharpness: float) -> Tensor:
    rows = CLASSIFIER / CLASSIFIER.square().sum(1, keepdim=True).sqrt()
    costs = 1 - torch.exp(-sharpness * (1 - rows @ rows.T))
    return costs - costs.diag().diag()


def published(student: Tensor, teacher: Tensor, cost: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Sinkhorn as the published code has it: each sample's own copy of the costs, without its class."""
    found = []
    for p, q, label in zip(student, teacher, LABELS.tolist(), strict=True):
        rest = [k for k in range(CLASSES) if k != label]
        p, q, c = p[rest].softmax(0), q[rest].softmax(0), cost[rest][:, rest]
        kernel = torch.exp(-c / epsilon)
        u = torch.full_like(p, 1 / len(rest))
        for _ in range(iterations):
            v = q / (kernel.T @ u)
            u = p / (kernel @ v)
        found.append((u[:, None] * kernel * v[None] * c).sum())
    return torch.stack(found).mean()


def test_the_logits_part_is_the_published_one() -> None:
    given = {"logit_weight": 30.0, "target_weight": 0.7, "temperature": 3.0, "sharpness": 2.0, "iterations": 4}
    method = wkd(feature_weight=0.0, ce_weight=0.5, **given)
    assert method.adapter is None
    own, other = features(STUDENT, seed=1), frozen(features(TEACHER, seed=2))
    loss = method.loss(StudentOutput(own.logits), method.target(other), BATCH)
    rows = torch.arange(SAMPLES)
    of_target = -(other.logits.softmax(1) * own.logits.log_softmax(1))[rows, LABELS].mean()
    moved = published(own.logits / 3, other.logits / 3, costs_by_hand(2.0), 0.05, 4)
    ce = cross_entropy_of(own.logits)
    expected = {"ce": ce.detach(), "target_class": of_target.detach(), "transport": moved.detach()}
    torch.testing.assert_close(loss.terms, expected, rtol=1e-10, atol=1e-12)
    total = 0.5 * ce + 0.7 * of_target + 30 * moved
    torch.testing.assert_close(loss.total, total)
    (found,), (wanted,) = (torch.autograd.grad(each, [own.logits], retain_graph=True) for each in (loss.total, total))
    assert relative_error(found, wanted) < 1e-10  # two sums in float64, in another order


def test_the_transport_is_that_of_a_linear_programme() -> None:
    """The plan of least cost. Entropy of weight ε makes it dearer by at most ε times the largest entropy of a plan."""
    epsilon, cost = 0.01, costs_by_hand(1.0)
    p, q = randn(SAMPLES, CLASSES, seed=3).softmax(1), randn(SAMPLES, CLASSES, seed=4).softmax(1)
    found = transport_cost(p.log(), q.log(), cost, epsilon=epsilon, iterations=1500)
    ones = np.kron(np.eye(CLASSES), np.ones(CLASSES)), np.kron(np.ones(CLASSES), np.eye(CLASSES))
    least = [
        linprog(cost.flatten().numpy(), A_eq=np.concatenate(ones), b_eq=np.concatenate([row, column])).fun
        for row, column in zip(p.numpy(), q.numpy(), strict=True)
    ]
    above = found - torch.tensor(least)
    assert min(least) > 0.03
    # The bound is 2 ε ln 5 = 0.03; near ε = 0 plans are nearly vertices, so a thirtieth of it will do. 1e-6 is what the
    # last iterations still change.
    assert (above > -1e-6).all() and (above < 1e-3).all()


def test_the_transport_between_equals_is_almost_free() -> None:
    p = randn(SAMPLES, CLASSES, seed=3).log_softmax(1)
    q = randn(SAMPLES, CLASSES, seed=4).log_softmax(1)
    same, other = (transport_cost(p, each, costs_by_hand(1.0), epsilon=0.02, iterations=50) for each in (p, q))
    assert (same < 1e-3).all() and (other > 0.01).all()  # what entropy moves at ε = 0.02


def test_extreme_logits_neither_overflow_nor_vanish() -> None:
    """Where probabilities underflow: fp32 against the whole log-sum-exp in float64, in value and gradient."""
    wide = 150 * randn(4, CLASSES, seed=5)
    teacher = (150 * randn(4, CLASSES, seed=6)).log_softmax(1)
    cost, epsilon = costs_by_hand(2.0), 0.02

    def whole(log_p: Tensor, log_q: Tensor) -> Tensor:
        log_kernel = -cost / epsilon
        log_u = torch.zeros_like(log_p)
        for _ in range(10):
            log_v = log_q - (log_u[:, :, None] + log_kernel).logsumexp(1)
            log_u = log_p - (log_v[:, None] + log_kernel).logsumexp(2)
        return ((log_u[:, :, None] + log_kernel + log_v[:, None]).exp() * cost).sum((1, 2))

    low, high = wide.float().requires_grad_(), wide.clone().requires_grad_()
    found = transport_cost(low.log_softmax(1), teacher.float(), cost, epsilon=epsilon, iterations=10)
    wanted = whole(high.log_softmax(1), teacher)
    assert (low.softmax(1) == 0).any()
    # Logits of 150 are rounded to 1e-5 in fp32, and so are the exponents.
    torch.testing.assert_close(found.double(), wanted, rtol=1e-3, atol=1e-5)
    (gradient,), (exact,) = (torch.autograd.grad(x.sum(), [z]) for x, z in ((found, low), (wanted, high)))
    assert gradient.isfinite().all()
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-2, atol=1e-4)


def test_gradients_are_those_of_finite_differences() -> None:
    p, q = randn(3, CLASSES, seed=7, grad=True), randn(3, CLASSES, seed=8, grad=True)
    own = F.one_hot(torch.tensor([0, 3, 4]), CLASSES).bool()

    def moved(student: Tensor, teacher: Tensor) -> Tensor:
        logs = (each.masked_fill(own, -torch.inf).log_softmax(1) for each in (student, teacher))
        return transport_cost(*logs, costs_by_hand(1.0), epsilon=0.05, iterations=5)

    assert torch.autograd.gradcheck(moved, (p, q))
    cells = grid_cells((5, 3), 2)
    assert torch.autograd.gradcheck(lambda maps: cell_statistics(maps, *cells), randn(2, 2, 5, 3, grad=True))


def test_the_memory_estimate_is_what_autograd_saves() -> None:
    classes, batch = 60, 40
    method = build(WKD, STUDENT, TEACHER, 6, 6, randn(classes, 6).float(), num_classes=classes, feature_weight=0.0)
    p, q = (randn(batch, classes, seed=seed, dtype=torch.float32).log_softmax(1) for seed in (1, 2))
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        transport_cost(p.requires_grad_(), q, method.cost, epsilon=0.05, iterations=10)
    saved = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    # Besides: the costs, which need no gradient, and a few numbers a row at either end of the iterations.
    assert method.device_bytes(batch) == pytest.approx(saved + method.cost.nbytes, rel=0.05)


def test_costs_are_zero_to_oneself_and_below_one() -> None:
    weight = torch.cat([CLASSIFIER, -CLASSIFIER[:1], CLASSIFIER[:1] * 3]).float()
    cost = class_costs(weight, sharpness=2.0)
    assert (cost.diag() == 0).all() and cost.max() < 1
    torch.testing.assert_close(cost, cost.T)
    assert cost[0, -1] < 1e-6  # a multiple of the row
    torch.testing.assert_close(cost[0, -2], torch.tensor(1 - np.exp(-4.0)).float())


def test_the_features_part_is_the_distance_of_gaussians() -> None:
    """With the general formula, whose root of a product of covariances does not know that they are diagonal."""
    method = wkd(logit_weight=0.0, feature_weight=1.0, mean_ratio=1.0)
    own, other = features(STUDENT, seed=1), frozen(features(TEACHER, seed=2))
    loss = step(method, own, other)
    assert method.adapter is not None
    distances = []
    for mine, yours in zip(method.adapter(own).detach(), other.levels[-1], strict=True):
        means = [x.flatten(1).mean(1).numpy() for x in (mine, yours)]
        a, b = (np.diag(x.flatten(1).numpy().var(axis=1, ddof=1) + 1e-5) for x in (mine, yours))
        root = sqrtm(a)
        between = np.trace(a + b - 2 * sqrtm(root @ b @ root)).real
        distances.append(np.square(means[0] - means[1]).sum() + between)
    assert list(loss.terms) == ["ce", "mean_gap", "std_gap"]
    # sqrtm of a root rounds to about the root of float64's unit.
    found = float(loss.terms["mean_gap"] + loss.terms["std_gap"])
    assert found == pytest.approx(np.mean(distances), rel=1e-7)
    torch.testing.assert_close(loss.total, loss.terms["ce"] + found, check_dtype=False)


@pytest.mark.parametrize(("size", "grid"), [((7, 7), 4), ((8, 8), 4), ((5, 3), 1), ((4, 6), 3)])
def test_cells_are_those_of_adaptive_pooling(size: tuple[int, int], grid: int) -> None:
    maps = 3 + 1e-3 * randn(2, 3, *size, seed=9)  # a mean a thousand times the deviation
    mean, std = cell_statistics(maps, *grid_cells(size, grid))
    torch.testing.assert_close(mean, F.adaptive_avg_pool2d(maps, grid))
    for i in range(grid):
        for j in range(grid):
            top, left = i * size[0] // grid, j * size[1] // grid
            bottom, right = -(-(i + 1) * size[0] // grid), -(-(j + 1) * size[1] // grid)
            variance = maps[:, :, top:bottom, left:right].var((2, 3))
            torch.testing.assert_close(std[:, :, i, j], (variance + 1e-5).sqrt())
    # Without removing the mean first fp32 would lose all of a variance of 1e-6.
    low = cell_statistics(maps.float(), *grid_cells(size, grid))[1]
    torch.testing.assert_close(low.double(), std, rtol=1e-3, atol=0)


@pytest.mark.parametrize("projector", ["conv", "bottleneck"])
def test_the_whole_loss_and_what_it_trains(projector: str) -> None:
    method = wkd(feature_weight=0.5, mean_ratio=2.0, grid=4, projector=projector, total_steps=8, steps_per_epoch=1)
    own, other = features(STUDENT, seed=1), features(TEACHER, seed=2)
    for epochs, factor in ((0.0, 1.0), (5.0, 1.0), (6.5, 0.5), (8.0, 0.0)):  # 5 of 8 epochs, then half a cosine
        method.set_progress(epochs)
        loss = step(method, own, other)
        terms = loss.terms
        distilled = 200 * terms["transport"] + 0.5 * (2 * terms["mean_gap"] + terms["std_gap"])
        wanted = terms["ce"] + terms["target_class"] + factor * distilled
        torch.testing.assert_close(loss.total.detach(), wanted, rtol=1e-6, atol=1e-6)  # the factor is fp32
    method.set_progress(0.0)
    step(method, own, other).total.backward()
    assert method.adapter is not None
    read = [own.logits, own.levels[-1], *method.adapter.parameters()]
    assert all(x.grad is not None and x.grad.abs().sum() > 0 for x in read)
    assert own.levels[0].grad is None and own.embedding.grad is None and other.levels[-1].grad is None


def test_a_part_that_is_off_needs_nothing() -> None:
    features_alone = WKD.settings_class(logit_weight=0.0)
    assert WKD.needs_of(features_alone) == Needs(levels=True)
    logits_alone = WKD.settings_class(feature_weight=0.0)
    assert not WKD.needs_of(logits_alone).levels and WKD.needs_of(logits_alone).hard_labels
    assert WKD.needs_of(WKD.settings_class()) == WKD.needs
    assert wkd(feature_weight=0.0).uncacheable == "WKD needs the teacher's classifier, not only its logits"
    with pytest.raises(ValueError, match="logit_weight and feature_weight are both 0"):
        wkd(logit_weight=0.0, feature_weight=0.0)


def test_levels_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 4 x 4 and 4 x 4 cells; set a smaller distill\.wkd\.grid"):
        wkd(teacher=[(5, 4, 4)], grid=4)
    with pytest.raises(ValueError, match=r"one size, got 7 x 7 and 8 x 8; set distill\.wkd\.projector = conv"):
        wkd(teacher=[(5, 8, 8)], projector="bottleneck")
    of_detectors = "for a detector use kd, dkd, unikd or fitnet"
    with pytest.raises(ValueError, match=of_detectors):
        wkd(teacher=[(5, 0, 0)], logit_weight=0.0)
    with pytest.raises(ValueError, match=of_detectors):
        build(WKD, STUDENT, TEACHER, None, None, CLASSIFIER)
    with pytest.raises(ValueError, match="WKD: a level of the student must be half as large"):
        wkd(teacher=[(5, 9, 9)])
    with pytest.raises(ValueError, match=r"the last level is 14 x 7, and its cells were made for 7 x 7; give images"):
        wkd().target(frozen(features([(5, 14, 7)], seed=2)))


def test_the_decay_ends_with_the_run() -> None:
    never = CosineDecay(start=6.0, end=6.0)
    falling = CosineDecay(start=0.0, end=6.0)
    seen = []
    for epochs in (0.0, 2.0, 3.0, 6.0, 7.0):
        for each in (never, falling):
            each.set_progress(epochs)
        assert never.value == 1
        seen.append(falling.value.item())
    assert seen == pytest.approx([1.0, 0.75, 0.5, 0.0, 0.0], abs=1e-7)


def test_two_classes_leave_nothing_to_move() -> None:
    """One class remains beside the target, whose probability is 1 for both."""
    method = build(WKD, STUDENT, TEACHER, 6, 6, CLASSIFIER[:2], num_classes=2, feature_weight=0.0)
    own = randn(SAMPLES, 2, seed=1, grad=True)
    other = frozen(features(TEACHER, seed=2))._replace(logits=randn(SAMPLES, 2, seed=2))
    loss = method.loss(StudentOutput(own), method.target(other), BATCH._replace(labels=LABELS % 2))
    loss.total.backward()
    assert loss.terms["transport"] == 0 and own.grad is not None and own.grad.isfinite().all()
