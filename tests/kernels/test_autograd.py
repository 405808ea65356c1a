"""What the four losses share: gradients computed in forward, and the upstream gradient multiplied in afterwards."""

import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad

from support.kernel_inputs import (
    DEVICE,
    DTYPES,
    LOSSES,
    compare,
    every_dtype,
    every_loss,
    leaves_of,
    long,
    quiet,
    randn,
    without_gaussians,
)
from support.numerics import relative_error
from unikd_fast import SoftmaxKL, dkd_loss, softmax_kl
from unikd_fast.kernels import _autograd
from unikd_fast.kernels._autograd import multiplied
from unikd_fast.kernels._multiply import MOST_BUFFERS, multiply_in_place

pytestmark = quiet


def results_of(name: str, inputs: list[Tensor], *, factor: float = 1.0, **settings: Any) -> list[Tensor]:
    """Return the loss and its gradients, times a factor."""
    loss = LOSSES[name].compute(*inputs, impl="fused", **settings)
    return [loss.detach(), *torch.autograd.grad(loss * factor, leaves_of(inputs))]


@every_loss
def test_accumulated_micro_batches_are_the_batch(name: str) -> None:
    """Case 7: unequal micro-batches under one normalizer."""
    loss = LOSSES[name]
    inputs = loss.make(7, 11, torch.float32)
    for normalizer in (7.0, torch.tensor(7.0, device=DEVICE)):
        whole = results_of(name, inputs, normalizer=normalizer)
        leaves = leaves_of(inputs)
        for leaf in leaves:
            leaf.grad = None
        total = torch.zeros((), device=DEVICE)
        for rows in (slice(0, 1), slice(1, 6), slice(6, 7)):
            part = loss.compute(*(x[rows] for x in inputs), normalizer=normalizer, impl="fused")
            part.backward()
            total += part.detach()
        torch.testing.assert_close([total, *(x.grad for x in leaves)], whole, rtol=2e-6, atol=1e-8)


@every_loss
@every_dtype
class TestBackwardTwice:
    """Case 11: two upstream gradients, and results that share no memory."""

    def test_under_retain_graph(self, name: str, dtype: torch.dtype) -> None:
        inputs = LOSSES[name].make(5, 11, dtype)
        leaves = leaves_of(inputs)
        loss = LOSSES[name].compute(*inputs, impl="fused")
        first = torch.autograd.grad(loss, leaves, torch.tensor(2.0, device=DEVICE), retain_graph=True)
        kept = [x.clone() for x in first]
        second = torch.autograd.grad(loss, leaves, torch.tensor(-0.5, device=DEVICE), retain_graph=True)
        third = torch.autograd.grad(loss, leaves)
        for a, a_before, b, c in zip(first, kept, second, third, strict=True):
            assert torch.equal(a, a_before)
            assert len({x.data_ptr() for x in (a, b, c)}) == 3
            torch.testing.assert_close(b * -4, a)  # 2 and 1/2 are exact
            torch.testing.assert_close(c * 2, a)

    def test_through_two_losses_of_one_result(self, name: str, dtype: torch.dtype) -> None:
        inputs = LOSSES[name].make(5, 11, dtype)
        leaves = leaves_of(inputs)
        loss = LOSSES[name].compute(*inputs, impl="fused")
        (loss * 3).backward(retain_graph=True)
        once = [x.grad.clone() for x in leaves if x.grad is not None]
        (loss * 3).backward()
        twice = [x.grad for x in leaves]
        torch.testing.assert_close([2 * x for x in once], twice)

    def test_graph_is_freed(self, name: str, dtype: torch.dtype) -> None:
        inputs = LOSSES[name].make(5, 11, dtype)
        loss = LOSSES[name].compute(*inputs, impl="fused")
        loss.backward()
        with pytest.raises(RuntimeError, match="second time"):
            loss.backward()


def of_maps(name: str, student: Tensor, teacher: Tensor) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """Return a loss, times 3, and its inputs for logits (..., K) of any strides."""
    rows = student.shape[:-1]
    labels = torch.arange(rows.numel(), device=DEVICE).reshape(rows) % student.shape[-1]

    def compute(*inputs: Tensor, **settings: Any) -> Tensor:
        if name == "unikd_loss":
            return without_gaussians(*inputs, **settings)[0] * 3
        return LOSSES[name].compute(*inputs, **settings) * 3

    return compute, [student.detach().requires_grad_(), teacher, *([] if name == "softmax_kl" else [labels])]


