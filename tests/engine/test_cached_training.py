"""Training from the teacher's outputs on disk is the training that the teacher itself would give."""

import gc
import json
import signal
import weakref
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from real_runs import (
    ALONE,
    cached_config,
    kill_group,
    opened,
    run,
    save_teacher,
    start,
    train_here,
    train_records,
    wait_for_step,
)
from safetensors.torch import load_file
from torch import Tensor

from unikd_fast.config import load_config
from unikd_fast.engine import networks
from unikd_fast.engine.build import Experiment
from unikd_fast.engine.fill_cache import cached_teacher, ready_cache, recheck
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.stop import StopSignal
from unikd_fast.teacher.cache import CacheFolder
from unikd_fast.values import Batch, Gaussian, Target, TopKLogits

STEPS = 18  # three epochs of six
KD = {"method": "kd", "teacher_head": "anchored", "head_steps": None}


@dataclass(frozen=True)
class Pretended(Processes):
    """One of several processes, without the others: it hears what the first one said."""

    said: list[Any] = field(default_factory=list)

    def broadcast(self, value: Any) -> Any:
        if not self.is_first:
            return self.said.pop(0)
        self.said.append(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value] * self.world_size

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor

    def barrier(self) -> None:
        pass


def pretended(rank: int, said: list[Any] | None = None) -> Pretended:
    return Pretended(rank=rank, world_size=2, local_rank=rank, device=ALONE.device, said=list(said or []))


def made_ready(experiment: Experiment) -> dict[str, Any]:
    assert experiment.cache is not None
    return ready_cache(experiment.cache, experiment.side, StopSignal(ALONE), "test", epochs=experiment.epochs)


def ready(config: Path, processes: Processes = ALONE) -> Experiment:
    """An experiment that could train: with its cache built."""
    experiment = opened(config, processes)
    made_ready(experiment)
    return experiment


def payloads(path: Path) -> np.ndarray[Any, np.dtype[np.uint8]]:
    folder = CacheFolder.open(path)
    assert folder.verify().ok
    return folder.read(range(folder.samples * folder.views))


def state_of(path: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in path.glob("shard-*")}


def same_weights(left: Path, right: Path) -> bool:
    a, b = load_file(left / "student.safetensors"), load_file(right / "student.safetensors")
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def steps(folder: Path) -> list[dict[str, float]]:
    return [record for record in train_records(folder) if record["kind"] == "train"]  # type: ignore[comparison-overlap]


def by_sample(batches: Iterator[tuple[Batch, Target | None]]) -> dict[int, tuple[Tensor, Tensor, Gaussian | None]]:
    found = {}
    for batch, target in batches:
        assert target is not None
        assert isinstance(target.logits, Tensor)
        for row, sample in enumerate(batch.sample_ids.tolist()):
            gaussian = None if target.gaussian is None else Gaussian(*(part[row] for part in target.gaussian))
            found[sample] = (batch.images[row], target.logits[row], gaussian)
    return found


# What storing may change in a number: half a unit of fp16, as a share of it; half of one of 255 levels, as a share of
# the row's range. A step sees 160 logits, whose roundings are independent and average: the first loss changes by less
# than a number may (measured 4e-6 and 5e-4). Later steps also differ by what training made of this. At this rate that
# stays below a whole unit or level (measured at most 3e-4 and 1.5e-3); at 0.05 it grows to twenty times as much.
HALF_UNIT = {"fp16": 2.0**-11, "uint8": 2.0**-9}


@pytest.mark.parametrize(
    ("distill", "logits"),
    [
        pytest.param(KD, "fp16", id="kd-fp16"),
        pytest.param({"method": "unikd"}, "fp16", id="unikd-fp16"),
        pytest.param(KD, "uint8", id="kd-uint8"),
    ],
)
def test_the_loss_curve_is_that_of_the_teacher_online(
    tmp_path: Path, weights: Path, group: None, distill: dict[str, Any], logits: str
) -> None:
    runs = {}
    for mode in ("off", "read_write"):
        cache = {"mode": mode, "logits": logits}
        config = cached_config(tmp_path, weights, name=mode, cache=cache, distill=distill)
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
def test_every_epoch_shows_the_views_of_training_online_and_what_the_teacher_says_of_them(
    tmp_path: Path, weights: Path, distill: dict[str, Any]
) -> None:
    cached = ready(cached_config(tmp_path, weights, distill=distill))
    online = opened(cached_config(tmp_path, weights, name="online", distill=distill, cache={"mode": "off"}))
    assert cached.teacher is None
    assert online.teacher is not None
    if cached.method.fitted_head is not None:
        online.method.adopt_head(cached.method.fitted_head.state_dict())
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


def test_a_second_run_builds_nothing_and_gives_the_same_student(tmp_path: Path, weights: Path, group: None) -> None:
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


