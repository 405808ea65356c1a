"""The kernel of softmax KL against plain PyTorch and float64."""

import math
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from support.kernel_inputs import (
    BACKEND,
    DEVICE,
    DTYPES,
    close_logits,
    compare,
    drawn,
    long,
    quantized_kl,
    quiet,
    randn,
)
from support.numerics import relative_error
from unikd_fast import channel_wise_kl, quantize_logits, softmax_kl
from unikd_fast.kernels import _launch, reference
from unikd_fast.kernels._launch import LARGEST_SINGLE_BLOCK

pytestmark = quiet
INF = math.inf
DIVERGENCES = ("forward", "reverse", "jsd")
TEMPERATURES = [(temperature, scale) for temperature in (0.5, 1.0, 4.0, 20.0) for scale in (True, False)]


# A row of a heavy kernel, and one of any kernel, that takes more than one block.
TWO_BLOCKS, MORE_BLOCKS = LARGEST_SINGLE_BLOCK // 2 + 1, LARGEST_SINGLE_BLOCK + 1


@pytest.mark.parametrize(
    ("classes", "dtypes"),
    [(7, DTYPES), (TWO_BLOCKS, DTYPES[:1]), long(1003, DTYPES), long(TWO_BLOCKS, DTYPES[1:])],
    ids=str,
)
@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("divergence", DIVERGENCES)
class TestDivergences:
    def test_both_gradients(
        self, divergence: str, standardized: bool, classes: int, dtypes: tuple[torch.dtype, ...]
    ) -> None:
        """Case 17: each of the two logits gets its gradient if it asks for one."""
        for dtype in dtypes:
            inputs = [randn(3, classes, seed=seed, dtype=dtype, grad=True) for seed in (1, 2)]
            compare(softmax_kl, inputs, divergence=divergence, standardized=standardized, beta=0.3, temperature=2.0)

    def test_the_teachers_alone(
        self, divergence: str, standardized: bool, classes: int, dtypes: tuple[torch.dtype, ...]
    ) -> None:
        """Case 17, the other way round."""
        inputs = [randn(3, classes, seed=seed, dtype=dtypes[0], grad=seed == 2) for seed in (1, 2)]
        compare(softmax_kl, inputs, divergence=divergence, standardized=standardized)


def test_teacher_gets_no_gradient_by_default() -> None:
    """Case 17."""
    student, teacher = randn(3, 5, seed=1, grad=True), randn(3, 5, seed=2)
    softmax_kl(student, teacher, impl="fused").backward()
    assert student.grad is not None
    assert teacher.grad is None


@pytest.mark.parametrize(
    ("classes", "divergence"),
    [
        *((6, divergence) for divergence in DIVERGENCES),
        (MORE_BLOCKS, "forward"),
        long(MORE_BLOCKS, "reverse"),
        long(MORE_BLOCKS, "jsd"),
    ],
)
class TestExtremes:
    """Case 1."""

    def test_absent_from_both(self, classes: int, divergence: str) -> None:
        student, teacher = randn(3, classes, seed=1), randn(3, classes, seed=2)
        for x in (student, teacher):
            x[:, 1::3] = -INF
        compare(softmax_kl, [student.requires_grad_(), teacher], divergence=divergence)

    def test_absent_from_the_teacher(self, classes: int, divergence: str) -> None:
        student, teacher = randn(3, classes, seed=1, grad=True), randn(3, classes, seed=2)
        teacher[:, 1::3] = -INF
        if divergence == "reverse":
            assert softmax_kl(student, teacher, divergence=divergence, impl="fused").item() == INF
        else:
            compare(softmax_kl, [student, teacher], divergence=divergence)

    def test_absent_from_the_student(self, classes: int, divergence: str) -> None:
        student, teacher = randn(3, classes, seed=1), randn(3, classes, seed=2)
        student[:, 1::3] = -INF
        if divergence != "forward":
            compare(softmax_kl, [student.requires_grad_(), teacher], divergence=divergence)
            return
        loss = softmax_kl(student.requires_grad_(), teacher, impl="fused")
        loss.backward()
        assert loss.item() == INF
        assert student.grad is not None
        expected = (student.softmax(-1) - teacher.softmax(-1)).detach() / 3
        torch.testing.assert_close(student.grad, expected, rtol=1e-5, atol=1e-8)

    def test_huge_logits(self, classes: int, divergence: str) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            student, teacher = (randn(3, classes, seed=seed, dtype=dtype) for seed in (1, 2))
            student[:, 0], student[:, 1], teacher[:, 1], teacher[:, 2] = 1e4, -1e4, 1e4, -1e4
            compare(softmax_kl, [student.requires_grad_(), teacher.requires_grad_()], divergence=divergence)


