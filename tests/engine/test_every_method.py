"""What every method does in training: it logs its terms, resumes bit for bit, and trains alike at ZeRO stage 3."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from support.captured_runs import CHANGING, config_of, curve, state
from support.long_rounds import quick
from support.real_runs import config_of as path_of
from support.real_runs import newest_checkpoint, opened, train_here, train_records
from unikd_fast.config import Config, load_config
from unikd_fast.engine.checkpoint import FOLDER, checkpoint_name
from unikd_fast.methods import OF_IMAGES

EACH = {name: name for name in OF_IMAGES} | {
    "kd+unikd": ["kd", "unikd"],
    "unikd_dev+mlkd": ["unikd_dev", "mlkd"],
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


HYBRID: dict[str, Any] = {
    "method": ["kd", "unikd"],
    "teacher_head": "prefit",
    "head_steps": 4,
    "alpha_ramp_epochs": 0.0,
}
TERMS = ("total", "ce", "kd_logit_kl", "feature_kl", "unikd_logit_kl")


def test_a_hybrid_logs_each_term(tmp_path: Path, weights: Path) -> None:
    config = load_config(path_of(tmp_path, weights, "hybrid", distill=HYBRID, train={"max_steps": 6}))
    records = [record for record in train_records(train_here(config)) if record["kind"] == "train"]
    assert len(records) == 6
    for record in records:
        assert [key for key in record if key in TERMS] == list(TERMS)
        _, ce, kd, feature, unikd = (record[name] for name in TERMS)
        assert record["total"] == pytest.approx(ce + 0.9 * kd + 4.0 * feature + 1.0 * unikd, rel=1e-5)
        assert kd == pytest.approx(unikd, rel=1e-5)
    result = json.loads((tmp_path / "hybrid" / "result.json").read_text())
    assert result["method"] == "kd+unikd"


@pytest.mark.long
def test_a_cached_hybrid_resumes_bit_for_bit(tmp_path: Path, weights: Path) -> None:
    """From a cache, which means that the head of the checkpoint is compared with that of the cache."""
    settings: dict[str, Any] = {"distill": HYBRID, "cache": {"mode": "read_write"}, "train": {"total_epochs": 2}}
    settings["run"] = {"checkpoint_every_steps": 1, "keep_checkpoints": 20}
    whole = train_here(load_config(path_of(tmp_path, weights, "whole", **settings)))
    parted = load_config(path_of(tmp_path, weights, "parted", **settings))
    folder = train_here(parted)
    for later in sorted((folder / FOLDER).glob("step-*"))[4:]:
        shutil.rmtree(later)
    assert newest_checkpoint(folder)["run"]["step"] == 4
    (folder / "result.json").unlink()
    train_here(parted, resume=True)
    assert train_records(folder) == train_records(whole)