@pytest.mark.parametrize("name", ["softmax_kl", "dkd_loss", "unikd_loss"])
class TestStrides:
    """Gradients of class maps, multiplied by an upstream one."""

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_of_dense_logits_are_theirs(self, name: str, dtype: torch.dtype) -> None:
        student, teacher = (randn(2, 6, 4, 8, seed=seed, dtype=dtype).movedim(1, -1) for seed in (1, 2))
        for other in (teacher, teacher.contiguous()):
            compute, inputs = of_maps(name, student, other)
            compare(compute, inputs)
            gradient = torch.autograd.grad(compute(*inputs, impl="fused"), inputs[0])[0]
            assert gradient.stride() == student.stride()

    def test_of_parts_are_dense_rows(self, name: str) -> None:
        """Rows of a map, and a map whose axes no two steps reach."""
        student, teacher = (randn(2, 6, 4, 8, seed=seed).movedim(1, -1) for seed in (1, 2))
        for s, t in ((student[:, :-1], teacher[:, 1:]), (student.transpose(0, 2), teacher.transpose(0, 2))):
            compute, inputs = of_maps(name, s, t)
            compare(compute, inputs)
            gradient = torch.autograd.grad(compute(*inputs, impl="fused"), inputs[0])[0]
            assert gradient.is_contiguous()


@every_loss
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_second_derivatives_are_rejected(name: str, factor: float) -> None:
    """A penalty on the gradient must not drop out of a sum unnoticed, whatever the loss is multiplied by."""
    inputs = LOSSES[name].make(5, 11, torch.float32)
    weight = torch.tensor(factor, device=DEVICE, requires_grad=factor != 1)
    loss = LOSSES[name].compute(*inputs, impl="fused") * weight
    with pytest.raises(RuntimeError, match=r"twice|second derivative|double backward"):
        (gradient, *_) = torch.autograd.grad(loss, leaves_of(inputs), create_graph=True)
        (loss + gradient.square().sum()).backward()


def tangent_of(f: Callable[[Tensor], Tensor], x: Tensor, direction: Tensor) -> Tensor | None:
    """Differentiate in forward mode."""
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, direction))).tangent