@pytest.mark.parametrize("classes", [100, MORE_BLOCKS])
def test_constant_stored_rows(classes: int) -> None:
    """Their scale is 0: all classes are equal, and what stands past the last one is still absent."""
    stored = quantize_logits(torch.full((2, classes), 3.0, device=DEVICE))
    compare(quantized_kl(stored.values), [randn(2, classes, seed=1, grad=True), stored.scale, stored.offset])


@pytest.mark.parametrize("classes", [100, MORE_BLOCKS])
def test_rows_without_logits_are_nan(classes: int) -> None:
    student = randn(2, classes, seed=1)
    for nothing in (-INF, torch.finfo(torch.float32).min):
        teacher = torch.full((2, classes), nothing, device=DEVICE)
        assert softmax_kl(student, teacher, impl="fused").isnan()


@pytest.mark.parametrize(
    ("share", "classes"), [(0.45, 100), (0.55, 100), (0.79, 100), (0.99, 100), (0.79, MORE_BLOCKS), (0.99, MORE_BLOCKS)]
)
def test_class_with_a_large_share(share: float, classes: int) -> None:
    """Of close distributions, where q - p cancels; in blocks, a share of a half is known too late."""
    teacher = randn(16, classes, seed=1)
    others = teacher[:, 1:].logsumexp(1)
    teacher[:, 0] = others + math.log(share / (1 - share))
    student = teacher + randn(16, classes, seed=2, scale=0.01)
    compare(softmax_kl, [student.detach().requires_grad_(), teacher], units=4, reduction="none")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("temperature", "scale_by_t2"),
    [(4.0, True), (0.5, False), *(long(*x) for x in TEMPERATURES if x not in ((4.0, True), (0.5, False)))],
)
def test_temperature(temperature: float, scale_by_t2: bool, divergence: str) -> None:
    """Case 6."""
    for dtype in DTYPES:
        inputs = [randn(9, 100, seed=1, dtype=dtype, grad=True), randn(9, 100, seed=2, dtype=dtype)]
        compare(softmax_kl, inputs, temperature=temperature, scale_by_t2=scale_by_t2, divergence=divergence)


@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("divergence", ["reverse", "jsd"])
@pytest.mark.parametrize(
    ("classes", "seeds"),
    [(10, (1, 3, 5)), (TWO_BLOCKS, (1,)), long(1000, (1, 3, 5)), long(TWO_BLOCKS, (3, 5))],
    ids=str,
)
def test_very_high_temperature(classes: int, seeds: tuple[int, ...], divergence: str, standardized: bool) -> None:
    """ln q - ln p, 1e-6 at most, is off by 1e-7 in all of a row; that must cancel in the loss and its gradient."""
    for seed in seeds:
        inputs = [randn(3, classes, seed=seed, grad=True), randn(3, classes, seed=seed + 1)]
        compare(softmax_kl, inputs, temperature=1e6, divergence=divergence, standardized=standardized, beta=0.3)
        losses, gradients = [], []
        for impl, dtype in (("fused", torch.float32), ("reference", torch.float64)):
            x, y = (z.detach().to(dtype).requires_grad_() for z in inputs)
            loss = softmax_kl(x, y, temperature=1e6, divergence=divergence, standardized=standardized, impl=impl)
            losses.append(loss)
            gradients.append(torch.autograd.grad(loss, x)[0])
        assert relative_error(*losses) < 1e-6
        assert relative_error(*gradients) < 1e-5


