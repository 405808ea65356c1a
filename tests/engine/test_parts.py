"""The engine's parts by themselves: schedule, meter, evaluation, BatchNorm buffers, teacher, DeepSpeed settings."""

import itertools
import math
from functools import partial
from pathlib import Path

import pytest
import torch
from deepspeed.ops.op_builder.builder import MissingCUDAException
from deepspeed.runtime.utils import clip_grad_norm_
from torch import Tensor, nn

from support.ranks import Ranks
from unikd_fast.config import Config, ConfigError
from unikd_fast.config.schema import TrainConfig
from unikd_fast.engine.distributed import Processes, average_buffers, join_alone
from unikd_fast.engine.evaluate import evaluate
from unikd_fast.engine.metrics import LossMeter
from unikd_fast.engine.optimizer import build_optimizer, clip_before_update, learning_rate
from unikd_fast.engine.zero import deepspeed_config
from unikd_fast.errors import NonFiniteLoss
from unikd_fast.models import build_model
from unikd_fast.teacher import OnlineTeacher
from unikd_fast.values import Batch, Features, Loss

ALONE = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))


def train_section(**values: object) -> TrainConfig:
    return TrainConfig.model_validate({"total_epochs": 10, "global_batch_size": 8, "learning_rate": 0.4, **values})


def test_cosine_schedule_with_warm_up() -> None:
    train = train_section(schedule="cosine", warmup_epochs=2.0)
    rates = [learning_rate(train, step, total_steps=100, steps_per_epoch=10) for step in range(101)]
    assert rates[0] == pytest.approx(0.4 / 20)
    assert max(rates) == rates[19] == rates[20] == pytest.approx(0.4)
    assert rates[60] == pytest.approx(0.2)
    assert rates[100] == pytest.approx(0.0)
    assert all(a >= b for a, b in itertools.pairwise(rates[20:]))


def test_step_schedule_drops_at_milestones() -> None:
    train = train_section(schedule="step", milestones=[3, 6], gamma=0.1)
    rates = [learning_rate(train, step, total_steps=100, steps_per_epoch=10) for step in (0, 29, 30, 59, 60)]
    assert rates == pytest.approx([0.4, 0.4, 0.04, 0.04, 0.004])


def test_a_schedule_in_steps_is_the_same_for_any_epoch() -> None:
    """COCO's: from 1/1000 of the rate to all of it in 1,000 steps; a tenth from 120,000 on, 1/100 from 160,000."""
    train = train_section(schedule="step", milestone_steps=[120_000, 160_000], warmup_steps=1000)
    steps = (0, 499, 999, 1000, 119_999, 120_000, 159_999, 160_000)
    for steps_per_epoch in (1, 14_658):
        rates = [learning_rate(train, step, total_steps=180_000, steps_per_epoch=steps_per_epoch) for step in steps]
        assert rates == pytest.approx([0.0004, 0.2, 0.4, 0.4, 0.4, 0.04, 0.04, 0.004])


TERMS = ("ce", "hint")


def loss(value: float) -> Loss:
    """With the terms in another order than the method states them."""
    t = torch.tensor(value)
    return Loss(t, {"hint": 3 * t, "ce": 2 * t})


def test_the_meter_averages_and_resets() -> None:
    meter = LossMeter(ALONE, TERMS)
    meter.update(loss(1.0), 0)
    meter.update(loss(3.0), 1)
    assert list(meter.read().items()) == [("total", 2.0), ("ce", 4.0), ("hint", 6.0)]
    meter.update(loss(5.0), 2)
    assert meter.read()["total"] == 5.0


