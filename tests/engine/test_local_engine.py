"""The engine of one process against DeepSpeed's: the same steps to the bit, and either goes on from a checkpoint."""

import math
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from support.captured_runs import CHANGING, config_of, curve, state
from support.long_rounds import long
from support.real_runs import ALONE, ROOT, train_here, write_config
from unikd_fast.config import Config
from unikd_fast.engine.build import build_experiment
from unikd_fast.engine.distributed import StopSignal
from unikd_fast.engine.gradients import GradientWatch, LossScale
from unikd_fast.engine.local_engine import LocalEngine
from unikd_fast.engine.networks import StudentModule
from unikd_fast.engine.step import train_step
from unikd_fast.engine.trainer import Trainer
from unikd_fast.engine.zero import collect_optimizer_state, reasons_for_deepspeed, start_engine
from unikd_fast.errors import Interrupted
from unikd_fast.methods import RunContext, build_method
from unikd_fast.models import LogitsOnly, build_model
from unikd_fast.values import Batch

# A key that changes nothing, but is one for DeepSpeed to read.
ASKED: dict[str, Any] = {"prescale_gradients": False}
SETTINGS: dict[str, dict[str, Any]] = {
    "sgd": {"nesterov": True},
    "adamw": {"optimizer": "adamw", "learning_rate": 0.001},
    "accumulation_and_clipping": {"accumulation_steps": 2, "clip_grad_norm": 0.5},
    "bf16_channels_last": {"precision": "bf16", "channels_last": True},
    "fp16": {"precision": "fp16"},
    "skip": {"nonfinite": "skip", "clip_grad_norm": 0.5},
}


def settings_of(deepspeed: dict[str, Any], **train: Any) -> Config:
    sizes = {"total_epochs": 1, "global_batch_size": 8, "learning_rate": 0.1, "weight_decay": 0.01}
    return Config.model_validate(
        {
            "data": {"name": "digits"},
            "student": {"model": "cifar/resnet8"},
            "distill": {"method": "none"},
            "train": {**sizes, **train},
            "deepspeed": deepspeed,
        }
    )


def changed_by_steps(config: Config, *, poisoned: bool) -> dict[str, torch.Tensor]:
    """All that eight micro-batches change; the third and fourth may have infinite pixels."""
    method = build_method(config.distill.settings, RunContext())
    torch.manual_seed(0)
    network = LogitsOnly(build_model("cifar/resnet8", num_classes=10))
    unused = nn.Linear(3, 3)  # has no gradient, and decays
    autocast = torch.float16 if config.train.precision == "fp16" else None
    engine = start_engine(config, StudentModule(network, None, unused, autocast=autocast), ALONE)
    assert isinstance(engine, LocalEngine) == (not config.deepspeed)
    engine.train()
    scale = LossScale(2.0**10) if config.train.precision == "fp16" else None
    watch = GradientWatch(engine, skip=config.train.nonfinite == "skip", scale=scale)
    for number in range(8):
        images, labels = torch.randn(4, 3, 16, 16), torch.randint(10, (4,))
        if poisoned and number in (2, 3):
            images.fill_(math.inf)
        update = (number + 1) % config.train.accumulation_steps == 0
        train_step(engine, None, method, Batch(images, labels, labels), update=update, watch=watch)
    optimizer = collect_optimizer_state(engine)["tensors"]
    states = {f"{name}/{key}": tensor for name, own in optimizer.items() for key, tensor in own.items()}
    return {**engine.module.state_dict(), **states, "norms": watch.norms, "skipped": torch.tensor(watch.skipped_steps)}


