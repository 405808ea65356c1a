"""unikd export --preprocess: an ONNX file that takes images as they are."""

import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from PIL import Image

from support.exported_runs import Runs, export
from support.real_runs import call
from unikd_fast.export import formats
from unikd_fast.export.preprocess import INNER, preprocess, with_preprocessing
from unikd_fast.models import Preprocessing, StudentCard

SIZES = [(64, 64), (37, 80), (120, 64), (900, 650), (30, 41), (16, 500), (333, 33)]


def pixels(wanted: Preprocessing, opset: int = 18) -> onnxruntime.InferenceSession:
    """The preprocessing alone, in front of a network that returns its input."""
    kind = onnx.helper.make_tensor_value_info(INNER, onnx.TensorProto.FLOAT, ["n", 3, "h", "w"])
    out = onnx.helper.make_tensor_value_info("logits", onnx.TensorProto.FLOAT, ["n", 3, "h", "w"])
    graph = onnx.helper.make_graph([onnx.helper.make_node("Identity", [INNER], ["logits"])], "same", [kind], [out])
    opsets = [onnx.helper.make_opsetid("", opset)]
    network = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return onnxruntime.InferenceSession(with_preprocessing(network, wanted).SerializeToString())


@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("crop_pct", "opset"), [(1.0, 18), (0.875, 21)])
def test_the_file_makes_the_loaders_pixels(squash: bool, interpolation: str, crop_pct: float, opset: int) -> None:
    mean, std = (0.485, 0.0, -1e-6), (0.229, 1.0, 1 / 255)
    wanted = Preprocessing(mean, std, interpolation, crop_pct, squash, 32)  # type: ignore[arg-type]
    session = pixels(wanted, opset)
    random = np.random.default_rng(0)
    for height, width in SIZES:
        images = random.integers(0, 256, (2, height, width, 3), dtype=np.uint8)
        expected = preprocess(images, wanted)
        (found,) = session.run(["logits"], {"images": images})
        assert found.shape == expected.shape
        levels = 255 * (torch.from_numpy(found) - expected) * torch.tensor(std)[:, None, None]
        # ONNX Runtime rounds as Pillow does but for the last bit of its weights: noise, the worst case, differs by one
        # level in 6 % of the places or fewer. Levels themselves are exact up to fp32, 2^-24 of 255.
        assert levels.abs().max() < 1 + 1e-3, (height, width)
        assert (levels.abs() > 1e-3).float().mean() < 0.08, (height, width)


def test_a_file_that_preprocesses_predicts_as_the_run(runs: Runs, tmp_path: Path) -> None:
    random, paths = np.random.default_rng(0), []
    for number, (height, width) in enumerate(SIZES):
        coarse = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        paths.append(tmp_path / f"{number}.png")
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(paths[-1])
    Image.open(paths[0]).convert("L").save(paths[0])
    file = tmp_path / "student.onnx"
    assert export(runs.alone, file, "--preprocess", "--checkpoint", "best") == 0
    session = onnxruntime.InferenceSession(file)
    assert [(each.name, each.type, each.shape) for each in session.get_inputs()] == [
        ("images", "tensor(uint8)", ["batch", "height", "width", 3])
    ]
    assert json.loads((tmp_path / "student.json").read_text())["preprocesses"] is True
    held = session.get_modelmeta().custom_metadata_map
    assert json.loads(held["student"])["preprocesses"] is True and "mean" in json.loads(held["preprocessing"])
    said = []
    for source in (runs.alone, file):
        done = call("predict", source, *paths, "--json")
        assert done.returncode == 0, done.stderr
        said.append([json.loads(line) for line in done.stdout.splitlines()])
    for ours, its in zip(*said, strict=True):
        assert ours["image"] == its["image"]
        assert [one["class"] for one in ours["classes"]] == [one["class"] for one in its["classes"]]
        shares = [[one["probability"] for one in each["classes"]] for each in (ours, its)]
        assert shares[0] == pytest.approx(shares[1], abs=2e-3)  # one level of 255 in a few places


def test_a_wrong_preprocessing_is_not_exported(
    runs: Runs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def shifted(network: onnx.ModelProto, wanted: Preprocessing) -> onnx.ModelProto:
        mean = tuple(value + 1e-4 for value in wanted.mean)
        return with_preprocessing(network, Preprocessing(**{**vars(wanted), "mean": mean}))

    monkeypatch.setattr(formats, "with_preprocessing", shifted)
    assert export(runs.alone, tmp_path / "x.onnx", "--preprocess") == 1
    assert "logits that differ by" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_preprocess_is_refused_where_it_cannot_be(
    runs: Runs, copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert export(runs.alone, tmp_path / "x.pt", "--preprocess") == 2
    assert "--preprocess is for ONNX, and --to" in capsys.readouterr().err
    monkeypatch.setattr(StudentCard, "read", lambda path: None)
    assert export(copy, tmp_path / "x.onnx", "--preprocess") == 2
    assert "does not say how its images are made" in capsys.readouterr().err
