"""A run under a teacher of several networks: cached as online, named everywhere, and refused where it cannot be."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support.long_rounds import long
from support.real_runs import ALONE, config_of, opened, run, save_teacher, train_here, train_records
from unikd_fast.config import ConfigError, load_config
from unikd_fast.config.load import config_hash
from unikd_fast.engine.build import build_experiment
from unikd_fast.engine.cache import outputs_key
from unikd_fast.engine.networks import build_teacher_network
from unikd_fast.methods import Needs
from unikd_fast.models import build_model

SIXTEEN = {"run": {"probe": False, "test_logits": False, "checkpoint_every_steps": None}}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Weights of three teachers of the digits."""
    folder = tmp_path_factory.mktemp("weights")
    return [save_teacher(folder / f"{seed}.pth", seed=seed) for seed in range(3)]


def ensemble_of(files: list[Path], *others: Any, first: float = 1.0) -> dict[str, Any]:
    members = [{"model": "cifar/resnet8", "weights": str(path), "weight": weight} for path, weight in others]
    return {"weights": str(files[0]), "ensemble": members, "weight": first}


def config(folder: Path, files: list[Path], name: str = "run", **sections: Any) -> Path:
    teacher = {**ensemble_of(files, (files[1], 3.0)), **sections.pop("teacher", {})}
    distill = {"method": "kd", **sections.pop("distill", {})}
    train = {"total_epochs": 2, **sections.pop("train", {})}
    return config_of(folder, files[0], name, teacher=teacher, distill=distill, train=train, **SIXTEEN, **sections)


def steps(folder: Path) -> list[dict[str, Any]]:
    return [record for record in train_records(folder) if record["kind"] == "train"]  # type: ignore[comparison-overlap]


