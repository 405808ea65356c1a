"""DeepSpeed's section and options: optimisers, precisions, offloading, compilation, recomputation, refusals."""

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from support.real_runs import ALONE, merged, opened, run_ranks, train_here, write_config
from unikd_fast.config import ConfigError, load_config
from unikd_fast.engine.memory import oom_hint
from unikd_fast.engine.zero import deepspeed_config
from unikd_fast.errors import LoaderError, OutOfMemory


@pytest.mark.parametrize(
    ("section", "said"),
    [
        (
            {"zero_optimisation": {"stage": 1}},
            "deepspeed.zero_optimisation is not read by DeepSpeed; the nearest key is 'zero_optimization'",
        ),
        (
            {"zero_optimization": {"stage": 1, "overlap_com": True}},
            "deepspeed.zero_optimization.overlap_com = True is not valid: unknown key; the nearest key is "
            "'overlap_comm'",
        ),
        (
            {"zero_optimization": {"stage": 1, "reduce_bucket_size": "large"}},
            "deepspeed.zero_optimization.reduce_bucket_size = 'large' is not valid: ",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "gpu"}}},
            "deepspeed.zero_optimization.offload_optimizer.device = 'gpu' is not valid: ",
        ),
        ({"zero_optimization": {"stage": "two"}}, "deepspeed.zero_optimization.stage = 'two' is not supported; use"),
        ({"zero_optimization": {"stage": 4}}, "deepspeed.zero_optimization.stage = 4 is not supported; use one of"),
        (
            {"activation_checkpointing": None},
            "deepspeed.activation_checkpointing = None is not a section; set its keys",
        ),
        ({"timers": 5}, "deepspeed.timers = 5 is not a section; set"),
        ({"zero_optimization": 2}, "deepspeed.zero_optimization = 2 is not a section; set"),
        (
            {"flops_profiler": {"enable": True}},
            "deepspeed.flops_profiler.enable is not read by DeepSpeed; the nearest key is 'enabled'",
        ),
        ({"comms_logger": {"enabled": "some"}}, "deepspeed.comms_logger.enabled = 'some' is not valid: "),
        ({"communication_data_type": "fp17"}, "deepspeed: "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_invalid_deepspeed_keys_are_named(tmp_path: Path, section: dict[str, Any], said: str) -> None:
    config = load_config(write_config(tmp_path, deepspeed=section))
    with pytest.raises(ConfigError) as error:
        deepspeed_config(config, ALONE)
    assert str(error.value).startswith(said)
    assert "\n" not in str(error.value)


def test_valid_deepspeed_keys_are_passed_on(tmp_path: Path) -> None:
    section = {
        "zero_optimization": {"stage": 2, "overlap_comm": True, "offload_optimizer": {"device": "cpu"}},
        "communication_data_type": "fp32",
        "prescale_gradients": True,
        "wall_clock_breakdown": False,
        "checkpoint": {"tag_validation": "Warn"},
        "flops_profiler": {"enabled": False},
        "timers": {"throughput": {"enabled": False}},
        "aio": {"block_size": 1048576},
        "data_types": {"grad_accum_dtype": "fp32"},
    }
    given = deepspeed_config(load_config(write_config(tmp_path, deepspeed=section)), ALONE)
    assert {key: given[key] for key in section} == section


SMALL: dict[str, Any] = {
    "run": {"checkpoint_every_steps": None, "evaluate_every_epochs": 9},
    "student": {"model": "cifar/resnet8"},
    "train": {"total_epochs": 1, "learning_rate": 0.001, "ema_decay": None, "accumulation_steps": 1},
}


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["total"] for line in lines if line["kind"] == "train"]


def config_of(folder: Path, name: str, **sections: dict[str, Any]) -> Path:
    return write_config(folder, name=name, **merged(SMALL, sections))