@pytest.mark.parametrize("classes", [10, 1000])
def test_forward_loss_at_high_temperature(classes: int) -> None:
    """Its gradient q - p is written before one knows what ln q - ln p is off by, and errs as eager does."""
    for standardized in (False, True):
        x, y = (randn(3, classes, seed=seed) for seed in (1, 2))
        chosen: dict[str, Any] = {"temperature": 1e6, "standardized": standardized}
        truth = reference.softmax_kl(x.double(), y.double(), **chosen)
        assert relative_error(softmax_kl(x, y, impl="fused", **chosen), truth) < 1e-6


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize(
    ("classes", "size"), [(10, 1e30), long(10, 1e19), long(TWO_BLOCKS, 1e19), long(TWO_BLOCKS, 1e30)]
)
def test_standardized_rows_of_any_size(size: float, classes: int, divergence: str) -> None:
    """Their squares leave the range of fp32; and the gradient is that of rows of size 1, divided by it."""
    inputs = [randn(3, classes, seed=1, scale=size, grad=True), randn(3, classes, seed=2, scale=size, grad=True)]
    chosen: dict[str, Any] = {"standardized": True, "divergence": divergence, "temperature": 2.0}
    compare(softmax_kl, inputs, **chosen)
    compare(softmax_kl, [inputs[0], randn(3, classes, seed=2)], **chosen)
    gradients = []
    for scale in (1.0, size):
        x = randn(3, classes, seed=1, scale=scale, grad=True)
        softmax_kl(x, randn(3, classes, seed=2, scale=scale), impl="fused", **chosen).backward()
        assert x.grad is not None
        gradients.append(x.grad.double() * scale)
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("classes", [100, 1003, TWO_BLOCKS])
def test_standardized_constant_rows(classes: int) -> None:
    """Their deviation is 0: whatever the mean is off by would be all that is left of them."""
    student = torch.tensor([[2.0], [-0.3]], device=DEVICE).expand(2, classes).contiguous()
    for divergence in DIVERGENCES:
        inputs = [student.requires_grad_(), randn(2, classes, seed=2, grad=True)]
        compare(softmax_kl, inputs, standardized=True, divergence=divergence)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_reductions(reduction: str, masked: bool) -> None:
    """Case 8, with a random upstream vector for "none"; ignored rows hold NaN."""
    mask = torch.arange(67, device=DEVICE) % 3 == 1
    for dtype in DTYPES:
        student, teacher = (randn(67, 11, seed=seed, dtype=dtype) for seed in (1, 2))
        chosen: dict[str, Any] = {"reduction": reduction}
        if masked:
            chosen["ignore_mask"] = mask
            student[mask], teacher[mask] = math.nan, INF
        _assert_zero_where(mask if masked else ~(mask | ~mask), student, teacher, chosen)
        student, teacher = student.nan_to_num(3.0), teacher.nan_to_num(posinf=2.0)  # the oracle compares with itself
        compare(softmax_kl, [student.requires_grad_(), teacher.requires_grad_()], **chosen)


def _assert_zero_where(mask: Tensor, student: Tensor, teacher: Tensor, chosen: dict[str, Any]) -> None:
    leaves = [x.clone().requires_grad_() for x in (student, teacher)]
    loss = softmax_kl(*leaves, impl="fused", **chosen)
    loss.sum().backward()
    assert loss.isfinite().all()
    for leaf in leaves:
        assert leaf.grad is not None
        assert (leaf.grad[mask] == 0).all()
        assert leaf.grad.isfinite().all()


