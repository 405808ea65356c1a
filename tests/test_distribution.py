"""FDP: the Gaussian it predicts, its precision, its gradients, what it refuses."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call

from support.numerics import assert_no_worse_than_eager, relative_error
from unikd_fast import FeatureDistributionPrediction, Gaussian

D, K = 12, 5


def module(**options: Any) -> FeatureDistributionPrediction:
    torch.manual_seed(0)
    fdp = FeatureDistributionPrediction(D, K, **options)
    with torch.no_grad():
        for parameter in fdp.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return fdp


def pooled(batch: int = 4) -> Tensor:
    return 3 + 2 * torch.randn(batch, D, generator=torch.Generator().manual_seed(1))


def by_hand(x: Tensor, state: dict[str, Tensor], floor: float) -> tuple[Tensor, Tensor]:
    """Section 3.2 with every step written out."""
    if "norm.weight" in state:
        x = (x - x.mean(1, keepdim=True)) / (x.var(1, unbiased=False, keepdim=True) + 1e-5).sqrt()
        x = x * state["norm.weight"] + state["norm.bias"]
    h = x
    if "projection.weight" in state:
        h = x @ state["projection.weight"].T + state["projection.bias"]
    raw = h @ state["variance.weight"].T + state["variance.bias"]
    return h @ state["mean.weight"].T + state["mean.bias"], ((1 + raw.exp()).log() + floor).log()


@pytest.mark.parametrize("form", ["projected", "direct"])
@pytest.mark.parametrize("norm", ["layer", "none"])
@pytest.mark.parametrize("floor", [0.1, 1e-5])
def test_equals_the_formula(norm: str, floor: float, form: str) -> None:
    fdp, x = module(norm=norm, variance_floor=floor, form=form).double(), pooled().double()
    gaussian = fdp(x)
    assert isinstance(gaussian, Gaussian)
    # float64, the same few operations in another order
    torch.testing.assert_close(tuple(gaussian), by_hand(x, fdp.state_dict(), floor), rtol=1e-12, atol=1e-12)


def test_direct_form_is_linear_in_the_classes() -> None:
    def parameters(form: str, classes: int) -> int:
        with torch.device("meta"):
            fdp = FeatureDistributionPrediction(256, classes, form=form)
        return sum(parameter.numel() for parameter in fdp.parameters())

    assert parameters("projected", 21_841) == 2 * 256 + 257 * 21_841 + 2 * 21_842 * 21_841
    assert parameters("direct", 21_841) == 2 * 256 + 2 * 257 * 21_841


@pytest.mark.parametrize("form", ["projected", "direct"])
@pytest.mark.parametrize("norm", ["layer", "none"])
def test_gradients(norm: str, form: str) -> None:
    fdp = module(norm=norm, form=form).double()
    names, values = zip(*fdp.named_parameters(), strict=True)

    def predict(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        return tuple(functional_call(fdp, dict(zip(names, parameters, strict=True)), (x,)))

    leaves = [value.detach().requires_grad_() for value in values]
    assert torch.autograd.gradcheck(predict, (pooled(2).double().requires_grad_(), *leaves))


@given(st.floats(-1e4, 1e4), st.sampled_from([0.1, 1e-3]))
@settings(max_examples=40, deadline=None)
def test_variance_is_finite_and_above_the_floor(scale: float, floor: float) -> None:
    fdp = module(norm="none", variance_floor=floor)
    mean, log_var = fdp(scale * pooled())
    assert mean.isfinite().all()
    assert log_var.isfinite().all()
    assert (log_var.exp() >= floor * (1 - 1e-6)).all()  # ln and exp in fp32


def test_layer_norm_removes_the_scale() -> None:
    """Which is what keeps it stable while the AFF in front of it grows."""
    x = pooled()
    for norm, blind in (("layer", True), ("none", False)):
        fdp = module(norm=norm)
        mean, other = fdp(x).mean, fdp(50 * x).mean
        assert (relative_error(other, mean) < 1e-4) == blind  # 1e-5 is added to a variance of 4


def test_autocast_and_half_inputs_give_fp32() -> None:
    fdp, x = module(), pooled()
    expected = fdp(x)
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = fdp(x)
        of_half = fdp(x.bfloat16())
    for part, value, half, want in zip(under_autocast, expected, of_half, fdp(x.bfloat16().float()), strict=True):
        assert part.dtype == half.dtype == torch.float32
        assert torch.equal(part, value)
        assert torch.equal(half, want)


def test_half_weights_are_used_in_fp32() -> None:
    """An engine may keep all weights in bf16; the rounding of the weights is then the only one."""
    fdp, x = module().bfloat16(), pooled()
    state = {name: value.double() for name, value in fdp.state_dict().items()}
    truth = by_hand(x.double(), state, 0.1)
    gaussian = fdp(x)
    for part, value in zip(gaussian, truth, strict=True):
        assert part.dtype == torch.float32
        assert relative_error(part, value) < 1e-5  # roundings of fp32 and not of bf16, 3.9e-3


def test_no_worse_than_separate_layers() -> None:
    fdp = module()

    def one_by_one(x: Tensor) -> tuple[Tensor, Tensor]:
        layers = fdp.double() if x.dtype == torch.float64 else fdp.float()
        h = layers.projection(layers.norm(x))
        return layers.mean(h), (torch.nn.functional.softplus(layers.variance(h)) + 0.1).log()

    assert_no_worse_than_eager(lambda x: tuple(fdp.float()(x)), one_by_one, [pooled(64).requires_grad_()])


def test_detached_weights_pass_the_gradient_on() -> None:
    """How the student uses the shared module: through its numbers, without touching them."""
    fdp, x = module(), pooled().requires_grad_()
    frozen = {name: value.detach() for name, value in fdp.named_parameters()}
    gaussian = functional_call(fdp, frozen, (x,))
    (gaussian.mean.sum() + gaussian.log_var.sum()).backward()
    assert all(parameter.grad is None for parameter in fdp.parameters())
    other = pooled().requires_grad_()
    expected = fdp(other)
    (expected.mean.sum() + expected.log_var.sum()).backward()
    assert x.grad is not None
    assert torch.equal(x.grad, other.grad)


def test_compiles_into_one_graph() -> None:
    fdp, x = module(), pooled()
    for part, value in zip(torch.compile(fdp, fullgraph=True, backend="aot_eager")(x), fdp(x), strict=True):
        torch.testing.assert_close(part, value, rtol=1e-6, atol=1e-6)  # fp32, other decompositions


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 0}, "width and num_classes must be at least 1, got 0 and 5"),
        ({"num_classes": 0}, "width and num_classes must be at least 1, got 12 and 0"),
        ({"form": "auto"}, "form must be 'projected' or 'direct', got 'auto'"),
        ({"norm": "batch"}, "norm must be 'layer' or 'none', got 'batch'"),
        ({"variance_floor": 0.0}, "variance_floor must be finite and above 0, got 0.0"),
        ({"variance_floor": float("nan")}, "variance_floor must be finite and above 0, got nan"),
    ],
)
def test_bad_options_are_rejected(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"FeatureDistributionPrediction: {message}"):
        FeatureDistributionPrediction(**{"width": D, "num_classes": K, **options})


@pytest.mark.parametrize("shape", [(4, D + 1), (4, D, 1, 1), (D,)])
def test_features_must_be_pooled(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"pooled must be \(N, 12\), got .*; average F_R over its pixels first"):
        module()(torch.zeros(shape))
