"""Methods that are summed, trained: every term is said, and a killed run goes on, online and from a cache."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from support.real_runs import config_of, newest_checkpoint, train_here, train_records
from unikd_fast.config import load_config
from unikd_fast.engine.checkpoint import FOLDER

HYBRID: dict[str, Any] = {
    "method": ["kd", "unikd"],
    "teacher_head": "prefit",
    "head_steps": 4,
    "alpha_ramp_epochs": 0.0,
}
TERMS = ("total", "ce", "kd_logit_kl", "feature_kl", "unikd_logit_kl")


def test_a_hybrid_logs_each_term(tmp_path: Path, weights: Path) -> None:
    config = load_config(config_of(tmp_path, weights, "hybrid", distill=HYBRID, train={"max_steps": 6}))
    records = [record for record in train_records(train_here(config)) if record["kind"] == "train"]
    assert len(records) == 6
    for record in records:
        assert [key for key in record if key in TERMS] == list(TERMS)
        _, ce, kd, feature, unikd = (record[name] for name in TERMS)
        assert record["total"] == pytest.approx(ce + 0.9 * kd + 4.0 * feature + 1.0 * unikd, rel=1e-5)
        assert kd == pytest.approx(unikd, rel=1e-5)
    result = json.loads((tmp_path / "hybrid" / "result.json").read_text())
    assert result["method"] == "kd+unikd"


def test_a_cached_hybrid_resumes_bit_for_bit(tmp_path: Path, weights: Path) -> None:
    """From a cache, which means that the head of the checkpoint is compared with that of the cache."""
    settings: dict[str, Any] = {"distill": HYBRID, "cache": {"mode": "read_write"}, "train": {"total_epochs": 2}}
    settings["run"] = {"checkpoint_every_steps": 1, "keep_checkpoints": 20}
    whole = train_here(load_config(config_of(tmp_path, weights, "whole", **settings)))
    parted = load_config(config_of(tmp_path, weights, "parted", **settings))
    folder = train_here(parted)
    for later in sorted((folder / FOLDER).glob("step-*"))[4:]:
        shutil.rmtree(later)
    assert newest_checkpoint(folder)["run"]["step"] == 4
    (folder / "result.json").unlink()
    train_here(parted, resume=True)
    assert train_records(folder) == train_records(whole)