def test_infinite_upstream_gradient_of_ignored_row() -> None:
    """The mean over kept rows as 1 / count gives one: the plain loss answers 0 there."""
    mask = torch.tensor([True, False, True], device=DEVICE)
    weights = torch.tensor([INF, 0.5, math.nan], device=DEVICE)
    compiled = torch.compile(softmax_kl, fullgraph=True, backend=BACKEND)
    for dtype in DTYPES:
        gradients = []
        for function, impl in ((softmax_kl, "fused"), (compiled, "fused"), (softmax_kl, "reference")):
            student = randn(3, 7, seed=1, dtype=dtype, grad=True)
            loss = function(student, randn(3, 7, seed=2, dtype=dtype), reduction="none", ignore_mask=mask, impl=impl)
            loss.backward(weights)
            gradients.append(student.grad)
        torch.testing.assert_close(gradients[0], gradients[2])
        torch.testing.assert_close(gradients[1], gradients[2])


@pytest.mark.parametrize("reduction", ["mean", "batchmean"])
@pytest.mark.parametrize("normalizer", [13.0, torch.tensor(13.0), torch.tensor(13)])
def test_normalizer(normalizer: float | Tensor, reduction: str) -> None:
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(DEVICE)
    inputs = [randn(5, 11, seed=1, grad=True), randn(5, 11, seed=2)]
    mask = torch.tensor([False, True, False, False, True], device=DEVICE)
    for given_mask in (None, mask):
        compare(softmax_kl, inputs, reduction=reduction, normalizer=normalizer, ignore_mask=given_mask)


