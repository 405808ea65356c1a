"""unikd predict: the classes of images, by a run and by every file it is exported to."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from support.exported_runs import Runs, export, resnet8
from support.real_runs import call
from unikd_fast.data.sets import open_data
from unikd_fast.data.settings import DataSettings
from unikd_fast.data.splits import TensorImages


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """The first test digits as files, of the size that the run has seen."""
    split = open_data(DataSettings(name="digits", image_size=16)).test
    assert isinstance(split, TensorImages)
    folder = tmp_path_factory.mktemp("photos")
    paths = [folder / f"{place} ü.png" for place in range(20)]
    for path, image in zip(paths, split.images, strict=False):
        Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(path)
    return paths


def test_a_run_and_its_files_say_the_same(runs: Runs, photos: list[Path], tmp_path: Path) -> None:
    sources = [runs.alone]
    for ending in ("safetensors", "pt", "onnx"):
        sources.append(tmp_path / f"{ending}.{ending}")
        assert export(runs.alone, sources[-1], "--checkpoint", "best") == 0
    network = resnet8(runs.alone / "checkpoints" / "best.safetensors")
    splits = open_data(DataSettings(name="digits", image_size=16))
    mean, std = (torch.tensor(each)[:, None, None] for each in (splits.mean, splits.std))
    assert isinstance(splits.test, TensorImages)
    with torch.no_grad():
        expected = network((splits.test.images[:20] / 255 - mean) / std).softmax(1)
    for source in sources:
        done = call("predict", source, *photos, "--top", "3", "--json")
        assert done.returncode == 0, done.stderr
        found = [json.loads(line) for line in done.stdout.splitlines()]
        assert [each["image"] for each in found] == list(map(str, photos))
        for each, row in zip(found, expected, strict=True):
            shares, classes = row.topk(3)
            assert [one["class"] for one in each["classes"]] == [str(int(place)) for place in classes]
            assert [one["probability"] for one in each["classes"]] == pytest.approx(shares.tolist(), abs=1e-3)


def test_one_line_an_image(runs: Runs, photos: list[Path]) -> None:
    done = call("predict", runs.alone, photos[0], "--top", "2")
    assert done.returncode == 0, done.stderr
    path, _, said = done.stdout.strip().rpartition(": ")
    assert path == str(photos[0])
    assert len(said.split(", ")) == 2 and all(each.endswith(" %") for each in said.split(", "))


def test_what_cannot_be_predicted_is_refused(runs: Runs, photos: list[Path], tmp_path: Path) -> None:
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    assert export(runs.alone, tmp_path / "lonely.onnx") == 0
    (tmp_path / "lonely.json").unlink()
    assert export(runs.alone, tmp_path / "torn.onnx") == 0
    (tmp_path / "torn.json").write_text("{}")
    (tmp_path / "mine.json").write_text('{"my": "own"}')
    assert export(runs.alone, tmp_path / "mine.pt") == 2
    assert (tmp_path / "mine.json").read_text() == '{"my": "own"}' and not (tmp_path / "mine.pt").exists()
    cases = [
        (runs.alone, tmp_path / "absent.png", 2, "there is no image"),
        (runs.alone, broken, 5, "broken.png"),
        (tmp_path / "absent", photos[0], 2, "give a run folder, or a file that unikd export wrote"),
        (tmp_path, photos[0], 2, "is not a run folder"),
        (photos[0], photos[0], 2, "is not a file that unikd export wrote with a"),
        (tmp_path / "lonely.onnx", photos[0], 2, "lonely.json beside it; export it again"),
        (tmp_path / "torn.onnx", photos[0], 1, "torn.json is damaged"),
    ]
    for source, image, code, said in cases:
        done = call("predict", source, image)
        assert (done.returncode, done.stdout) == (code, ""), (source, done.stderr)
        assert said in done.stderr and "Traceback" not in done.stderr


def test_one_bad_image_does_not_lose_the_others(runs: Runs, photos: list[Path], tmp_path: Path) -> None:
    """Two of a batch of 16, and one alone in the last."""
    bad = [tmp_path / f"{place}.png" for place in range(3)]
    for path, content in zip(bad, (b"", b"no image", photos[0].read_bytes()[:-40]), strict=True):
        path.write_bytes(content)
    given = [*photos[:3], bad[0], *photos[3:9], bad[1], *photos[9:14], bad[2]]
    assert len(given) == 17
    done, whole = (call("predict", runs.alone, *paths, "--json") for paths in (given, photos[:14]))
    assert (done.returncode, whole.returncode) == (5, 0)
    assert done.stdout == whole.stdout and done.stdout.count("\n") == 14
    said = done.stderr.splitlines()
    assert [line for line in said if "unikd predict: error: cannot decode" in line] == said[-3:]
    assert all(str(path) in line for path, line in zip(bad, said[-3:], strict=True))


def test_a_file_for_another_image_size_predicts(runs: Runs, photos: list[Path], tmp_path: Path) -> None:
    assert export(runs.alone, tmp_path / "large.onnx", "--image-size", "24") == 0
    done = call("predict", tmp_path / "large.onnx", photos[0])
    assert done.returncode == 0, done.stderr
    # The card of large.onnx is not replaced by that of another size, which ONNX would not take.
    assert export(runs.alone, tmp_path / "large.pt", "--image-size", "32") == 2
    assert not (tmp_path / "large.pt").exists()
    assert json.loads((tmp_path / "large.json").read_text())["preprocessing"]["image_size"] == 24
    assert export(runs.alone, tmp_path / "large.pt", "--image-size", "24") == 0


def test_a_damaged_best_checkpoint_of_a_run_is_named(runs: Runs, photos: list[Path], tmp_path: Path) -> None:
    run = shutil.copytree(runs.alone, tmp_path / "torn")
    best = run / "checkpoints" / "best.safetensors"
    best.write_bytes(best.read_bytes()[:300])
    done = call("predict", run, photos[0])
    assert done.returncode == 6 and "best.safetensors is damaged" in done.stderr, done.stderr


@pytest.mark.parametrize(
    ("ending", "changed", "code", "said"),
    [
        ("onnx", {"class_names": ["cat"]}, 1, "card.json is damaged (10 classes with the names"),
        ("onnx", {"num_classes": 7, "class_names": None}, 1, "returns logits (1, 10) for 1 images"),
        ("safetensors", {"model": "no_such_networks:Net"}, 2, "student.model = no_such_networks:Net"),
        ("onnx", None, 1, "card.onnx cannot be read"),
        ("pt", None, 1, "card.pt cannot be read"),
    ],
)
def test_a_damaged_file_or_card_is_named(
    runs: Runs, photos: list[Path], tmp_path: Path, ending: str, changed: Any, code: int, said: str
) -> None:
    path = tmp_path / f"card.{ending}"
    assert export(runs.alone, path) == 0
    if changed is None:
        path.write_bytes(b"no network")
    else:
        card = path.with_suffix(".json")
        card.write_text(json.dumps({**json.loads(card.read_text()), **changed}))
    done = call("predict", path, photos[0])
    assert done.returncode == code and said in done.stderr and "Traceback" not in done.stderr, done.stderr