@pytest.mark.slow
def test_activation_checkpointing_is_bit_exact(tmp_path: Path) -> None:
    for name, recompute in (("kept", False), ("again", True)):
        config = config_of(tmp_path, name, train={"activation_checkpointing": recompute})
        train_here(load_config(config))
    assert losses(tmp_path / "kept") == losses(tmp_path / "again")
    assert len(losses(tmp_path / "kept")) == 6


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_lower_precisions_follow_fp32(tmp_path: Path, precision: str) -> None:
    for name in ("fp32", precision):
        train_here(load_config(config_of(tmp_path, name, train={"precision": name})))
    exact, rounded = losses(tmp_path / "fp32"), losses(tmp_path / precision)
    assert exact != rounded
    # Eight bits of a bf16 product, over six steps.
    assert all(math.isclose(a, b, rel_tol=0.03) for a, b in zip(exact, rounded, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("stage", [2, 3])
def test_offloading_matches_torchs_optimizer(tmp_path: Path, stage: int) -> None:
    found = []
    for name, offload in (("device", {}), ("cpu", {"offload_optimizer": {"device": "cpu"}})):
        config = config_of(tmp_path, name, deepspeed={"zero_optimization": {"stage": stage, **offload}})
        done = run_ranks(config)
        assert done.returncode == 0, done.stdout + done.stderr
        found.append(losses(tmp_path / name))
    assert found[0] == pytest.approx(found[1], rel=2e-5)
    assert len(set(found[0])) == 6


CPU_STATES = {"offload_optimizer": {"device": "cpu"}}
# What is changed in the run, what is changed in the one it is held against, and how far the losses may lie apart: eight
# bits of a bf16 product, eleven of fp16, fp32 in another order, or the same operations.
OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any], float]] = {
    "bf16": ({"precision": "bf16"}, {}, 0.03),
    "fp16": ({"precision": "fp16"}, {}, 0.005),
    "channels_last": ({"channels_last": True}, {}, 1e-4),
    "activation_checkpointing": ({"activation_checkpointing": True}, {}, 0.0),
    "compile": ({"compile": "default"}, {}, 1e-4),
    "adamw, clipped": (
        {"optimizer": "adamw", "clip_grad_norm": 1.0},
        {"optimizer": "adamw", "clip_grad_norm": 1.0},
        0.0,
    ),
    "fused_adamw": ({"optimizer": "fused_adamw"}, {"optimizer": "adamw"}, 1e-4),
    "cpu_adamw": ({"optimizer": "cpu_adamw"}, {"optimizer": "adamw"}, 1e-4),
}


@pytest.fixture(scope="module")
def trained_losses(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int, dict[str, Any]], list[float]]:
    """The losses of six steps of two processes at a stage; each combination is trained once."""

    @functools.cache
    def train(stage: int, changes: str) -> list[float]:
        folder = tmp_path_factory.mktemp("run")
        options = json.loads(changes)
        offload = CPU_STATES if options.get("optimizer") == "cpu_adamw" and stage else {}
        config = config_of(folder, "run", train=options, deepspeed={"zero_optimization": {"stage": stage, **offload}})
        done = run_ranks(config)
        assert done.returncode == 0, done.stdout + done.stderr
        return losses(folder / "run")

    return lambda stage, changes: train(stage, json.dumps(changes))


@pytest.mark.long
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_trains_at_every_stage(
    trained_losses: Callable[[int, dict[str, Any]], list[float]], option: str, stage: int
) -> None:
    changes, without, tolerance = OPTIONS[option]
    found, expected = trained_losses(stage, changes), trained_losses(stage, without)
    if option == "activation_checkpointing" and stage == 3:
        tolerance = 1e-6  # gradients meet in another order
    assert len(set(found)) == 6
    assert found == pytest.approx(expected, rel=tolerance, abs=0)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError(), "MemoryError"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore"), "Tried to allocate 2 GiB"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 9 bytes"), "you tried 9 bytes"),
    ],
)
def test_out_of_memory_names_the_part_and_the_remedy(error: Exception, said: str) -> None:
    with (
        pytest.raises(OutOfMemory, match=f"^out of memory in the student's part: .*{said}.?; raise train.accumulation"),
        oom_hint("student"),
    ):
        raise error


def test_a_real_out_of_memory_is_recognised() -> None:
    with pytest.raises(OutOfMemory, match="out of memory in the teacher's part"), oom_hint("teacher"):
        torch.empty(2**60, dtype=torch.uint8)


def test_a_method_that_is_too_large_is_named(tmp_path: Path) -> None:
    config = write_config(tmp_path, student={"model": "cifar/resnet8"}, distill={"width": 2**44})
    with pytest.raises(OutOfMemory, match=r"^out of memory in the method's part: .*; lower distill\.unikd\.width"):
        opened(config)


def test_errors_with_a_remedy_pass() -> None:
    with pytest.raises(LoaderError, match="workers"), oom_hint("run"):
        raise LoaderError("worker 0: Cannot allocate memory; lower data.workers")


def test_other_errors_pass() -> None:
    with pytest.raises(RuntimeError, match="shape"), oom_hint("student"):
        raise RuntimeError("shape mismatch")
