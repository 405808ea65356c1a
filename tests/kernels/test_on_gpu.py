"""What only a GPU shows: no synchronisation, graphs, streams, other devices, races, memory."""

import gc
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from support.kernel_inputs import (
    LOSSES,
    capture,
    compare,
    every_dtype,
    every_loss,
    labels_for,
    leaves_of,
    randn,
    rows_for,
    softmax_kl,
)
from unikd_fast import linear_softmax_kl

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


def step(name: str, inputs: list[Tensor], factor: Tensor | None = None) -> list[Tensor]:
    """Return the loss and its gradients."""
    loss = LOSSES[name].compute(*inputs, impl="fused")
    return [loss.detach(), *torch.autograd.grad(loss, leaves_of(inputs), factor)]


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def test_synchronisation_is_detected(no_synchronisation: None) -> None:
    with pytest.raises(RuntimeError, match="synchronizing"):
        torch.ones((), device="cuda").item()


@every_loss
@every_dtype
def test_no_synchronisation(name: str, dtype: torch.dtype) -> None:
    """Case 14, forward and backward, with an upstream gradient other than 1."""
    for rows, classes in ((5, 11), (2, 50257)):
        inputs = LOSSES[name].make(rows, classes, dtype)
        factor = torch.tensor(3.0, device="cuda")
        step(name, inputs, factor)  # compiled before
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            step(name, inputs, factor)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@every_loss
@every_dtype
def test_cuda_graph(name: str, dtype: torch.dtype) -> None:
    """Case 14: captured once, replayed on other numbers; a replay gives what eager mode gives, to the bit."""
    inputs = LOSSES[name].make(300, 1000, dtype)
    factor = torch.tensor(3.0, device="cuda")
    graph, captured = capture(partial(step, name, inputs, factor))
    for i in range(3):
        with torch.no_grad():
            inputs[0].copy_(torch.roll(inputs[0], 1, 0))
            factor.fill_(i + 1.0)
        graph.replay()
        replayed = [x.clone() for x in captured]
        graph.replay()
        again = [x.clone() for x in captured]
        for a, b, c in zip(replayed, again, step(name, inputs, factor), strict=True):
            assert torch.equal(a, b)
            assert torch.equal(a, c)


@pytest.mark.parametrize("labelled", [False, True])
def test_the_last_layer_in_a_cuda_graph(labelled: bool) -> None:
    """Several chunks and an ignored row: captured, so without synchronisation, and the same to the bit."""
    hidden, weight = (randn(n, 64, seed=n, scale=1, dtype=torch.bfloat16, grad=True) for n in (700, 1000))
    teacher, teacher_weight = (randn(n, 32, seed=n + 1, scale=1, dtype=torch.bfloat16) for n in (700, 1000))
    labels = labels_for(700, 1000, ignored=(3,)) if labelled else None
    mask = torch.arange(700, device="cuda") == 5
    factor = torch.tensor(3.0, device="cuda")

    def run() -> list[Tensor]:
        loss = linear_softmax_kl(hidden, weight, teacher, teacher_weight, labels, ignore_mask=mask, impl="fused")
        return [loss.detach(), *torch.autograd.grad(loss, (hidden, weight), factor)]

    graph, captured = capture(run)
    with torch.no_grad():
        hidden.copy_(torch.roll(hidden, 1, 0))
    graph.replay()
    for a, b in zip([x.clone() for x in captured], run(), strict=True):
        assert torch.equal(a, b)


