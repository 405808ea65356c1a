"""Eq. 4 against loops over pixels, the collapsed average of F_R against the stage-wise one, and batch statistics."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from support.numerics import outputs_and_gradients, relative_error
from unikd_fast.kernels.reference_fusion import fuse_stagewise, resize, resize_adjoint
from unikd_fast.kernels.reference_moments import channel_moments
from unikd_fast.kernels.reference_pooled import pool_collapsed

Size = tuple[int, int]
MODES = ["nearest", "bilinear"]

# Name -> sizes of the levels, fine to coarse; channels are 3, 5, 7, ... Each is there for a reason.
PYRAMIDS: dict[str, list[Size]] = {
    "halving": [(16, 12), (8, 6), (4, 3)],
    "odd sizes, ratio not 2": [(13, 11), (7, 5), (2, 3)],
    "equal sizes": [(6, 5), (6, 5), (3, 3), (3, 3)],
    "one level": [(5, 4)],
    "five levels, down to a pixel": [(17, 16), (9, 8), (5, 4), (2, 2), (1, 1)],
    "ratio 9 at once": [(9, 9), (1, 1)],
    "one axis alone grows": [(8, 4), (4, 4)],
}


def problem(
    sizes: list[Size],
    *,
    width: int = 4,
    batch: int = 2,
    gate_maps: int = 1,
    dtype: torch.dtype = torch.float64,
    channels: list[int] | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Features, then the parameters of E and of the gates, with gates that open and close (pre-activations of ~1)."""
    generator = torch.Generator().manual_seed(seed)
    channels = channels or [3 + 2 * level for level in range(len(sizes))]

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        x = torch.randn(*shape, generator=generator, dtype=torch.float64) * scale
        return x.to(dtype).requires_grad_()

    features = [randn(batch, c, *size) for c, size in zip(channels, sizes, strict=True)]
    weights = [randn(width, c, 1, 1, scale=c**-0.5) for c in channels]
    biases = [randn(width) for _ in channels]
    gate_weights = [randn(gate_maps, 2 * width, 3, 3, scale=(18 * width) ** -0.5) for _ in sizes[1:]]
    gate_biases = [randn(gate_maps) for _ in sizes[1:]]
    return [*features, *weights, *biases, *gate_weights, *gate_biases]


def unpacked(tensors: tuple[Tensor, ...]) -> list[list[Tensor]]:
    levels = (len(tensors) + 2) // 5
    ends = list(itertools.accumulate([0, levels, levels, levels, levels - 1, levels - 1]))
    return [list(tensors[start:end]) for start, end in itertools.pairwise(ends)]


def stagewise(mode: str) -> Callable[..., Tensor]:
    return lambda *tensors: fuse_stagewise(*unpacked(tensors), upsample=mode)


def stagewise_average(mode: str) -> Callable[..., Tensor]:
    return lambda *tensors: fuse_stagewise(*unpacked(tensors), upsample=mode).mean((2, 3))


def collapsed(mode: str) -> Callable[..., Tensor]:
    return lambda *tensors: pool_collapsed(*unpacked(tensors), upsample=mode)


