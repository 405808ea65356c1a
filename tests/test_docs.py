"""What README and docs/ show must run, name what exists, and link to what is there."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import unikd_fast
from support.folder_images import write_images
from unikd_fast import cli
from unikd_fast.config.schema import Config
from unikd_fast.methods import METHODS
from unikd_fast.models import build_model
from unikd_fast.recipes.experiments import read_experiment

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
NOT_OURS = ("CONFIG", "photos.json", "teacher.json", "ten.json")  # configurations that the reader writes
SECTIONS = ("run", "data", "teacher", "student", "distill", "loss", "train", "compare")


class Network(nn.Module):
    """Returns logits and three feature maps, fine to coarse, as the networks of the snippets do."""

    def __init__(self, channels: tuple[int, int, int], classes: int) -> None:
        super().__init__()
        before = (3, *channels[:-1])
        self.stages = nn.ModuleList(nn.Conv2d(i, o, 3, 2, 1) for i, o in zip(before, channels, strict=True))
        self.classifier = nn.Linear(channels[-1], classes)

    def forward(self, images: Tensor) -> tuple[Tensor, list[Tensor]]:
        levels = []
        for stage in self.stages:
            images = stage(images).relu()
            levels.append(images)
        return self.classifier(images.mean((2, 3))), levels


def blocks(page: str, language: str) -> list[str]:
    fenced = re.findall(r"^```(\w*)\n(.*?)^```", TEXTS[page], flags=re.DOTALL | re.MULTILINE)
    return [text for named, text in fenced if named == language]


def snippet(page: str) -> str:
    return next(block for block in blocks(page, "python") if "AdaptiveFeatureFusion(" in block)


def commands() -> list[tuple[str, list[str]]]:
    """Every command that starts a program of ours, with the page it stands on."""
    found = []
    for page in TEXTS:
        for block in blocks(page, ""):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "unikd" in words[:1] or "launch_distill.py" in words:
                    found.append((page, words))
    return found


def slug(heading: str) -> str:
    """The anchor that both GitHub and mkdocs give a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def test_the_front_page_is_short() -> None:
    assert len(TEXTS["README.md"].splitlines()) <= 150


