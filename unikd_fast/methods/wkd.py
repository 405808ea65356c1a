"""WKD, Wasserstein distances in place of KL divergences: of the logits and of a feature level (Lv et al. 2024)."""

import math
from typing import Annotated, Literal

import torch
from annotated_types import Ge
from torch import Tensor, nn
from torch.nn import functional as F

from unikd_fast.kernels.reference import at_least_fp32, autocast_off, cross_entropy, is_ignored, reduce_rows
from unikd_fast.methods.context import RunContext, Shape
from unikd_fast.methods.fitnet import Regressor
from unikd_fast.methods.method import Method, Needs, Ramp
from unikd_fast.settings import Fraction, NonNegative, Positive, PositiveInt, settings
from unikd_fast.values import NO_LABEL, Batch, Features, Loss, StudentOutput, Target

_VARIANCE_FLOOR = 1e-5  # as published
_BOTTLENECK_WIDTH = 256  # as published


@settings
class WKDSettings:
    """Wasserstein distances (Lv et al. 2024): of the other classes' probabilities, and of the last level's statistics.

    Defaults are those published for ResNet32x4 and ResNet8x4 on CIFAR-100.
    """

    ce_weight: NonNegative = 1.0
    """w, weight of the cross-entropy. In a hybrid it is counted once."""
    logit_weight: NonNegative = 200.0
    """a, weight of the transport between the classes other than the target: 10 to 600 in the published files. 0 turns
    the logits' part off, the target's term included."""
    target_weight: NonNegative = 1.0
    """Weight of the target's term, the cross-entropy with the teacher's probability of the target; 1 as published."""
    temperature: Positive = 8.0
    """Softmax temperature τ of the other classes: 4 to 8 on CIFAR, 2 on ImageNet. There is no factor τ²."""
    sharpness: Positive = 1.0
    """κ in the cost 1 - exp(-κ (1 - cos)) of moving probability from one class to another: 1, or 2."""
    epsilon: Annotated[float, Ge(0.02)] = 0.05
    """ε, entropic regularisation of the transport, in units of the cost, which is below 1."""
    iterations: PositiveInt = 10
    """Sinkhorn iterations."""
    feature_weight: NonNegative = 0.08
    """b, weight of the distance between the features' Gaussians: 0.005 to 1 in the published files. 0 turns it off."""
    mean_ratio: NonNegative = 8.0
    """ρ, weight of the means relative to the standard deviations; 1 is the Wasserstein distance itself."""
    grid: PositiveInt = 1
    """G: statistics of G x G cells of the level, which must be larger than that; 4 on ImageNet."""
    projector: Literal["conv", "bottleneck"] = "conv"
    """How the student's level becomes the teacher's shape. conv: one convolution, as in FitNet; bottleneck: 1x1, 3x3
    and 1x1 convolutions with 256 channels between, for levels of one size. BatchNorm and ReLU follow either."""
    decay_from: Fraction = 0.625
    """Share of the run after which a and b fall to 0 along half a cosine: 150 of 240 epochs on CIFAR, 0 on ImageNet; 1:
    they stay."""


