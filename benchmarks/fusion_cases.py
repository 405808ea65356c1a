"""The fusions that are measured: shapes, inputs, forms, and what each must reach.

The feature shapes are those of the networks in the paper's recipes at their input sizes. Arguments are flat lists: the
features from fine to coarse, weights and biases of the expanders, weights and biases of the gates.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from measurement import Compute
from speed_targets import Target
from torch import Tensor

from unikd_fast.kernels.reference_fusion import blend_top_down, fuse_stagewise
from unikd_fast.kernels.reference_pooled import pool_collapsed


@dataclass(frozen=True)
class Pyramid:
    """The features of one network, fine to coarse: channels, and height and width in pixels."""

    name: str
    channels: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def values_per_image(self) -> int:
        return sum(c * size * size for c, size in zip(self.channels, self.sizes, strict=True))


RESNET50 = Pyramid("ResNet-50", (256, 512, 1024, 2048), (56, 28, 14, 7))
MOBILENET_V1 = Pyramid("MobileNetV1", (128, 256, 512, 1024), (56, 28, 14, 7))
RESNET32X4 = Pyramid("resnet32x4", (64, 128, 256), (32, 16, 8))


def pooled_inputs(pyramid: Pyramid, width: int, randn: Callable[..., Tensor]) -> list[Tensor]:
    """Draw features and parameters; `randn(*shape, scale=1.0)` gives a tensor, of a whole batch for (C, H, W)."""
    levels = list(zip(pyramid.channels, pyramid.sizes, strict=True))
    return [
        *(randn(c, size, size) for c, size in levels),
        *(randn(width, c, 1, 1, scale=c**-0.5) for c, _ in levels),
        *(randn(width) for _ in levels),
        *_gates(len(levels) - 1, width, randn),
    ]


def blend_inputs(pyramid: Pyramid, randn: Callable[..., Tensor]) -> list[Tensor]:
    """Draw E(F) of a level, R of the one above it, and the gate between them."""
    width = pyramid.channels[0]
    features = [randn(c, size, size) for c, size in zip(pyramid.channels, pyramid.sizes, strict=True)]
    return [*features, *_gates(len(features) - 1, width, randn)]


def _gates(count: int, width: int, randn: Callable[..., Tensor]) -> list[Tensor]:
    weights = [randn(1, 2 * width, 3, 3, scale=(18 * width) ** -0.5) for _ in range(count)]
    return weights + [randn(1) for _ in range(count)]


def levels_of(x: Sequence[Tensor]) -> tuple[Sequence[Tensor], ...]:
    """Split the arguments of a pooled fusion as `fuse_stagewise` takes them: three a level, and two a gate."""
    n = (len(x) + 2) // 5
    return x[:n], x[n : 2 * n], x[2 * n : 3 * n], x[3 * n : 4 * n - 1], x[4 * n - 1 :]


def stagewise_pooled(*x: Tensor) -> Tensor:
    """Return what `AdaptiveFeatureFusion.pooled` gives stage by stage, (N, D)."""
    fused = fuse_stagewise(*levels_of(x))
    return fused.mean((2, 3), dtype=torch.promote_types(fused.dtype, torch.float32))


def collapsed_pooled(*x: Tensor) -> Tensor:
    return pool_collapsed(*levels_of(x))


def fused_pooled(*x: Tensor) -> Tensor:
    from unikd_fast.kernels.pooled_fusion import fused_pool

    return fused_pool(*levels_of(x))


def stagewise_blend(fine: Tensor, coarse: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Return R_l of one step of Eq. 4."""
    return blend_top_down([fine, coarse], [weight], [bias])


