"""ReviewKD: fusion, hierarchical context and ramp against their formulas."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from support.build_method import build
from support.feature_levels import BATCH, averaged, cross_entropy_of, features, frozen, normalised, step, student_of
from unikd_fast.methods import ReviewKD
from unikd_fast.methods.reviewkd import AttentionFusion, hierarchical_context_loss

# The teacher has a level more; its second is finer than the student's, its third has the size, its last is coarser.
STUDENT = [(3, 8, 8), (4, 8, 8), (5, 4, 4)]
TEACHER = [(2, 16, 16), (6, 16, 16), (7, 8, 8), (8, 2, 2)]
WIDTHS = {"student_width": 9, "teacher_width": 11}


def method_of(**options: object) -> ReviewKD:
    torch.manual_seed(0)
    method = build(ReviewKD, STUDENT, TEACHER, 9, 11, **options)  # type: ignore[arg-type]
    for module in method.adapter.double().modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return method


def resized(x: Tensor, size: int) -> Tensor:
    """To the nearest pixel: of index floor(i * from / to)."""
    index = torch.arange(size) * x.shape[-1] // size
    return x[:, :, index][:, :, :, index]


def fused(fusion: AttentionFusion, level: Tensor, above: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """ABF, written out."""
    projection, norm = fusion.project
    assert isinstance(norm, nn.BatchNorm2d)
    mixed = torch.einsum("nchw,dc->ndhw", level, projection.weight[:, :, 0, 0])  # type: ignore[operator, index]
    x = normalised(mixed, norm.weight, norm.bias)
    if above is not None:
        assert fusion.attention is not None
        above = resized(above, x.shape[-1])
        weight, bias = fusion.attention.weight[:, :, 0, 0], fusion.attention.bias
        assert bias is not None
        own, other = weight.split(x.shape[1], dim=1)
        scores = torch.einsum("nchw,kc->nkhw", x, own) + torch.einsum("nchw,kc->nkhw", above, other)
        maps = 1 / (1 + (-scores - bias[:, None, None]).exp())
        x = x * maps[:, 0:1] + above * maps[:, 1:2]
    x = resized(x, size)
    convolution, last = fusion.output
    assert isinstance(convolution, nn.Conv2d) and isinstance(last, nn.BatchNorm2d)
    return normalised(F.conv2d(x, convolution.weight, padding=1), last.weight, last.bias), x


def context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    height = student.shape[-1]
    sizes = [height, *(size for size in (4, 2, 1) if size < height)]
    weights = [0.5**i for i in range(len(sizes))]
    each = [(averaged(student, size) - averaged(teacher, size)).square().mean() for size in sizes]
    weighted = torch.stack([weight * one for weight, one in zip(weights, each, strict=True)])
    return weighted.sum() / sum(weights)


def loss_by_hand(method: ReviewKD, levels: Sequence[Tensor], embedding: Tensor, targets: Sequence[Tensor]) -> Tensor:
    inputs = [*levels, embedding.reshape(*embedding.shape, 1, 1)]
    above, total = None, torch.zeros((), dtype=torch.float64)
    for index in (3, 2, 1, 0):
        fusion = method.adapter.fusions[index]
        assert isinstance(fusion, AttentionFusion)
        result, above = fused(fusion, inputs[index], above, targets[index].shape[-1])
        total = total + context_loss(result, targets[index])
    return total


@pytest.mark.parametrize("before_activation", [False, True])
def test_loss_and_gradients_match_the_formula(before_activation: bool) -> None:
    method = method_of(weight=5.0, width=4, student_before_activation=before_activation)
    own, other = features(STUDENT, width=9, seed=1), features(TEACHER, width=11, seed=2)
    levels = own.before_activation if before_activation else own.levels
    assert own.embedding is not None and other.embedding is not None
    inputs = [own.logits, *levels, own.embedding, *method.adapter.parameters()]
    loss = step(method, own, other)
    found = torch.autograd.grad(loss.total, inputs)

    targets = [level.detach() for level in (*other.before_activation[1:], other.embedding[:, :, None, None])]
    expected, ce = loss_by_hand(method, levels, own.embedding, targets), cross_entropy_of(own.logits)
    torch.testing.assert_close(loss.terms, {"ce": ce.detach(), "hcl": expected.detach()})
    torch.testing.assert_close(loss.total, ce + 5.0 * expected)
    torch.testing.assert_close(found, torch.autograd.grad(ce + 5.0 * expected, inputs))


@pytest.mark.parametrize(
    ("size", "weights"),
    [(8, {8: 8, 4: 4, 2: 2, 1: 1}), (4, {4: 4, 2: 2, 1: 1}), (2, {2: 2, 1: 1}), (1, {1: 1})],
)
def test_context_weights_depend_on_the_level_size(size: int, weights: dict[int, int]) -> None:
    student, teacher = torch.randn(2, 2, 3, size, size, generator=torch.Generator().manual_seed(0)).double()
    means = {s: (averaged(student, s) - averaged(teacher, s)).square().mean() for s in weights}
    expected = sum(weight * means[s] for s, weight in weights.items()) / sum(weights.values())
    torch.testing.assert_close(hierarchical_context_loss(student, teacher), expected)


def test_half_precision_is_cast_before_squaring() -> None:
    student, teacher = torch.full((2, 3, 8, 8), 400.0).half(), torch.full((2, 3, 8, 8), -400.0).half()
    found = hierarchical_context_loss(student, teacher)
    torch.testing.assert_close(found, torch.tensor(640000.0))


def test_the_weight_rises_linearly_in_place() -> None:
    method = method_of(weight=8.0, ramp_epochs=4.0)
    own, other = features(STUDENT, width=9, seed=1), features(TEACHER, width=11, seed=2)
    tensor, seen = method.weight.value, []
    for epochs in (0.0, 1.0, 4.0, 9.0):
        method.set_progress(epochs)
        loss = step(method, own, other)
        seen.append(float(((loss.total - loss.terms["ce"]) / loss.terms["hcl"]).detach()))
    assert seen == pytest.approx([0.0, 2.0, 8.0, 8.0])
    assert method.weight.value is tensor


def test_a_zero_weight_leaves_the_other_term() -> None:
    method = method_of(weight=0.0, label_smoothing=0.2)
    own, other = features(STUDENT, width=9, seed=1), features(TEACHER, width=11, seed=2)
    loss = step(method, own, other)
    torch.testing.assert_close(loss.total, 0.8 * cross_entropy_of(own.logits) - 0.2 * own.logits.log_softmax(1).mean())
    method.ce_weight = 0.0
    assert float(step(method, own, other).total) == 0.0


def test_fusion_width_is_the_embedding_up_to_512() -> None:
    def width(student_width: int, **options: int) -> int:
        fusion = build(ReviewKD, [(3, 4, 4)], [(2, 4, 4)], student_width, 3, **options).adapter.fusions[0]
        assert isinstance(fusion, AttentionFusion)
        return int(fusion.output[0].in_channels)  # type: ignore[arg-type]

    assert (width(64), width(1280), width(1280, width=24)) == (64, 512, 24)


def test_a_single_sample_can_be_evaluated() -> None:
    method = method_of()
    one = features(STUDENT, width=9)
    assert one.embedding is not None
    one = one._replace(levels=tuple(x[:1] for x in one.levels), logits=one.logits[:1], embedding=one.embedding[:1])
    method.adapter.eval()
    assert len(student_of(method, one).adapted) == 4


def test_teacher_features_are_passed_unchanged() -> None:
    """Half precision stays half until the loss; nothing is copied."""
    method = method_of()
    teacher = frozen(features(TEACHER, width=11, dtype=torch.float16))
    extra = method.target(teacher).extra
    assert [level.data_ptr() for level in extra[:3]] == [level.data_ptr() for level in teacher.before_activation[1:]]
    own = features(STUDENT, width=9)
    assert method.loss(student_of(method, own), method.target(teacher), BATCH).total.dtype == torch.float64
