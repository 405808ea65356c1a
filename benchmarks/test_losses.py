"""The losses against what they replace: on a GPU the kernels, on a CPU the plain formulas.

On a GPU, forward and gradient in bf16: plain PyTorch, torch.compile and Liger-Kernel in the same run, correctness
before any timing (`loss_measurement.py`), and the targets of `loss_cases.py`. A target that is missed fails the
benchmark after its figures were recorded.
"""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from typing import Any

import pytest
import torch
from loss_cases import CASES, LOSSES, Case, make_inputs
from loss_measurement import measure
from loss_peers import TEMPERATURE, mdistiller_kd
from measurement import as_line, forward_and_gradients
from speed_targets import raise_if_missed
from timing import interleaved_medians
from torch import Tensor

from unikd_fast import softmax_kl


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_fused_loss(benchmark: Any, record_property: Callable[[str, Any], None], case: Case) -> None:
    rows, roofs = measure(case)
    record_property("benchmark_rows", rows)
    record_property("roofs", asdict(roofs))
    benchmark.group = f"{case}, forward and gradient"
    benchmark.extra_info.update(
        gpu=torch.cuda.get_device_name(), torch=torch.__version__, roofs=asdict(roofs), rows=rows
    )
    print("", *(as_line(row, "gradient_error") for row in rows), sep="\n")

    inputs = make_inputs(case, device="cuda")
    ours = partial(LOSSES[case.loss].ours, impl="fused")
    upstream = torch.ones_like(ours(*inputs).detach())

    def step() -> None:
        forward_and_gradients(ours, inputs, upstream)
        torch.cuda.synchronize()

    benchmark.pedantic(step, rounds=5, warmup_rounds=1)
    raise_if_missed(str(case), rows[0]["targets"])


@pytest.mark.parametrize(("rows", "classes"), [(64, 100), (512, 1000), (64, 1000)])
def test_plain_loss_over_mdistillers(benchmark: Any, rows: int, classes: int) -> None:
    """On a CPU `softmax_kl` is the plain formula; it may cost no more than the one that peers ship.

    One thread: several on shared cores wait for each other, and that would be what is compared.
    """
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(rows, classes, generator=generator) for _ in range(2))
    student.requires_grad_()
    ours = partial(softmax_kl, student, teacher, temperature=TEMPERATURE)
    plain = partial(ours, impl="reference")
    peer = partial(mdistiller_kd, student, teacher)

    def with_gradient(compute: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        value = compute()
        return (value.detach(), *torch.autograd.grad(value, student))

    for a, b, c in zip(with_gradient(ours), with_gradient(plain), with_gradient(peer), strict=True):
        assert torch.equal(a, b)
        # fp32; the peer's KL is a difference of two sums of size ln K.
        torch.testing.assert_close(a, c, rtol=1e-4, atol=1e-6)

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = interleaved_medians(
            {"ours": partial(with_gradient, ours), "mdistiller": partial(with_gradient, peer)},
            rounds=50_000_000 // (rows * classes + 100_000),
        )
        benchmark.group = f"plain softmax_kl {rows}x{classes} fp32, forward and gradient"
        benchmark.pedantic(with_gradient, args=(ours,), rounds=20, warmup_rounds=2)
    finally:
        torch.set_num_threads(threads)
    ratio = times["ours"] / times["mdistiller"]
    benchmark.extra_info.update(
        ratio=round(ratio, 3), median_us={name: round(1e6 * t, 1) for name, t in times.items()}, torch=torch.__version__
    )
    assert ratio <= 1.1, f"plain softmax_kl {rows}x{classes} takes {ratio:.2f} times as long as mdistiller's"
