"""unikd export: what it refuses to read, to write and to run."""

import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from support.exported_runs import (
    STEPS,
    Runs,
    export,
    left_behind,
)
from unikd_fast.cli import main
from unikd_fast.config import ConfigError
from unikd_fast.engine.checkpoint import checkpoint_name
from unikd_fast.export.formats import plain_logits, random_images


def test_a_damaged_checkpoint_is_skipped_with_a_warning(
    copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    def damage(step: int) -> None:
        file = copy / "checkpoints" / checkpoint_name(step) / "average.safetensors"
        content = bytearray(file.read_bytes())
        content[-5] ^= 1
        file.write_bytes(content)

    damage(STEPS)
    assert export(copy, tmp_path / "a.safetensors") == 0
    assert f"from step {STEPS - 1}, " in capsys.readouterr().out
    assert "passed over a checkpoint" in caplog.text
    assert export(copy, tmp_path / "b.safetensors", "--checkpoint", f"step-{STEPS}") == 6
    assert "is damaged: its checksum" in capsys.readouterr().err
    for step in range(1, STEPS):
        damage(step)
    assert export(copy, tmp_path / "b.safetensors") == 6
    assert "no checkpoint in" in capsys.readouterr().err
    shutil.rmtree(copy / "checkpoints")
    assert export(copy, tmp_path / "b.safetensors") == 6
    assert f"give --checkpoint {copy / 'student.safetensors'}" in capsys.readouterr().err
    assert export(copy, tmp_path / "b.safetensors", "--checkpoint", "best") == 6
    assert left_behind(tmp_path) == ["a.json", "a.safetensors", "copy"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (
            ["{run}", "--to", "{there}/a.pth"],
            "the ending '.pth' is not a format; use one of .safetensors (safe",
        ),
        (["{run}", "--to", "{there}/a"], "the ending '' is not a format"),
        (["{run}", "--to", "{there}"], "is a folder"),
        (["{run}", "--to", "{there}/a.pt", "--opset", "18"], "--opset 18 is for ONNX"),
        (["{run}", "--to", "{there}/a.onnx", "--image-size", "99999"], "--image-size 99999 is too large; give at most"),
        (["{run}", "--to", "{there}/a.onnx", "--opset", "11"], "torch writes opset 18 and later"),
        (["{run}", "--to", "{there}/a.pt", "--checkpoint", "step-77"], "there are step-000000001, step-000000002"),
        (["{run}", "--to", "{there}/a.pt", "--checkpoint", "newest"], "there is no such path; give last, best, step-"),
        (["{run}", "--to", "{there}/a.pt", "--checkpoint", "{run}/config.json"], "is neither a checkpoint folder"),
        (["{run}", "--to", "{run}/checkpoints/a.pt"], "the run writes that itself"),
        (["{run}", "--to", "{run}/student.safetensors", "--force"], "the run writes that itself"),
        (["{run}", "--to", "{run}/checkpoints/x/../best.safetensors", "--force"], "the run writes that itself"),
        (["{there}", "--to", "{there}/a.pt"], "is not a run folder, it has no config.json"),
        (["{there}/none", "--to", "{there}/a.pt"], "is not a folder"),
        (["{run}/checkpoints", "--to", "{there}/a.pt"], "is not a run folder, but lies in {run}, which is one"),
    ],
)
def test_impossible_exports_are_refused(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], reason: str
) -> None:
    names = {"run": runs.alone, "there": tmp_path}
    assert main(["export", *(argument.format(**names) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("unikd export: error: ")
    assert reason.format(**names) in error
    assert left_behind(tmp_path) == []


def test_images_too_small_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"does not run on images of 4 pixels \(.*\); give --image-size"):
        plain_logits(nn.Conv2d(3, 10, 7), random_images(4))


class Malicious:
    """Says so if it is unpickled."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def __reduce__(self) -> Any:
        return Path.write_text, (self.sign, "executed")


def test_pickles_are_not_loaded(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sign = tmp_path / "sign"
    evil = pickle.dumps(Malicious(sign))
    pickle.loads(evil)
    assert sign.read_text() == "executed"  # it would
    sign.unlink()

    checkpoints = copy / "checkpoints"
    names = ["best.safetensors", "latest", "latest.pt", f"{checkpoint_name(90)}.pt", "global_step5/mp_rank_00.pt"]
    # As a step of its own, and in place of a part of a whole one.
    names += [f"{checkpoint_name(99)}/{name}" for name in ("checkpoint.json", "student.safetensors", "student.pt")]
    names += [f"{checkpoint_name(STEPS)}/average.safetensors", "../student.safetensors"]
    for name in names:
        (checkpoints / name).parent.mkdir(exist_ok=True)
        (checkpoints / name).write_bytes(evil)
    torch.save({"weight": Malicious(sign)}, checkpoints / "saved.pt")
    assert export(copy, tmp_path / "student.safetensors") == 0  # the newest one that is none of these
    assert f"from step {STEPS - 1}, " in capsys.readouterr().out
    for choice, code in [
        ("best", 6),
        ("step-99", 6),
        (str(checkpoints / checkpoint_name(99)), 6),
        (str(checkpoints / "global_step5"), 6),
        (str(copy / "student.safetensors"), 6),
        (str(checkpoints / "saved.pt"), 2),
        (str(checkpoints / f"{checkpoint_name(90)}.pt"), 2),
    ]:
        assert export(copy, tmp_path / "other.safetensors", "--checkpoint", choice) == code, choice
    assert not sign.exists()
    assert left_behind(tmp_path) == ["copy", "student.safetensors"]


def test_paths_outside_the_run_are_not_followed(copy: Path, tmp_path: Path) -> None:
    """All that a run names is read from its folder, and written is the file asked for, with the one beside it."""
    config = json.loads((copy / "config.json").read_text())
    config["run"]["dir"] = str(tmp_path / "elsewhere")
    config["student"]["weights"] = str(tmp_path / "absent.pth")
    (copy / "config.json").write_text(json.dumps(config))
    before = set(tmp_path.rglob("*"))
    assert export(copy, tmp_path / "student.safetensors") == 0
    assert set(tmp_path.rglob("*")) - before == {tmp_path / "student.safetensors", tmp_path / "student.json"}
    assert before <= set(tmp_path.rglob("*"))


def test_weights_of_another_network_are_refused(copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = json.loads((copy / "config.json").read_text())
    for change, reason in [
        ({"model": "cifar/resnet14"}, "the weights are not those of student.model = 'cifar/resnet14'"),
        ({"model": "cifar/resnet9999"}, "no network 'cifar/resnet9999'"),
        ({"modell": "cifar/resnet8"}, "unknown key 'student.modell'"),
    ]:
        (copy / "config.json").write_text(json.dumps({**stored, "student": {**stored["student"], **change}}))
        assert export(copy, tmp_path / "student.safetensors") == 2
        assert reason in capsys.readouterr().err
    (copy / "config.json").write_text(json.dumps(stored))
    half = {name: tensor.half() if tensor.is_floating_point() else tensor for name, tensor in _best(copy).items()}
    save_file(half, tmp_path / "half.safetensors")
    given = ("--checkpoint", str(tmp_path / "half.safetensors"))
    assert export(copy, tmp_path / "student.safetensors", *given) == 2
    assert "torch.float16 instead of torch.float32" in capsys.readouterr().err
    diverged = {name: tensor * float("nan") if tensor.is_floating_point() else tensor for name, tensor in half.items()}
    save_file(
        {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in diverged.items()},
        tmp_path / "nan.safetensors",
    )
    assert export(copy, tmp_path / "a.onnx", "--checkpoint", str(tmp_path / "nan.safetensors")) == 1
    assert "not finite" in capsys.readouterr().err
    assert not (tmp_path / "student.safetensors").exists()


def _best(run: Path) -> dict[str, Tensor]:
    return load_file(run / "checkpoints" / "best.safetensors")