def test_the_meter_requires_the_stated_terms() -> None:
    for other in ({"ce": torch.ones(())}, {name: torch.ones(()) for name in ("ce", "hint", "anchor")}):
        with pytest.raises(AssertionError, match=r"states \('total', 'ce', 'hint'\), got"):
            LossMeter(ALONE, TERMS).update(Loss(torch.ones(()), other), 0)


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_the_meter_remembers_the_first_bad_step(bad: float) -> None:
    meter = LossMeter(ALONE, TERMS)
    for step, value in enumerate([1.0, 2.0, bad, math.nan]):
        meter.update(loss(value), step)
    for call in (meter.check, meter.read):
        with pytest.raises(NonFiniteLoss, match=f"step 2 on process 0: total {bad:g}, ce {bad:g}, hint {bad:g}"):
            call()


class Fixed(nn.Module):
    """Logits that are the images' first values."""

    def forward(self, images: Tensor) -> Features:
        return Features((), images[:, 0, 0, :])


def test_evaluation_counts_every_sample_of_uneven_batches() -> None:
    labels = torch.tensor([0, 1, 2, 3, 4])
    rank_of_label = torch.tensor([0, 0, 0, 3, 6])  # three are first, one is among five, one is not
    images = torch.stack(
        [torch.arange(0.0, -8.0, -1.0).roll(int(k - r)) for k, r in zip(labels, rank_of_label, strict=True)]
    )
    images = images[:, None, None, :]
    batches = [Batch(images[:3], labels[:3], labels[:3]), Batch(images[3:], labels[3:], labels[3:])]
    found = evaluate(Fixed(), batches, ALONE)
    assert found["accuracy"] == pytest.approx(60.0)
    assert found["top5"] == pytest.approx(80.0)
    assert found["samples"] == 5
    logits = images[:, 0, 0, :]
    assert found["ce"] == pytest.approx(nn.functional.cross_entropy(logits, labels).item(), rel=1e-6)


def test_the_teacher_stays_in_eval_mode() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, images: Tensor) -> Features:
            out = self.norm(images)
            return Features((out,), out.mean((2, 3)))

    teacher = OnlineTeacher(Net(), precision="bf16")
    before = {name: buffer.clone() for name, buffer in teacher.named_buffers()}
    teacher.train()
    assert not any(module.training for module in teacher.modules())
    features = teacher(torch.randn(4, 3, 8, 8) + 3)
    assert features.logits.dtype == torch.float32
    assert features.levels[0].dtype == torch.bfloat16
    assert not features.logits.requires_grad
    assert all(torch.equal(before[name], buffer) for name, buffer in teacher.named_buffers())
    with pytest.raises(ValueError, match="got 'int8'"):
        OnlineTeacher(Net(), precision="int8")


def full_config(**train: object) -> Config:
    raw = {"data": {"name": "digits"}, "student": {"model": "cifar/resnet8"}, "distill": {"method": "none"}}
    sizes = {"total_epochs": 1, "global_batch_size": 24, "learning_rate": 0.1}
    deepspeed = {"wall_clock_breakdown": True, "zero_optimization": {"stage": 1}}
    return Config.model_validate({**raw, "train": {**sizes, **train}, "deepspeed": deepspeed})


