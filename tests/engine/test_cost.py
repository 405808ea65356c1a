"""What networks cost: counted exactly, measured at the end of runs that are long enough, never a reason to fail."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.real_runs import run, write_config
from unikd_fast.engine import cost, trainer
from unikd_fast.models import build_model


def test_multiply_adds_parameters_and_bytes_are_exact() -> None:
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    network[1].eval()
    found = cost.measure_cost(network, 16, torch.device("cpu"))
    assert found["multiply_adds"] == 3 * 8 * 9 * 16 * 16 + 8 * 5
    assert found["parameters"] == (3 * 9 + 1) * 8 + 2 * 8 + (8 + 1) * 5
    assert found["bytes"] == 4 * (found["parameters"] + 2 * 8) + 8  # running statistics, and an int64 counter
    assert found["latency_ms"].keys() == {"1", "32"} and all(0 < each < 1e4 for each in found["latency_ms"].values())
    assert (found["image_size"], found["hardware"]) == (16, f"CPU, {torch.get_num_threads()} threads")
    assert network.training and not network[1].training


def test_the_published_figure_of_a_resnet() -> None:
    found = cost.measure_cost(build_model("torchvision/resnet18", num_classes=1000), 64, torch.device("cpu"))
    # 1.814e9 at 224 pixels (torchvision's figure), of which the classifier has 512,000.
    assert found["multiply_adds"] == pytest.approx((1.814e9 - 512e3) * (64 / 224) ** 2 + 512e3, rel=1e-3)


def test_latency_is_the_median_of_repeats() -> None:
    class Slow(nn.Module):
        calls = 0

        def forward(self, images: Tensor) -> Tensor:
            Slow.calls += 1
            return images.mean((2, 3))

    cost.measure_cost(Slow(), 8, torch.device("cpu"))
    assert Slow.calls == 1 + 2 * (cost._WARM_UP + cost._REPEATS)


def config_of(folder: Path) -> Path:
    return write_config(
        folder,
        name="run",
        data={"image_size": 16, "synthetic_samples": 32},
        student={"model": "cifar/resnet8"},
        distill={"method": "kd"},
        train={"total_epochs": 1, "accumulation_steps": 1},
    )


def results(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    student, teacher = (json.loads((folder / "run" / part / "result.json").read_text()) for part in (".", "teacher"))
    return student, teacher


def test_a_run_measures_student_and_teacher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trainer, "_WORTH_MEASURING", 2)
    assert run(config_of(tmp_path)).returncode == 0
    student, teacher = results(tmp_path)
    assert student["cost"]["parameters"] == 78042
    assert student["cost"]["bytes"] == pytest.approx(
        (tmp_path / "run" / "student.safetensors").stat().st_size, rel=0.05
    )
    assert teacher["cost"]["multiply_adds"] == student["cost"]["multiply_adds"] > 1e6


def test_a_short_run_measures_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "measure_cost", lambda *_: pytest.fail("measured"))
    assert run(config_of(tmp_path)).returncode == 0
    assert all("cost" not in one for one in results(tmp_path))


def test_a_run_is_done_without_its_cost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("out of memory\nand more")

    monkeypatch.setattr(trainer, "_WORTH_MEASURING", 2)
    monkeypatch.setattr(cost, "measure_cost", fail)
    done = run(config_of(tmp_path))
    assert done.returncode == 0 and "cost" not in results(tmp_path)[0]
    assert "what the network costs is not measured: out of memory\n" in done.stderr
