"""What a run's cache is compared with: everything that decides an output, and nothing else."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from real_runs import write_config

from unikd_fast.config import ConfigError, load_config
from unikd_fast.engine import cache_key, fill_cache
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.output_cache import OutputCache
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.stop import StopSignal
from unikd_fast.errors import CacheError
from unikd_fast.models import build_model
from unikd_fast.teacher import resolve_precision
from unikd_fast.teacher.cache import CacheFolder

ALONE = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
SAMPLES = 96
Settings = dict[str, Any]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "teacher.pth"
    torch.save(build_model("cifar/resnet8", num_classes=10).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    """A folder with a cache of each method, nothing built; a run that does not fit changes nothing in it."""
    folder = tmp_path_factory.mktemp("caches")
    for method in ("unikd", "kd"):
        experiment(folder, weights, method)
    return folder


def experiment(caches: Path, weights: Path, method: str = "unikd", changes: Settings | None = None) -> Experiment:
    """A run whose cache lies in caches / method, with {"section.key": value} changed."""
    sections: dict[str, Settings] = {
        "teacher": {
            "model": "cifar/resnet8",
            "weights": str(weights),
            "precision": "fp32",
            "cache": {"mode": "read_write", "dir": str(caches / "{method}")},
        },
        "student": {"model": "cifar/resnet8"},
        "distill": {"method": method, "teacher_head": "prefit", "head_steps": 4},
    }
    config = write_config(caches, **sections)
    changed = [f"{key}={json.dumps(value)}" for key, value in (changes or {}).items()]
    return build_experiment(load_config(config, changed), ALONE)


def of(built: Experiment) -> OutputCache:
    assert built.cache is not None
    assert built.teacher is None
    return built.cache


BOTH = [
    ({"teacher.precision": "bf16"}, 'teacher.precision: "fp32" in the cache, "bf16" now'),
    ({"teacher.fold_batch_norm": False}, "teacher.fold_batch_norm: true in the cache, false now"),
    ({"teacher.compile": "default"}, 'teacher.compile: null in the cache, "default" now'),
    ({"teacher.model": "cifar/resnet14", "teacher.weights": "random"}, 'teacher.model: "cifar/resnet8" in the'),
    ({"data.image_size": 24}, "data.image_size: 32 in the cache, 24 now"),
    ({"data.train_samples": 80}, "samples: 96 in the cache, 80 now"),
    ({"data.synthetic_samples": 95}, "samples: 96 in the cache, 95 now"),
    ({"data.seed": 1}, "data.samples: "),
    ({"data.augmentation.padding": 3}, "views.padding: 2 in the cache, 3 now"),
    ({"data.augmentation.crop": "none"}, 'views.crop: "pad" in the cache, "none" now'),
    ({"data.augmentation.crop": "resized"}, 'data.resize: "none" in the cache, "unikd_fast, '),
    ({"data.augmentation.flip_probability": 0.25}, "views.flip_probability: 0.5 in the cache, 0.25 now"),
    ({"run.seed": 1}, "views.seed: 0 in the cache, 1 now"),
    ({"teacher.cache.views": 4}, "views: 3 in the cache, 4 now"),
    ({"train.total_epochs": 4}, "views: 3 in the cache, 4 now"),
    ({"teacher.cache.logits": "uint8"}, 'codec.kind: "fp16" in the cache, "uint8" now'),
]
OF_A_HEAD = [
    ({"distill.head_steps": 5}, "head.steps: 4 in the cache, 5 now"),
    ({"distill.head_learning_rate": 0.01}, "head.learning_rate: 0.001 in the cache, 0.01 now"),
    ({"distill.variance_floor": 0.2}, "head.variance_floor: 0.1 in the cache, 0.2 now"),
    ({"distill.gate": "channel"}, 'head.gate: "spatial" in the cache, "channel" now'),
    ({"distill.fusion": "last"}, 'head.fusion: "aff" in the cache, "last" now'),
    ({"distill.upsample": "bilinear"}, 'head.upsample: "nearest" in the cache, "bilinear" now'),
    ({"distill.norm": "batch"}, 'head.norm: null in the cache, "batch" now'),
    ({"distill.fdp_norm": "none"}, 'head.fdp_norm: "layer" in the cache, "none" now'),
    ({"distill.width": 32}, "head.initial_weights: "),
    ({"distill.max_levels": 2}, 'head.levels: ["layer1","layer2","layer3"] in the cache, ["layer2","layer3"] now'),
    ({"train.global_batch_size": 8}, "head.batch_size: 8 in the cache, 4 now"),
    ({"train.accumulation_steps": 1}, "head.batch_size: 8 in the cache, 16 now"),
]


COMPARED = [(method, *case) for method, case in itertools.product(("unikd", "kd"), BOTH)]
COMPARED += [("unikd", *case) for case in OF_A_HEAD]


@pytest.mark.parametrize(
    ("method", "changes", "named"), COMPARED, ids=[f"{method}-{next(iter(changes))}" for method, changes, _ in COMPARED]
)
def test_what_decides_an_output_is_compared(
    caches: Path, weights: Path, method: str, changes: Settings, named: str
) -> None:
    with pytest.raises(CacheError) as caught:
        experiment(caches, weights, method, changes)
    message, folder = str(caught.value), caches / method
    assert message.startswith(f"teacher.cache.dir = {folder}: the cache in {folder} was built from something else:\n")
    assert f"  {named}" in message
    assert message.endswith("choose another folder with --set teacher.cache.dir=...")


NO_MATTER = [
    {"student.model": "torchvision/mobilenet_v3_small"},
    {"train.learning_rate": 0.1, "train.optimizer": "adamw", "train.schedule": "step"},
    {"train.precision": "bf16"},
    {"distill.alpha": 1.0, "distill.beta": 2.0, "distill.feature_reduction": "sum"},
    {"distill.temperature": 1.0, "loss.label_smoothing": 0.1},
    {"data.workers": 0},
    {"deepspeed.zero_optimization.stage": 1},
    {"train.channels_last": True},
    {"train.global_batch_size": 32, "train.accumulation_steps": 4},
    {"teacher.cache.batch_size": 7, "teacher.cache.recheck": 0.5},
    {"teacher.fidelity.batches": 0},
    {"teacher.cache.views": 2},
    {"distill.fusion_path": "stagewise"},
]
NO_MATTER_WITHOUT_A_HEAD = [
    {"train.global_batch_size": 8},
    {"train.accumulation_steps": 1},
    {"distill.max_levels": 2},
    *({key: value} for changes, _ in OF_A_HEAD[:8] for key, value in changes.items()),
]


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        *itertools.product(("unikd", "kd"), NO_MATTER),
        *(("kd", changes) for changes in NO_MATTER_WITHOUT_A_HEAD),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_what_decides_no_output_is_not(caches: Path, weights: Path, method: str, changes: Settings) -> None:
    assert of(experiment(caches, weights, method, changes)).folder.path == caches / method


def test_a_key_is_the_same_in_another_folder_and_for_weights_in_another_file(
    caches: Path, weights: Path, tmp_path: Path
) -> None:
    state = dict(reversed(torch.load(weights).items()))
    torch.save(state, tmp_path / "copy.pth")
    for method in ("unikd", "kd"):
        found = of(experiment(tmp_path, tmp_path / "copy.pth", method)).folder.key
        assert found == CacheFolder.open(caches / method).key


def test_weights_replaced_under_the_same_path_are_other_weights(tmp_path: Path, weights: Path) -> None:
    path = tmp_path / "teacher.pth"
    path.write_bytes(weights.read_bytes())
    experiment(tmp_path, path, "kd")
    state = torch.load(path)
    state["fc.bias"][3] = state["fc.bias"][3].nextafter(torch.tensor(9.0))  # the last bit of one number
    torch.save(state, path)
    with pytest.raises(CacheError, match=r"teacher\.weights: \"\w{64}\" in the cache, \"\w{64}\" now\nbuild"):
        experiment(tmp_path, path, "kd")


def test_all_methods_share_what_is_no_head(caches: Path) -> None:
    unikd, kd = (CacheFolder.open(caches / method).key.fields for method in ("unikd", "kd"))
    assert unikd.pop("head") is not None and kd.pop("head") is None
    assert unikd == kd


def test_auto_is_what_it_stands_for(
    caches: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    experiment(tmp_path, weights, "kd", {"teacher.precision": "auto"})
    experiment(tmp_path, weights, "kd", {"teacher.precision": resolve_precision("auto", "cpu")})
    monkeypatch.setattr(cache_key, "resolve_precision", lambda precision, device: "fp16")  # as on a GPU
    with pytest.raises(CacheError, match='"fp32" in the cache, "fp16, or bf16 where it overflows" now'):
        experiment(caches, weights, "kd", {"teacher.precision": "auto"})
    with pytest.raises(CacheError, match='"fp32" in the cache, "fp16" now'):
        experiment(caches, weights, "kd", {"teacher.precision": "fp16"})


@pytest.mark.parametrize("head", ["anchored", "literal"])
def test_a_head_that_learns_along_cannot_be_cached(tmp_path: Path, weights: Path, head: str) -> None:
    with pytest.raises(ConfigError) as caught:
        experiment(tmp_path, weights, changes={"distill.teacher_head": head})
    # Levels of 16 x 32 x 32, 32 x 16 x 16 and 64 x 8 x 8, of 96 samples, two bytes each.
    assert f"distill.teacher_head = '{head}'" in str(caught.value)
    assert "in half precision these are 5.25 MiB a view of all samples" in str(caught.value)
    assert "use distill.teacher_head = 'prefit' or teacher.cache.mode = 'off'" in str(caught.value)
    assert not (tmp_path / "unikd").exists()


def test_more_logits_than_classes_are_refused(tmp_path: Path, weights: Path) -> None:
    changes = {"teacher.cache.logits": "top_k", "teacher.cache.top_k": 11, "distill.temperature": 1}
    with pytest.raises(ConfigError, match=r"top_k must lie in \[1, 10\], got 11"):
        experiment(tmp_path, weights, "kd", changes)
    assert not (tmp_path / "kd").exists()


def ready(built: Experiment) -> OutputCache:
    fill_cache.ready_cache(of(built), built.side, StopSignal(ALONE), "test", epochs=built.epochs)
    return of(built)


def test_a_cache_of_more_views_serves_a_run_that_needs_fewer(tmp_path: Path, weights: Path) -> None:
    settings: Settings = {"teacher.cache.views": 2, "train.total_epochs": 2, "teacher.cache.recheck": 0}
    ready(experiment(tmp_path, weights, "kd", settings))
    built = experiment(tmp_path, weights, "kd", {**settings, "teacher.cache.views": 1, "teacher.cache.mode": "read"})
    cache = ready(built)
    assert (cache.views, cache.folder.views) == (1, 2)
    for epoch in (0, 1):  # both show view 0, each in an order of its own
        batches = list(built.micro_batches(epoch))
        order = list(built.loader.schedule.order(epoch))
        assert len(batches) == len(order) == SAMPLES // 8
        shown = built.loader.train(epoch, view_epoch=0)
        for (batch, target), positions, expected in zip(batches, order, shown, strict=True):
            stored, _ = cache.folder.codec.decode(cache.folder.read(cache.folder.records(positions, view=0)))
            assert isinstance(stored, torch.Tensor) and target is not None
            assert torch.equal(target.logits, stored)  # type: ignore[arg-type]
            assert torch.equal(batch.images, expected.images)
            assert batch.sample_ids.tolist() == positions.tolist()


def test_reading_makes_no_cache(tmp_path: Path, weights: Path) -> None:
    with pytest.raises(CacheError) as caught:
        experiment(tmp_path, weights, "kd", {"teacher.cache.mode": "read"})
    assert str(caught.value).startswith(f"teacher.cache.dir = {tmp_path / 'kd'} does not exist, and teacher.cache.mode")
    assert "--set teacher.cache.mode=read_write" in str(caught.value)
    assert not (tmp_path / "kd").exists()
    (tmp_path / "kd").mkdir()
    with pytest.raises(CacheError, match=r"kd is no cache, manifest\.json is missing"):
        experiment(tmp_path, weights, "kd", {"teacher.cache.mode": "read"})
    assert not list((tmp_path / "kd").iterdir())


def test_reading_builds_no_shards(tmp_path: Path, weights: Path) -> None:
    experiment(tmp_path, weights, "kd")
    built = experiment(tmp_path, weights, "kd", {"teacher.cache.mode": "read"})
    with pytest.raises(CacheError, match=r"1 of 1 shards are not built, and teacher\.cache\.mode = 'read' builds none"):
        ready(built)
    assert of(built).folder.missing_shards() == [0]
    assert not list((tmp_path / "kd").glob("*.partial"))
