"""What is compiled: every kernel, at every launch size and with every feature that changes its code.

The sizes of `_launch.py` depend on K alone, so one K for each bucket is all of them: 10 (many rows a tile), 100, 1000
(not a multiple of 16), 1003 (odd), 8192 (the largest on chip), 16384 (four rows a multiprocessor), 32768 and 128256.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from support.compile_check import TARGETS, compile_key, compile_launch, recorded
from unikd_fast.kernels import (
    _launch,
    _multiply,
    _pooled_plan,
    dkd,
    feature_fusion,
    gaussian_kl,
    pixel_weights,
    pooled_fusion,
    softmax_kl,
    unikd_loss,
)
from unikd_fast.kernels.reference_moments import ChannelStatistics

SIZES = (10, 100, 1000, 1003, 8192, 16384, 32768, 128256)
HEAVY_SIZES = (10, 1000, 1003, 4096, 8192, 128256)  # on chip up to 4096, then four and two rows a multiprocessor
ROWS = 4


def logits(classes: int, dtype: torch.dtype = torch.bfloat16, *, grad: bool = False) -> Tensor:
    return torch.zeros(ROWS, classes, dtype=dtype, requires_grad=grad)


def softmax_case(classes: int, dtype: torch.dtype = torch.bfloat16, *, teacher: str = "same", **settings: Any) -> None:
    """Launch forward; and backward, for fp16."""
    scale = None
    other = logits(classes, dtype, grad=teacher == "gradient")
    if teacher == "uint8":
        other, scale = logits(classes, torch.uint8), torch.ones(ROWS)
    loss = softmax_kl.fused_softmax_kl(logits(classes, dtype, grad=True), other, scale, temperature=4.0, **settings)
    if dtype == torch.float16:
        loss.sum().backward()


def class_maps(classes: int, size: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Return logits (2, size, size, K) that lie in memory as (2, K, size, size)."""
    return torch.zeros(2, classes, size, size, dtype=dtype).movedim(1, -1)


def maps_case(
    classes: int, *, loss: str = "softmax_kl", size: int = 128, teacher: str = "same", **settings: Any
) -> None:
    """Launch a loss of class maps forward."""
    student, other = (class_maps(classes, size).requires_grad_(x) for x in (True, teacher == "gradient"))
    labels, scale = torch.zeros(2, size, size, dtype=torch.int64), None
    if teacher == "rows":
        other = other.contiguous()
    if teacher == "uint8":
        other, scale = class_maps(classes, size, torch.uint8), torch.ones(2, size, size)
    if loss == "dkd":
        dkd.fused_dkd(student, other, scale, labels, **settings)
    elif loss == "unikd_loss":
        unikd_loss.fused_unikd_loss(
            student,
            other,
            scale,
            labels,
            None,
            None,
            None,
            alpha=0.0,
            beta=1.0,
            ce_weight=1.0,
            temperature=4.0,
            scale_by_t2=True,
            feature_reduction="mean",
            label_smoothing=0.0,
            ignore_index=-100,
            normalizer=None,
        )
    else:
        softmax_kl.fused_softmax_kl(student, other, scale, temperature=4.0, **settings)


def dkd_case(classes: int, *, standardized: bool = False) -> None:
    labels = torch.zeros(ROWS, dtype=torch.int64)
    dkd.fused_dkd(logits(classes, grad=True), logits(classes), None, labels, standardized=standardized)


def gaussian_case(classes: int, *, teacher_gradient: bool = False, reduction: str = "batchmean") -> None:
    parameters = [logits(classes, grad=i < 2 or teacher_gradient) for i in range(4)]
    gaussian_kl.fused_gaussian_kl(*parameters, reduction=reduction)