class TestShapes:
    """Case 4: strides of all kinds, different ones for the two sides."""

    def test_strides(self) -> None:
        student = randn(7, 40, seed=1)[:, ::2].requires_grad_()  # a class stride of 2
        teacher = randn(20, 7, seed=2).T  # transposed
        compare(softmax_kl, [student, teacher])
        compare(softmax_kl, [teacher.clone(memory_format=torch.preserve_format).requires_grad_(), student.detach()])

    def test_every_other_row(self) -> None:
        compare(softmax_kl, [randn(14, 20, seed=1)[::2].requires_grad_(), randn(9, 20, seed=2)[2:].requires_grad_()])

    def test_expanded(self) -> None:
        teacher = randn(1, 20, seed=2).expand(7, 20)
        compare(softmax_kl, [randn(7, 20, seed=1, grad=True), teacher])
        compare(softmax_kl, [randn(7, 1, seed=1).expand(7, 20), randn(7, 20, seed=2, grad=True)])

    def test_sequences(self) -> None:
        mask = torch.arange(12, device=DEVICE).reshape(3, 4) % 5 == 0
        student = randn(4, 3, 20, seed=1).transpose(0, 1).requires_grad_()
        for reduction in ("none", "batchmean", "mean"):
            compare(softmax_kl, [student, randn(3, 4, 20, seed=2)], ignore_mask=mask, reduction=reduction)

    def test_maps(self) -> None:
        """Class maps (N, K, H, W), as dense prediction has them, moved to (N, H, W, K)."""
        student, teacher = (randn(2, 6, 3, 5, seed=seed).movedim(1, -1) for seed in (1, 2))
        compare(softmax_kl, [student.requires_grad_(), teacher], reduction="none")
        compare(softmax_kl, [student.detach().contiguous().requires_grad_(), teacher])

    @pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
    def test_channels(self, layout: torch.memory_format) -> None:
        """Maps whose rows are the channels, each a distribution over positions."""
        maps = [randn(2, 3, 5, 8, seed=seed).to(memory_format=layout).requires_grad_() for seed in (1, 2)]
        compare(channel_wise_kl, maps, temperature=2.0)

    @pytest.mark.parametrize("classes", [20, long(MORE_BLOCKS)])
    def test_views_of_two_axes_are_not_copied(self, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """Shifted sequences, on one side and on both, and class maps: rows that no single stride reaches."""
        monkeypatch.setattr(_launch, "_dense_rows", _refuse_copy)
        student, teacher = (randn(3, 5, classes, seed=seed) for seed in (1, 2))
        pairs = [
            (student[:, :-1], teacher[:, 1:]),
            (student[:, :-1], randn(3, 4, classes, seed=4)),
            (randn(12, classes, seed=4).reshape(3, 4, classes), teacher[:, :-1]),
        ]
        if classes <= _launch.MOST_STRIDED_CLASSES:
            maps = randn(3, classes, 2, 2, seed=3).movedim(1, -1)
            pairs += [(maps, randn(3, 2, 2, classes, seed=5)), (randn(3, classes, 2, 2, seed=6).movedim(1, -1), maps)]
        for s, t in pairs:
            compare(softmax_kl, [s.detach().requires_grad_(), t], reduction="none")

    def test_one_row_without_axes(self) -> None:
        for reduction in ("none", "batchmean"):
            compare(softmax_kl, [randn(9, seed=1, grad=True), randn(9, seed=2)], reduction=reduction)

    def test_one_class(self) -> None:
        student = randn(3, 1, seed=1, grad=True)
        loss = softmax_kl(student, randn(3, 1, seed=2), impl="fused")
        loss.backward()
        assert loss.item() == 0
        assert student.grad is not None
        assert (student.grad == 0).all()

    def test_unequal_classes(self) -> None:
        """Case 5."""
        with pytest.raises(ValueError, match=r"logits must have one shape, got \(2, 3\) and \(2, 4\)"):
            softmax_kl(randn(2, 3), randn(2, 4), impl="fused")

    def test_dtypes_may_differ(self) -> None:
        for student_dtype in DTYPES:
            for teacher_dtype in DTYPES:
                student = randn(5, 20, seed=1, dtype=student_dtype, grad=True)
                compare(softmax_kl, [student, randn(5, 20, seed=2, dtype=teacher_dtype, grad=True)])

    def test_more_than_2_to_the_31_elements(self) -> None:
        """Case 2: the last of three rows starts at 2^31. Pages that nobody touches take up no memory."""
        stride, classes = 2**30, 16
        try:
            student = torch.empty(2 * stride + classes, dtype=torch.bfloat16, device=DEVICE)
            teacher = torch.empty(2 * stride + classes, dtype=torch.uint8, device=DEVICE)
        except RuntimeError:
            pytest.skip("no room for 6 GiB of addresses")
        student, teacher = (x.as_strided((3, classes), (stride, 1)) for x in (student, teacher))
        student.copy_(randn(3, classes, seed=1))
        stored = quantize_logits(randn(3, classes, seed=2))
        teacher.copy_(stored.values)
        compare(quantized_kl(teacher), [student.requires_grad_(), stored.scale, stored.offset], reduction="none")


class TestPixels:
    """Class maps, whose tiles run along the pixels of an image."""

    @staticmethod
    def maps(
        classes: int = 19, size: tuple[int, int] = (3, 7), dtype: torch.dtype = torch.float32
    ) -> tuple[Tensor, Tensor]:
        """Return logits (2, H, W, K) that lie in memory as (2, K, H, W)."""
        student, teacher = (randn(2, classes, *size, seed=seed, dtype=dtype).movedim(1, -1) for seed in (1, 2))
        s, t = _launch.logit_rows(student, teacher)
        assert _launch.row_launch_for(s, t).pixels == math.gcd(size[0] * size[1], 16)
        return student.requires_grad_(), teacher

    # Odd, a multiple of 16, and two tiles an image of which the second is not full.
    @pytest.mark.parametrize("size", [(3, 7), (4, 8), (4, 72)])
    @pytest.mark.parametrize("classes", [2, 19])
    def test_sizes(self, classes: int, size: tuple[int, int]) -> None:
        for dtype in DTYPES:
            compare(softmax_kl, self.maps(classes, size, dtype), temperature=3.0)

    @pytest.mark.parametrize("standardized", [False, True])
    @pytest.mark.parametrize("divergence", DIVERGENCES)
    def test_divergences(self, divergence: str, standardized: bool) -> None:
        inputs = [x.detach().requires_grad_() for x in self.maps(7)]
        compare(softmax_kl, inputs, divergence=divergence, beta=0.3, standardized=standardized)

    @pytest.mark.long
    def test_ignored_pixels(self) -> None:
        """They are read with their neighbours, and may hold anything."""
        maps = [x.detach() for x in self.maps()]
        mask = torch.arange(42, device=DEVICE).reshape(2, 3, 7) % 5 == 0
        compare(softmax_kl, [x.requires_grad_() for x in maps], ignore_mask=mask, reduction="mean")
        spoiled = [x.detach().clone().masked_fill_(mask[..., None], math.nan).requires_grad_() for x in maps]
        assert all(x.stride() == maps[0].stride() for x in spoiled)
        results = []
        for inputs in (maps, spoiled):
            loss = softmax_kl(*inputs, ignore_mask=mask, impl="fused")
            results.append([loss, *torch.autograd.grad(loss, inputs)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

    @pytest.mark.long
    def test_other_teachers(self) -> None:
        """In rows, one image for all, of another dtype, and stored in a byte."""
        student, teacher = self.maps()
        compare(softmax_kl, [student, teacher.contiguous().requires_grad_()])
        compare(softmax_kl, [student, teacher[:1].expand(2, 3, 7, 19)])
        compare(softmax_kl, [student, teacher.bfloat16().requires_grad_()])
        stored = quantize_logits(teacher)
        values = stored.values.movedim(-1, 1).contiguous().movedim(1, -1)
        compare(quantized_kl(values), [student, stored.scale, stored.offset], reduction="none")

    def test_close_and_certain(self) -> None:
        """Pixels whose teacher gives a class 0.999 and whose student is close to it: q - p must not cancel."""
        maps = [x.T.contiguous().reshape(1, 19, 4, 8).movedim(1, -1) for x in close_logits(19, 32)]
        for student, teacher in (maps, [x.float() for x in maps]):
            compare(softmax_kl, [student.requires_grad_(), teacher])

    def test_many_classes_are_copied_as_rows(self) -> None:
        classes = _launch.MOST_STRIDED_CLASSES + 1
        student, teacher = (randn(2, classes, 4, 4, seed=seed).movedim(1, -1) for seed in (1, 2))
        assert [x.class_stride for x in _launch.logit_rows(student, teacher)] == [1, 1]
        compare(softmax_kl, [student.requires_grad_(), teacher])

    def test_more_than_2_to_the_31_elements(self) -> None:
        """Case 2: the fifth class of the second image is beyond them."""
        student, teacher = (randn(2, 4, 4, 5, seed=seed) for seed in (1, 2))
        try:
            storage = torch.empty(9 * 2**28 + 16, dtype=torch.bfloat16, device=DEVICE)
        except RuntimeError:
            pytest.skip("no room for 5 GiB of addresses")
        logits = storage.as_strided((2, 4, 4, 5), (5 * 2**28, 4, 1, 2**28)).copy_(student)
        compare(softmax_kl, [logits.requires_grad_(), teacher.bfloat16()], reduction="none")


def _refuse_copy(x: Tensor) -> _launch.Rows:
    raise AssertionError(f"{tuple(x.shape)} was copied")


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("reduction", ["none", "batchmean", "mean"])
def test_no_rows(reduction: str, divergence: str) -> None:
    """Case 9: no rows at all, none kept, and one."""
    for shape in ((0, 5), (3, 0, 5)):
        student, teacher = (torch.empty(shape, device=DEVICE, requires_grad=True) for _ in range(2))
        loss = softmax_kl(student, teacher, reduction=reduction, divergence=divergence, impl="fused")
        loss.sum().backward()
        assert loss.sum().item() == 0
        assert student.grad is not None
        assert student.grad.shape == shape
    for rows in (1, 4):
        mask = torch.ones(rows, dtype=torch.bool, device=DEVICE)
        leaves = [randn(rows, 5, seed=seed, grad=True) for seed in (1, 2)]
        loss = softmax_kl(*leaves, reduction=reduction, divergence=divergence, ignore_mask=mask, impl="fused")
        loss.sum().backward()
        assert (loss == 0).all()
        assert all((x.grad == 0).all() for x in leaves)
    compare(softmax_kl, [randn(1, 5, seed=1, grad=True), randn(1, 5, seed=2)], reduction=reduction)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("classes", [100, long(MORE_BLOCKS)])
class TestAStudentCloseToItsTeacher:
    """Case 12: bf16 logits, p_y = 0.999. Within half a percent of the same logits in float64."""

    def test_loss(self, classes: int, divergence: str, temperature: float) -> None:
        student, teacher = close_logits(classes)
        chosen: dict[str, Any] = {"divergence": divergence, "temperature": temperature}
        truth = reference.softmax_kl(student.double(), teacher.double(), **chosen)
        assert relative_error(softmax_kl(student, teacher, impl="fused", **chosen), truth) < 0.005

    def test_gradient(self, classes: int, divergence: str, temperature: float) -> None:
        """In fp32, of the same logits: rounding to bf16 would hide what is lost before it."""
        student, teacher = close_logits(classes)
        leaf, exact = student.float().requires_grad_(), student.double().requires_grad_()
        chosen: dict[str, Any] = {"divergence": divergence, "temperature": temperature}
        softmax_kl(leaf, teacher, impl="fused", **chosen).backward()
        reference.softmax_kl(exact, teacher.double(), **chosen).backward()
        assert leaf.grad is not None
        assert exact.grad is not None
        assert relative_error(leaf.grad, exact.grad) < 0.005


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16])
@pytest.mark.parametrize("standardized", [False, True])
@pytest.mark.parametrize("classes", [10, long(1000), long(MORE_BLOCKS)])
def test_quantized_teachers(classes: int, standardized: bool, dtype: torch.dtype) -> None:
    stored = quantize_logits(randn(3, classes, seed=2, scale=5), dtype)
    for divergence in DIVERGENCES if classes == 10 else ("forward",):
        student = randn(3, classes, seed=1, dtype=torch.bfloat16, grad=True)
        inputs = [student, stored.scale, stored.offset]
        compare(quantized_kl(stored.values), inputs, divergence=divergence, standardized=standardized)


def test_fp16_teachers_beyond_range_or_with_absent_class() -> None:
    teacher = randn(3, 10, seed=2)
    teacher[0, 0], teacher[1, 4] = 1e5, -INF
    stored = quantize_logits(teacher, torch.float16)
    compare(quantized_kl(stored.values), [randn(3, 10, seed=1, grad=True), stored.scale, stored.offset])


@pytest.mark.parametrize("examples", [4, long(40)])
def test_any_inputs(examples: int) -> None:
    drawn(compare_any, examples)


def compare_any(data: st.DataObject) -> None:
    """Shapes, strides, dtypes, settings and sizes of logits nobody thought of.

    But no two sides that are both nearly uniform: for them see `TestAStudentCloseToItsTeacher`. And where a gradient is
    that of the first argument of a KL, p (u - mean of u), no p that is 1 but for ε: that gradient is ε itself.
    """
    rows, classes = data.draw(st.integers(1, 40)), data.draw(st.integers(2, 70))
    divergence, both = data.draw(st.sampled_from(DIVERGENCES)), data.draw(st.booleans())
    scales = [1.0, 2.0] if both or divergence != "forward" else [1.0, 30.0, 300.0]
    inputs = []
    for seed in (1, 2):
        scale = data.draw(st.sampled_from(scales + [0.0, 1e-3] * (seed == 1)))
        dtype = data.draw(st.sampled_from(DTYPES))
        row_step, column_step = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3))
        x = randn(rows * row_step, classes * column_step, seed=seed, scale=scale, dtype=dtype)
        x = x[::row_step, ::column_step]
        if data.draw(st.booleans()):
            x = x.T.contiguous().T
        inputs.append(x.requires_grad_(seed == 1 or both))
    compare(
        softmax_kl,
        inputs,
        divergence=divergence,
        temperature=data.draw(st.sampled_from([1.0, 4.0])),
        reduction=data.draw(st.sampled_from(["none", "sum", "batchmean", "mean"])),
        beta=data.draw(st.sampled_from([0.1, 0.5, 0.9])),
    )
