"""What the tests of methods on feature levels share: Features of two networks, and a step of a method on them."""

from collections.abc import Sequence

import torch
from torch import Tensor

from unikd_fast.methods import Method
from unikd_fast.values import Batch, Features, Loss, StudentOutput

SAMPLES, CLASSES = 6, 5
LABELS = torch.arange(SAMPLES) % CLASSES
BATCH = Batch(torch.zeros(SAMPLES, 3, 1, 1), LABELS, torch.arange(SAMPLES))

Shape = tuple[int, int, int]


def features(
    shapes: Sequence[Shape], *, width: int = 7, seed: int = 0, dtype: torch.dtype = torch.float64, scale: float = 1.0
) -> Features:
    """Features in full, each tensor a leaf of its own, so that a test sees by the gradients which of them were read."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int) -> Tensor:
        return (scale * torch.randn(SAMPLES, *shape, generator=generator, dtype=torch.float64)).to(dtype)

    before = [drawn(*shape) for shape in shapes]
    levels = tuple(level.relu().requires_grad_() for level in before)
    return Features(
        levels,
        drawn(CLASSES).requires_grad_(),
        tuple(level.requires_grad_() for level in before),
        drawn(width).requires_grad_(),
    )


def frozen(teacher: Features) -> Features:
    """The same without gradients, as the engine gives a teacher's."""
    assert teacher.embedding is not None
    return Features(
        tuple(level.detach() for level in teacher.levels),
        teacher.logits.detach(),
        tuple(level.detach() for level in teacher.before_activation),
        teacher.embedding.detach(),
    )


def student_of(method: Method, own: Features) -> StudentOutput:
    assert method.adapter is not None
    return StudentOutput(own.logits, method.adapter(own))


def step(method: Method, own: Features, teacher: Features, batch: Batch = BATCH) -> Loss:
    """The loss of a micro-batch; its terms are those that the method states."""
    loss = method.loss(student_of(method, own), method.target(frozen(teacher)), batch)
    assert tuple(loss.terms) == method.term_names
    assert not any(term.requires_grad for term in loss.terms.values())
    return loss


def normalised(x: Tensor, scale: Tensor, shift: Tensor, eps: float = 1e-5) -> Tensor:
    """BatchNorm in training, written out."""
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = (x - mean).square().mean((0, 2, 3), keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * scale[:, None, None] + shift[:, None, None]


def cross_entropy_of(logits: Tensor) -> Tensor:
    return -(logits - logits.exp().sum(1, keepdim=True).log())[torch.arange(SAMPLES), LABELS].mean()


def averaged(x: Tensor, size: int) -> Tensor:
    """(N, C, H, H) to (N, C, size, size) by the means of equal squares."""
    n, channels, height, _ = x.shape
    side = height // size
    assert side * size == height
    return x.reshape(n, channels, size, side, size, side).mean((3, 5))
