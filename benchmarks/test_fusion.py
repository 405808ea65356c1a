"""The collapsed AFF against the stage-wise one, pooled to (N, D), fp32: times, and the ratio that must hold.

The feature shapes are those of the networks in the paper's recipes at their input sizes. Stage-wise is `fuse_stagewise`
and a mean, collapsed is `pool_collapsed`, on the same tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from timing import interleaved_medians
from torch import Tensor

from unikd_fast.kernels.reference_fusion import fuse_stagewise
from unikd_fast.kernels.reference_pooled import pool_collapsed


@dataclass(frozen=True)
class Case:
    """One pyramid of features and what is computed on it."""

    name: str
    channels: tuple[int, ...]
    sizes: tuple[int, ...]
    width: int
    batch: int
    backward: bool

    def __str__(self) -> str:
        return f"{self.name} D={self.width} batch {self.batch} {'fwd+bwd' if self.backward else 'fwd'}"


RESNET50 = ("ResNet-50", (256, 512, 1024, 2048), (56, 28, 14, 7))
MOBILENET_V1 = ("MobileNetV1", (128, 256, 512, 1024), (56, 28, 14, 7))
RESNET32X4 = ("resnet32x4", (64, 128, 256), (32, 16, 8))

CASES = [
    Case(*RESNET50, width=2048, batch=4, backward=False),
    Case(*RESNET50, width=256, batch=4, backward=True),
    Case(*MOBILENET_V1, width=1024, batch=4, backward=False),
    Case(*MOBILENET_V1, width=1024, batch=4, backward=True),
    Case(*RESNET32X4, width=256, batch=64, backward=False),
    Case(*RESNET32X4, width=256, batch=64, backward=True),
]
# The least ratio of stage-wise to collapsed.
TARGETS = [(CASES[0], 20.0), (CASES[1], 5.0)]

Computation = Callable[[], list[Tensor]]


def computations(case: Case) -> dict[str, Computation]:
    """Give both forms on one set of tensors: the pooled output and, with `backward`, the gradient of every input."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*shape, generator=generator) * scale).requires_grad_(case.backward)

    levels = list(zip(case.channels, case.sizes, strict=True))
    features = [randn(case.batch, c, size, size) for c, size in levels]
    weights = [randn(case.width, c, 1, 1, scale=c**-0.5) for c, _ in levels]
    biases = [randn(case.width) for _ in levels]
    gate_weights = [randn(1, 2 * case.width, 3, 3, scale=(18 * case.width) ** -0.5) for _ in levels[1:]]
    gate_biases = [randn(1) for _ in levels[1:]]
    inputs = (features, weights, biases, gate_weights, gate_biases)
    leaves = [x for group in inputs for x in group]
    upstream = torch.randn(case.batch, case.width, generator=generator)

    def with_gradients(pooled: Tensor) -> list[Tensor]:
        return [pooled, *torch.autograd.grad(pooled, leaves, upstream)] if case.backward else [pooled]

    return {
        "stagewise": lambda: with_gradients(fuse_stagewise(*inputs).mean((2, 3))),
        "collapsed": lambda: with_gradients(pool_collapsed(*inputs)),
    }


def assert_same(forms: dict[str, Computation]) -> None:
    for expected, result in zip(forms["stagewise"](), forms["collapsed"](), strict=True):
        # fp32 sums over up to 3136 pixels and 4096 * 9 products, in another order.
        assert ((result - expected).norm() / expected.norm()).item() < 1e-4


@pytest.mark.parametrize("form", ["stagewise", "collapsed"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_pooled_fusion(benchmark: BenchmarkFixture, case: Case, form: str) -> None:
    forms = computations(case)
    assert_same(forms)
    benchmark.group = f"pooled fusion, {case}, fp32"
    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(forms[form], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize(("case", "target"), TARGETS, ids=str)
def test_ratio_of_stagewise_to_collapsed(benchmark: BenchmarkFixture, case: Case, target: float) -> None:
    """Recorded on one thread and on all; asserted on one.

    The collapsed form is many short operations. Where the cores are shared, each operation on several threads waits for
    a time slice of the scheduler (8 ms seen), more than it takes itself: then the ratio is one of waiting times.
    """
    forms = computations(case)
    assert_same(forms)
    benchmark.group = f"ratio, {case}, fp32"
    threads = torch.get_num_threads()
    ratios: dict[int, float] = {}
    try:
        for count in (threads, 1):
            torch.set_num_threads(count)
            times = interleaved_medians(forms, rounds=5 if case.width > 1024 else 15)
            ratios[count] = times["stagewise"] / times["collapsed"]
            benchmark.extra_info[f"median_ms_{count}_threads"] = {k: round(1000 * v, 2) for k, v in times.items()}
        benchmark.pedantic(forms["collapsed"], rounds=5, warmup_rounds=1)
    finally:
        torch.set_num_threads(threads)
    benchmark.extra_info.update(
        ratio=round(ratios[1], 2),
        ratio_all_threads=round(ratios[threads], 2),
        torch=torch.__version__,
        threads=threads,
    )
    assert ratios[1] >= target, f"{case}: stage-wise over collapsed is {ratios[1]:.1f}, must be at least {target}"
