"""The key of a run's cache: every setting that decides an output, and no other; another key is refused."""

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from support.outputs_runs import Settings, experiment, of, save_random_teacher
from support.real_runs import cached_config, opened, save_teacher
from unikd_fast.engine import cache as cache_key
from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import CacheFolder


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_random_teacher(tmp_path_factory.mktemp("weights") / "teacher.pth")


@pytest.fixture(scope="module")
def caches(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    """A folder with a cache of each method, nothing built; a run that does not fit changes nothing in it."""
    folder = tmp_path_factory.mktemp("caches")
    for method in ("unikd", "kd"):
        experiment(folder, weights, method)
    return folder


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
    ({"distill.unikd.head_steps": 5}, "head.steps: 4 in the cache, 5 now"),
    ({"distill.unikd.variance_floor": 0.2}, "head.variance_floor: 0.1 in the cache, 0.2 now"),
    ({"distill.unikd.gate": "channel"}, 'head.gate: "spatial" in the cache, "channel" now'),
    ({"distill.unikd.fusion": "last"}, 'head.fusion: "aff" in the cache, "last" now'),
    ({"distill.unikd.upsample": "bilinear"}, 'head.upsample: "nearest" in the cache, "bilinear" now'),
    ({"distill.unikd.norm": "batch"}, 'head.norm: "input" in the cache, "batch" now'),
    ({"distill.unikd.fdp_norm": "none"}, 'head.fdp_norm: "layer" in the cache, "none" now'),
    ({"distill.unikd.fdp": "direct"}, 'head.fdp: "projected" in the cache, "direct" now'),
    ({"distill.unikd.width": 32}, "head.initial_weights: "),
    ({"distill.max_levels": 2}, 'head.levels: ["layer1","layer2","layer3"] in the cache, ["layer2","layer3"] now'),
    ({"train.global_batch_size": 8}, "head.batch_size: 8 in the cache, 4 now"),
    ({"train.accumulation_steps": 1}, "head.batch_size: 8 in the cache, 16 now"),
]


COMPARED = [(method, *case) for method, case in itertools.product(("unikd", "kd"), BOTH)]
COMPARED += [("unikd", *case) for case in OF_A_HEAD]


@pytest.mark.parametrize(
    ("method", "changes", "named"), COMPARED, ids=[f"{method}-{next(iter(changes))}" for method, changes, _ in COMPARED]
)
def test_settings_that_decide_outputs_are_compared(
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
    {"loss.label_smoothing": 0.1},
    {"data.workers": 0},
    {"deepspeed.zero_optimization.stage": 1},
    {"train.channels_last": True},
    {"train.global_batch_size": 32, "train.accumulation_steps": 4},
    {"teacher.cache.batch_size": 7, "teacher.cache.recheck": 0.5},
    {"teacher.fidelity.batches": 0},
    {"teacher.cache.views": 2},
    {"data.augmentation.scale": [0.5, 1.0]},  # of the windows of crop = "resized"
    {"data.augmentation.ratio": [1.0, 2.0]},
    {"data.augmentation.eval_resize": 40},  # of image files
]
NO_MATTER_WITHOUT_A_HEAD = [
    {"train.global_batch_size": 8},
    {"train.accumulation_steps": 1},
    {"distill.max_levels": 2},
]
OF_UNIKD = {"distill.unikd.alpha": 1.0, "distill.unikd.beta": 2.0, "distill.unikd.temperature": 1.0}
OF_KD = {"distill.kd.ce_weight": 1.0, "distill.kd.beta": 2.0, "distill.kd.temperature": 1.0}


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        *itertools.product(("unikd", "kd"), NO_MATTER),
        ("unikd", OF_UNIKD),
        ("unikd", {"distill.unikd.feature_reduction": "sum"}),
        ("kd", OF_KD),
        *(("kd", changes) for changes in NO_MATTER_WITHOUT_A_HEAD),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else None,
)
def test_other_settings_are_not_compared(caches: Path, weights: Path, method: str, changes: Settings) -> None:
    assert of(experiment(caches, weights, method, changes)).folder.path == caches / method


def views_of(caches: Path, weights: Path, crop: str, changes: Settings) -> dict[str, Any]:
    """What the key of a new cache says about the views; with the image files in caches / "images", if there are any."""
    images = caches / "images"
    settings: Settings = {f"data.augmentation.{key}": value for key, value in changes.items()}
    if images.exists():
        settings |= {"data.name": "image_folder", "data.root": str(images), "data.num_classes": None}
    folder = caches / str(len(list(caches.iterdir())))
    folder.mkdir()
    found = of(experiment(folder, weights, "kd", {**settings, "data.augmentation.crop": crop}))
    views: dict[str, Any] = found.folder.key.fields["views"]
    return views


