"""unikd export: which student of which checkpoint it writes."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors.torch import load_file
from torch import nn

from support.exported_runs import (
    ALONE_TRAINED,
    SHORT,
    STEPS,
    Runs,
    equal,
    export,
    left_behind,
    resnet8,
    short,
    stripped,
    trained,
)
from support.real_runs import ALONE, start, wait_for_step
from unikd_fast.engine.checkpoint import checkpoint_name, read_folder
from unikd_fast.engine.checkpoint.files import on_cpu, write_folder
from unikd_fast.engine.distributed import StopSignal
from unikd_fast.engine.folder import open_run_folder
from unikd_fast.engine.run import _run_all
from unikd_fast.engine.step import train_step
from unikd_fast.export import student as export_weights
from unikd_fast.export.student import load_student
from unikd_fast.models import build_model


@pytest.mark.parametrize("which", ["averaged", "alone"])
def test_the_newest_checkpoint_is_exported(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], which: str
) -> None:
    run, file = getattr(runs, which), tmp_path / "new" / "student.safetensors"
    assert export(run, file) == 0
    line = capsys.readouterr().out
    assert line.count("\n") == 1
    assert f"cifar/resnet8 of {run} from step {STEPS}" in line
    assert ("exponential average" in line) == (which == "averaged")
    count = sum(parameter.numel() for parameter in resnet8(file).parameters())
    assert f"10 classes, {count:,} parameters" in line
    assert "bit for bit the plain network" in line
    assert equal(load_file(file), load_file(run / "student.safetensors"))
    assert left_behind(tmp_path / "new") == ["student.json", "student.safetensors"]


def test_average_selects_the_weights(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved = read_folder(runs.averaged / "checkpoints" / checkpoint_name(STEPS))
    expected = {
        "yes": stripped(saved["average"], "module.plain."),
        "no": stripped(saved["student"], "network.plain."),
    }
    for choice, state in expected.items():
        assert export(runs.averaged, tmp_path / f"{choice}.safetensors", "--average", choice) == 0
        assert equal(load_file(tmp_path / f"{choice}.safetensors"), state)
    assert not equal(expected["yes"], expected["no"])
    assert export(runs.alone, tmp_path / "none.safetensors", "--average", "yes") == 2
    assert "train.ema_decay" in capsys.readouterr().err
    best = ("--checkpoint", "best", "--average", "no")
    assert export(runs.averaged, tmp_path / "best.safetensors", *best) == 2
    assert "holds the exponential average alone" in capsys.readouterr().err
    assert export(runs.alone, tmp_path / "best.safetensors", *best) == 0


def test_every_checkpoint_can_be_chosen(
    runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for step in (3, 5):
        file = tmp_path / f"{step}.safetensors"
        assert export(runs.averaged, file, "--checkpoint", f"step-{step}") == 0
        assert f"from step {step}, the exponential average" in capsys.readouterr().out
        found.append(load_file(file))
        folder = runs.averaged / "checkpoints" / checkpoint_name(step)
        assert equal(found[-1], stripped(read_folder(folder)["average"], "module.plain."))
        assert export(runs.averaged, file, "--checkpoint", str(folder), "--force") == 0
        assert equal(load_file(file), found[-1])
    assert not equal(*found)

    monkeypatch.chdir(runs.averaged)
    capsys.readouterr()
    assert export(Path(), tmp_path / "best.safetensors", "--checkpoint", "best") == 0
    records = [json.loads(line) for line in Path("metrics.jsonl").read_text().splitlines()]
    best = max((r for r in records if r["kind"] == "evaluation"), key=lambda r: (r["accuracy"], -r["ce"]))
    assert f"from the best evaluation so far, step {best['step']};" in capsys.readouterr().out
    assert equal(load_file(tmp_path / "best.safetensors"), load_file("checkpoints/best.safetensors"))
    assert export(Path(), tmp_path / "file.safetensors", "--checkpoint", "./student.safetensors") == 0
    assert equal(load_file(tmp_path / "file.safetensors"), load_file("student.safetensors"))


@pytest.mark.parametrize(
    ("model", "build"),
    [
        ("torchvision/shufflenet_v2_x0_5", lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=10)),
        ("timm/test_resnet", lambda: timm.create_model("test_resnet", num_classes=10)),
    ],
)
def test_an_unfinished_run_is_exported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, build: Callable[[], nn.Module]
) -> None:
    steps = []

    def breaks(*arguments: Any, **options: Any) -> Any:
        steps.append(1)
        if len(steps) == 4:
            raise ZeroDivisionError
        return train_step(*arguments, **options)

    monkeypatch.setattr("unikd_fast.engine.step.train_step", breaks)
    settings = {**SHORT["train"], "ema_decay": None}
    config = short(tmp_path, "broken", **ALONE_TRAINED, student={"model": model}, train=settings)
    with pytest.raises(ZeroDivisionError):
        trained(config)
    run = tmp_path / "broken"
    assert not (run / "student.safetensors").exists()
    assert export(run, tmp_path / "found.safetensors") == 0
    network = build()
    network.load_state_dict(load_file(tmp_path / "found.safetensors"), strict=True)
    saved = read_folder(run / "checkpoints" / checkpoint_name(3))
    assert equal(dict(network.state_dict()), stripped(saved["student"], "network.plain."))


@pytest.mark.slow
@pytest.mark.long
def test_a_killed_run_is_exported(tmp_path: Path) -> None:
    settings = {**SHORT["train"], "ema_decay": None, "total_epochs": 500}
    short(tmp_path, "killed", **ALONE_TRAINED, run={**SHORT["run"], "keep_checkpoints": 1}, train=settings)
    process = start(tmp_path / "killed.json")
    wait_for_step(tmp_path / "killed", 3, process)
    for number in range(3):  # while it goes on, and removes its checkpoints
        assert export(tmp_path / "killed", tmp_path / f"{number}.safetensors") == 0
        resnet8(tmp_path / f"{number}.safetensors")
    process.kill()
    assert export(tmp_path / "killed", tmp_path / "after.safetensors") == 0
    resnet8(tmp_path / "after.safetensors")


def test_running_statistics_are_averaged_over_ranks(copy: Path, tmp_path: Path) -> None:
    """Between two evaluations those of each process differ, and the state holds those of the first alone."""
    folder = copy / "checkpoints" / checkpoint_name(STEPS)
    saved = read_folder(folder)
    name = "network.plain.bn1.running_mean"
    (own,) = saved["processes"]
    other = on_cpu(own)
    other["buffers"][name] += 1.0
    saved["processes"] = [own, other]
    shutil.rmtree(folder)
    write_folder(folder, saved)
    assert export(copy, tmp_path / "mean.safetensors", "--average", "no") == 0
    found = load_file(tmp_path / "mean.safetensors")
    torch.testing.assert_close(found.pop("bn1.running_mean"), own["buffers"][name] + 0.5)
    expected = stripped(saved["student"], "network.plain.")
    del expected["bn1.running_mean"]
    assert equal(found, expected)


def test_a_checkpoint_removed_meanwhile_is_skipped(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    removed = []

    def read(path: Path) -> dict[str, Any]:
        if len(removed) < 2:
            removed.append(path)
            shutil.rmtree(path)
        return read_folder(path)

    monkeypatch.setattr(export_weights, "read_folder", read)
    assert export(copy, tmp_path / "student.safetensors") == 0
    assert f"from step {STEPS - 2}, " in capsys.readouterr().out


def test_one_run_of_a_comparison_is_exported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compare = {
        "seeds": [3],
        "runs": {
            "A KD (τ = 4)": {"distill.unikd.alpha": 2.0},
            "alone": {"distill.method": "none", "student.model": "cifar/resnet14"},
        },
    }
    train = {**SHORT["train"], "max_steps": 1, "ema_decay": None}
    teacher = {"weights": None, "training": {"total_epochs": 1}}
    config = short(tmp_path, "several", compare=compare, train=train, teacher={**SHORT["teacher"], **teacher})
    with open_run_folder(config, ALONE, resume=False) as folder, StopSignal(ALONE) as stop:
        _run_all(config, folder, ALONE, stop, resume=False)
    file = tmp_path / "student.safetensors"
    assert export(folder, file) == 2
    names = [f"seed-3/{name}" for name in ("teacher", "a-kd-4", "alone")]
    assert f"holds a comparison of 3 runs; name one of these: {', '.join(str(folder / n) for n in names)}\n" in (
        capsys.readouterr().err
    )
    assert export(folder / "seed-3", file) == 2
    assert "name one of these" in capsys.readouterr().err
    for name in names:
        assert export(folder / name, file, "--force") == 0
        model = "resnet14" if name.endswith("alone") else "resnet8"
        assert f"cifar/{model} of {folder / name}" in capsys.readouterr().out
        assert equal(load_file(file), load_file(folder / name / "student.safetensors"))


@pytest.mark.parametrize(("name", "given"), [("googlenet", "IMAGENET1K_V1"), ("inception_v3", "IMAGENET1K_V1")])
def test_published_weights_keep_their_network(monkeypatch: pytest.MonkeyPatch, name: str, given: str) -> None:
    """torchvision then normalises the images once more, and leaves auxiliary heads out."""
    entry = torchvision.models.get_model_weights(name)[given]
    constructor = {"googlenet": torchvision.models.GoogLeNet, "inception_v3": torchvision.models.Inception3}[name]
    published = constructor(aux_logits=True, init_weights=False).state_dict()
    monkeypatch.setattr(type(entry), "get_state_dict", lambda self, *arguments, **options: published)
    trained_one = build_model(f"torchvision/{name}", num_classes=1000, weights=given).eval()
    monkeypatch.undo()
    found = load_student(f"torchvision/{name}", given, trained_one.state_dict(), num_classes=None).network
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        assert torch.equal(found(images), trained_one(images))
