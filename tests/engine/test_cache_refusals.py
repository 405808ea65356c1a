"""Which caches a run may train from: those of the same outputs, whatever else has changed."""

from pathlib import Path
from typing import Any

import pytest

from support.real_runs import cached_config, opened, save_teacher
from unikd_fast.errors import CacheError

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