def unikd_case(
    classes: int, *, soft: bool = False, anchor: bool = False, teacher: str = "same", gaussian: bool = True
) -> None:
    pair = (logits(classes, grad=True), logits(classes, grad=True)) if gaussian else None
    fixed = (logits(classes), logits(classes)) if gaussian else None
    labels = torch.zeros(ROWS, classes) if soft else torch.zeros(ROWS, dtype=torch.int64)
    other, scale = logits(classes), None
    if teacher == "uint8":
        other, scale = logits(classes, torch.uint8), torch.ones(ROWS)
    unikd_loss.fused_unikd_loss(
        logits(classes, grad=True),
        other,
        scale,
        labels,
        pair,
        fixed,
        (logits(classes, grad=True), logits(classes, grad=True)) if anchor else None,
        alpha=torch.tensor(4.0),
        beta=1.0,
        ce_weight=1.0,
        temperature=4.0,
        scale_by_t2=True,
        feature_reduction="mean",
        label_smoothing=0.1 if soft else 0.0,
        ignore_index=-100,
        normalizer=None,
    )


def multiply_case(classes: int) -> None:
    pairs = [(logits(classes), torch.ones(())), (logits(classes, torch.float32), torch.ones(ROWS))]
    _multiply.multiply_in_place(pairs)


def pooled_case(
    dtype: torch.dtype,
    layout: torch.memory_format,
    upsample: str,
    normalised: bool = False,
    *,
    images: int = 2,
    sizes: Sequence[int] = (56, 28, 14, 7),
) -> None:
    """Forward and backward on the features of a ResNet-50, at 224 pixels if nothing is said."""
    shapes = list(zip((256, 512, 1024, 2048), sizes, strict=True))
    width, gates = 8, len(shapes) - 1
    features = [torch.zeros(images, c, size, size, dtype=dtype).contiguous(memory_format=layout) for c, size in shapes]
    parameters = [
        [torch.zeros(width, c, 1, 1) for c, _ in shapes],
        [torch.zeros(width) for _ in shapes],
        [torch.zeros(1, 2 * width, 3, 3) for _ in range(gates)],
        [torch.zeros(1) for _ in range(gates)],
    ]
    for x in (*features, *(p for group in parameters for p in group)):
        x.requires_grad_()
    statistics = [ChannelStatistics(torch.zeros(c), torch.ones(c), 1e-5) for c, _ in shapes] if normalised else None
    pooled_fusion.fused_pool(features, *parameters, upsample=upsample, statistics=statistics).sum().backward()


def blend_case(
    dtype: torch.dtype, layout: torch.memory_format, upsample: str, *, sizes: Sequence[int] = (56, 28)
) -> None:
    """Forward and backward of the finest stage, at 224 pixels if nothing is said."""
    width = 256
    maps = [torch.zeros(2, width, size, size, dtype=dtype).contiguous(memory_format=layout) for size in sizes]
    parameters = [torch.zeros(1, 2 * width, 3, 3), torch.zeros(1)]
    for x in (*maps, *parameters):
        x.requires_grad_()
    feature_fusion.fused_blend(*maps, *parameters, upsample=upsample).sum().backward()


LAUNCHES: dict[str, Callable[[], None]] = {}
for size in SIZES:
    LAUNCHES[f"softmax_kl-{size}"] = partial(softmax_case, size)
for size in HEAVY_SIZES:
    LAUNCHES[f"softmax_kl-jsd-{size}"] = partial(softmax_case, size, divergence="jsd", beta=0.3)
    LAUNCHES[f"dkd-{size}"] = partial(dkd_case, size)
    LAUNCHES[f"gaussian_kl-{size}"] = partial(gaussian_case, size)
    LAUNCHES[f"unikd_loss-{size}"] = partial(unikd_case, size, anchor=True)
