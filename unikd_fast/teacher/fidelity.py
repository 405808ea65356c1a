"""How far a fast teacher is from the network it was made from, and from what distance that is an error."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from unikd_fast.teacher.online import OnlineTeacher, unit_rounding
from unikd_fast.values import Features

# In units of `unit_rounding`, relative to the size of the logits. In bf16 and fp16, randomly initialised ResNet-18 and
# ResNet-50 are off by 1.1 to 1.4 units, and a resnet20 trained on digits by 1.6. Random weights on normalised
# activations amplify errors: they take a ResNet-18 to 4 to 7 units and a ResNet-50 to 50 and more, where predicted
# classes change. 32 lies in between.
LOGIT_BOUND = 32.0
# The difference of two logits that are each off by 1.6 units is off by 2.3 (one sigma): a lead below 8 is weak.
TIE_BOUND = 8.0


class Fidelity(NamedTuple):
    """A teacher against its eager fp32 reference. Errors are relative: ‖teacher - reference‖ / ‖reference‖."""

    relative_logit_error: float  # of the logits centred over classes, which is all that softmax depends on
    top1_agreement: float  # share of images with the same class; near ties count as agreement
    feature_errors: tuple[float, ...]  # one per level
    images: int
    near_ties: int  # images whose class differs while the reference's lead is within rounding error


class Checked(Protocol):
    """What is asked of a teacher that is compared with the network it was made from."""

    precision: str
    folded: int
    compile_mode: str | None

    @property
    def network(self) -> nn.Module: ...


def measure_fidelity(teacher: OnlineTeacher, reference: nn.Module, batches: Iterable[Tensor]) -> Fidelity:
    """Compare a teacher with the network it was made from, on real images; see `compare_features`.

    Args:
        teacher: teacher to check.
        reference: the same network in fp32, run eagerly; a deep copy from before the teacher folded and cast it.
        batches: images (N, 3, H, W), on the device of both.

    Raises:
        ValueError: there are no images.

    Example:
        >>> reference = copy.deepcopy(network).eval()
        >>> measure_fidelity(OnlineTeacher(network, precision="bf16"), reference, [images]).top1_agreement
        1.0
    """

    def exact(images: Tensor) -> Features:
        with exact_convolutions(images.device), torch.no_grad():
            features: Features = reference(teacher.renormalised(images.float()))
        return features

    return compare_features(((teacher(batch), exact(batch)) for batch in batches), teacher.precision)


@torch.no_grad()
def compare_features(pairs: Iterable[tuple[Features, Features]], precision: str) -> Fidelity:
    """Compare what a teacher returns with what the network it was made from returns in fp32.

    An image whose predicted class differs is a near tie, and not a disagreement, if the reference's lead of its own
    class over the teacher's is at most `TIE_BOUND` roundings of the teacher's precision times the RMS of the image's
    centred logits. The bound is fixed in advance: errors of the teacher do not widen it, and the logit error covers all
    images. Of a detector, an image is a region here.

    Args:
        pairs: features of the teacher and of the network, for the same images.
        precision: the teacher's precision.

    Returns:
        Errors and agreement; NaN or inf where a value is not finite.

    Raises:
        ValueError: there are no images.
    """
    sums = torch.zeros(0)
    images = disagreements = ties = 0
    for fast, exact in pairs:
        rows = [_squares(a, b) for a, b in zip(fast.levels, exact.levels, strict=True)]
        y, z = (_centred(logits) for logits in (fast.logits, exact.logits))
        table = torch.stack([*rows, _squares(y, z)]).cpu()  # (L + 1, 2)
        sums = table if not len(sums) else sums + table
        other = y.argmax(1) != z.argmax(1)
        lead = z.amax(1) - z.gather(1, y.argmax(1, keepdim=True)).squeeze(1)
        rounding = TIE_BOUND * unit_rounding(precision, z.device)
        tie = other & (lead <= rounding * z.square().mean(1).sqrt())
        images += len(z)
        disagreements += int((other & ~tie).sum())
        ties += int(tie.sum())
    if not images:
        raise ValueError("measure_fidelity: no images to compare on; pass at least one batch")
    *levels, logits = (sums[:, 0] / sums[:, 1].clamp_min(torch.finfo(torch.float64).tiny)).sqrt().tolist()
    return Fidelity(logits, 1 - disagreements / images, tuple(levels), images, ties)


def pool_fidelity(found: Sequence[Fidelity]) -> Fidelity:
    """Combine measurements of equal networks on different images: the worst errors, the mean agreement.

    Example:
        >>> pool_fidelity([Fidelity(0.1, 1.0, (), 8, 0), Fidelity(0.2, 0.5, (), 8, 1)])
        Fidelity(relative_logit_error=0.2, top1_agreement=0.75, feature_errors=(), images=16, near_ties=1)
    """
    images = sum(f.images for f in found)
    return Fidelity(
        _worst(f.relative_logit_error for f in found),
        sum(f.top1_agreement * f.images for f in found) / images,
        tuple(_worst(errors) for errors in zip(*(f.feature_errors for f in found), strict=True)),
        images,
        sum(f.near_ties for f in found),
    )


def check_fidelity(
    fidelity: Fidelity, teacher: Checked, *, min_agreement: float = 0.995, compared: str = "training images"
) -> None:
    """Raise ValueError if a teacher does not reproduce the network it was made from.

    The largest logit error allowed is `LOGIT_BOUND` roundings of the precision: 12.5 % in bf16, 1.6 % in fp16 and
    0.1 % in fp32 (1.6 % on a GPU, with TF32).

    Args:
        fidelity: measured fidelity.
        teacher: teacher it was measured on.
        min_agreement: smallest allowed share of images on which both predict the same class.
        compared: what was compared, for the message.

    Raises:
        ValueError: a value is not finite, the logits are too far off, or too few classes agree; the message gives both
            values and the settings to change.

    Example:
        >>> check_fidelity(measure_fidelity(teacher, reference, [images]), teacher)
    """
    how = f"teacher in {teacher.precision}, {teacher.folded} BatchNorms folded, compile {teacher.compile_mode or 'off'}"
    on = f"on {fidelity.images} {compared}, against the network in fp32"
    remedy = _remedy(teacher)
    names = [f"level {index}" for index in range(len(fidelity.feature_errors))] + ["the logits"]
    errors = (*fidelity.feature_errors, fidelity.relative_logit_error)
    wrong = [name for name, error in zip(names, errors, strict=True) if not _finite(error)]
    if wrong:
        raise ValueError(f"{how}: {', '.join(wrong)} not finite {on}; {remedy}, or check teacher.weights")
    first = next(teacher.network.parameters(), None)
    bound = LOGIT_BOUND * unit_rounding(teacher.precision, "cpu" if first is None else first.device)
    if fidelity.relative_logit_error > bound:
        raise ValueError(
            f"{how}: the logits differ by {fidelity.relative_logit_error:.2g} of their size {on}, and rounding "
            f"explains at most {bound:.2g}; {remedy}"
        )
    if fidelity.top1_agreement < min_agreement - 1e-9:
        disagreeing = round((1 - fidelity.top1_agreement) * fidelity.images)
        raise ValueError(
            f"{how}: {disagreeing} of {fidelity.images} {compared} get another class than from the fp32 network, "
            f"an agreement of {fidelity.top1_agreement:.4f}; teacher.fidelity.min_agreement is "
            f"{min_agreement}; {remedy}"
        )


def _remedy(teacher: Checked) -> str:
    finer = {"fp16": ["teacher.precision=bf16", "teacher.precision=fp32"], "bf16": ["teacher.precision=fp32"]}
    changes = finer.get(teacher.precision, [])
    if teacher.compile_mode is not None:
        changes.append("teacher.compile=null")
    if teacher.folded:
        changes.append("teacher.fold_batch_norm=false")
    return "try --set " + " or --set ".join(changes) if changes else "its weights are not those of the network"


def _centred(logits: Tensor) -> Tensor:
    logits = logits.double()
    return logits - logits.mean(1, keepdim=True)


def _squares(found: Tensor, exact: Tensor) -> Tensor:
    exact = exact.double()
    return torch.stack([(found.double() - exact).square().sum(), exact.square().sum()])


def _finite(value: float) -> bool:
    return float("-inf") < value < float("inf")


def _worst(errors: Iterable[float]) -> float:
    values = list(errors)
    return next((value for value in values if not _finite(value)), max(values))


@contextmanager
def exact_convolutions(device: torch.device) -> Iterator[None]:
    """Compute fp32 convolutions in fp32: a GPU would use TF32, which rounds as coarsely as fp16."""
    if device.type != "cuda":
        yield
        return
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        enabled=cudnn.enabled, benchmark=cudnn.benchmark, deterministic=cudnn.deterministic, allow_tf32=False
    ):
        yield