def shortened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `unikd_fast.distill` train for one epoch, with any teacher."""
    whole = unikd_fast.distill

    def one_epoch(*given: Any, **settings: Any) -> Any:
        config = {**settings.pop("config", {}), "teacher.min_accuracy": 0, "train.total_epochs": 1}
        few = {"head_steps": 2} if settings["method"] == "unikd" else {}
        return whole(*given, **{**settings, **few, "global_batch_size": 8, "workers": 0}, config=config)

    monkeypatch.setattr(unikd_fast, "distill", one_epoch)


def test_the_call_of_the_front_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shortened(monkeypatch)
    torch.manual_seed(0)
    teacher, student = (build_model(f"cifar/{name}", num_classes=2) for name in ("resnet14", "resnet8"))
    labels = torch.arange(64) % 2
    data = TensorDataset(torch.randn(64, 3, 32, 32) + 2 * labels[:, None, None, None], labels)
    names: dict[str, Any] = {"teacher": teacher, "student": student, "train_set": data, "val_set": data}
    exec(blocks("README.md", "python")[0], names)
    assert names["run"].student is student and names["run"].result["steps"] == 8
    assert Path("student.onnx").is_file() and (names["run"].folder / "report.html").is_file()


@pytest.mark.long
def test_the_page_about_python_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shortened(monkeypatch)
    write_images(tmp_path / "photos", {"train": 24, "val": 9}, fixed_size=32)
    torch.save(timm.create_model("resnet18", num_classes=3).state_dict(), "teacher.pth")
    first, second = blocks("docs/python.md", "python")
    names: dict[str, Any] = {}
    exec(first, names)
    assert names["run"].result["method"] == "unikd" and 0 <= names["run"].accuracy <= 100
    exec(second, names)
    config = json.loads((names["run"].folder / "config.json").read_text())
    assert config["distill"]["kd"]["temperature"] == 2.0 and config["teacher"]["cache"]["mode"] == "read_write"
    assert names["run"].result["seed"] == 1


def test_the_loop_of_the_front_page_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = unikd_fast.Distiller.fit_teacher
    monkeypatch.setattr(unikd_fast.Distiller, "fit_teacher", lambda self, loader: whole(self, loader, steps=50))
    torch.manual_seed(0)
    teacher, student = (build_model(f"cifar/{name}", num_classes=10) for name in ("resnet14", "resnet8"))
    before = [p.detach().clone() for p in student.parameters()]
    loader = [(torch.randn(4, 3, 32, 32), torch.arange(4))]
    names: dict[str, Any] = {"teacher": teacher, "student": student, "loader": loader}
    exec(blocks("README.md", "python")[1], names)
    assert names["loss"].terms.keys() == {"ce", "feature_kl", "logit_kl"}
    assert float(names["loss"].terms["ce"]) < 1.5  # of 2.3 at first
    assert all(not torch.equal(old, new) for old, new in zip(before, student.parameters(), strict=True))


def test_the_whole_loop_fits_the_head_and_the_student() -> None:
    torch.manual_seed(0)
    student, teacher = Network((16, 32, 64), 10), Network((16, 32, 64), 10)
    loader = [(torch.randn(16, 3, 32, 32), torch.randint(10, (16,))) for _ in range(4)]
    first = [p.detach().clone() for p in student.parameters()]
    names = {"student": student, "teacher": teacher, "loader": loader, "head_epochs": 20, "epochs": 2}
    exec(snippet("docs/losses.md"), names)
    fitted = names["teacher_gaussian"].mean  # type: ignore[attr-defined]
    logits = names["teacher_logits"]
    assert not fitted.requires_grad
    assert torch.corrcoef(torch.stack([fitted.flatten(), logits.flatten()]))[0, 1] > 0.5  # type: ignore[attr-defined]
    assert all(not torch.equal(old, new) for old, new in zip(first, student.parameters(), strict=True))
    assert torch.isfinite(names["terms"].total)  # type: ignore[attr-defined]


@pytest.mark.long
def test_the_start_page_works_from_end_to_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make_images, predict, _ = blocks("docs/start.md", "python")  # the last is of the real case, as is ten.json
    exec(make_images, {})
    config = json.loads(blocks("docs/start.md", "json")[0])
    config["teacher"]["training"]["total_epochs"] = config["train"]["total_epochs"] = 5  # of 10
    Path("photos.json").write_text(json.dumps(config))
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"}
    for page, words in commands():
        if page == "docs/start.md" and words[0] == "unikd" and not {"teacher.json", "ten.json"} & {*words}:
            subprocess.run([sys.executable, "-m", "unikd_fast", *words[1:]], check=True, env=environment)
    exec(predict, {})
    path, predicted = capsys.readouterr().out.split()
    assert predicted == Path(path).parent.name


@pytest.mark.parametrize("page", [page for page in TEXTS if '"student"' in TEXTS[page]])
def test_configurations_are_valid(page: str) -> None:
    whole = [block for block in blocks(page, "json") if '"student"' in block and '"train"' in block]
    for block in whole:
        Config.model_validate_json(block)
    assert whole or page != "docs/start.md"


def test_commands_parse_and_their_overrides_are_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = commands()
    assert {page for page, _ in found} >= {"README.md", "docs/start.md", "docs/training.md", "docs/cache.md"}
    for _, words in found:
        arguments = words[1:] if words[0] == "unikd" else ["train", *words[words.index("launch_distill.py") + 1 :]]
        options = cli._parser().parse_args(arguments)
        if options.function in (cli._train, cli._cache_plan) and options.config not in NOT_OURS:
            read_experiment(options.config, options.recipe, options.set)


def test_the_settings_of_the_example_are_those_of_the_code() -> None:
    shown = next(block for block in blocks("docs/internals.md", "python") if "class NKDSettings" in block)
    assert shown in (ROOT / "unikd_fast/methods/nkd.py").read_text()


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    named = {(page, name) for page, text in TEXTS.items() for name in re.findall(r"(?:`|^)make ([a-z-]+)", text, re.M)}
    assert {name for _, name in named} >= {"distill", "test", "setup"}
    assert not [(page, name) for page, name in named if name not in targets]


def test_keys_and_files_that_are_named_exist() -> None:
    known = set(re.findall(r"^\| `([^`]+)` \|", TEXTS["docs/configuration.md"], flags=re.MULTILINE))
    missing = []
    for page, text in TEXTS.items():
        for name in re.findall(r"`([^`\n ]+)`", text):
            key, section = name.partition("=")[0], name.partition(".")[0]
            if section in SECTIONS and re.fullmatch(r"[a-z]+(\.[a-z_0-9]+)+(?<!\.json)(?<!\.safetensors)", key):
                missing += [(page, key)] if key not in known else []
            is_path = re.fullmatch(r"(unikd_fast|tests|benchmarks|configs|docs|examples|kernels)/[\w./-]*", name)
            if is_path and "results" not in name and not (ROOT / name).exists():
                missing.append((page, name))
    assert not missing


def test_links_lead_somewhere() -> None:
    broken = []
    for page in PAGES:
        for target in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.S | re.M)):
            if target.startswith(("http://", "https://")):
                continue
            path, _, anchor = target.partition("#")
            there = page.parent / path if path else page
            headings = re.findall(r"^#+ (.*)", there.read_text(), flags=re.M) if there.is_file() else []
            if not there.exists() or (anchor and anchor not in map(slug, headings)):
                broken.append((page.name, target))
    assert not broken


def test_every_public_name_is_in_the_reference() -> None:
    shown = set(re.findall(r"^::: unikd_fast\.(\w+)$", "\n".join(TEXTS.values()), flags=re.MULTILINE))
    assert set(unikd_fast.__all__) <= shown
    drop_ins = {path.stem for path in (ROOT / "unikd_fast/compat").glob("*.py")}
    helpers = {name for name in drop_ins if name.startswith("_")} | {"conformance", "patching", "presets"}
    pages = set(re.findall(r"^::: unikd_fast\.compat\.(\w+)$", TEXTS["docs/api/compat.md"], flags=re.MULTILINE))
    assert drop_ins - helpers - {"torchdistill_register"} == pages


def test_every_method_is_in_the_reference() -> None:
    for name, method in METHODS.items():
        assert f"::: {method.__module__}\n" in TEXTS["docs/api/methods.md"], name
        assert f"`{name}`" in TEXTS["README.md"] and f"| `{name}` |" in TEXTS["docs/methods.md"], name
        (row,) = (line for line in TEXTS["docs/methods.md"].splitlines() if line.startswith(f"| `{name}` |"))
        assert row.endswith("| of all |") == method.needs_of(method.settings_class()).labels, name