for size in (1000, 128256):
    LAUNCHES[f"softmax_kl-fp32-{size}"] = partial(softmax_case, size, torch.float32)
    LAUNCHES[f"softmax_kl-fp16-{size}"] = partial(softmax_case, size, torch.float16)
    LAUNCHES[f"softmax_kl-reverse-{size}"] = partial(softmax_case, size, divergence="reverse")
    LAUNCHES[f"softmax_kl-standardized-{size}"] = partial(softmax_case, size, standardized=True, reduction="none")
    LAUNCHES[f"softmax_kl-teacher_gradient-{size}"] = partial(
        softmax_case, size, teacher="gradient", divergence="jsd", standardized=True
    )
    LAUNCHES[f"softmax_kl-uint8-{size}"] = partial(softmax_case, size, teacher="uint8")
    LAUNCHES[f"dkd-standardized-{size}"] = partial(dkd_case, size, standardized=True)
    LAUNCHES[f"gaussian_kl-teacher_gradient-{size}"] = partial(gaussian_case, size, teacher_gradient=True)
    LAUNCHES[f"unikd_loss-soft-{size}"] = partial(unikd_case, size, soft=True)
    LAUNCHES[f"unikd_loss-uint8-{size}"] = partial(unikd_case, size, teacher="uint8")
# 16,384 pixels an image are loaded 16 bytes at a time, 4,225 one by one.
for size, name in ((128, "maps"), (65, "odd_maps")):
    LAUNCHES[f"softmax_kl-{name}-150"] = partial(maps_case, 150, size=size)
    LAUNCHES[f"dkd-{name}-150"] = partial(maps_case, 150, loss="dkd", size=size)
    LAUNCHES[f"dkd-standardized-{name}-150"] = partial(maps_case, 150, loss="dkd", size=size, standardized=True)
    LAUNCHES[f"unikd_loss-{name}-150"] = partial(maps_case, 150, loss="unikd_loss", size=size)
    LAUNCHES[f"softmax_kl-teacher_gradient-{name}-150"] = partial(
        maps_case, 150, size=size, teacher="gradient", divergence="jsd", standardized=True
    )
LAUNCHES["softmax_kl-maps-19"] = partial(maps_case, 19)
LAUNCHES["softmax_kl-uint8-maps-150"] = partial(maps_case, 150, teacher="uint8")
LAUNCHES["softmax_kl-rows-maps-150"] = partial(maps_case, 150, teacher="rows")
LAUNCHES["softmax_kl-fp32-8192"] = partial(softmax_case, 8192, torch.float32)
LAUNCHES["multiply-1000"] = partial(multiply_case, 1000)
LAUNCHES["gaussian_kl-none-1000"] = partial(gaussian_case, 1000, reduction="none")
LAUNCHES["pooled_fusion-bf16-channels_last"] = partial(pooled_case, torch.bfloat16, torch.channels_last, "bilinear")
LAUNCHES["pooled_fusion-bf16-contiguous"] = partial(pooled_case, torch.bfloat16, torch.contiguous_format, "nearest")
LAUNCHES["pooled_fusion-fp32-channels_last"] = partial(pooled_case, torch.float32, torch.channels_last, "nearest")
LAUNCHES["pooled_fusion-normalised-bf16-channels_last"] = partial(
    pooled_case, torch.bfloat16, torch.channels_last, "nearest", normalised=True
)
LAUNCHES["pooled_fusion-normalised-fp32-contiguous"] = partial(
    pooled_case, torch.float32, torch.contiguous_format, "nearest", normalised=True
)
LAUNCHES["blend-bf16-channels_last"] = partial(blend_case, torch.bfloat16, torch.channels_last, "nearest")
LAUNCHES["blend-bilinear-channels_last"] = partial(blend_case, torch.bfloat16, torch.channels_last, "bilinear")
LAUNCHES["blend-fp32-contiguous"] = partial(blend_case, torch.float32, torch.contiguous_format, "nearest")


def spilling_case() -> None:
    """A tile larger than the rules allow."""
    allowed, _launch.LARGEST_SINGLE_BLOCK = _launch.LARGEST_SINGLE_BLOCK, 65536
    try:
        softmax_case(65536)
    finally:
        _launch.LARGEST_SINGLE_BLOCK = allowed


LAUNCHES["spilling"] = spilling_case