class WKD(Method[WKDSettings]):
    """L = w L_CE + L_target + s(t) [ a W_ε(p, q) + b ( ρ ‖μ_s - μ_t‖² + ‖σ_s - σ_t‖² ) ]

    L_target = -p_y log q_y at temperature 1, for the teacher's p, the student's q and the label y. W_ε = Σ T_ij C_ij is
    what it costs to move q to p, both of the classes other than y at temperature τ; T is the transport plan after some
    Sinkhorn iterations, C_ij = 1 - exp(-κ (1 - IR_ij)), IR_ij how alike classes i and j are. μ and σ are a channel's
    mean and standard deviation over the pixels of a cell of the last level: with ρ = 1 the squared 2-Wasserstein
    distance of two diagonal Gaussians, summed over channels, averaged over G x G cells. s falls from 1 to 0 along half
    a cosine. Samples without a label have the features' part alone.

    IR is the cosine of two rows of the teacher's classifier, which is an option of the published code. The published
    figures have the linear CKA of the classes' features in a pass over the training data instead, on ImageNet of their
    logits. It compares different images, paired as they come; in the published matrices of ImageNet it is 0.03 on
    average with a standard deviation of 0.005, which makes every cost equal to within 1.5 %, and more than 80 % of its
    variance is the product of one number a class. The cosine needs no pass and no order of images.

    Differences to the published code (WKD, based on mdistiller): it copies C for every sample to remove y from it; here
    y has no probability, which is the same with K² numbers. It adds 1e-8 to every sum it divides by; here the
    iterations are in the logarithmic domain, where such sums can't vanish. Its s is that of the whole epoch, ours that
    of the step. Its bottleneck has a transposed convolution from half the size, of which no published file makes use.

    Raises:
        ValueError: both weights are 0, the networks are detectors, the level is not larger than the grid, or the
            projector can't map its size.
    """

    settings_class = WKDSettings
    needs = Needs(levels=True, embedding=True, labels=True, hard_labels=True, two_classes=True)

    def __init__(self, settings: WKDSettings, context: RunContext) -> None:
        super().__init__(settings, context)
        if not settings.logit_weight and not settings.feature_weight:
            raise ValueError(
                "WKD: logit_weight and feature_weight are both 0, so nothing is distilled; set one of them, or use "
                "method none"
            )
        logits_of_detectors = settings.logit_weight and not context.has_embeddings
        if logits_of_detectors or (settings.feature_weight and not context.teacher_shapes[-1][1]):
            raise ValueError(
                "WKD: it is for classifiers, whose last layer is linear and whose levels have one size; for a detector "
                "use kd, dkd, unikd or fitnet"
            )
        epochs = context.total_steps / context.steps_per_epoch
        self.decay = CosineDecay(start=settings.decay_from * epochs, end=epochs, device=context.device)
        self.cost: Tensor | None = None
        if settings.logit_weight:
            self.cost = class_costs(at_least_fp32(context.classifier_weight), sharpness=settings.sharpness)
        if settings.feature_weight:
            student, teacher = context.student_shapes[-1], context.teacher_shapes[-1]
            self.cells = [cells.to(context.device) for cells in grid_cells(teacher[1:], settings.grid)]
            if settings.projector == "conv":
                self.adapter: nn.Module | None = Regressor(student, teacher, level=-1, method="WKD")
            else:
                self.adapter = Bottleneck(student, teacher)

    @classmethod
    def needs_of(cls, settings: WKDSettings) -> Needs:
        """Return what the parts that are on need."""
        logits, features = settings.logit_weight > 0, settings.feature_weight > 0
        return Needs(levels=features, embedding=logits, labels=logits, hard_labels=logits, two_classes=logits)

    @property
    def term_names(self) -> tuple[str, ...]:
        logits = ("target_class", "transport") if self.settings.logit_weight else ()
        return ("ce", *logits, *(("mean_gap", "std_gap") if self.settings.feature_weight else ()))

    def set_progress(self, epochs: float) -> None:
        self.decay.set_progress(epochs)

    def target(self, teacher: Features, second: Features | None = None) -> Target:
        if not self.settings.feature_weight:
            return super().target(teacher, second)
        return Target(teacher.logits, extra=cell_statistics(teacher.levels[-1], *self.cells))

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        assert isinstance(target.logits, Tensor)
        given = self.settings
        ce = cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
        total, values = self.ce_weight * ce, [ce]
        if self.cost is not None:
            without = is_ignored(batch.labels, NO_LABEL)
            given_rows = student.logits, target.logits, batch.labels.long().masked_fill(without, 0)
            of_target, transport = (
                reduce_rows(of(*given_rows), "batchmean", classes=len(self.cost), ignore_mask=without)
                for of in (target_cross_entropy, self._transport)
            )
            total = total + given.target_weight * of_target + given.logit_weight * self.decay.value * transport
            values += [of_target, transport]
        if given.feature_weight:
            pairs = zip(cell_statistics(student.adapted, *self.cells), target.extra, strict=True)
            means, deviations = ((own - other).square().sum((1, 2, 3)).mean() / given.grid**2 for own, other in pairs)
            distance = given.mean_ratio * means + deviations
            total = total + given.feature_weight * self.decay.value * distance
            values += [means, deviations]
        return Loss(total, {name: value.detach() for name, value in zip(self.term_names, values, strict=True)})

    def device_bytes(self, batch: int) -> int:
        """Return the bytes of the costs, of two matrices made of them, and of what the iterations save: two sums each,
        and their summands."""
        if self.cost is None:
            return 0
        saved = 4 * self.settings.iterations * batch * len(self.cost)
        return 3 * self.cost.nbytes + saved * self.cost.element_size()

    @property
    def uncacheable(self) -> str | None:
        beyond = [
            reason
            for reason, weight in (
                ("the teacher's classifier", self.settings.logit_weight),
                ("its last feature level", self.settings.feature_weight),
            )
            if weight
        ]
        return f"WKD needs {' and '.join(beyond)}, not only its logits"

    def _transport(self, student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        """Return W_ε between the classes other than each sample's own, (N,)."""
        assert self.cost is not None
        own = labels[:, None] == torch.arange(len(self.cost), device=labels.device)
        log_q, log_p = (
            (at_least_fp32(logits) / self.settings.temperature).masked_fill(own, -math.inf).log_softmax(dim=-1)
            for logits in (student, teacher)
        )
        epsilon, iterations = self.settings.epsilon, self.settings.iterations
        return transport_cost(log_q, log_p, self.cost, epsilon=epsilon, iterations=iterations)


def class_costs(weight: Tensor, *, sharpness: float) -> Tensor:
    """Return C (K, K) in [0, 1): 1 - exp(-κ (1 - cos(w_i, w_j))), 0 on the diagonal.

    Args:
        weight: the classifier's rows, (K, D).
        sharpness: κ > 0.
    """
    rows = F.normalize(weight, dim=1)
    with autocast_off(rows.device):
        distance = (1 - rows @ rows.mT).clamp(min=0)
    return -torch.expm1(-sharpness * distance.fill_diagonal_(0))


def target_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """Return -p_y log q_y, (N,), for logits (N, K) and labels (N,)."""
    p, log_q = at_least_fp32(teacher).softmax(dim=-1), at_least_fp32(student).log_softmax(dim=-1)
    place = labels[:, None]
    return -(p.gather(1, place) * log_q.gather(1, place))[:, 0]


def transport_cost(log_p: Tensor, log_q: Tensor, cost: Tensor, *, epsilon: float, iterations: int) -> Tensor:
    """Return Σ_ij T_ij C_ij of each row, T = diag(u) exp(-C / ε) diag(v) after some Sinkhorn iterations.

    They begin with u constant where p is not 0, and end with u, so that T has the row sums p exactly; its column sums
    tend to q. Gradients pass through the iterations. Every logarithm is of a sum of at least exp(-1 / ε), because the
    largest summand is scaled to 1 first: nothing over- or underflows, however small a probability.

    Args:
        log_p, log_q: logarithms of distributions over classes, (N, K); -inf where a class has no probability in both.
        cost: C (K, K) in [0, 1], symmetric.
        epsilon: ε.
        iterations: number of times that v and u are updated.

    Returns:
        (N,).
    """
    with autocast_off(log_p.device):
        cost = cost.to(log_p.dtype)
        kernel = (-cost / epsilon).exp()
        log_u = torch.zeros_like(log_p).masked_fill(log_p == -math.inf, -math.inf)
        log_v = log_q - _log_product(log_u, kernel)
        for _ in range(iterations - 1):
            log_u = log_p - _log_product(log_v, kernel)
            log_v = log_q - _log_product(log_u, kernel)
        # The last u is p / (kernel v): the mean cost under each row of T, weighted by p.
        v = (log_v - _largest(log_v)).exp()
        return (log_p.exp() * (v @ (kernel * cost)) / (v @ kernel)).sum(dim=-1)


def _log_product(log_x: Tensor, kernel: Tensor) -> Tensor:
    """Return log(exp(log_x) kernel), (N, K)."""
    largest = _largest(log_x)
    return ((log_x - largest).exp() @ kernel).log() + largest


def _largest(log_x: Tensor) -> Tensor:
    return log_x.detach().amax(dim=-1, keepdim=True)


def grid_cells(size: tuple[int, int], grid: int) -> list[Tensor]:
    """Return which rows and which columns of a map are in each cell, 0 or 1: (G, H) and (G, W).

    Cell g of G covers the pixels from floor(g H / G) to ceil((g + 1) H / G), as adaptive pooling does; cells overlap
    where G does not divide H.

    Args:
        size: height H and width W.
        grid: G.

    Raises:
        ValueError: a cell would be a single pixel, which has no variance.
    """
    if min(size) <= grid:
        raise ValueError(
            f"WKD: the teacher's last level must be larger than the grid, got {size[0]} x {size[1]} and {grid} x "
            f"{grid} cells; set a smaller distill.wkd.grid, or distill.wkd.feature_weight = 0"
        )
    found = []
    for length in size:
        cells = torch.zeros(grid, length)
        for cell in range(grid):
            cells[cell, cell * length // grid : -(-(cell + 1) * length // grid)] = 1
        found.append(cells)
    return found


def cell_statistics(maps: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean and the standard deviation of each channel in each cell, (N, C, G, G), of maps (N, C, H, W).

    The variance is the unbiased one, plus 1e-5. For rows and columns see `grid_cells`.

    Raises:
        ValueError: the cells are of maps of another size.
    """
    if maps.shape[2:] != (rows.shape[1], columns.shape[1]):
        raise ValueError(
            f"WKD: the last level is {maps.shape[2]} x {maps.shape[3]}, and its cells were made for {rows.shape[1]} x "
            f"{columns.shape[1]}; give images of the size that the method was built for (image_size)"
        )
    maps = at_least_fp32(maps)
    rows, columns = rows.to(maps.dtype), columns.to(maps.dtype)
    count = rows.sum(1)[:, None] * columns.sum(1)
    # Without the map's mean the difference of squares does not cancel.
    whole = maps.mean((2, 3), keepdim=True)
    rest = maps - whole
    with autocast_off(maps.device):
        mean, square = (rows @ values @ columns.mT / count for values in (rest, rest.square()))
    variance = (square - mean.square()).clamp(min=0) * (count / (count - 1))
    return whole + mean, (variance + _VARIANCE_FLOOR).sqrt()


class Bottleneck(nn.Module):
    """Maps the student's Features to its last level with the teacher's channels."""

    def __init__(self, student: Shape, teacher: Shape) -> None:
        super().__init__()
        if student[1:] != teacher[1:]:
            raise ValueError(
                f"WKD: with projector = bottleneck both last levels must have one size, got {student[1]} x "
                f"{student[2]} and {teacher[1]} x {teacher[2]}; set distill.wkd.projector = conv"
            )
        self.layers = nn.Sequential(
            nn.Conv2d(student[0], _BOTTLENECK_WIDTH, 1),
            nn.Conv2d(_BOTTLENECK_WIDTH, _BOTTLENECK_WIDTH, 3, padding=1),
            nn.Conv2d(_BOTTLENECK_WIDTH, teacher[0], 1),
            nn.BatchNorm2d(teacher[0]),
            nn.ReLU(),
        )

    def forward(self, features: Features) -> Tensor:
        level: Tensor = self.layers(features.levels[-1])
        return level


class CosineDecay(Ramp):
    """1 up to an epoch, then 1/2 (1 + cos(π u)), where u rises from 0 there to 1 at the end of the run.

    Args:
        start: epoch at which it begins to fall. At the end: it never falls.
        end: length of the run in epochs.
        device: device of the value.

    Example:
        >>> decay = CosineDecay(start=2.0, end=6.0)
        >>> decay.set_progress(4.0)
        >>> decay.value
        tensor(0.5000)
    """

    def __init__(self, *, start: float, end: float, device: torch.device | str = "cpu") -> None:
        super().__init__(1.0, epochs=end, device=device)
        self.start = start

    def set_progress(self, epochs: float) -> None:
        """Set the value for this number of epochs; infinity, in a loop that does not count them, leaves it at 1."""
        never = self.start >= self.epochs or math.isinf(epochs)
        past = 0.0 if never else (epochs - self.start) / (self.epochs - self.start)
        self.value.fill_(0.5 * (1 + math.cos(math.pi * min(1.0, max(0.0, past)))))
