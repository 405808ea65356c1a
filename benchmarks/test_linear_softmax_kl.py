"""The last layer fused with the loss against the loss of all logits: time and memory of forward and gradients, in bf16.

The extra memory is the most that is live at once beside inputs and gradients, as torch's allocator sees it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from gpu_timing import MIB, extra_mib
from timing import interleaved_medians
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from unikd_fast import linear_softmax_kl, softmax_kl

TEMPERATURE = 2.0

Gradients = tuple[Tensor, ...]


def chunked(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    return linear_softmax_kl(hidden, weight, teacher, teacher_weight, temperature=TEMPERATURE)


def unfused(hidden: Tensor, weight: Tensor, teacher: Tensor, teacher_weight: Tensor) -> Tensor:
    return softmax_kl(F.linear(hidden, weight), F.linear(teacher, teacher_weight), temperature=TEMPERATURE)


def with_gradients(loss: Callable[..., Tensor], inputs: list[Tensor]) -> Gradients:
    value = loss(*inputs)
    return (value.detach(), *torch.autograd.grad(value, inputs[:2]))


def peak_mib(call: Callable[[], Gradients]) -> float:
    """Return the most memory during the call, its result included."""
    if torch.cuda.is_available():
        return extra_mib(call)[0]
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).cumsum(0)
    return live.max().item() / MIB


on_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
on_cpu = pytest.mark.skipif(torch.cuda.is_available(), reason="a size for processors")


@pytest.mark.parametrize(
    ("rows", "width", "classes"),
    [
        pytest.param(2048, 512, 21841, marks=on_cpu),
        pytest.param(8192, 4096, 128256, marks=on_gpu),
        pytest.param(8192, 1024, 21841, marks=on_gpu),
    ],
)
def test_fused_last_layer(benchmark: Any, rows: int, width: int, classes: int) -> None:
    """About as fast as the loss of all logits, whose products are the same, in a fraction of its memory."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator(device).manual_seed(0)
    make = partial(torch.randn, generator=generator, device=device)
    inputs = [scale * make(n, width) for _ in range(2) for n, scale in ((rows, 1), (classes, 3 / width**0.5))]
    inputs = [x.bfloat16().requires_grad_(i < 2) for i, x in enumerate(inputs)]
    calls = {name: partial(with_gradients, loss, inputs) for name, loss in (("ours", chunked), ("unfused", unfused))}

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        results = [call() for call in calls.values()]
        # Both round the logits, and ours rounds the gradient of the weight some 20 times: a few roundings of bf16.
        for ours, theirs in zip(*results, strict=True):
            assert (ours.double() - theirs.double()).norm() <= 0.02 * theirs.double().norm()
        del results
        gradients = sum(x.nbytes for x in inputs[:2]) / MIB
        memory = {name: peak_mib(call) - gradients for name, call in calls.items()}
        times = interleaved_medians(calls, rounds=3, warmup=1)
        benchmark.group = f"linear_softmax_kl {rows}x{width}x{classes} bf16, forward and gradients"
        benchmark.pedantic(calls["ours"], rounds=1)
    finally:
        torch.set_num_threads(threads)
    ratio = times["ours"] / times["unfused"]
    shares = {name: round(mib / (rows * classes * 2 / MIB), 3) for name, mib in memory.items()}
    benchmark.extra_info.update(
        ratio=round(ratio, 3),
        median_ms={name: round(1e3 * t, 1) for name, t in times.items()},
        extra_mib={name: round(mib, 1) for name, mib in memory.items()},
        extra_over_logits=shares,
        torch=torch.__version__,
    )
    # Of fewer rows than 4,096 a chunk has as many as of these; on a CPU plain losses of 2^17 logits come on top.
    bound = 0.13 * max(4096 / rows, 1) + (0.08 if device == "cpu" else 0)
    assert shares["ours"] <= bound, f"extra memory over logits: {shares}"
    assert ratio <= 1.1, f"takes {ratio:.2f} times as long as the loss of all logits"