@pytest.mark.parametrize("train", SETTINGS.values(), ids=SETTINGS)
def test_steps_match_deepspeed_bit_for_bit(train: dict[str, Any]) -> None:
    skips = "nonfinite" in train or train.get("precision") == "fp16"
    ours, theirs = (changed_by_steps(settings_of(section, **train), poisoned=skips) for section in ({}, ASKED))
    assert int(ours["skipped"]) == 2 * skips and bool(ours["norms"].any()) == skips
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)
    torch.manual_seed(0)
    before = build_model("cifar/resnet8", num_classes=10).state_dict()
    assert not any(torch.equal(before[key], ours[f"network.plain.{key}"]) for key in before if key.endswith("weight"))


class StopsAfter(StopSignal):
    """As if SIGTERM came in the second epoch of a run."""

    def __init__(self) -> None:
        super().__init__(ALONE)
        self._left = 10

    def agreed(self) -> int:
        self._left -= 1
        return 0 if self._left > 0 else signal.SIGTERM


@pytest.mark.parametrize("optimizer", [long("sgd"), "adamw"])
def test_either_engine_resumes_the_others_checkpoint(tmp_path: Path, weights: Path, optimizer: str) -> None:
    train = {**CHANGING["train"], "optimizer": optimizer, "accumulation_steps": 2}
    straight = config_of(tmp_path, weights, "straight", "kd", train=train)
    train_here(straight)
    whole, losses = state(Path(straight.run.dir)), curve(Path(straight.run.dir))
    assert len(losses) == 20 and len({loss["total"] for loss in losses}) == 20
    for name, first, then in (("to", {}, ASKED), ("fro", ASKED, {})):
        config = config_of(tmp_path, weights, name, "kd", train=train, deepspeed=first)
        with StopsAfter() as stop, pytest.raises(Interrupted, match="stopped at step 9"):
            Trainer(build_experiment(config, ALONE), Path(config.run.dir), stop, label="student", resume=False).run()
        train_here(config.model_copy(update={"deepspeed": then}), resume=True)
        assert curve(Path(config.run.dir)) == losses
        found = state(Path(config.run.dir))
        assert found.keys() == whole.keys() and all(torch.equal(found[key], whole[key]) for key in whole)


@pytest.mark.parametrize(
    ("deepspeed", "train", "processes", "reasons"),
    [
        ({}, {}, 1, []),
        ({"zero_optimization": {}}, {}, 1, []),
        ({"zero_optimization": {"stage": 0}}, {"optimizer": "adamw"}, 1, []),
        ({}, {}, 2, ["2 processes exchange gradients (start one)"]),
        ({"zero_optimization": {"stage": 1}}, {}, 1, ["deepspeed.zero_optimization.stage = 1 shards the optimiser"]),
        ({"zero_optimization": {"stage": 0, "overlap_comm": True}}, {}, 1, ["deepspeed has zero_optimization.overlap"]),
        ({"timers": {}, **ASKED}, {}, 1, ["deepspeed has prescale_gradients, timers (remove these keys)"]),
        ({}, {"optimizer": "cpu_adamw"}, 1, ["train.optimizer = 'cpu_adamw' is DeepSpeed's"]),
    ],
)
def test_reasons_for_deepspeed(
    deepspeed: dict[str, Any], train: dict[str, Any], processes: int, reasons: list[str]
) -> None:
    config = settings_of(deepspeed, **train)
    found = list(reasons_for_deepspeed(config, replace(ALONE, world_size=processes)))
    assert len(found) == len(reasons) and all(map(str.startswith, found, reasons))


ALONE_PROGRAM = """
import sys
from unikd_fast.cli import main
import torch.distributed as dist

assert main(["train", *sys.argv[1:]]) == 0
assert main(["train", *sys.argv[1:], "--dry-run"]) == 0
assert "deepspeed" not in sys.modules and not dist.is_initialized()
"""


def test_one_process_imports_no_deepspeed(tmp_path: Path) -> None:
    config = write_config(tmp_path, train={"max_steps": 2}, student={"model": "cifar/resnet8"})
    script = tmp_path / "alone.py"
    script.write_text(ALONE_PROGRAM)
    command = [sys.executable, str(script), "--config", str(config), "--set", "run.trackers=[]"]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