def fuse_pixel_by_pixel(features: list[Tensor], parameters: list[list[Tensor]]) -> Tensor:
    """Eq. 4 with nearest upsampling as loops over samples, pixels and taps."""
    weights, biases, gate_weights, gate_biases = parameters
    n, width = len(features[0]), len(biases[0])
    fused: Tensor | None = None
    for level in reversed(range(len(features))):
        h, w = features[level].shape[-2:]
        result = torch.zeros(n, width, h, w, dtype=torch.float64)
        for i in range(n):
            own = {
                (y, x): weights[level][:, :, 0, 0] @ features[level][i, :, y, x] + biases[level]
                for y in range(h)
                for x in range(w)
            }
            for (y, x), e in own.items():
                if fused is None:
                    result[i, :, y, x] = e
                    continue

                def up(y: int, x: int, i: int = i, below: Tensor = fused, h: int = h, w: int = w) -> Tensor:
                    return below[i, :, y * below.shape[2] // h, x * below.shape[3] // w]

                before = gate_biases[level].clone()
                for dy, dx in itertools.product((-1, 0, 1), repeat=2):
                    if (y + dy, x + dx) in own:
                        both = torch.cat([own[y + dy, x + dx], up(y + dy, x + dx)])
                        before = before + gate_weights[level][:, :, dy + 1, dx + 1] @ both
                gate = before.sigmoid()
                result[i, :, y, x] = gate * e + (1 - gate) * up(y, x)
        fused = result
    assert fused is not None
    return fused


class TestStagewise:
    @pytest.mark.parametrize("gate_maps", [1, 3])
    def test_equals_eq_4_pixel_by_pixel(self, gate_maps: int) -> None:
        with torch.no_grad():
            features, *parameters = unpacked(
                tuple(problem([(5, 6), (3, 3), (1, 2)], width=3, gate_maps=gate_maps, batch=2))
            )
            fused = fuse_stagewise(features, *parameters)
            # Two float64 computations in another order.
            torch.testing.assert_close(fused, fuse_pixel_by_pixel(features, parameters), rtol=1e-12, atol=1e-13)

    @pytest.mark.parametrize("gate_maps", [1, 2])
    @pytest.mark.parametrize("mode", MODES)
    def test_gradients(self, mode: str, gate_maps: int) -> None:
        inputs = tuple(problem([(4, 3), (2, 2)], width=2, batch=1, channels=[2, 3], gate_maps=gate_maps))
        assert torch.autograd.gradcheck(stagewise(mode), inputs)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
    def test_channel_gates_against_float64(self, dtype: torch.dtype, mode: str) -> None:
        inputs = [x.detach().to(dtype).requires_grad_() for x in problem(PYRAMIDS["halving"], gate_maps=4)]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        (output, *gradients), (truth, *expected) = (
            [y[0], *g] for y, g in (outputs_and_gradients(stagewise(mode), x) for x in (inputs, exact))
        )
        # Three blends and their products, each rounded: some ε of the dtype.
        assert relative_error(output, truth) < 8 * torch.finfo(dtype).eps
        for gradient, value in zip(gradients, expected, strict=True):
            assert gradient is not None
            assert value is not None
            assert relative_error(gradient, value) < 32 * torch.finfo(dtype).eps


class TestUpsampling:
    @given(
        st.tuples(st.integers(1, 6), st.integers(1, 6)),
        st.tuples(st.integers(0, 9), st.integers(0, 9)),
        st.sampled_from(MODES),
    )
    @settings(max_examples=60, deadline=None)
    def test_adjoint_is_the_transpose(self, small: Size, more: Size, mode: str) -> None:
        """<Up x, y> = <x, Upᵀ y> for any sizes, and Up of a constant is that constant."""
        large = (small[0] + more[0], small[1] + more[1])
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(1, 2, *small, generator=generator, dtype=torch.float64)
        y = torch.randn(1, 2, *large, generator=generator, dtype=torch.float64)
        left = (resize(x, large, mode) * y).sum()
        right = (x * resize_adjoint(y, small, mode)).sum()
        # PyTorch takes the weights of bilinear upsampling in float64 from positions of about 1e-16 relative.
        torch.testing.assert_close(left, right, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(resize(torch.ones_like(x), large, mode), torch.ones_like(y), rtol=1e-12, atol=0)

    @pytest.mark.parametrize("mode", MODES)
    def test_adjoint_differentiates(self, mode: str) -> None:
        x = torch.randn(1, 1, 5, 7, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda v: resize_adjoint(v, (2, 3), mode), (x,))


class TestCollapsed:
    """The collapsed average is Eq. 4 averaged: outputs and all gradients, in float64."""

    def assert_equal(self, inputs: list[Tensor], mode: str) -> None:
        output, gradients = outputs_and_gradients(collapsed(mode), inputs)
        expected, expected_gradients = outputs_and_gradients(stagewise_average(mode), inputs)
        # Some hundred additions in another order, each with 1.1e-16.
        assert relative_error(output[0], expected[0]) < 1e-13
        for i, (gradient, value) in enumerate(zip(gradients, expected_gradients, strict=True)):
            assert gradient is not None
            assert value is not None
            assert relative_error(gradient, value) < 1e-11, f"gradient {i}, {tuple(value.shape)}"

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("sizes", PYRAMIDS.values(), ids=PYRAMIDS)
    def test_equals_stagewise(self, sizes: list[Size], mode: str) -> None:
        self.assert_equal(problem(sizes), mode)

    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize(("batch", "width"), [(1, 1), (1, 6), (3, 1)])
    def test_smallest_batch_and_width(self, batch: int, width: int, mode: str) -> None:
        self.assert_equal(problem(PYRAMIDS["halving"], batch=batch, width=width), mode)

    @given(st.data())
    @settings(max_examples=25, deadline=None)
    def test_equals_stagewise_for_any_sizes(self, data: st.DataObject) -> None:
        sizes = [(data.draw(st.integers(1, 3)), data.draw(st.integers(1, 3)))]
        for _ in range(data.draw(st.integers(0, 3))):
            h, w = sizes[0]
            sizes.insert(0, (h + data.draw(st.integers(0, h + 1)), w + data.draw(st.integers(0, w + 1))))
        self.assert_equal(problem(sizes), data.draw(st.sampled_from(MODES)))

    @pytest.mark.parametrize("mode", MODES)
    def test_gradients_by_differences(self, mode: str) -> None:
        inputs = tuple(problem([(5, 4), (3, 2), (1, 2)], width=2, batch=1, channels=[2, 3, 2]))
        assert torch.autograd.gradcheck(collapsed(mode), inputs)

    def test_channels_last_features(self) -> None:
        inputs = problem(PYRAMIDS["halving"])
        last = [
            x.detach().contiguous(memory_format=torch.channels_last).requires_grad_() if i < 3 else x
            for i, x in enumerate(inputs)
        ]
        _, expected = outputs_and_gradients(stagewise_average("nearest"), inputs)
        _, gradients = outputs_and_gradients(collapsed("nearest"), last)
        for level, (gradient, value) in enumerate(zip(gradients, expected, strict=True)):
            assert gradient is not None
            assert value is not None
            assert relative_error(gradient, value) < 1e-11
            if level < 3:  # or the backward pass of the network would begin with a copy
                assert gradient.is_contiguous(memory_format=torch.channels_last)

    def test_strided_and_expanded_features(self) -> None:
        inputs = problem([(6, 8), (3, 4)], batch=3)
        fine, coarse = (x.detach() for x in inputs[:2])
        wide = torch.zeros(3, 3, 6, 16, dtype=torch.float64)
        wide[..., ::2] = fine
        odd = [wide[..., ::2].requires_grad_(), coarse[:1].expand(3, -1, -1, -1).requires_grad_(), *inputs[2:]]
        plain = [fine, coarse[:1].repeat(3, 1, 1, 1), *inputs[2:]]
        output, _ = outputs_and_gradients(collapsed("nearest"), odd)
        expected, _ = outputs_and_gradients(stagewise_average("nearest"), plain)
        assert relative_error(output[0], expected[0]) < 1e-13

    # Who asks for a gradient in training: the student all of it, a teacher's head the parameters, a frozen AFF the
    # features. The two reads of a feature share their backward pass, so each has to work by itself.
    @pytest.mark.parametrize("wanted", ["features", "expand", "gates", "one feature"])
    def test_gradients_for_a_part_of_the_inputs(self, wanted: str) -> None:
        inputs = problem(PYRAMIDS["halving"])
        selected = {
            "features": range(3),
            "expand": range(3, 9),
            "gates": range(9, len(inputs)),
            "one feature": range(1, 2),
        }[wanted]
        for i, x in enumerate(inputs):
            x.requires_grad_(i in selected)
        self.assert_equal(inputs, "nearest")

    def test_backward_twice(self) -> None:
        inputs = problem(PYRAMIDS["halving"])
        output, expected = collapsed("nearest")(*inputs), stagewise_average("nearest")(*inputs)
        for seed in range(2):
            upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
            gradients = torch.autograd.grad(output, inputs, upstream, retain_graph=True)
            values = torch.autograd.grad(expected, inputs, upstream, retain_graph=True)
            assert max(map(relative_error, gradients, values)) < 1e-11

    def test_second_derivatives_are_rejected(self) -> None:
        inputs = problem([(4, 4), (2, 2)])
        output = collapsed("nearest")(*inputs)
        (gradient,) = torch.autograd.grad(output.sum(), inputs[0], create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            gradient.sum().backward()

    def test_no_rows(self) -> None:
        assert collapsed("nearest")(*problem([(4, 4), (2, 2)], batch=0)).shape == (0, 4)

    def test_the_border_of_the_gate_sees_no_bias(self) -> None:
        """E's bias does not reach into the zero padding of the gate: with zero features only the border tells."""
        inputs = problem([(3, 3), (2, 2)])
        with torch.no_grad():
            for feature in inputs[:2]:
                feature.zero_()
            inputs[4].fill_(10.0)
        self.assert_equal(inputs, "nearest")


class TestPrecision:
    # Sums over 64 to 256 channels and 256 pixels, so that half precision has something to lose; three seeds, so that
    # the comparison is not luck.
    @pytest.mark.parametrize("seed", [0, 1, 2])
    @pytest.mark.parametrize("mode", MODES)
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_collapsed_is_more_accurate_in_half_precision(self, dtype: torch.dtype, mode: str, seed: int) -> None:
        exact = problem([(16, 16), (8, 8), (4, 4)], width=64, channels=[64, 128, 256], batch=4, seed=seed)
        # Half features, fp32 parameters: what autocast and a half-precision teacher hand over.
        inputs = [x.detach().to(dtype if i < 3 else torch.float32).requires_grad_() for i, x in enumerate(exact)]
        exact = [x.detach().double().requires_grad_() for x in inputs]
        truth, true_gradients = outputs_and_gradients(stagewise_average(mode), exact)
        errors = {}
        for name, compute in (("stage-wise", stagewise_average(mode)), ("collapsed", collapsed(mode))):
            output, gradients = outputs_and_gradients(compute, inputs)
            of_features = [g for g in gradients[:3] if g is not None]
            errors[name] = [
                relative_error(output[0], truth[0]),
                max(
                    relative_error(g, t) for g, t in zip(of_features, true_gradients[:3], strict=True) if t is not None
                ),
            ]
        assert errors["collapsed"][0] < 0.85 * errors["stage-wise"][0], errors
        assert errors["collapsed"][1] < 0.85 * errors["stage-wise"][1], errors

    def test_fp32_is_no_worse_than_stagewise(self) -> None:
        exact = problem([(16, 16), (8, 8), (4, 4)], width=64, channels=[64, 128, 256], batch=4)
        inputs = [x.detach().float().requires_grad_() for x in exact]
        truth, _ = outputs_and_gradients(stagewise_average("nearest"), [x.double() for x in inputs])
        output, _ = outputs_and_gradients(collapsed("nearest"), inputs)
        expected, _ = outputs_and_gradients(stagewise_average("nearest"), inputs)
        assert relative_error(output[0], truth[0]) <= relative_error(expected[0], truth[0]) + 1.2e-7

    # Where the weights go through fp16, a gate at 1 and at 0.0025 over 3136 pixels: a plain sum of the first leaves
    # its range (65504), the pixel weights of the second, 8e-7, are a dozen of its smallest steps.
    @pytest.mark.parametrize("gate_bias", [6.0, -6.0])
    def test_fp16_neither_overflows_nor_underflows(self, gate_bias: float) -> None:
        inputs = [x.detach() for x in problem([(56, 56), (28, 28)], batch=1)]
        fine, coarse, _, _, bias_1, bias_2, gate, _ = inputs
        fine.abs_().add_(40)
        for x in (coarse, bias_1, bias_2, gate):  # so that the fine level and the gate's bias are all there is
            x.zero_()
        inputs[-1] = torch.full((1,), gate_bias, dtype=torch.float64)
        inputs = [x.to(torch.float16 if i < 2 else torch.float32) for i, x in enumerate(inputs)]
        output = collapsed("nearest")(*inputs)
        expected = stagewise_average("nearest")(*(x.double() for x in inputs))
        assert relative_error(output, expected) < 2e-3  # one rounding of the weights and one of the sum, 4.9e-4 each


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shift", [0.0, 1.9, 100.0])
def test_channel_moments(shift: float, dtype: torch.dtype, channels_last: bool) -> None:
    """With means up to a hundred deviations."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    feature = torch.randn(6, 5, 17, 13, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + shift
    feature[:, 1] = 3.0  # no variance
    feature[:, 2] = 0.0
    feature = feature.to(dtype).contiguous(memory_format=layout)
    mean, variance = channel_moments(feature)
    assert mean.dtype == variance.dtype == torch.promote_types(dtype, torch.float32)
    exact = feature.double()
    # What is added are numbers of the size of the mean; E[x²] - E[x]² would be wrong by its square.
    bound = (8 + shift) * torch.finfo(mean.dtype).eps
    assert relative_error(mean, exact.mean((0, 2, 3))) < bound
    assert relative_error(variance, exact.var((0, 2, 3), correction=0)) < bound
    assert (variance >= 0).all()


def test_moments_have_no_gradient() -> None:
    mean, variance = channel_moments(torch.randn(2, 3, 4, 4, requires_grad=True))
    assert not mean.requires_grad
    assert not variance.requires_grad


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_nonfinite_values_stay_in_their_channel(value: float) -> None:
    feature = torch.randn(2, 3, 4, 4)
    clean = channel_moments(feature)
    feature[1, 1, 2, 2] = value
    for spoilt, before in zip(channel_moments(feature), clean, strict=True):
        assert not spoilt[1].isfinite()
        torch.testing.assert_close(spoilt[[0, 2]], before[[0, 2]])


def test_one_pixel_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"two pixels or more, got a feature of \(1, 3, 1, 1\)"):
        channel_moments(torch.zeros(1, 3, 1, 1))