KERNELS = [
    (softmax_kl, "_softmax_kl_kernel"),
    (dkd, "_dkd_kernel"),
    (gaussian_kl, "_gaussian_kl_kernel"),
    (unikd_loss, "unikd_kernel"),
    (_multiply, "_multiply_kernel"),
    (pixel_weights, "pixel_weights_kernel"),
    (pixel_weights, "pixel_weights_backward_kernel"),
    (feature_fusion, "blend_kernel"),
    (feature_fusion, "gate_gradient_kernel"),
    (pooled_fusion, "project_kernel"),
    (pooled_fusion, "average_kernel"),
    (pooled_fusion, "weight_gradient_kernel"),
    (pooled_fusion, "feature_gradient_kernel"),
    (pooled_fusion, "sum_parts_kernel"),
    (pooled_fusion, "norm_gradient_kernel"),
]


# The fusions at several image sizes: multiples of 16, odd, single pixels; contiguous ones with the same whole channels.
PYRAMIDS = ((56, 28, 14, 7), (64, 32, 16, 8), (57, 29, 15, 8), (9, 5, 3, 1), (112, 1, 1, 1))
WHOLE = ((56, 28, 14, 7), (40, 20, 10, 5))
RESIZED: dict[str, list[Callable[[], None]]] = {}
for upsample in ("nearest", "bilinear"):
    for name, layout, pyramids in (
        ("channels_last", torch.channels_last, PYRAMIDS),
        ("contiguous", torch.contiguous_format, WHOLE),
    ):
        RESIZED[f"pooled_fusion-{upsample}-{name}"] = [
            partial(pooled_case, torch.bfloat16, layout, upsample, True, sizes=sizes) for sizes in pyramids
        ]
        RESIZED[f"blend-{upsample}-{name}"] = [
            partial(blend_case, torch.bfloat16, layout, upsample, sizes=sizes[:2]) for sizes in pyramids
        ]


def variants(name: str) -> dict[str, int]:
    """Return how many times each kernel is compiled for an entry of `RESIZED`, launches of other kinds apart."""
    keys: dict[str, set[str]] = {}
    for case in RESIZED[name]:
        with recorded([module for module, _ in KERNELS], [kernel for _, kernel in KERNELS]) as recorders:
            case()
        for recorder in recorders:
            for i, (bound, options) in enumerate(recorder.launches):
                key = compile_key(recorder.kernel, bound, options)
                keys.setdefault(f"{recorder.kernel.fn.__name__}-{i}", set()).add(key)
    return {kernel: len(found) for kernel, found in keys.items()}


# Multiprocessors and MB of L2 of A100, H200, B200, RTX PRO 6000 and MI300X: so many rows are read at a time.
CARDS = {"sm_80": (108, 40), "sm_90": (132, 50), "sm_100": (148, 126), "sm_120": (188, 128), "gfx942": (304, 4)}


def launches_for(case: Callable[[], None], target: str) -> list[tuple[Any, dict[str, Any], dict[str, Any]]]:
    """Return what a case launches, kernel, arguments and options, with the sizes that a target gets."""
    description = TARGETS[target]
    amd = description.backend == "hip"
    multiprocessors, l2_megabytes = CARDS[target]
    capability = 0 if amd else description.arch
    device = _launch.Device(multiprocessors, description.warp_size, l2_megabytes * 2**20, amd, capability)
    users = (_launch, pixel_weights, _pooled_plan, feature_fusion)
    original = _launch.describe
    try:
        for module in users:
            module.describe = lambda _: device
        _pooled_plan.plan_of.cache_clear()
        feature_fusion.plan_of.cache_clear()
        with recorded([module for module, _ in KERNELS], [kernel for _, kernel in KERNELS]) as recorders:
            case()
    finally:
        for module in users:
            module.describe = original
    return [(r.kernel, *launch) for r in recorders for launch in r.launches]


def reports(name: str, targets: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Compile what a case launches, for each target."""
    for target in targets:
        launches = launches_for(LAUNCHES[name], target)
        assert launches, name
        for kernel, bound, options in launches:
            yield compile_launch(kernel, bound, options, target)