def fused_blend(fine: Tensor, coarse: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from unikd_fast.kernels.feature_fusion import fused_blend

    return fused_blend(fine, coarse, weight, bias)


@dataclass(frozen=True)
class Form:
    """One fusion in all its forms, and the roofs that its bytes are compared with."""

    ours: Compute
    plain: Compute
    peers: Mapping[str, Compute]
    forward_roof: str
    backward_roof: str
    writes_map: bool  # at the size of the finest feature; else (N, D), a thousandth of that


FORMS = {
    "pooled": Form(fused_pooled, stagewise_pooled, {"collapsed": collapsed_pooled}, "read", "copy", writes_map=False),
    "blend": Form(fused_blend, stagewise_blend, {}, "copy", "two_reads_one_write", writes_map=True),
}


@dataclass(frozen=True)
class Case:
    """One fusion at one size: forward, or forward and the gradients of all features and parameters."""

    form: str
    pyramid: Pyramid
    width: int
    batch: int
    backward: bool
    targets: tuple[Target, ...] = ()
    dtype: torch.dtype = torch.bfloat16

    def __str__(self) -> str:
        passes = "forward and gradients" if self.backward else "forward"
        return f"{self.form} {self.pyramid.name} D={self.width}, batch {self.batch}, {passes}"

    @property
    def feature_bytes(self) -> int:
        return self.batch * self.pyramid.values_per_image * self.dtype.itemsize

    @property
    def result_bytes(self) -> int:
        """Of the fused map; 0 where only its average is formed."""
        finest = self.batch * self.width * self.pyramid.sizes[0] ** 2 * self.dtype.itemsize
        return finest if FORMS[self.form].writes_map else 0

    @property
    def result_dtype(self) -> torch.dtype:
        return self.dtype if FORMS[self.form].writes_map else torch.float32

    @property
    def forward_bytes(self) -> int:
        """Each feature read once, the map written once; parameters are a thousandth of that."""
        return self.feature_bytes + self.result_bytes

    @property
    def backward_bytes(self) -> int:
        """The map's gradient and the features read once, the features' gradients written once."""
        return self.result_bytes + 2 * self.feature_bytes

    @property
    def least_bytes(self) -> int:
        return self.forward_bytes + (self.backward_bytes if self.backward else 0)


NO_WAITING = Target("waits_for_the_gpu", "at_most", 0)
LITTLE_MEMORY = Target("peak_percent_of_features", "at_most", 5)
COLLAPSED = (LITTLE_MEMORY, NO_WAITING)
BACKWARD_HALF = (Target("backward_percent_of_floor", "at_least", 50), *COLLAPSED)
BLENDED = (Target("forward_percent_of_floor", "at_least", 70), NO_WAITING)


def _teacher(width: int, batch: int, ratio: float) -> Case:
    targets = (Target("ratio_compile", "at_least", ratio), Target("percent_of_read_roof", "at_least", 60), *COLLAPSED)
    return Case("pooled", RESNET50, width, batch, False, targets)


def _blend(batch: int, targets: tuple[Target, ...], width: int = 256) -> Case:
    return Case("blend", Pyramid("56 over 28", (width, width), (56, 28)), width, batch, True, targets)


CASES = [
    *(_teacher(width, batch, ratio) for width, ratio in ((256, 4.0), (2048, 20.0)) for batch in (64, 256)),
    *(Case("pooled", MOBILENET_V1, 256, batch, True, BACKWARD_HALF) for batch in (64, 256)),
    Case("pooled", RESNET32X4, 256, 64, True, COLLAPSED),  # so little to move that launching is what costs
    Case("pooled", RESNET32X4, 256, 512, True, BACKWARD_HALF),
    *(_blend(batch, BLENDED) for batch in (64, 256)),
]


def make_inputs(case: Case, *, device: str, seed: int = 0) -> list[Tensor]:
    """Return the arguments: channels_last features in the case's dtype, fp32 parameters; leaves if it goes backward."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        if len(shape) == 3:
            x = torch.randn(case.batch, *shape, generator=generator, device=device, dtype=case.dtype)
            x = x.contiguous(memory_format=torch.channels_last)
        else:
            x = torch.randn(*shape, generator=generator, device=device) * scale
        return x.requires_grad_(case.backward)

    if case.form == "pooled":
        return pooled_inputs(case.pyramid, case.width, randn)
    return blend_inputs(case.pyramid, randn)


def make_upstream(case: Case, *, device: str) -> Tensor:
    """Draw the gradient of the result, in its dtype."""
    generator = torch.Generator(device).manual_seed(1)
    map_shape = (case.pyramid.sizes[0], case.pyramid.sizes[0]) if FORMS[case.form].writes_map else ()
    shape = (case.batch, case.width, *map_shape)
    drawn = torch.randn(shape, generator=generator, device=device, dtype=case.result_dtype)
    return drawn.contiguous(memory_format=torch.channels_last) if map_shape else drawn


def eager(case: Case) -> Compute:
    """Return the plain form as in bf16 training, where the parameters are fp32 and autocast is on."""
    plain = FORMS[case.form].plain

    def compute(*x: Tensor) -> Tensor:
        with torch.autocast(x[0].device.type, torch.bfloat16):
            return plain(*x)

    return compute
