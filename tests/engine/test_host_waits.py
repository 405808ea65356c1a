"""No step makes the host wait for the device: counted on a device that is none, with all that a step may do."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from captured_runs import CHANGING, config_of, inputs, prepared
from fake_device import DEVICE, fake_device
from real_runs import ALONE
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from unikd_fast.engine.average import StudentAverage
from unikd_fast.engine.pace import Pace
from unikd_fast.models import build_model

pytestmark = pytest.mark.usefixtures("group")

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
def test_an_eager_step_waits_for_nothing(tmp_path: Path, weights: Path, method: str, sections: dict[str, Any]) -> None:
    with fake_device() as device:
        ready = prepared(config_of(tmp_path, weights, "run", method, **{"train": EAGER, **sections}), ON_DEVICE)
        data, pace = inputs(ready), Pace(ON_DEVICE, global_batch_size=16, loader_rate=None)
        pace.begin(0)
        for step in range(3):
            with device.watch():  # the first ones make the optimiser's state, and what a method makes with its first
                ready.steps.take(data, pace, step, learning_rate=0.01)
        assert device.waits == []
        with device.watch():
            means = ready.parts.meter.read()
        average = ready.parts.average
        assert average is not None
        pairs = zip(average.module.parameters(), ready.parts.experiment.student.parameters(), strict=True)
        assert all(own.stride() == other.stride() for own, other in pairs), "else each is averaged by itself"
        assert len(device.waits) == 1 and means["total"] > 0, "the log reads, once"


def test_deepspeed_times_itself_only_if_asked(tmp_path: Path, weights: Path) -> None:
    """What its timer costs shows that the device sees DeepSpeed wait."""
    sections = {"train": EAGER, "deepspeed": {"timers": {"throughput": {"enabled": True}}}}
    with fake_device() as device:
        ready = prepared(config_of(tmp_path, weights, "run", "none", **sections), ON_DEVICE)
        data, pace = inputs(ready), Pace(ON_DEVICE, global_batch_size=16, loader_rate=None)
        pace.begin(0)
        for step in range(4):
            with device.watch():
                ready.steps.take(data, pace, step, learning_rate=0.01)
        assert [wait.partition(" ")[0] for wait in device.waits] == ["synchronize"] * 4, "two in each micro-batch"


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
def test_the_device_sees_what_waits(waits: Callable[[torch.Tensor], Any]) -> None:
    with fake_device() as device:
        x = torch.ones(3, device=DEVICE)
        with device.watch():
            waits(x)
    assert len(device.waits) == 1


def test_the_device_sees_that_nothing_waits() -> None:
    with fake_device() as device:
        x = torch.ones(3, device=DEVICE, requires_grad=True)
        with device.watch():
            y = (x + torch.arange(3.0).pin_memory().to(DEVICE, non_blocking=True)).sum() * torch.tensor(2.0)
            y.backward()
            kept = x.detach().to("cpu", non_blocking=True)
        assert device.waits == []
        assert x.grad is not None and x.grad.tolist() == [2.0] * 3 and kept.tolist() == [1.0] * 3


def test_an_average_is_torchs_in_four_launches() -> None:
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