def test_deepspeed_gets_each_setting_once_and_the_users_own() -> None:
    two = Processes(rank=0, world_size=2, local_rank=0, device=torch.device("cpu"))
    found = deepspeed_config(full_config(accumulation_steps=3, precision="bf16", clip_grad_norm=1.5), two)
    assert found["train_batch_size"] == 24
    assert found["train_micro_batch_size_per_gpu"] == 4
    assert found["gradient_accumulation_steps"] == 3
    assert found["gradient_clipping"] == 1.5
    assert found["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert "bf16" not in found
    assert found["wall_clock_breakdown"] is True
    assert found["timers"] == {"throughput": {"enabled": False}}
    with pytest.raises(
        ConfigError, match=r"train.global_batch_size = 24: .* world_size 5 x accumulation_steps 1 .* set it to 20 or 25"
    ):
        deepspeed_config(full_config(), Processes(0, 5, 0, torch.device("cpu")))


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_compiled_graphs_do_not_accumulate(mode: str) -> None:
    assert full_config(compile="default", accumulation_steps=2) and full_config(compile=mode)
    with pytest.raises(ValueError, match=f"train.compile = '{mode}' .* train.accumulation_steps = 2; set .* 'default'"):
        full_config(compile=mode, accumulation_steps=2)


@pytest.mark.parametrize("name", ["fused_adamw", "cpu_adamw"])
def test_an_optimiser_that_cannot_be_built(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise MissingCUDAException("CUDA_HOME does not exist, unable to compile CUDA op(s)\nand more")

    for kind in ("FusedAdam", "DeepSpeedCPUAdam"):
        monkeypatch.setattr(f"deepspeed.ops.adam.{kind}", fails)
    with pytest.raises(ConfigError, match=rf"'{name}': .* build it: CUDA_HOME .* op\(s\); set it to 'adamw'"):
        build_optimizer(nn.Linear(2, 2).parameters(), train_section(optimizer=name))


def test_the_users_timers_stay() -> None:
    timers = {"throughput": {"enabled": True, "synchronized": False}}
    config = full_config().model_copy(update={"deepspeed": {"timers": timers}})
    assert deepspeed_config(config, ALONE)["timers"] == timers


@pytest.mark.parametrize("max_norm", [0.0, 0.5, 3.0, 1e4])
def test_clipping_is_deepspeeds_to_the_bit(max_norm: float) -> None:
    join_alone(ALONE.device)
    ours, theirs = (build_model("cifar/resnet8", num_classes=10) for _ in range(2))
    theirs.load_state_dict(ours.state_dict())
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        own.grad = torch.randn_like(own) * 0.05
        other.grad = own.grad.clone()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.1)
    clip_before_update(optimizer, max_norm)
    optimizer.step()
    if max_norm:
        clip_grad_norm_(list(theirs.parameters()), max_norm)
    torch.optim.SGD(theirs.parameters(), lr=0.1).step()
    for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert own.grad is not None and other.grad is not None
        assert torch.equal(own.grad, other.grad) and torch.equal(own, other)


def test_without_zero_deepspeed_leaves_gradients_alone() -> None:
    config = full_config(clip_grad_norm=1.5).model_copy(update={"deepspeed": {}})
    assert deepspeed_config(config, ALONE)["gradient_clipping"] == 0.0


def _two_processes(folder: Path) -> int:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    own = Processes(rank, 2, rank, torch.device("cpu"))
    norm = nn.BatchNorm2d(4)
    torch.manual_seed(rank)
    norm(torch.randn(8, 4, 3, 3) * (rank + 1))
    local = norm.running_var.clone()  # type: ignore[operator, union-attr]
    average_buffers(norm, own)
    images = torch.zeros(3 - 2 * rank, 1, 1, 8)  # three samples here, one there
    images[:, 0, 0, rank] = 1.0
    labels = torch.zeros(len(images), dtype=torch.int64)
    found = evaluate(Fixed(), [Batch(images, labels, labels)], own)
    meter = LossMeter(own, TERMS)
    meter.update(loss(float("nan") if rank else 1.0), 4)
    try:
        meter.check()
        message = ""
    except NonFiniteLoss as error:
        message = str(error)
    torch.save({"local": local, "mean": norm.running_var, "found": found, "message": message}, folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()
    return 0


def test_two_ranks_agree_on_state_and_failure(tmp_path: Path) -> None:
    done = Ranks(partial(_two_processes, tmp_path), tmp_path, processes=2).done()
    assert done.returncode == 0, done.stderr
    a, b = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert not torch.equal(a["local"], b["local"])
    assert torch.equal(a["mean"], b["mean"])
    torch.testing.assert_close(a["mean"], (a["local"] + b["local"]) / 2)
    assert a["found"] == b["found"]
    assert a["found"]["accuracy"] == pytest.approx(75.0)
    assert a["message"] == b["message"]
    assert "step 4 on process 1" in a["message"]
