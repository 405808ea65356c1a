"""unikd export: its files compute what the plain network computes, and are whole or absent."""

import json
import os
import stat
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from zipfile import ZipFile

import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from support.exported_runs import STEPS, Runs, export, left_behind, resnet8, stripped
from support.kills import killed_at_each_operation
from support.real_runs import ROOT
from unikd_fast.data.sets import open_data
from unikd_fast.data.settings import DataSettings
from unikd_fast.engine.checkpoint import checkpoint_name, read_folder
from unikd_fast.export import formats as export_formats
from unikd_fast.export.formats import relative_difference
from unikd_fast.io import is_leftover
from unikd_fast.models import CIFAR_MODELS, Preprocessing, StudentCard

# Eight times what fp32 costs such a network, see export_check.py; measured 0 for TorchScript and 9e-7 for ONNX.
CLOSE = 1e-5


def test_torchscript_matches_the_plain_network(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "student.pt"
    assert export(runs.averaged, file) == 0
    assert "TorchScript for images of 16 pixels; logits differ by at most 0" in capsys.readouterr().out
    loaded, plain = torch.jit.load(file), resnet8(runs.averaged / "student.safetensors")
    for count in (1, 5):
        images = torch.randn(count, 3, 16, 16)
        with torch.no_grad():
            assert relative_difference(loaded(images), plain(images)) < CLOSE
    assert not loaded.training
    assert left_behind(tmp_path) == ["student.json", "student.pt"]


def test_onnx_matches_the_plain_network(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "student.onnx"
    assert export(runs.averaged, file, "--opset", "21", "--image-size", "24", "--average", "no") == 0
    assert "ONNX for images of 24 pixels; logits differ by at most" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [(value.name, value.shape) for value in session.get_inputs()] == [("images", ["batch", 3, 24, 24])]
    plain = CIFAR_MODELS["resnet8"](num_classes=10)
    saved = read_folder(runs.averaged / "checkpoints" / checkpoint_name(STEPS))
    plain.load_state_dict(stripped(saved["student"], "network.plain."), strict=True)
    plain.eval()
    for count in (1, 5):
        images = torch.randn(count, 3, 24, 24)
        with torch.no_grad():
            (logits,) = session.run(["logits"], {"images": images.numpy()})
            assert relative_difference(torch.from_numpy(logits), plain(images)) < CLOSE
    assert [(item.domain, item.version) for item in onnx.load(file).opset_import] == [("", 21)]
    for trace in (str(ROOT), sys.prefix, "stack_trace"):  # where the code lay concerns nobody
        assert trace.encode() not in file.read_bytes()
    assert left_behind(tmp_path) == ["student.json", "student.onnx"]  # weights included


def test_every_format_says_how_to_use_it(runs: Runs, tmp_path: Path) -> None:
    splits = open_data(DataSettings(name="digits", image_size=16))
    expected = StudentCard(
        "cifar/resnet8",
        {},
        10,
        tuple("0123456789"),
        Preprocessing(splits.mean, splits.std, "bilinear", 1.0, False, 16),
    )
    for name in ("student.safetensors", "checkpoints/best.safetensors"):  # as the run wrote them
        assert StudentCard.read(runs.averaged / name) == expected
    words = expected.in_words()
    for name in ("new.safetensors", "new.pt", "new.onnx"):
        assert export(runs.averaged, tmp_path / name) == 0
        assert StudentCard.from_dict(json.loads((tmp_path / "new.json").read_text())) == expected
        (tmp_path / "new.json").unlink()
    assert StudentCard.read(tmp_path / "new.safetensors") == expected
    found = dict.fromkeys(words, "")
    torch.jit.load(tmp_path / "new.pt", _extra_files=found)
    assert all(found[key] in (said, said.encode()) for key, said in words.items())
    assert {item.key: item.value for item in onnx.load(tmp_path / "new.onnx").metadata_props} == words


def test_a_file_is_replaced_only_with_force(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "student.safetensors"
    file.write_text("mine")
    assert export(runs.alone, file) == 2
    assert "exists; give another name, or --force" in capsys.readouterr().err
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "nowhere.safetensors")
    assert export(runs.alone, tmp_path / "link.safetensors") == 2
    assert file.read_text() == "mine"
    before = os.umask(0o027)
    try:
        assert export(runs.alone, file, "--force") == 0
    finally:
        os.umask(before)
    assert stat.S_IMODE(file.stat().st_mode) == 0o640
    resnet8(file)

    def meanwhile(student: Any, path: Path, *rest: Any) -> None:
        exact.write(student, path, *rest)
        (tmp_path / "late.safetensors").write_text("another's")

    exact = export_formats.FORMATS[".safetensors"]
    monkeypatch.setitem(export_formats.FORMATS, ".safetensors", replace(exact, write=meanwhile))
    assert export(runs.alone, tmp_path / "late.safetensors") == 2
    assert (tmp_path / "late.safetensors").read_text() == "another's"
    assert left_behind(tmp_path) == ["late.safetensors", "link.safetensors", "student.json", "student.safetensors"]


class Shorter(nn.Module):
    """What a trace of a network would be that was written for the two images it was shown."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> Tensor:
        return self.network(images)[:2]


def rounded(network: nn.Module) -> nn.Module:
    for parameter in network.parameters():
        parameter.data = parameter.data.half().float()
    return network


@pytest.mark.parametrize(
    ("ending", "spoil", "reason"),
    [
        (".pt", rounded, "of their size from those of the plain network, "),
        (".pt", Shorter, "a batch of 3 gives torch.float32 (2, 10) instead of torch.float32 (3, 10)"),
        (".safetensors", rounded, "came back from the file with other numbers"),
    ],
)
def test_a_wrong_file_is_removed(
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    ending: str,
    spoil: Callable[[nn.Module], nn.Module],
    reason: str,
) -> None:
    good = export_formats.FORMATS[ending]

    def write(student: Any, *rest: Any) -> None:
        other = student.fresh()
        other.load_state_dict(student.network.state_dict())
        spoilt = spoil(other)
        good.write(replace(student, network=spoilt, logits=spoilt), *rest)

    monkeypatch.setitem(export_formats.FORMATS, ending, replace(good, write=write))
    assert export(runs.averaged, tmp_path / f"new{ending}") == 1
    error = capsys.readouterr().err
    assert "failed: " in error
    assert reason in error
    (tmp_path / f"old{ending}").write_text("good")
    assert export(runs.averaged, tmp_path / f"old{ending}", "--force") == 1
    assert (tmp_path / f"old{ending}").read_text() == "good"
    assert left_behind(tmp_path) == [f"old{ending}"]


@pytest.mark.usefixtures("small_files")
@pytest.mark.parametrize("ending", [".pt", ".safetensors"])
def test_a_full_disk_is_named(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str) -> None:
    assert export(runs.alone, tmp_path / f"student{ending}") == 1
    assert f"student{ending} cannot be written: File too large" in capsys.readouterr().err
    assert left_behind(tmp_path) == []


@pytest.mark.parametrize(("error", "code"), [(OSError(28, "No space left on device"), 1), (KeyboardInterrupt(), 130)])
def test_no_partial_file_remains(
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
    code: int,
) -> None:
    def write(student: Any, path: Path, *rest: Any) -> None:
        path.write_bytes(b"half")
        raise error

    good = export_formats.FORMATS[".pt"]
    monkeypatch.setitem(export_formats.FORMATS, ".pt", replace(good, write=write))
    assert export(runs.alone, tmp_path / "student.pt") == code
    assert capsys.readouterr().err.startswith("unikd export: error: ")
    assert left_behind(tmp_path) == []


def test_missing_packages_are_named(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert export(runs.alone, tmp_path / "student.onnx") == 2
    assert "needs onnxruntime, not installed: pip install 'unikd-fast[export]'" in capsys.readouterr().err
    assert left_behind(tmp_path) == []
    assert export(runs.alone, tmp_path / "student.safetensors") == 0


@pytest.mark.long
@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_an_export_killed_at_any_operation(runs: Runs, tmp_path: Path, suffix: str) -> None:
    """The file is the old one or the new one, and the next export is not held up by what was left."""
    target = tmp_path / f"student{suffix}"
    assert export(runs.alone, target) == 0
    target.write_bytes(b"old")

    def export_again() -> None:
        torch.set_num_threads(1)  # OpenMP's threads are not there in a forked process
        assert export(runs.alone, target, "--force") == 0

    def whole() -> bool:
        if suffix == ".pt":
            return ZipFile(target).testzip() is None
        return load_file(target).keys() == resnet8(target).state_dict().keys()

    kills = [target.read_bytes() == b"old" or whole() for _ in killed_at_each_operation(export_again, tmp_path)]
    assert len(kills) > 5 and all(kills)
    assert whole() and target.read_bytes() != b"old"
    assert all(name in (target.name, "student.json") or is_leftover(name) for name in left_behind(tmp_path))
