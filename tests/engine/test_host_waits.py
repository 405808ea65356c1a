"""No step makes the host wait for the device, and evaluation does once: counted on a device that is none."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from support.captured_runs import CHANGING, config_of, inputs, prepared
from support.fake_device import DEVICE, fake_device
from support.real_runs import ALONE
from unikd_fast.engine.evaluate import BatchLogits, Probe, evaluate
from unikd_fast.engine.optimizer import StudentAverage
from unikd_fast.engine.timing import Throughput
from unikd_fast.models import build_model
from unikd_fast.values import Batch, Features

ON_DEVICE = replace(ALONE, device=DEVICE)
# Clipping and an average are CHANGING's.
EAGER = {**CHANGING["train"], "cuda_graph": "off", "accumulation_steps": 2}
STEPS: list[Any] = [
    pytest.param("kd", {}, id="kd"),
    pytest.param("unikd", {"distill": {**CHANGING["distill"], "teacher_head": "anchored"}}, id="unikd"),
    pytest.param("mlkd", {"data": {**CHANGING["data"], "second_view": None}}, id="mlkd, strong second views"),
    pytest.param("reviewkd", {"train": {**EAGER, "optimizer": "adamw"}}, id="reviewkd, adamw"),
    pytest.param("dkd", {"train": {**EAGER, "precision": "bf16", "channels_last": True}}, id="dkd, bf16"),
    pytest.param("none", {"data": {**CHANGING["data"], "mixing": {"cutmix_alpha": 1.0}}}, id="none, mixing"),
]


@pytest.mark.parametrize(("method", "sections"), STEPS)
def test_eager_steps_do_not_wait(tmp_path: Path, weights: Path, method: str, sections: dict[str, Any]) -> None:
    with fake_device() as device:
        ready = prepared(config_of(tmp_path, weights, "run", method, **{"train": EAGER, **sections}), ON_DEVICE)
        data, throughput = inputs(ready), Throughput(ON_DEVICE, global_batch_size=16, loader_rate=None)
        throughput.begin(0)
        for step in range(3):
            with device.watch():  # the first ones make the optimiser's state, and what a method makes with its first
                ready.steps.take(data, throughput, step, learning_rate=0.01)
        assert device.waits == []
        with device.watch():
            means = ready.meter.read()
        average = ready.average
        assert average is not None
        pairs = zip(average.module.parameters(), ready.experiment.student.parameters(), strict=True)
        assert all(own.stride() == other.stride() for own, other in pairs), "else each is averaged by itself"
        assert len(device.waits) == 1 and means["total"] > 0, "the log reads, once"


def test_deepspeed_times_itself_only_if_asked(tmp_path: Path, weights: Path) -> None:
    """What its timer costs shows that the device sees DeepSpeed wait."""
    sections = {"train": EAGER, "deepspeed": {"timers": {"throughput": {"enabled": True}}}}
    with fake_device() as device:
        ready = prepared(config_of(tmp_path, weights, "run", "none", **sections), ON_DEVICE)
        data, throughput = inputs(ready), Throughput(ON_DEVICE, global_batch_size=16, loader_rate=None)
        throughput.begin(0)
        for step in range(4):
            with device.watch():
                ready.steps.take(data, throughput, step, learning_rate=0.01)
        assert [wait.partition(" ")[0] for wait in device.waits] == ["synchronize"] * 4, "two in each micro-batch"


class Noting(nn.Module):
    """A network that notes how many images it was given at a time.

    Args:
        room: images that the memory is enough for.
    """

    def __init__(self, *, room: int = 99) -> None:
        super().__init__()
        self.room, self.sizes = room, list[int]()
        self.layer = nn.Linear(8, 7)

    def forward(self, images: torch.Tensor) -> Features:
        self.sizes.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return Features((), self.layer(images[:, 0, 0]))


def held_out() -> list[Batch]:
    images, labels, ids = torch.randn(23, 1, 1, 8), torch.arange(23) % 7, torch.arange(100, 123)
    return [Batch(images[i : i + 4], labels[i : i + 4], ids[i : i + 4]) for i in range(0, 23, 4)]


@pytest.mark.parametrize(("room", "sizes"), [(99, [16, 7]), (8, [16, 8, 8, 7]), (3, [16, 8, 4, *[2] * 11, 1])])
def test_an_evaluation_reads_once(room: int, sizes: list[int]) -> None:
    network, batches = Noting(room=room), held_out()
    kept: list[BatchLogits] = []
    wanted = evaluate(network, batches, ALONE, keep=kept)
    assert network.sizes == [4, 4, 4, 4, 4, 3] or room < 4, "on a CPU the batches stay what they are"
    network.sizes.clear()
    with fake_device() as device:
        network.to(DEVICE)
        on_device = [Batch(*(part.to(DEVICE) for part in batch[:3])) for batch in batches]
        outputs: list[BatchLogits] = []
        with device.watch():
            found = evaluate(network, on_device, ON_DEVICE, keep=outputs)
        assert len(device.waits) == 1
    assert network.sizes == sizes
    assert found.pop("ce") == pytest.approx(wanted.pop("ce"), rel=1e-6)
    assert found == wanted and found["samples"] == 23
    for own, other in zip(zip(*outputs, strict=True), zip(*kept, strict=True), strict=True):
        torch.testing.assert_close(torch.cat(own), torch.cat(other))


def test_the_probe_reads_once_for_each_network() -> None:
    teacher, student, batches = Noting(), Noting(), held_out()
    kept: list[BatchLogits] = []
    evaluate(student, batches, ALONE, keep=kept)
    wanted = Probe(teacher, lambda: batches, ALONE).measure(kept)
    with fake_device() as device:
        on_device = [Batch(*(part.to(DEVICE) for part in batch[:3])) for batch in batches]
        probe = Probe(teacher.to(DEVICE), lambda: on_device, ON_DEVICE)
        for waits in (2, 1):  # the teacher's logits are kept
            with device.watch():
                assert probe.measure(kept) == pytest.approx(wanted, rel=1e-6)
            assert len(device.waits) == waits


WAITS: list[Any] = [
    pytest.param(lambda x: x.sum().item(), id="a number of a tensor"),
    pytest.param(lambda x: x if x.sum() > 0 else -x, id="a branch"),
    pytest.param(lambda x: x[x > 0], id="a mask"),
    pytest.param(lambda x: x.cpu(), id="a copy to the host"),
    pytest.param(lambda x: x.tolist(), id="a list"),
    pytest.param(lambda x: torch.zeros(3).copy_(x), id="a copy into the host"),
    pytest.param(lambda x: torch.ones(3).to(DEVICE, non_blocking=True), id="a copy from pageable memory"),
    pytest.param(lambda x: torch.ones(3).pin_memory().to(DEVICE), id="a copy that blocks"),
    pytest.param(lambda x: x.new_tensor([2.0]), id="a tensor of a number"),
    pytest.param(lambda x: x[torch.tensor([1])], id="an index of the host"),
]


@pytest.mark.parametrize("waits", WAITS)
def test_the_fake_device_sees_waits(waits: Callable[[torch.Tensor], Any]) -> None:
    with fake_device() as device:
        x = torch.ones(3, device=DEVICE)
        with device.watch():
            waits(x)
    assert len(device.waits) == 1


def test_the_fake_device_sees_that_nothing_waits() -> None:
    with fake_device() as device:
        x = torch.ones(3, device=DEVICE, requires_grad=True)
        with device.watch():
            y = (x + torch.arange(3.0).pin_memory().to(DEVICE, non_blocking=True)).sum() * torch.tensor(2.0)
            y.backward()
            kept = x.detach().to("cpu", non_blocking=True)
        assert device.waits == []
        assert x.grad is not None and x.grad.tolist() == [2.0] * 3 and kept.tolist() == [1.0] * 3


def test_the_average_matches_torchs_in_four_launches() -> None:
    student = build_model("cifar/resnet20", num_classes=10).train()
    ours, theirs = StudentAverage(student, 0.9), _torchs(student, 0.9)
    for step in range(3):
        for tensor in student.state_dict().values():
            tensor.add_(torch.randn_like(tensor) if tensor.is_floating_point() else 5)
        ours.update_parameters(student)
        theirs.update_parameters(student)
        assert int(ours.n_averaged) == int(theirs.n_averaged) == step + 1
        for (name, own), other in zip(ours.state_dict().items(), theirs.state_dict().values(), strict=True):
            counts = name.endswith("num_batches_tracked")
            assert torch.equal(own, student.state_dict()[name.removeprefix("module.")] if counts else other)
    with fake_device() as device:
        student.to(DEVICE)
        ours.module.to(DEVICE)
        with device.watch():
            ours.update_parameters(student)
        assert device.waits == []
        changing = [name for name in device.launches if name.startswith("aten._foreach")]
        assert len(changing) <= 4 and device.launches.count("aten.detach.default") == len(device.launches) - len(
            changing
        )


def _torchs(student: nn.Module, decay: float) -> AveragedModel:
    return AveragedModel(student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)