@every_loss
class TestTransforms:
    """Forward mode and torch.func: an error from a kernel, and the right numbers from the plain loss and "auto"."""

    def loss_of(self, name: str, impl: str) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        first, *rest = (x.detach() for x in LOSSES[name].make(5, 11, torch.float32))
        return lambda x: LOSSES[name].compute(x, *rest, impl=impl), first

    @pytest.mark.parametrize("wanted", [False, True])
    def test_forward_mode_of_a_kernel_is_rejected(self, name: str, wanted: bool) -> None:
        """With and without requires_grad, where the tangent was lost without a word."""
        f, x = self.loss_of(name, "fused")
        with pytest.raises(RuntimeError, match=r"got tensors under forward-mode differentiation; use impl='auto'"):
            tangent_of(f, x.requires_grad_(wanted), torch.ones_like(x))

    def test_transforms_of_a_kernel_are_rejected(self, name: str) -> None:
        f, x = self.loss_of(name, "fused")
        transforms = torch.func.grad(f), torch.func.jacfwd(f), torch.func.hessian(f), lambda x: torch.vmap(f)(x[None])
        for transform in transforms:
            with pytest.raises(RuntimeError, match=r"got tensors under torch\.vmap or another .*; use impl='auto'"):
                transform(x)

    @pytest.mark.parametrize("impl", ["auto", long("reference")])
    def test_transforms_of_the_plain_loss(self, name: str, impl: str) -> None:
        f, x = self.loss_of(name, impl)
        gradient = torch.autograd.grad(f(x.requires_grad_()), x)[0]
        x, direction = x.detach(), randn(5, 11, seed=9)
        expected = (gradient * direction).sum()
        tangent = tangent_of(f, x, direction)
        assert tangent is not None
        torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-6)
        tangent = torch.func.jvp(f, (x,), (direction,))[1].float()  # a number times a 0-d tensor is fp64 there
        torch.testing.assert_close(tangent, expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(torch.func.grad(f)(x), gradient, rtol=1e-4, atol=1e-6)
        several = torch.stack([x, 2 * x])
        torch.testing.assert_close(torch.vmap(f)(several), torch.stack([f(x), f(2 * x)]), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(torch.vmap(torch.func.grad(f))(several)[0], gradient, rtol=1e-4, atol=1e-6)

    def test_every_input_can_be_batched(self, name: str) -> None:
        """Labels and stored rows too, whose values are then not looked at."""
        inputs = [x.detach() for x in LOSSES[name].make(5, 11, torch.float32)]

        def compute(*x: Tensor) -> Tensor:
            return LOSSES[name].compute(*x, impl="reference")

        batched = torch.vmap(compute)(*(torch.stack([x, x.flip(0)]) for x in inputs))
        torch.testing.assert_close(batched, compute(*inputs).expand(2), rtol=1e-4, atol=1e-6)


def test_batched_weight_is_rejected() -> None:
    """By the operator itself: it is not among the tensors that choose the implementation."""
    student, teacher, labels = LOSSES["dkd_loss"].make(5, 11, torch.float32)
    with pytest.raises(RuntimeError, match=r"dkd: the kernel can .* got a tensor under torch\.vmap .*impl='reference'"):
        torch.vmap(lambda a: dkd_loss(student, teacher, labels, alpha=a, impl="fused"))(torch.ones(2, device=DEVICE))


@every_loss
@every_dtype
def test_in_place_change_of_an_input_is_detected(name: str, dtype: torch.dtype) -> None:
    inputs = LOSSES[name].make(5, 11, dtype)
    inputs[0] = inputs[0].detach().clone().requires_grad_() * 1  # no leaf, so it may change in place
    loss = LOSSES[name].compute(*inputs, impl="fused")
    inputs[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@every_loss
@every_dtype
def test_same_bits_twice(name: str, dtype: torch.dtype) -> None:
    """Case 20, and case 10: the inputs stay as they are."""
    for rows, classes in ((67, 11), (3, 5000)):
        inputs = LOSSES[name].make(rows, classes, dtype)
        before = [x.detach().clone() for x in inputs]
        first, second = (results_of(name, inputs, factor=3.0) for _ in range(2))
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
        assert all(torch.equal(a, b) for a, b in zip(inputs, before, strict=True))


class Launches:
    """Which gradients each launch of a loss computed, and the buffers."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.wanted: list[int] = []
        self.buffers: list[weakref.ref[Tensor]] = []
        seen: set[int] = set()
        apply = _autograd.FusedLoss.__call__

        def call(loss: _autograd.FusedLoss, *arguments: Any, **settings: Any) -> Any:
            if id(loss) not in seen:
                seen.add(id(loss))
                monkeypatch.setattr(loss, "compute", self.watched(loss.compute))
            return apply(loss, *arguments, **settings)

        monkeypatch.setattr(_autograd.FusedLoss, "__call__", call)

    def watched(self, compute: Callable[..., Any]) -> Callable[..., Any]:
        def run(tensors: Any, wanted: Any, upstream: Any, settings: Any) -> Any:
            outputs, gradients = compute(tensors, wanted, upstream, settings)
            self.wanted.append(sum(wanted))
            self.buffers += [weakref.ref(x) for x in gradients if x is not None]
            return outputs, gradients

        return run


@every_loss
@every_dtype
class TestWhatIsComputed:
    def test_no_gradient_under_no_grad(self, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        launches = Launches(monkeypatch)
        inputs = LOSSES[name].make(5, 11, dtype)
        with torch.no_grad():
            loss = LOSSES[name].compute(*inputs, impl="fused")
        assert not loss.requires_grad
        loss = LOSSES[name].compute(*(x.detach() for x in inputs), impl="fused")
        assert not loss.requires_grad
        assert launches.wanted == [0, 0]
        assert launches.buffers == []

    def test_buffers_are_released(self, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        """Nothing but the gradient itself is left after backward, though the graph is kept."""
        launches = Launches(monkeypatch)
        inputs = LOSSES[name].make(5, 11, dtype)
        loss = LOSSES[name].compute(*inputs, impl="fused")
        at_once = len(leaves_of(inputs)) if dtype != torch.float16 else 0
        assert launches.wanted == [at_once]
        for _ in range(3):
            gradients = torch.autograd.grad(loss * 2, leaves_of(inputs), retain_graph=True)
            del gradients
        gc.collect()
        assert len(launches.wanted) == (3 if at_once else 4)
        assert [x for x in launches.buffers if x() is not None] == []

    def test_buffers_end_with_the_loss(self, name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        launches = Launches(monkeypatch)
        loss = LOSSES[name].compute(*LOSSES[name].make(5, 11, dtype), impl="fused")
        del loss
        gc.collect()
        assert [x for x in launches.buffers if x() is not None] == []


class TestMixedPrecision:
    """Case 16."""

    @every_loss
    @pytest.mark.parametrize("factor", [long(1.0), 65536.0, 2.0**24])
    def test_scaled_fp16_gradients(self, name: str, factor: float) -> None:
        """4096 rows make gradients of 1e-8, which fp16 does not hold before they are scaled; 2^24 overflows some."""
        loss = LOSSES[name]

        def scaled(*x: Any, **settings: Any) -> Tensor:
            return loss.compute(*x, normalizer=2.0**22, **settings) * factor

        inputs = loss.make(9, 100, torch.float16)
        compare(scaled, inputs, units=2)
        gradient = torch.autograd.grad(scaled(*inputs, impl="fused"), inputs[0])[0]
        if factor == 65536:
            assert (gradient != 0).double().mean() > 0.9
            assert gradient.isfinite().all()

    @every_loss
    def test_fp16_overflow_is_seen(self, name: str) -> None:
        """As GradScaler needs it: inf in the gradient where it leaves the range of fp16, and no NaN."""
        inputs = LOSSES[name].make(9, 11, torch.float16)
        exact = [x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x for x in inputs]
        loss = LOSSES[name].compute(*inputs, impl="fused")
        truth = LOSSES[name].compute(*exact, impl="reference")
        gradients = torch.autograd.grad(loss * 2.0**24, leaves_of(inputs))
        for fused, expected in zip(gradients, torch.autograd.grad(truth * 2.0**24, leaves_of(exact)), strict=True):
            assert fused.isinf().any()
            assert not fused.isnan().any()
            assert (fused[expected.abs() > 65600] == expected[expected.abs() > 65600].half()).all()
            assert fused[expected.abs() < 65400].isfinite().all()

    @every_loss
    @every_dtype
    def test_autocast_changes_nothing(self, name: str, dtype: torch.dtype) -> None:
        inputs = LOSSES[name].make(5, 11, dtype)
        expected = results_of(name, inputs)
        with torch.autocast(DEVICE, torch.bfloat16):
            under = results_of(name, inputs)
        assert under[0].dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(under, expected, strict=True))

    def test_grad_scaler(self) -> None:
        """A step in fp16, and a step that overflows and is skipped."""
        scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**16)
        logits = nn.Parameter(randn(6, 11, seed=1))
        optimizer = torch.optim.SGD([logits], lr=1.0)
        teacher = randn(6, 11, seed=2)
        for weight in (1.0, 1e4):
            before = logits.detach().clone()
            optimizer.zero_grad()
            loss = softmax_kl(logits.half(), teacher, impl="fused") * weight
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            if weight == 1:
                exact = before.half().double().requires_grad_()
                softmax_kl(exact, teacher.double(), impl="reference").backward()
                assert exact.grad is not None
                assert relative_error(before - logits, exact.grad) < 2e-3
                assert scaler.get_scale() == 2.0**16
            else:
                assert torch.equal(before, logits)
                assert scaler.get_scale() == 2.0**15


class TestMultiplyInPlace:
    def test_multiplying_by_one_writes_nothing(self) -> None:
        x = randn(5, 11, seed=1)
        x[0, 0] = float("nan")  # times 1 would be another NaN, perhaps
        before = x.clone()
        multiply_in_place([(x, torch.ones((), device=DEVICE))])
        assert torch.equal(x.view(torch.int32), before.view(torch.int32))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_scalar_and_per_row_factors(self, dtype: torch.dtype) -> None:
        for rows, classes in ((1, 1), (67, 11), (3, 5000)):
            for factor_dtype in (torch.float32, dtype):
                for factor in (torch.tensor(-2.5, device=DEVICE), randn(rows, seed=2), torch.ones(rows, device=DEVICE)):
                    factor = factor.to(factor_dtype)
                    x = randn(rows, classes, seed=1, dtype=dtype)
                    expected = x.double() * (factor[:, None] if factor.ndim else factor).double()
                    outside = multiplied(x, factor)
                    multiply_in_place([(x, factor)])
                    assert relative_error(x, expected) <= torch.finfo(dtype).eps
                    assert torch.equal(outside, expected.float().to(dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_factor_is_not_rounded(self, dtype: torch.dtype) -> None:
        x, factor = torch.ones(2, 3, dtype=dtype, device=DEVICE), torch.tensor(1 + 2**-9 + 2**-12, device=DEVICE)
        x[1] = 1.5
        assert torch.equal(multiplied(x, factor), (x.double() * factor.double()).to(dtype))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_zero_times_infinity_is_zero(self, dtype: torch.dtype) -> None:
        """A row that was left out stays left out."""
        x = torch.tensor([[0.0, 0.0], [1.0, 0.0]], dtype=dtype, device=DEVICE)
        for factor in (torch.tensor(float("inf")), torch.tensor([float("nan"), float("inf")])):
            factor = factor.to(DEVICE)
            outside, inside = multiplied(x, factor), x.clone()
            multiply_in_place([(inside, factor)])
            assert torch.equal(outside, inside)
            assert torch.equal(outside, torch.tensor([[0.0, 0.0], [float("inf"), 0.0]], device=DEVICE).to(dtype))

    def test_an_expanded_factor(self) -> None:
        x, factor = randn(6, 11, seed=1), torch.tensor(3.0, device=DEVICE).expand(2, 3)
        expected = x * 3
        multiply_in_place([(x.view(2, 3, 11), factor)])
        assert torch.equal(x, expected)

    @pytest.mark.parametrize("buffers", [1, MOST_BUFFERS, MOST_BUFFERS + 1, 2 * MOST_BUFFERS + 3])
    def test_many_buffers(self, buffers: int) -> None:
        pairs, expected = [], []
        for i in range(buffers):
            x = randn(1 + 7 * i % 40, 1 + 13 * i % 90, seed=i, dtype=DTYPES[i % 3])
            factor = randn(len(x), seed=i) if i % 2 else torch.tensor(1.0 + i, device=DEVICE)
            pairs.append((x, factor))
            expected.append((x.double() * (factor[:, None] if factor.ndim else factor).double()).to(x.dtype))
        multiply_in_place(pairs)
        for (x, _), y in zip(pairs, expected, strict=True):
            torch.testing.assert_close(x, y)

    def test_multiplying_nothing(self) -> None:
        multiply_in_place([])
        multiply_in_place([(torch.empty(0, 5, device=DEVICE), torch.tensor(2.0, device=DEVICE))])
        multiply_in_place([(torch.empty(0, 5, device=DEVICE), torch.empty(0, device=DEVICE))])


@pytest.fixture
def process_group(tmp_path: Any) -> Iterator[None]:
    if dist.is_initialized():
        pytest.skip("another test has left its process group")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize("dtype", DTYPES)
def test_distributed_data_parallel(process_group: None, dtype: torch.dtype) -> None:
    """Two steps, so that the buckets are rebuilt; the gradients are those without it."""
    network = nn.Linear(7, 11).to(DEVICE, dtype)
    loss = SoftmaxKL(temperature=2.0, impl="fused")
    images, teacher = randn(5, 7, seed=1, dtype=dtype), randn(5, 11, seed=2, dtype=dtype)
    expected = torch.autograd.grad(loss(network(images), teacher), list(network.parameters()))
    replicas = nn.parallel.DistributedDataParallel(network)
    for _ in range(2):
        network.zero_grad()
        loss(replicas(images), teacher).backward()
        for parameter, gradient in zip(network.parameters(), expected, strict=True):
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, gradient)