def write_images(folder: Path) -> None:
    for split in ("train", "val"):
        for index in range(20):
            path = folder / split / f"class{index % 10}" / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 50), (index, 0, 0)).save(path)


COMMON = {"crop", "flip_probability", "seed", "version"}


@pytest.mark.parametrize(
    ("crop", "fields"),
    [("none", COMMON), ("pad", {*COMMON, "padding"}), ("resized", {*COMMON, "scale", "ratio"})],
)
def test_only_the_settings_of_the_crop_count(tmp_path: Path, weights: Path, crop: str, fields: set[str]) -> None:
    """Of images in memory, which have their size."""
    first = views_of(tmp_path, weights, crop, {})
    assert first.keys() == fields
    changes = {"scale": [0.5, 1.0], "ratio": [1.0, 2.0], "padding": 3, "flip_probability": 0.25, "eval_resize": 40}
    for name, value in changes.items():
        found = views_of(tmp_path, weights, crop, {name: value})
        assert {key for key in found if found[key] != first[key]} == {name} & fields, name
        assert found.get(name, value) == value
        assert found.keys() == fields


@pytest.mark.parametrize(
    ("crop", "fields"),
    [
        ("none", {*COMMON, "short_side"}),
        ("pad", {*COMMON, "padding", "short_side"}),
        ("resized", {*COMMON, "scale", "ratio"}),
    ],
)
def test_the_short_side_of_center_cropped_files_counts(
    tmp_path: Path, weights: Path, crop: str, fields: set[str]
) -> None:
    write_images(tmp_path / "images")
    first, another = (views_of(tmp_path, weights, crop, changes) for changes in ({}, {"eval_resize": 40}))
    same = views_of(tmp_path, weights, crop, {"eval_resize": 37})  # 8/7 of 32, which is what is left out means
    assert first.keys() == fields
    assert first == same
    if "short_side" in fields:
        assert another == {**first, "short_side": 40} and first["short_side"] == 37
    else:
        assert another == first


def test_paths_are_not_part_of_the_key(caches: Path, weights: Path, tmp_path: Path) -> None:
    state = dict(reversed(torch.load(weights).items()))
    torch.save(state, tmp_path / "copy.pth")
    for method in ("unikd", "kd"):
        found = of(experiment(tmp_path, tmp_path / "copy.pth", method)).folder.key
        assert found == CacheFolder.open(caches / method).key


def test_replaced_weights_change_the_key(tmp_path: Path, weights: Path) -> None:
    path = tmp_path / "teacher.pth"
    path.write_bytes(weights.read_bytes())
    experiment(tmp_path, path, "kd")
    state = torch.load(path)
    state["fc.bias"][3] = state["fc.bias"][3].nextafter(torch.tensor(9.0))  # the last bit of one number
    torch.save(state, path)
    with pytest.raises(CacheError, match=r"teacher\.weights: \"\w{64}\" in the cache, \"\w{64}\" now\nbuild"):
        experiment(tmp_path, path, "kd")


def test_methods_without_a_head_share_a_cache(caches: Path) -> None:
    unikd, kd = (CacheFolder.open(caches / method).key.fields for method in ("unikd", "kd"))
    assert unikd.pop("head") is not None and kd.pop("head") is None
    assert unikd == kd