def test_a_run_learns_from_the_weighted_mean(tmp_path: Path, files: list[Path]) -> None:
    built = opened(config(tmp_path, files))
    assert built.teacher is not None
    images = next(built.loader.train(0)).images
    one, other = (build_model("cifar/resnet8", num_classes=10, weights=str(path)).eval() for path in files[:2])
    with torch.no_grad():
        expected = (one(images) + 3 * other(images)) / 4
    # Folded BatchNorms round otherwise; these logits are about 10.
    torch.testing.assert_close(built.teacher(images).logits, expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("method", [long("kd"), "unikd"])
def test_a_cached_run_is_the_online_one(tmp_path: Path, files: list[Path], method: str) -> None:
    curves = []
    for mode in ("off", "read_write"):
        cache = {"mode": mode, "dir": str(tmp_path / "outputs"), "recheck": 0.01}
        given = {"method": "kd"} if method == "kd" else {"method": method, "head_steps": 4}
        path = config(tmp_path, files, mode, cache=cache, teacher={"cache": cache}, distill=given)
        curves.append(steps(train_here(load_config(path))))
    for online, cached in zip(*curves, strict=True):
        # Logits in fp16 are off by 2^-11 of themselves; the rate is low, so that no difference grows.
        assert online["total"] == pytest.approx(cached["total"], rel=2e-3)


def test_every_member_is_part_of_the_key(tmp_path: Path, files: list[Path]) -> None:
    def key(**teacher: Any) -> Any:
        built = opened(config(tmp_path, files, teacher=teacher))
        network = build_teacher_network(built.config, built.splits, needs=built.method.needs)
        return json.dumps(outputs_key(built, network))

    given = ensemble_of(files, (files[1], 3.0))
    changes: list[dict[str, Any]] = [
        given,
        ensemble_of(files, (files[2], 3.0)),
        ensemble_of(files, (files[1], 2.0)),
        ensemble_of(files, (files[1], 3.0), first=2.0),
        ensemble_of(files, (files[1], 3.0), (files[2], 1.0)),
        {"weights": str(files[0]), "ensemble": [], "weight": 1.0},
        {"weights": str(files[1]), "ensemble": given["ensemble"], "weight": 1.0},
    ]
    keys = [key(**change) for change in changes]
    assert len(set(keys)) == len(keys)
    assert keys[0] == key(**ensemble_of(files, (files[1], 6.0), first=2.0))  # the same mean
    assert "ensemble" not in keys[5]
    hashes = {config_hash(load_config(config(tmp_path, files, teacher=change))) for change in changes}
    assert len(hashes) == len(changes)


def test_all_its_networks_are_named(tmp_path: Path, files: list[Path]) -> None:
    path = config(tmp_path, files, teacher={"min_accuracy": None, "precision": "fp32"})
    dry = run(path, "--dry-run")
    assert dry.returncode == 0, dry.stderr
    assert f"cifar/resnet8 + cifar/resnet8: 155,412 parameters, weights {files[0]}, {files[1]}" in dry.stdout
    done = run(path, "--set", "teacher.min_accuracy=0.99")
    assert done.returncode == 2
    assert f"the teacher, cifar/resnet8 + cifar/resnet8 with teacher.weights = {files[0]}, {files[1]}, classifies" in (
        done.stderr
    )
    assert run(path, "--set", "teacher.min_accuracy=0", "--set", "run.dir=" + str(tmp_path / "done")).returncode == 0
    record = json.loads((tmp_path / "done" / "teacher.json").read_text())
    assert [member["weights"] for member in record["ensemble"]] == [str(files[1])]
    assert record["fidelity"]["relative_logit_error"] < 1e-3
    assert "| cifar/resnet8 + cifar/resnet8 |" in (tmp_path / "done" / "report.md").read_text()


def test_features_are_those_of_the_first(tmp_path: Path, files: list[Path]) -> None:
    """Also where they are of another network with other levels."""
    other = {"model": "cifar/vgg8", "weights": "random"}
    path = config(tmp_path, files, teacher={"ensemble": [other]}, distill={"method": "unikd", "head_steps": 2})
    built = opened(path)
    assert built.teacher is not None
    alone = opened(config(tmp_path, files, "alone", teacher={"ensemble": []}, distill={"method": "unikd"}))
    assert alone.teacher is not None
    images = next(built.loader.train(0)).images
    ours, first = built.teacher(images), alone.teacher(images)
    assert all(torch.equal(one, two) for one, two in zip(ours.levels, first.levels, strict=True))
    assert not torch.equal(ours.logits, first.logits)


@pytest.mark.parametrize("method", ["blockwise", "ofd"])
def test_methods_that_read_its_blocks_train(tmp_path: Path, files: list[Path], method: str) -> None:
    path = config(tmp_path, files, distill={"method": method}, train={"max_steps": 2})
    assert len(steps(train_here(load_config(path)))) == 2


def test_each_member_sees_images_of_its_own_constants(tmp_path: Path, files: list[Path]) -> None:
    """A network whose published images have mean and deviation 0.5, beside one of ImageNet's."""
    from support.folder_images import write_images

    root = write_images(tmp_path / "images", {"train": 12, "val": 6}, fixed_size=32)
    torch.manual_seed(0)
    for name, model in (("a", "torchvision/mobilenet_v3_small"), ("b", "timm/test_convnext")):
        torch.save(build_model(model, num_classes=3).state_dict(), tmp_path / f"{name}.pth")
    member = {"model": "timm/test_convnext", "weights": str(tmp_path / "b.pth")}
    data = {"name": "image_folder", "root": str(root), "image_size": 32, "loader": "torchvision", "workers": 0}
    path = config(
        tmp_path,
        files,
        data={**data, "train_samples": None, "num_classes": None},
        train={"global_batch_size": 4},
        teacher={
            "model": "torchvision/mobilenet_v3_small",
            "weights": str(tmp_path / "a.pth"),
            "ensemble": [member],
            "precision": "fp32",
            "fold_batch_norm": False,
        },
    )
    built = build_experiment(load_config(path), ALONE)
    assert built.teacher is not None
    images = next(built.loader.train(0)).images
    pixels = images * torch.tensor(built.splits.std)[:, None, None] + torch.tensor(built.splits.mean)[:, None, None]
    networks = [
        build_model(model, num_classes=3, weights=str(tmp_path / f"{name}.pth")).eval()
        for name, model in (("a", "torchvision/mobilenet_v3_small"), ("b", "timm/test_convnext"))
    ]
    with torch.no_grad():
        expected = (networks[0](images) + networks[1]((pixels - 0.5) / 0.5)) / 2
    assert built.splits.mean == (0.485, 0.456, 0.406)
    torch.testing.assert_close(built.teacher(images).logits, expected, rtol=1e-3, atol=1e-4)


def refused(folder: Path, files: list[Path], **teacher: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        opened(config(folder, files, teacher=teacher))
    return str(caught.value)


def test_what_it_cannot_be_is_refused(tmp_path: Path, files: list[Path]) -> None:
    torch.save(build_model("cifar/resnet8", num_classes=7).state_dict(), tmp_path / "seven.pth")
    seven = ensemble_of(files, (tmp_path / "seven.pth", 1.0))
    said = refused(tmp_path, files, **seven)
    assert said.startswith("teacher.ensemble[0].weights: ") and "has 7 classes" in said
    trained = {"weights": None, "training": {}}
    assert "train each in a run of its own (distill.method = 'none')" in refused(tmp_path, files, **trained)
    assert "train each in a run of its own" in refused(tmp_path, files, training={})
    assert "teacher.weight = 2.0 without teacher.ensemble" in refused(tmp_path, files, ensemble=[], weight=2.0)
    absent = ensemble_of(files, (tmp_path / "absent.pth", 1.0))
    assert f"teacher.ensemble[0].weights: no file {tmp_path}/absent.pth" in refused(tmp_path, files, **absent)
    member = {"model": "cifar/resnet8", "weights": str(files[1])}
    assert "teacher.ensemble[0].image_size = 64 is above" in (
        refused(tmp_path, files, ensemble=[{**member, "image_size": 64}])
    )
    assert "teacher.ensemble.0.weight" in refused(tmp_path, files, ensemble=[{**member, "weight": 0.0}])
    said = refused(tmp_path, files, ensemble=[{"model": "cifar/resnet8"}])
    assert "teacher.ensemble.0.weights" in said


def test_without_weights_its_shapes_are_known(tmp_path: Path, files: list[Path]) -> None:
    """As on all but the first process of a cached run."""
    built = opened(config(tmp_path, files))
    network = build_teacher_network(built.config, built.splits, needs=Needs(levels=True), with_weights=False)
    assert len(network.level_shapes) == 3  # type: ignore[union-attr]
