"""Processes, workers, threads and sizes of batches build one cache, and train the same from it."""

import gc
import json
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support.cached_runs import (
    STEPS,
    assert_within_one_unit,
    by_sample,
    flat,
    made_ready,
    payloads,
    pretended,
    ready,
    same_weights,
    steps,
)
from support.long_rounds import long
from support.real_runs import (
    cached_config,
    opened,
    run_ranks,
    train_here,
)
from unikd_fast.config import load_config
from unikd_fast.engine import networks
from unikd_fast.teacher.cache import CacheFolder


@pytest.mark.parametrize("share", [long(0.0), 0.5])
def test_only_rank_0_loads_the_teacher(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, share: float
) -> None:
    ready(cached_config(tmp_path, weights))
    config = cached_config(tmp_path, weights, cache={"recheck": share})
    build, loads = networks.build_model, []

    def noted(name: str, **arguments: Any) -> Any:
        if arguments["role"] == "teacher" and arguments["weights"] is not None:
            loads.append(arguments["weights"])
        return build(name, **arguments)

    monkeypatch.setattr(networks, "build_model", noted)
    first = pretended(0)
    experiment = opened(config, first)
    assert experiment.cache is not None
    network = weakref.ref(experiment.cache.network)
    assert network() is not None
    record = made_ready(experiment)
    gc.collect()
    assert network() is None  # let go, with the memory it had
    assert ("recheck" in record) == bool(share)
    assert loads == [str(weights)]  # once, for its hash; the recheck takes the same

    loads.clear()
    second = pretended(1, first.said)
    made_ready(opened(config, second))
    assert second.said == []  # both said and heard the same number of things
    assert loads == []


@pytest.mark.long
def test_workers_do_not_change_cache_or_training(tmp_path: Path, weights: Path) -> None:
    rng = np.random.default_rng(0)
    for split, count in (("train", 48), ("val", 10)):
        for index in range(count):
            folder = tmp_path / "data" / split / f"class{index % 10}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(folder / f"{index}.jpg")
    data = {
        "name": "image_folder",
        "root": str(tmp_path / "data"),
        "num_classes": None,
        "train_samples": None,
        "augmentation": {"crop": "resized", "flip_probability": 0.5},
    }

    def config(built: int, trained: int) -> Path:
        return cached_config(
            tmp_path,
            weights,
            name=f"from{built}-with{trained}",
            data={**data, "workers": trained},
            train={"total_epochs": 2},
            cache={"dir": str(tmp_path / f"built{built}")},
        )

    for workers in (0, 2):
        ready(config(workers, workers))
    assert np.array_equal(payloads(tmp_path / "built0"), payloads(tmp_path / "built2"))
    folders = [train_here(load_config(config(0, workers))) for workers in (0, 2)]
    assert same_weights(*folders)
    assert len(steps(folders[0])) == 6


def test_build_batch_size_changes_rounding_only(tmp_path: Path, weights: Path) -> None:
    """oneDNN chooses its convolution by the size of the batch, and the head is fitted to what it gives."""
    found = {}
    for size in (3, 16, 64):
        experiment = ready(
            cached_config(tmp_path, weights, cache={"dir": str(tmp_path / str(size)), "batch_size": size})
        )
        found[size] = experiment.cache.folder.codec.decode(payloads(tmp_path / str(size)))  # type: ignore[union-attr]
    keys = {CacheFolder.open(tmp_path / str(size)).key for size in found}
    assert len(keys) == 1
    for size in (3, 64):
        assert_within_one_unit(found[size], found[16])


def test_thread_count_does_not_change_the_key(tmp_path: Path, weights: Path) -> None:
    """Each of two processes has half the threads of one, and another machine has others."""
    config, threads = cached_config(tmp_path, weights), torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            opened(config)
    finally:
        torch.set_num_threads(threads)


def test_two_ranks_get_the_targets_of_one(tmp_path: Path, weights: Path) -> None:
    config = cached_config(tmp_path, weights, train={"accumulation_steps": 2})
    alone = ready(config)
    first = pretended(0)
    parts = [ready(config, first)]
    parts.append(ready(config, pretended(1, first.said)))
    for epoch in range(3):
        expected = by_sample(alone.micro_batches(epoch))
        shares = [by_sample(part.micro_batches(epoch)) for part in parts]
        assert not shares[0].keys() & shares[1].keys()
        assert (shares[0] | shares[1]).keys() == expected.keys()
        assert len(expected) == 96
        for sample, found in (shares[0] | shares[1]).items():
            for a, b in zip(flat(found), flat(expected[sample]), strict=True):
                assert torch.equal(a, b)


@pytest.mark.long
def test_two_ranks_build_and_train_from_one_cache(tmp_path: Path, weights: Path) -> None:
    """ZeRO stage 1, accumulation and an average; and the outputs are those that one process builds."""
    sections: dict[str, Any] = {
        "train": {"accumulation_steps": 2, "ema_decay": 0.9},
        "distill": {"norm": None},  # batch statistics are those of a process's own share
        "deepspeed": {"zero_optimization": {"stage": 1}},
    }
    config = cached_config(tmp_path, weights, name="two", cache={"recheck": 0.001}, **sections)
    done = run_ranks(config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(steps(tmp_path / "two")) == STEPS
    record = json.loads((tmp_path / "two" / "teacher.json").read_text())
    assert record["built_shards"] == CacheFolder.open(tmp_path / "outputs").info().shards
    assert record["recheck"]["worst"] <= record["recheck"]["bound"]
    assert (tmp_path / "two" / "student.safetensors").exists()

    alone = ready(cached_config(tmp_path, weights, cache={"dir": str(tmp_path / "alone")}, **sections))
    assert alone.cache is not None
    one, two = alone.cache.folder, CacheFolder.open(tmp_path / "outputs")
    assert_within_one_unit(*(folder.codec.decode(payloads(folder.path)) for folder in (one, two)))