@pytest.mark.parametrize("share", [0.0, 0.5])
def test_only_the_first_process_reads_the_weights_of_a_teacher_whose_outputs_are_there(
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


def test_epochs_beyond_the_stored_views_repeat_them_in_an_order_of_their_own(tmp_path: Path, weights: Path) -> None:
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


def flat(found: tuple[Tensor, Tensor, Gaussian | None]) -> list[Tensor]:
    images, logits, gaussian = found
    return [images, logits, *(gaussian or ())]


@pytest.mark.slow
def test_any_number_of_workers_builds_and_trains_the_same(tmp_path: Path, weights: Path, group: None) -> None:
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


def test_the_size_of_the_building_batches_changes_rounding_at_most(tmp_path: Path, weights: Path) -> None:
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


def assert_within_one_unit(left: Any, right: Any) -> None:
    """Outputs in fp16 that were nearly the same before they were rounded.

    What lies between two numbers of fp16 may go to either; fp32 differs by up to 2^-15 of a row's size, as for
    fidelity. Measured: the logits are the same bit for bit, 0.2 % of the Gaussians' numbers are not.
    """
    for a, b in zip((left[0], *(left[1] or ())), (right[0], *(right[1] or ())), strict=True):
        a, b = a.double(), b.double()
        size = b.square().mean(1, keepdim=True).sqrt()
        assert bool(((a - b).abs() <= 2.0**-10 * torch.maximum(a.abs(), b.abs()) + 2.0**-15 * size).all())
        assert float((a != b).double().mean()) < 0.01


def test_the_key_is_the_same_for_any_number_of_threads(tmp_path: Path, weights: Path) -> None:
    """Each of two processes has half the threads of one, and another machine has others."""
    config, threads = cached_config(tmp_path, weights), torch.get_num_threads()
    try:
        for count in (1, 2, 3, 4):
            torch.set_num_threads(count)
            opened(config)
    finally:
        torch.set_num_threads(threads)


def test_both_of_two_processes_get_what_one_would(tmp_path: Path, weights: Path) -> None:
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


def test_dropout_has_no_part_in_what_is_stored(tmp_path: Path) -> None:
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

    assert experiments[0].cache is not None
    made = cached_teacher(experiments[0].cache)
    made.network.train()  # by hand, behind its back
    assert recheck(experiments[0].cache, made).worst == 0.0
    batch, _ = next(experiments[0].micro_batches(0))
    shown = made(batch.images).logits
    made.network.train()
    assert not torch.allclose(made.network(batch.images).logits, shown, rtol=0.1)  # what it would be with dropout


def test_the_largest_logits_bound_the_loss_from_below(tmp_path: Path, weights: Path, group: None) -> None:
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
    student = experiments["full"].side
    losses: dict[str, list[float]] = {name: [] for name in configs}
    for epoch in range(3):
        for batches in zip(*(experiment.micro_batches(epoch) for experiment in experiments.values()), strict=True):
            output = student(batches[0][0].images)
            for (name, experiment), (batch, target) in zip(experiments.items(), batches, strict=True):
                terms = experiment.method.loss(output, target, batch.labels)
                losses[name].append(float(terms.logit_kl))
    top, whole, full = (np.array(losses[name]) for name in ("top", "all", "full"))
    assert isinstance(target.logits if target is not None else None, Tensor | TopKLogits)
    assert bool((top < full).all())
    assert bool((top > 0.5 * full).all())  # not trivially
    assert whole == pytest.approx(full, rel=1e-5)  # with all of them it is the loss; fp32


@pytest.mark.slow
def test_a_killed_run_on_a_cache_continues_bit_for_bit(tmp_path: Path, weights: Path) -> None:
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
    kill_group(process, signal.SIGKILL)
    process.wait()
    saved = torch.load(tmp_path / "cut" / "checkpoints" / "last.pt", weights_only=True)
    assert 7 <= saved["step"] < STEPS
    done = run(cut, "--resume", "auto")
    assert done.returncode == 0, done.stdout + done.stderr
    assert same_weights(tmp_path / "whole", tmp_path / "cut")
    assert train_records(tmp_path / "whole") == train_records(tmp_path / "cut")
    assert state_of(tmp_path / "outputs") == built


@pytest.mark.slow
def test_two_processes_with_everything_build_and_train_from_one_cache(tmp_path: Path, weights: Path) -> None:
    """ZeRO stage 1, accumulation and an average; and the outputs are those that one process builds."""
    sections: dict[str, Any] = {
        "train": {"accumulation_steps": 2, "ema_decay": 0.9},
        "deepspeed": {"zero_optimization": {"stage": 1}},
    }
    config = cached_config(tmp_path, weights, name="two", cache={"recheck": 0.001}, **sections)
    done = run(config, launcher="torchrun", processes=2)
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
