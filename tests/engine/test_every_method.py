"""What every method does in training: it says its terms, goes on where it stopped, and is the same where sharded."""

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from support.captured_runs import CHANGING, config_of, curve, state
from support.long_rounds import quick
from support.real_runs import opened, train_here, train_records
from unikd_fast.config import Config
from unikd_fast.engine.checkpoint import FOLDER, checkpoint_name
from unikd_fast.methods import METHODS

EACH = {name: name for name in METHODS} | {
    "kd+unikd": ["kd", "unikd"],
    "a sum over levels": ["kd", "fitnet", "at", "ofd", "reviewkd"],
}
STEPS = 4  # two epochs


def short(folder: Path, weights: Path, name: str, method: Any, **sections: Any) -> Config:
    train = {**CHANGING["train"], "total_epochs": 2, "cuda_graph": "off", **sections.pop("train", {})}
    run = {**CHANGING["run"], "checkpoint_every_steps": 1, "keep_checkpoints": STEPS}
    data = {**CHANGING["data"], "train_samples": 32}
    return config_of(folder, weights, name, method, run=run, data=data, train=train, **sections)


@pytest.mark.parametrize(
    ("method", "precision"),
    [*((method, "fp32") for method in EACH.values()), (EACH["a sum over levels"], "bf16")],
    ids=[*EACH, "a sum in bf16"],
)
def test_a_resumed_run_matches_an_uninterrupted_one(tmp_path: Path, weights: Path, method: Any, precision: str) -> None:
    """To the bit, with the state of the optimiser, the average and what the method remembers."""
    config = short(tmp_path, weights, "run", method, train={"precision": precision})
    folder = train_here(config)
    records, whole = train_records(folder), state(folder)
    losses = curve(folder)
    assert len(losses) == len({step["total"] for step in losses}) == STEPS  # it trains
    assert set(losses[0]) >= {"total", *opened(tmp_path / "run.json").method.term_names}
    assert all(math.isfinite(value) for step in losses for value in step.values())

    shutil.rmtree(folder / FOLDER / checkpoint_name(STEPS))
    (folder / "result.json").unlink()
    train_here(config, resume=True)  # from inside of the second epoch
    assert train_records(folder) == records
    resumed = state(folder)
    assert resumed.keys() == whole.keys()
    assert all(torch.equal(resumed[key], whole[key]) for key in whole)


@pytest.mark.parametrize("method", quick(EACH.values(), "reviewkd"), ids=EACH)
def test_stage_3_matches_stage_0(tmp_path: Path, weights: Path, method: Any) -> None:
    replicated, sharded = (
        curve(
            train_here(
                short(
                    tmp_path,
                    weights,
                    f"stage{stage}",
                    method,
                    train={"accumulation_steps": 2},
                    deepspeed={"zero_optimization": {"stage": stage}},
                )
            )
        )
        for stage in (0, 3)
    )
    assert len(replicated) == STEPS
    for one, other in zip(sharded, replicated, strict=True):
        # One process holds all of it, so the sums are the same but for the order in which they are made.
        assert one == pytest.approx(other, rel=1e-3, abs=1e-5)
