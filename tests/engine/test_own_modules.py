"""A person's own networks, by the name of their class or function, from the current folder."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from support.real_runs import call, run, write_config
from unikd_fast.models import build_model

SOURCE = """
from torch import nn

class MyNet(nn.Module):
    def __init__(self, num_classes, width=4):
        super().__init__()
        self.stages = nn.ModuleList(
            nn.Sequential(nn.Conv2d(c, d, 3, stride=2, padding=1), nn.BatchNorm2d(d), nn.ReLU())
            for c, d in ((3, width), (width, 2 * width), (2 * width, 4 * width))
        )
        self.head = nn.Linear(4 * width, num_classes)

    def forward(self, images):
        x = images
        for stage in self.stages:
            x = stage(x)
        if x.sum() > 1e9:  # which torch.fx cannot follow
            x = x / 2
        return {"logits": self.head(x.mean((2, 3)))}

class Nested:
    @staticmethod
    def fixed():
        return MyNet(10)

def options():
    return {"width": 4}

def broken(num_classes, error=KeyError("nothing")):
    raise error

number = 3
"""


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a module in the current folder, which is not on the path."""
    (tmp_path / "my_own_networks.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [each for each in sys.path if each not in ("", ".")])
    monkeypatch.delitem(sys.modules, "my_own_networks", raising=False)
    return "my_own_networks"


def test_a_class_and_a_function_are_built(module: str) -> None:
    wide = build_model(f"{module}:MyNet", num_classes=7, model_args={"width": 8})
    assert wide.head.weight.shape == (7, 32)  # type: ignore[union-attr]
    assert build_model(f"{module}:Nested.fixed", num_classes=10).head.weight.shape == (10, 16)  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("name", "arguments", "said"),
    [
        ("my_own_networks:MyNte", {}, "no class or function 'MyNte'; nearest: MyNet"),
        ("my_own_networks:number", {}, "no class or function 'number'"),
        ("my_own_networks:options", {}, "builds a dict, and not a torch.nn.Module"),
        (
            "my_own_networks:broken",
            {},
            "cannot be built with {'num_classes': 5} .*nothing.*; correct student.model_args",
        ),
        ("my_own_networks:MyNet", {"depth": 3}, "unexpected keyword argument 'depth'.*; correct student.model_args"),
        ("my_other_networks:MyNet", {}, "the module my_other_networks cannot be imported .*; start in its folder"),
        ("cifar/resnet8", {"depth": 3}, "cifar/resnet8 cannot be built with .*'depth'"),
        ("timm/resnet18", {"depht": 3}, "timm/resnet18 cannot be built with"),
        ("torchvision/resnet18", {"depth": 3}, "torchvision/resnet18 cannot be built with"),
    ],
)
@pytest.mark.usefixtures("module")
def test_what_cannot_be_built_is_named(name: str, arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        build_model(name, num_classes=5, model_args=arguments, role="student")


@pytest.mark.parametrize("kind", [RuntimeError, AttributeError, OSError, ImportError, ZeroDivisionError])
def test_any_error_of_a_constructor_is_named(module: str, kind: type[Exception]) -> None:
    said = (
        rf"student.model = {module}:broken cannot be built with .*\({kind.__name__}: nothing\); correct student.model"
    )
    with pytest.raises(ValueError, match=said):
        build_model(f"{module}:broken", num_classes=5, model_args={"error": kind("nothing")}, role="student")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("nothing"), RuntimeError("out of memory")])
def test_a_lack_of_memory_is_not_an_error_of_arguments(module: str, error: Exception) -> None:
    with pytest.raises(type(error)) as caught:
        build_model(f"{module}:broken", num_classes=5, model_args={"error": error}, role="student")
    assert caught.value is error


@pytest.mark.parametrize(
    ("role", "settings", "said"),
    [
        ("student", {"model": "cifar/resnet9"}, "student.model = cifar/resnet9: no network 'cifar/resnet9'"),
        ("student", {"model": "my_own_networks:broken"}, "student.model = my_own_networks:broken cannot be built with"),
        ("student", {"feature_nodes": ["layer9"]}, "student.model = torchvision/mobilenet_v3_small: no node 'layer9'"),
        ("teacher", {"weights": "./absent.pth"}, "teacher.weights: no file absent.pth for the teacher"),
    ],
)
@pytest.mark.usefixtures("module")
def test_a_run_names_the_key_first(tmp_path: Path, role: str, settings: dict[str, Any], said: str) -> None:
    done = run(write_config(tmp_path, **{role: settings}), "--dry-run")
    assert done.returncode in (1, 2)
    assert f"error: {said}" in done.stderr, done.stderr


def test_there_are_no_weights_to_download(module: str) -> None:
    with pytest.raises(
        ValueError, match=f"{module}:MyNet has no weights to download, got 'pretrained' for the student"
    ):
        build_model(f"{module}:MyNet", num_classes=5, weights="pretrained", role="student")


def test_a_run_with_own_networks_trains_and_is_exported(module: str, tmp_path: Path) -> None:
    teacher = {"model": f"{module}:MyNet", "model_args": {"width": 8}, "fidelity": {"batches": 0}}
    student = {"model": f"{module}:MyNet", "model_args": {"width": 6}}
    config = write_config(tmp_path, name="own", teacher=teacher, student=student, train={"max_steps": 2})
    done = run(config)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "levels of MyNet by hooks" in done.stderr
    assert f"{module}:MyNet" in done.stdout
    for ending in ("safetensors", "pt"):  # each is run again and compared
        exported = call("export", tmp_path / "own", "--to", tmp_path / f"student.{ending}")
        assert exported.returncode == 0, exported.stderr
    network: nn.Module = build_model(f"{module}:MyNet", num_classes=10, model_args={"width": 6})
    network.load_state_dict(load_file(tmp_path / "student.safetensors"))