def test_auto_is_resolved_in_the_key(
    caches: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what may become of it: half precision that is not faithful is fp32, which must not be read as half."""

    def resolve_to(found: str) -> None:
        monkeypatch.setattr(cache_key, "resolve_precision", lambda asked, device: asked.replace("auto", found))

    resolve_to("fp32")  # as on a CPU without bf16 units
    experiment(tmp_path, weights, "kd", {"teacher.precision": "auto"})
    experiment(tmp_path, weights, "kd", {"teacher.precision": "fp32"})
    for device, now in (
        ("bf16", "bf16, or fp32 where it is not faithful"),
        ("fp16", "fp16, or bf16 where it overflows, or fp32 where it is not faithful"),
    ):
        resolve_to(device)
        with pytest.raises(CacheError, match=f'"fp32" in the cache, "{now}" now'):
            experiment(caches, weights, "kd", {"teacher.precision": "auto"})
        with pytest.raises(CacheError, match=f'"fp32" in the cache, "{device}" now'):
            experiment(caches, weights, "kd", {"teacher.precision": device})


AUGMENTATION = {"crop": "pad", "padding": 2, "flip_probability": 0.5}  # of the others
REFUSED: dict[str, tuple[dict[str, Any], set[str]]] = {
    "precision": ({"teacher": {"precision": "bf16"}}, {"teacher.precision"}),
    "folding": ({"teacher": {"fold_batch_norm": False}}, {"teacher.fold_batch_norm"}),
    "padding": ({"data": {"augmentation": {**AUGMENTATION, "padding": 1}}}, {"views.padding"}),
    "flip": ({"data": {"augmentation": {**AUGMENTATION, "flip_probability": 0.4}}}, {"views.flip_probability"}),
    "image size": ({"data": {"image_size": 32}}, {"data.image_size", "data.mean", "data.std", "data.samples"}),
    "samples": ({"data": {"train_samples": 112}}, {"data.samples", "samples", "sample ids"}),
    "seed": ({"run": {"seed": 1}}, {"views.seed", "head.initial_weights"}),
    "head": ({"distill": {"head_steps": 5}}, {"head.steps"}),
    "batches of the head": ({"train": {"global_batch_size": 8}}, {"head.batch_size"}),
    "method": (
        {"distill": {"method": "kd", "teacher_head": "anchored", "head_steps": None}},
        {"head", "codec.gaussian"},
    ),
    "codec": ({"cache": {"logits": "uint8"}}, {"codec.kind"}),
    "views": ({"cache": {"views": 4}}, {"views"}),
}


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory, weights: Path) -> Path:
    """The folder of a cache, of which only the identity is looked at."""
    home = tmp_path_factory.mktemp("described")
    opened(cached_config(home, weights))
    return home / "outputs"


def differing(error: CacheError) -> set[str]:
    return {line.strip().partition(": ")[0] for line in str(error).splitlines() if "in the cache, " in line}


@pytest.mark.parametrize(("changes", "names"), REFUSED.values(), ids=REFUSED)
def test_a_changed_key_is_refused_by_name(
    tmp_path: Path, weights: Path, described: Path, changes: dict[str, Any], names: set[str]
) -> None:
    changes = {**changes, "cache": {"dir": str(described), **changes.get("cache", {})}}
    if "teacher" in changes:
        settings = {"weights": str(weights), "cache": {"mode": "read_write", **changes.pop("cache")}}
        changes["teacher"] = {**settings, **changes["teacher"]}
    with pytest.raises(CacheError, match=r"was built from something else") as refused:
        opened(cached_config(tmp_path, weights, **changes))
    found = differing(refused.value)
    if "head" in found:  # there is none: every setting of it differs
        found = {name for name in found if not name.startswith("head.")}
    assert found == names
    assert "--set teacher.cache.dir=" in str(refused.value)


def test_replaced_weights_are_refused_with_both_hashes(tmp_path: Path) -> None:
    weights = save_teacher(tmp_path / "teacher.pth")
    config = cached_config(tmp_path, weights)
    before = opened(config).cache.folder.key.fields["teacher"]["weights"]  # type: ignore[union-attr]
    save_teacher(weights, seed=1)
    with pytest.raises(CacheError) as refused:
        opened(config)
    assert differing(refused.value) == {"teacher.weights"}
    now = opened(cached_config(tmp_path, weights, cache={"dir": str(tmp_path / "other")})).cache
    assert now is not None
    after = now.folder.key.fields["teacher"]["weights"]
    assert after != before
    assert f'teacher.weights: "{before}" in the cache, "{after}" now' in str(refused.value)
    assert refused.value.exit_code == 4


@pytest.mark.parametrize(
    "changes",
    [
        {"student": {"model": "cifar/resnet14"}},
        {"train": {"learning_rate": 0.1, "weight_decay": 0.0, "ema_decay": 0.5, "total_epochs": 2}},
        {"distill": {"alpha": 1.0, "beta": 2.0, "temperature": 2.0}},
        {"cache": {"batch_size": 7, "recheck": 0.5, "views": 2}},
        {"train": {"global_batch_size": 32, "accumulation_steps": 2}},
    ],
    ids=str,
)
def test_settings_outside_the_key_may_change(
    tmp_path: Path, weights: Path, described: Path, changes: dict[str, Any]
) -> None:
    changes = {**changes, "cache": {"dir": str(described), **changes.get("cache", {})}}
    cache = opened(cached_config(tmp_path, weights, **changes)).cache
    assert cache is not None
    assert cache.folder.path == described
