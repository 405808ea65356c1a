"""Training from the teacher's outputs on disk matches training with the teacher online, also after a kill."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from support.cached_runs import KD, STEPS, by_sample, flat, made_ready, payloads, ready, same_weights, state_of, steps
from support.real_runs import (
    cached_config,
    newest_checkpoint,
    opened,
    run,
    save_teacher,
    start,
    train_here,
    train_records,
    wait_for_step,
)
from unikd_fast.config import load_config
from unikd_fast.engine.cache import cached_teacher, recheck
from unikd_fast.teacher.cache import CacheFolder
from unikd_fast.values import TopKLogits

# What storing may change in a number: half a unit of fp16, as a share of it; half of one of 255 levels, as a share of
# the row's range. A step sees 160 logits, whose roundings are independent and average: the first loss changes by less
# than a number may (measured 4e-6 and 5e-4). Later steps also differ by what training made of this. At a low rate that
# stays below a whole unit or level; at 0.002 UniKD's curve comes to one and a half, and at 0.05 to many.
HALF_UNIT = {"fp16": 2.0**-11, "uint8": 2.0**-9}


@pytest.mark.parametrize(
    ("distill", "logits", "rate"),
    [
        pytest.param(KD, "fp16", 0.002, id="kd-fp16"),
        pytest.param({"method": "unikd"}, "fp16", 0.0005, id="unikd-fp16"),
        pytest.param({"method": "unikd", "fdp": "direct"}, "fp16", 0.0005, id="unikd-direct", marks=pytest.mark.long),
        pytest.param(KD, "uint8", 0.002, id="kd-uint8", marks=pytest.mark.long),
    ],
)
def test_the_cached_loss_curve_matches_online(
    tmp_path: Path, weights: Path, distill: dict[str, Any], logits: str, rate: float
) -> None:
    runs = {}
    for mode in ("off", "read_write"):
        cache = {"mode": mode, "logits": logits}
        config = cached_config(
            tmp_path, weights, name=mode, cache=cache, distill=distill, train={"learning_rate": rate}
        )
        runs[mode] = steps(train_here(load_config(config)))
    online, cached = runs["off"], runs["read_write"]
    assert len(online) == len(cached) == STEPS
    assert len({record["total"] for record in online}) == STEPS  # it trains
    assert cached != online  # and from what was stored
    for name in ("total", "logit_kl"):
        assert online[0][name] > 1.0  # the teacher counts
        assert cached[0][name] == pytest.approx(online[0][name], rel=HALF_UNIT[logits]), name
        found, expected = ([record[name] for record in records] for records in (cached, online))
        assert found == pytest.approx(expected, rel=2 * HALF_UNIT[logits]), name
    assert cached[0]["ce"] == online[0]["ce"]  # bit for bit: the student and its images are the same


@pytest.mark.parametrize("distill", [KD, {"method": "unikd"}], ids=["kd", "unikd"])
def test_cached_views_and_targets_match_online(tmp_path: Path, weights: Path, distill: dict[str, Any]) -> None:
    cached = ready(cached_config(tmp_path, weights, distill=distill))
    online = opened(cached_config(tmp_path, weights, name="online", distill=distill, cache={"mode": "off"}))
    assert cached.teacher is None
    assert online.teacher is not None
    if cached.method.fixed_head is not None:
        online.method.head.adopt(cached.method.fixed_head.module.state_dict())
    seen = []
    for epoch in range(3):
        for (batch, target), (expected, nothing) in zip(
            cached.micro_batches(epoch), online.micro_batches(epoch), strict=True
        ):
            assert nothing is None
            assert target is not None
            assert batch.second is None
            for name in ("images", "labels", "sample_ids"):
                assert torch.equal(getattr(batch, name), getattr(expected, name))
            seen.append(batch.images)
            said = online.method.target(online.teacher(expected.images))
            assert isinstance(said.logits, Tensor)
            assert isinstance(target.logits, Tensor)
            assert_stored(target.logits, said.logits)
            assert (target.gaussian is None) == (said.gaussian is None)
            if target.gaussian is not None and said.gaussian is not None:
                assert_stored(target.gaussian.mean, said.gaussian.mean)
                assert_stored(target.gaussian.log_var, said.gaussian.log_var)
    assert len(seen) == STEPS
    assert len({images.sum().item() for images in seen}) == STEPS  # no view twice


def assert_stored(found: Tensor, exact: Tensor) -> None:
    """Rounded to fp16, and nothing else beyond the last bits of fp32 (2^-15 of the row's size, as for fidelity)."""
    assert found.dtype == torch.float16
    size = exact.square().mean(1, keepdim=True).sqrt()
    assert bool(((found - exact).abs() <= 2.0**-11 * exact.abs() + 2.0**-15 * size).all())


def test_epochs_beyond_the_views_repeat_them(tmp_path: Path, weights: Path) -> None:
    cached = ready(cached_config(tmp_path, weights, cache={"views": 2}, train={"total_epochs": 5}))
    online = opened(cached_config(tmp_path, weights, name="online", cache={"mode": "off"}, train={"total_epochs": 5}))
    assert CacheFolder.open(tmp_path / "outputs").views == 2
    epochs = [by_sample(cached.micro_batches(epoch)) for epoch in range(5)]
    orders = []
    for epoch in range(5):
        orders.append([batch.sample_ids.tolist() for batch, _ in cached.micro_batches(epoch)])
        assert orders[-1] == [batch.sample_ids.tolist() for batch, _ in online.micro_batches(epoch)]
        assert [batch.sample_ids.tolist() for batch, _ in cached.micro_batches(epoch, 4)] == orders[-1][4:]
        for sample, found in epochs[epoch].items():
            for a, b in zip(flat(found), flat(epochs[epoch % 2][sample]), strict=True):
                assert torch.equal(a, b)
    assert len({str(order) for order in orders}) == 5
    equal = [torch.equal(epochs[0][sample][0], epochs[1][sample][0]) for sample in epochs[0]]
    assert sum(equal) < 0.1 * len(equal)  # one in 50 has the same window and flip by chance


@pytest.mark.long
def test_dropout_does_not_affect_the_cache(tmp_path: Path) -> None:
    weights = save_teacher(tmp_path / "dropout.pth", "torchvision/mobilenet_v3_small", sharpness=100.0)
    teacher = {"model": "torchvision/mobilenet_v3_small", "weights": str(weights)}
    experiments = []
    for name in ("once", "again"):
        cache = {"dir": str(tmp_path / name), "recheck": 1.0}
        experiment = opened(cached_config(tmp_path, weights, teacher=teacher, cache=cache, train={"total_epochs": 1}))
        assert experiment.cache is not None
        if name == "again":
            assert experiment.cache.network is not None
            experiment.cache.network.train()
            torch.manual_seed(5)
        made_ready(experiment)
        experiments.append(experiment)
    once, again = (payloads(tmp_path / name) for name in ("once", "again"))
    assert np.array_equal(once, again)
    logits, _ = experiments[0].cache.folder.codec.decode(once)  # type: ignore[union-attr]
    assert float(logits.float().std()) > 0.5  # type: ignore[union-attr]

    made = cached_teacher(experiments[0])
    made.network.train()  # by hand, behind its back
    assert recheck(experiments[0], made).worst == 0.0
    batch, _ = next(experiments[0].micro_batches(0))
    shown = made(batch.images).logits
    made.network.train()
    assert not torch.allclose(made.network(batch.images).logits, shown, rtol=0.1)  # what it would be with dropout


@pytest.mark.long
def test_top_k_logits_bound_the_loss_from_below(tmp_path: Path, weights: Path) -> None:
    """KL over the classes kept and the rest as one class is at most KL over all (data processing)."""
    distill = {**KD, "temperature": 1.0}
    caches: dict[str, dict[str, Any]] = {
        "top": {"logits": "top_k", "top_k": 3, "dir": str(tmp_path / "top")},
        "all": {"logits": "top_k", "top_k": 10, "dir": str(tmp_path / "all")},
        "full": {"dir": str(tmp_path / "full")},
    }
    configs = {
        name: cached_config(tmp_path, weights, name=name, cache=cache, distill=distill)
        for name, cache in caches.items()
    }
    first = {name: steps(train_here(load_config(config))) for name, config in configs.items()}
    assert all(len(records) == STEPS for records in first.values())
    assert first["top"][-1]["logit_kl"] < 0.8 * first["top"][0]["logit_kl"]  # it trains

    experiments = {name: ready(config) for name, config in configs.items()}
    student = experiments["full"].student_module
    losses: dict[str, list[float]] = {name: [] for name in configs}
    for epoch in range(3):
        for batches in zip(*(experiment.micro_batches(epoch) for experiment in experiments.values()), strict=True):
            output = student(batches[0][0].images)
            for (name, experiment), (batch, target) in zip(experiments.items(), batches, strict=True):
                loss = experiment.method.loss(output, target, batch)
                losses[name].append(float(loss.terms["logit_kl"]))
    top, whole, full = (np.array(losses[name]) for name in ("top", "all", "full"))
    assert isinstance(target.logits if target is not None else None, Tensor | TopKLogits)
    assert bool((top < full).all())
    assert bool((top > 0.5 * full).all())  # not trivially
    assert whole == pytest.approx(full, rel=1e-5)  # with all of them it is the loss; fp32


@pytest.mark.long
def test_a_second_run_builds_nothing(tmp_path: Path, weights: Path) -> None:
    configs = [
        cached_config(tmp_path, weights, name="first", cache={"recheck": 0.001}),
        cached_config(tmp_path, weights, name="second", cache={"recheck": 0.001}),
        cached_config(tmp_path, weights, name="unchecked"),
        cached_config(tmp_path, weights, name="reading", cache={"mode": "read"}),
    ]
    folders, files = [], []
    for config in configs:
        folders.append(train_here(load_config(config)))
        files.append(state_of(tmp_path / "outputs"))
    records = [json.loads((folder / "teacher.json").read_text()) for folder in folders]
    assert [record["built_shards"] for record in records] == [1, 0, 0, 0]
    assert all(found == files[0] for found in files)
    assert all(same_weights(folders[0], folder) for folder in folders[1:])
    assert all(train_records(folder) == train_records(folders[0]) for folder in folders[1:])
    assert ["recheck" in record for record in records] == [True, True, False, False]
    assert all(record["recheck"]["views"] == 64 for record in records[:2])  # a batch at least
    assert all(record["recheck"]["worst"] <= 2.0**-11 for record in records[:2])  # another batch rounds otherwise


@pytest.mark.long
def test_a_killed_cached_run_continues_bit_for_bit(tmp_path: Path, weights: Path) -> None:
    """The second run finds the first one's cache, and the third plans and checks before it goes on."""
    sections: dict[str, Any] = {
        "run": {"checkpoint_every_steps": 1},
        "train": {"ema_decay": 0.9},
        "cache": {"recheck": 0.001},
    }
    whole = cached_config(tmp_path, weights, name="whole", **sections)
    done = run(whole)
    assert done.returncode == 0, done.stdout + done.stderr
    built = state_of(tmp_path / "outputs")

    cut = cached_config(tmp_path, weights, name="cut", **sections)
    process = start(cut)
    wait_for_step(tmp_path / "cut", 8, process)  # six steps an epoch: inside the second one
    process.kill()
    saved = newest_checkpoint(tmp_path / "cut")
    assert 6 <= saved["run"]["step"] < STEPS
    done = run(cut, "--resume", "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    assert train_records(tmp_path / "whole") == train_records(tmp_path / "cut")
    assert state_of(tmp_path / "outputs") == built
