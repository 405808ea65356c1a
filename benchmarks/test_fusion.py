"""The fusion against the stage-wise form in plain PyTorch: on a GPU the kernels, on a CPU the collapsed form.

On a GPU, in bf16: stage-wise, torch.compile of it and the collapsed form in plain PyTorch in the same run, correctness
before any timing (`fusion_measurement.py`), and the targets of `fusion_cases.py`. On a CPU, fp32, pooled to (N, D):
times, and the ratio that must hold. Stage-wise is `fuse_stagewise` and a mean, collapsed is `pool_collapsed`.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import pytest
import torch
from fusion_cases import (
    CASES,
    FORMS,
    MOBILENET_V1,
    RESNET32X4,
    RESNET50,
    Case,
    Pyramid,
    levels_of,
    make_inputs,
    make_upstream,
    pooled_inputs,
)
from fusion_measurement import measure
from measurement import as_line, forward_and_gradients
from speed_targets import raise_if_missed
from timing import interleaved_medians
from torch import Tensor

from unikd_fast.kernels.reference_fusion import fuse_stagewise
from unikd_fast.kernels.reference_pooled import pool_collapsed


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_fusion(benchmark: Any, record_property: Callable[[str, Any], None], case: Case) -> None:
    rows, roofs = measure(case)
    record_property("benchmark_rows", rows)
    record_property("roofs", asdict(roofs))
    benchmark.group = str(case)
    benchmark.extra_info.update(
        gpu=torch.cuda.get_device_name(), torch=torch.__version__, roofs=asdict(roofs), rows=rows
    )
    print("", *(as_line(row, *(column for column in row if column.endswith("_error"))) for row in rows), sep="\n")

    inputs, upstream = make_inputs(case, device="cuda"), make_upstream(case, device="cuda")
    ours = partial(forward_and_gradients, FORMS[case.form].ours, inputs, upstream)

    def step() -> None:
        ours()
        torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    raise_if_missed(str(case), rows[0]["targets"])


@dataclass(frozen=True)
class PlainCase:
    """One pyramid of features and what is computed on it on a CPU."""

    features: Pyramid
    width: int
    batch: int
    backward: bool

    def __str__(self) -> str:
        return f"{self.features.name} D={self.width} batch {self.batch} {'fwd+bwd' if self.backward else 'fwd'}"


PLAIN_CASES = [
    PlainCase(RESNET50, width=2048, batch=4, backward=False),
    PlainCase(RESNET50, width=256, batch=4, backward=True),
    PlainCase(MOBILENET_V1, width=1024, batch=4, backward=False),
    PlainCase(MOBILENET_V1, width=1024, batch=4, backward=True),
    PlainCase(RESNET32X4, width=256, batch=64, backward=False),
    PlainCase(RESNET32X4, width=256, batch=64, backward=True),
]
# The least ratio of stage-wise to collapsed.
TARGETS = [(PLAIN_CASES[0], 20.0), (PLAIN_CASES[1], 5.0)]

Computation = Callable[[], list[Tensor]]


def computations(case: PlainCase) -> dict[str, Computation]:
    """Return both forms on one set of tensors: the pooled output and, with `backward`, the gradient of every input."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int, scale: float = 1.0) -> Tensor:
        batched = (case.batch, *shape) if len(shape) == 3 else shape
        return (torch.randn(*batched, generator=generator) * scale).requires_grad_(case.backward)

    leaves = pooled_inputs(case.features, case.width, randn)
    inputs = levels_of(leaves)
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
@pytest.mark.parametrize("case", PLAIN_CASES, ids=str)
def test_pooled_fusion(benchmark: Any, case: PlainCase, form: str) -> None:
    forms = computations(case)
    assert_same(forms)
    benchmark.group = f"pooled fusion, {case}, fp32"
    benchmark.extra_info.update(torch=torch.__version__, threads=torch.get_num_threads())
    benchmark.pedantic(forms[form], rounds=5, warmup_rounds=1)


@pytest.mark.parametrize(("case", "target"), TARGETS, ids=str)
def test_ratio_of_stagewise_to_collapsed(benchmark: Any, case: PlainCase, target: float) -> None:
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
