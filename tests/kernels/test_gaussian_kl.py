"""The kernel of Gaussian KL against plain PyTorch and float64."""

import pytest
import torch
from hypothesis import strategies as st
from torch import Tensor

from support.kernel_inputs import DEVICE, DTYPES, compare, drawn, gaussians, long, quiet, randn
from support.numerics import relative_error
from unikd_fast import gaussian_kl
from unikd_fast.kernels import reference

pytestmark = quiet
WANTED = ((True, True, False, False), (True,) * 4, (False, False, True, True), (False, True, False, False))


@pytest.mark.parametrize("wanted", WANTED)
@pytest.mark.parametrize("classes", [1, 100, long(2), long(1003), long(2049)])
def test_wanted_gradients(classes: int, wanted: tuple[bool, ...]) -> None:
    """Case 17: of each parameter alone, of the student's, of all."""
    for dtype in DTYPES:
        compare(gaussian_kl, gaussians(5, classes, dtype=dtype, grad=wanted))


@pytest.mark.parametrize("feature_reduction", ["mean", "sum"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "batchmean"])
def test_reductions(reduction: str, feature_reduction: str) -> None:
    """Case 8."""
    for dtype in DTYPES:
        inputs = gaussians(67, 11, dtype=dtype, grad=(True,) * 4)
        compare(gaussian_kl, inputs, reduction=reduction, feature_reduction=feature_reduction)


@pytest.mark.parametrize("normalizer", [13.0, torch.tensor(13.0)])
def test_normalizer(normalizer: float | Tensor) -> None:
    if isinstance(normalizer, Tensor):
        normalizer = normalizer.to(DEVICE)
    compare(gaussian_kl, gaussians(5, 11, grad=(True,) * 4), normalizer=normalizer)


class TestShapes:
    """Case 4."""

    def test_strides(self) -> None:
        inputs = [
            randn(7, 40, seed=1)[:, ::2],
            randn(20, 7, seed=2, scale=0.5).T,
            randn(1, 20, seed=3).expand(7, 20),
            randn(7, 1, seed=4, scale=0.5).expand(7, 20),
        ]
        compare(gaussian_kl, [x.requires_grad_() for x in inputs], reduction="none")
        compare(gaussian_kl, [x.detach().requires_grad_(i < 2) for i, x in enumerate(inputs)])

    def test_more_axes(self) -> None:
        inputs = [randn(4, 3, 20, seed=i, scale=0.5).transpose(0, 1).requires_grad_() for i in range(4)]
        for reduction in ("none", "batchmean"):
            compare(gaussian_kl, inputs, reduction=reduction)

    def test_maps(self) -> None:
        inputs = [randn(2, 6, 3, 5, seed=i, scale=0.5).movedim(1, -1).requires_grad_(i != 2) for i in range(4)]
        compare(gaussian_kl, inputs, reduction="none")

    def test_no_axes(self) -> None:
        compare(gaussian_kl, [randn(9, seed=i, scale=0.5, grad=True) for i in range(4)])

    def test_unequal_classes(self) -> None:
        """Case 5."""
        with pytest.raises(ValueError, match=r"student and teacher means must have one shape, got \(2, 3\) and \(2, 4"):
            gaussian_kl(*[randn(2, 3)] * 2, *[randn(2, 4)] * 2, impl="fused")

    def test_dtypes_may_differ(self) -> None:
        dtypes = (*DTYPES, torch.float32)
        inputs = [randn(5, 20, seed=i, scale=0.5, dtype=dtype, grad=True) for i, dtype in enumerate(dtypes)]
        compare(gaussian_kl, inputs)

    @pytest.mark.parametrize("reduction", ["none", "batchmean"])
    def test_no_rows_and_one(self, reduction: str) -> None:
        """Case 9."""
        leaves = [torch.empty(0, 5, device=DEVICE, requires_grad=True) for _ in range(4)]
        loss = gaussian_kl(*leaves, reduction=reduction, impl="fused")
        loss.sum().backward()
        assert loss.sum().item() == 0
        assert all(x.grad is not None and x.grad.shape == (0, 5) for x in leaves)
        compare(gaussian_kl, gaussians(1, 5, grad=(True,) * 4), reduction=reduction)

    def test_more_than_2_to_the_31_elements(self) -> None:
        """Case 2. Parameters that are not dense are copied, so their strides never reach the kernel."""
        stride, classes = 2**30, 16
        try:
            storage = torch.empty(2 * stride + classes, dtype=torch.bfloat16, device=DEVICE)
        except RuntimeError:
            pytest.skip("no room for 4 GiB of addresses")
        mean = storage.as_strided((3, classes), (stride, 1)).copy_(randn(3, classes, seed=1))
        others = gaussians(3, classes, grad=(True,) * 4)[1:]
        compare(gaussian_kl, [mean.requires_grad_(), *others], reduction="none")


