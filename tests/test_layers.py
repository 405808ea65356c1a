"""The import direction: lower layers never import upper ones, and only the engine imports DeepSpeed."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "unikd_fast"

# What each layer may import of the package, besides itself. Anything not listed is a violation.
ALLOWED: dict[str, set[str]] = {
    "values": set(),
    "errors": set(),
    "units": set(),
    "given": {"errors"},
    "command": {"errors"},
    "io": {"errors"},
    "settings": set(),
    "config": {"data", "errors", "io", "methods", "settings"},
    "kernels": {"values"},
    "losses": {"kernels", "values"},
    "compat": {"io", "losses", "kernels", "values"},
    "fusion": {"kernels", "values"},
    "distribution": {"kernels", "values"},
    "methods": {"distribution", "fusion", "kernels", "losses", "settings", "values"},
    "models": {"errors", "values"},
    "data": {"errors", "given", "io", "settings", "values"},
    "teacher": {"errors", "io", "losses", "values"},
    "tasks": set(),
    "report": {"errors", "io", "tasks"},
    "recipes": {"config", "data", "errors", "io", "models", "report", "units"},
    "engine": {
        "config",
        "errors",
        "given",
        "io",
        "methods",
        "losses",
        "models",
        "data",
        "teacher",
        "units",
        "report",
        "tasks",
        "values",
    },
    "export": {"config", "data", "engine", "errors", "given", "io", "models", "settings", "tasks"},
    "api": {"engine", "methods", "models", "teacher", "values"},
    "distillation": {
        "api",
        "config",
        "data",
        "engine",
        "errors",
        "export",
        "given",
        "methods",
        "models",
        "report",
        "settings",
        "teacher",
    },
    "cli": {"command", "config", "data", "engine", "errors", "export", "recipes", "report", "teacher"},
    "__main__": {"cli"},
}
FIRST_PARTY_ONLY_TORCH = (
    "values",
    "errors",
    "io",
    "kernels",
    "losses",
    "fusion",
    "distribution",
)


def modules() -> list[Path]:
    return [p for p in sorted(PACKAGE.rglob("*.py")) if p != PACKAGE / "__init__.py"]


def layer(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    own = layer(path)
    for name in imported(path):
        top, _, rest = name.partition(".")
        assert top != "kernels", f"{path}: import unikd_fast.kernels, another package bears the name kernels"
        if top == "unikd_fast":
            other = rest.partition(".")[0]
            assert other == own or other in ALLOWED[own], f"{path}: {own} must not import {other}"
        if top == "deepspeed":
            assert own == "engine", f"{path}: only the engine imports deepspeed"
        if own in FIRST_PARTY_ONLY_TORCH and top not in sys.stdlib_module_names:
            assert top in {"torch", "triton", "unikd_fast"}, f"{path}: {own} must need torch alone, imports {top}"


def test_kernel_references_import_torch_only() -> None:
    for path in (ROOT / "kernels").glob("reference*.py"):
        for name in imported(path):
            top = name.partition(".")[0]
            assert top in sys.stdlib_module_names or top == "torch" or name.startswith("unikd_fast.kernels.reference")


DETECTORS = [*(f"unikd_fast.models.{name}" for name in ("detector", "detector_weights", "detectron2", "faster_rcnn"))]
DETECTORS += ["unikd_fast.engine.detection", "unikd_fast.engine.detector_teacher"]
"""They are made of torchvision, and are themselves imported where they are used."""


@pytest.mark.parametrize("room", ["data", "models", "teacher", "methods", "engine"])
def test_a_room_imports_nothing_slow(room: str) -> None:
    """Each of these takes a second or more, and belongs where it is used."""
    code = f"""
import importlib, pkgutil, sys
room = importlib.import_module("unikd_fast.{room}")
for module in pkgutil.walk_packages(room.__path__, "unikd_fast.{room}."):
    if module.name not in {DETECTORS}:
        importlib.import_module(module.name)
slow = "torchvision", "sklearn", "scipy", "timm", "nvidia.dali", "datasets", "deepspeed", "tensorboard", "torch._dynamo"
print(sorted(set(slow) & set(sys.modules)))
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "[]\n"


def test_public_names_need_torch_alone() -> None:
    """In a process where every other dependency fails to import."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        if top in {"torchvision", "timm", "deepspeed", "pydantic", "safetensors", "tensorboard", "tqdm", "sklearn",
                   "psutil", "nvidia", "PIL", "numpy"}:
            raise ModuleNotFoundError(f"refused {name}", name=name)
sys.meta_path.insert(0, Refuse())
import torch
before = set(sys.modules)
import unikd_fast
for name in unikd_fast.__all__:
    if name not in ("Distiller", "distill"):
        getattr(unikd_fast, name)
loaded = {name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)
assert loaded == {"unikd_fast"}, loaded  # not Triton either: the names cost nothing beside torch
try:
    unikd_fast.Distiller
except ImportError as error:
    assert str(error).endswith("; pip install 'unikd-fast[train]'"), error
else:
    raise AssertionError("nothing was missing")
gaussian = unikd_fast.Gaussian(torch.zeros(2, 3), torch.zeros(2, 3))
terms = unikd_fast.unikd_loss(torch.zeros(2, 3), torch.ones(2, 3), torch.tensor([0, 1]), gaussian, gaussian)
assert abs(terms.ce.item() - 1.0986) < 1e-3
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