@every_loss
@every_dtype
def test_reduce_overhead(name: str, dtype: torch.dtype) -> None:
    """CUDA graph trees refuse what survives a call in their pool; eager calls in between have memory of their own."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    inputs = LOSSES[name].make(300, 1000, dtype)
    compiled = torch.compile(lambda *x: LOSSES[name].compute(*x, impl="fused"), fullgraph=True, mode="reduce-overhead")
    factor = torch.tensor(3.0, device="cuda")
    for _ in range(5):  # warmed up, recorded and replayed
        with torch.no_grad():
            inputs[0].copy_(torch.roll(inputs[0], 1, 0))
        torch.compiler.cudagraph_mark_step_begin()
        loss = compiled(*inputs)
        gradients = torch.autograd.grad(loss, leaves_of(inputs), factor)
        results = [x.detach().clone() for x in (loss, *gradients)]
        torch.testing.assert_close(results, step(name, inputs, factor), rtol=torch.finfo(dtype).eps, atol=0)
    assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0


@every_loss
def test_two_streams_at_once(name: str) -> None:
    """Each launch has a ticket of its own."""
    streams = [torch.cuda.Stream() for _ in range(4)]
    inputs = LOSSES[name].make(512, 1000, torch.float32)
    expected = step(name, inputs)
    torch.cuda.synchronize()
    results: list[list[Tensor]] = []
    for _ in range(50):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append(step(name, inputs))
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@every_loss
@every_dtype
def test_same_bits_a_hundred_times(name: str, dtype: torch.dtype) -> None:
    """Case 20, with more programs than run at once: whoever comes last adds up in the same order."""
    inputs = LOSSES[name].make(8192, 100, dtype)
    expected = step(name, inputs)
    for _ in range(100):
        assert all(torch.equal(a, b) for a, b in zip(step(name, inputs), expected, strict=True))


@every_loss
def test_many_rows(name: str) -> None:
    """More tiles than programs."""
    for rows, classes in ((200_000, 10), (20_000, 1000), (600, 50257)):
        compare(LOSSES[name].compute, LOSSES[name].make(rows, classes, torch.float32))
        gc.collect()


def test_more_than_2_to_the_31_elements() -> None:
    """Case 2, in earnest: the last rows equal the same rows alone."""
    rows, classes = 2**31 // 32768 + 3, 32768
    if torch.cuda.mem_get_info()[0] < 5 * rows * classes * 2:
        pytest.skip("needs 22 GB of GPU memory")
    student = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16).requires_grad_()
    teacher = torch.randn(rows, classes, device="cuda", dtype=torch.bfloat16)
    loss = softmax_kl(student, teacher, reduction="none", impl="fused")
    (gradient,) = torch.autograd.grad(loss, student, torch.ones_like(loss))
    tail = student.detach()[-4:].clone().requires_grad_()
    expected = softmax_kl(tail, teacher[-4:].clone(), reduction="none", impl="fused")
    expected.sum().backward()
    assert torch.equal(loss[-4:], expected)
    assert torch.equal(gradient[-4:], tail.grad)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@every_loss
@every_dtype
def test_another_device_than_the_current_one(name: str, dtype: torch.dtype) -> None:
    """Case 18."""
    here = LOSSES[name].make(5, 1000, dtype)
    there = [x.detach().to("cuda:1").requires_grad_(x.requires_grad) for x in here]
    assert torch.cuda.current_device() == 0
    for a, b in zip(step(name, here), step(name, there), strict=True):
        assert b.device.index == 1
        assert torch.equal(a, b.to(a.device))


@every_loss
def test_memory(name: str) -> None:
    """Forward takes the gradient's bytes and little else; after backward nothing but the gradient is left."""
    inputs: list[Any] = LOSSES[name].make(4096, rows_for(2) * 100, torch.bfloat16)
    leaves = leaves_of(inputs)
    step(name, inputs)
    gc.collect()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    wanted = sum(x.numel() * x.element_size() for x in leaves)
    torch.cuda.reset_peak_memory_stats()
    loss = LOSSES[name].compute(*inputs, impl="fused")
    slack = 2**20
    assert torch.cuda.max_memory_allocated() - before < wanted + slack
    assert torch.cuda.memory_allocated() - before < wanted + slack
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert torch.cuda.max_memory_allocated() - before < wanted + slack
    del gradients
    assert torch.cuda.memory_allocated() - before < slack