def test_extremes() -> None:
    """Case 1: means of ±1e4; variances from e^-30 to e^30. Nothing is NaN and what overflows does so in both."""
    inputs = gaussians(4, 6, grad=(False,) * 4)
    inputs[0][0, 0], inputs[2][0, 1] = 1e4, -1e4
    inputs[1][1, 0], inputs[1][1, 1], inputs[3][2, 0], inputs[3][2, 1] = 30.0, -30.0, 30.0, -30.0
    compare(gaussian_kl, [x.requires_grad_() for x in inputs], reduction="none")
    student = [torch.zeros(1, 2, device=DEVICE), torch.full((1, 2), 100.0, device=DEVICE)]
    assert gaussian_kl(*student, *[torch.zeros(1, 2, device=DEVICE)] * 2, impl="fused").item() == float("inf")


def test_a_student_close_to_its_teacher() -> None:
    """Case 12: differences of a few ulps of bf16. Within half a percent of the same numbers in float64."""
    teacher = gaussians(16, 100, grad=(False,) * 4)[2:]
    student = [x + randn(16, 100, seed=i, scale=0.01) for i, x in enumerate(teacher)]
    rounded = [x.bfloat16() for x in (*student, *teacher)]
    leaves = [x.clone().requires_grad_() for x in rounded]
    exact = [x.double().requires_grad_() for x in rounded]
    loss, truth = gaussian_kl(*leaves, impl="fused"), reference.gaussian_kl(*exact)
    loss.backward()
    truth.backward()
    assert relative_error(loss, truth) < 1e-5
    for a, b in zip(leaves, exact, strict=True):
        assert a.grad is not None
        assert b.grad is not None
        assert relative_error(a.grad, b.grad) < 0.005


def test_equal_gaussians_have_none() -> None:
    leaves = gaussians(5, 20, grad=(True, True, False, False))
    loss = gaussian_kl(*leaves[:2], *(x.detach().clone() for x in leaves[:2]), impl="fused")
    loss.backward()
    assert loss.item() == 0
    assert all((x.grad == 0).all() for x in leaves[:2])


@pytest.mark.parametrize("examples", [8, long(30)])
def test_any_inputs(examples: int) -> None:
    drawn(compare_any, examples)


def compare_any(data: st.DataObject) -> None:
    """Shapes, strides, dtypes, settings and sizes nobody thought of."""
    rows, classes = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    inputs = []
    for i in range(4):
        scale = data.draw(st.sampled_from([1e-2, 1.0, 5.0] if i % 2 else [1e-2, 1.0, 100.0]))
        dtype, step = data.draw(st.sampled_from(DTYPES)), data.draw(st.integers(1, 3))
        x = randn(rows, classes * step, seed=i, scale=scale, dtype=dtype)[:, ::step]
        if data.draw(st.booleans()):
            x = x.T.contiguous().T
        inputs.append(x.requires_grad_(i == 0 or data.draw(st.booleans())))
    compare(
        gaussian_kl,
        inputs,
        reduction=data.draw(st.sampled_from(["none", "sum", "batchmean"])),
        feature_reduction=data.draw(st.sampled_from(["mean", "sum"])),
    )
