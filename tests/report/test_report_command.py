"""unikd report from its arguments to its files, and how it refuses."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from support.report_runs import config, evaluation, some_logits, training, write_metrics, write_result, write_run_folder
from unikd_fast.cli import main
from unikd_fast.report.run_files import StepTime, write_step_time, write_test_logits

ROOT = Path(__file__).parents[2]
FIGURES = ("convergence", "differences", "class-means", "correlations", "agreement", "collapse", "step-time")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A single finished run with every file the report reads."""
    folder = write_run_folder(tmp_path / "run", config())
    write_result(folder, "student", last=100.0)
    write_result(folder / "teacher", "teacher", model="cifar/resnet56")
    for place, noise, seed in ((folder, 1.0, 0), (folder / "teacher", 0.5, 1)):
        write_test_logits(place, *some_logits(40, 5, noise=noise, seed=seed))
    records = [
        record
        for epoch in (1, 2, 3)
        for record in (
            training(float(epoch), logit_kl=3.0 / epoch, feature_kl=1.0 / epoch),
            evaluation(epoch, ce=2.0 / epoch, probe_kl=4.0 / epoch, head_accuracy=0.9, head_mean_std=0.9),
        )
    ]
    write_metrics(folder, records)
    write_step_time(folder, StepTime(1.0, 5.0, 3.0, 0.5, 8.0, 0.5, "one GPU"))
    return folder


@pytest.fixture
def short_run(tmp_path: Path) -> Path:
    """A finished run whose page has one figure, "convergence"."""
    folder = write_run_folder(tmp_path / "run", config())
    write_result(folder, "student")
    write_metrics(folder, [evaluation(epoch, ce=2.0 / epoch, accuracy=50.0) for epoch in (1, 2)])
    return folder


def test_the_page_and_its_png_files_are_written(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "out" / "my.html"
    assert main(["report", str(run), "--to", str(target), "--title", "Mine & yours"]) == 0
    page = target.read_text()
    assert "<h1>Mine &amp; yours</h1>" in page
    assert "73.01 (T1, T5)" in page
    assert 'class="missing"' not in page
    assert sorted(path.name for path in target.parent.iterdir()) == sorted(
        ["my.html", *(f"my-{name}.png" for name in FIGURES)]
    )
    for name in FIGURES:
        with Image.open(target.with_name(f"my-{name}.png")) as image:
            image.load()
            assert len(set(image.convert("RGB").get_flattened_data())) > 10, name  # something is drawn
    assert capsys.readouterr().out.startswith(f"{target}: 2 runs, 7 figures")


def test_the_page_states_what_is_missing(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "run", config(data={"name": "digits"}))
    write_result(folder, "student")
    assert main(["report", str(folder), "--to", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert page.count('class="missing"') == 5
    for name in ("test_logits.safetensors", "metrics.jsonl", "head_*", "step_time.json", "prints nothing for digits"):
        assert name in page
    assert list(tmp_path.glob("*.png")) == []


def test_names_with_special_characters_are_escaped(tmp_path: Path) -> None:
    label = '<b>$x_1$</b> "quoted" & _more_'
    folder = write_run_folder(tmp_path / "run & <i>", config(compare={"seeds": [0], "runs": {label: {}}}))
    home = write_result(folder / "seed-0" / "x", label)
    write_metrics(home, [evaluation(1, ce=1.0), evaluation(2, ce=0.5)])
    assert main(["report", str(folder), "--to", str(tmp_path / "r.html")]) == 0
    page = (tmp_path / "r.html").read_text()
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;b&gt;$x_1$&lt;/b&gt; &quot;quoted&quot; &amp; _more_" in page


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["report", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("unikd report: error: ")
    return captured.err


def test_existing_files_are_kept_without_force(
    short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "r.html"
    picture = tmp_path / "r-convergence.png"
    picture.write_text("mine")
    assert f"{picture} exists; give another name with --to, or --force" in refused(capsys, short_run, "--to", target)
    assert not target.exists()
    target.write_text("mine as well")
    assert f"{target} exists" in refused(capsys, short_run, "--to", target)
    assert (target.read_text(), picture.read_text()) == ("mine as well", "mine")
    assert main(["report", str(short_run), "--to", str(target), "--force"]) == 0
    assert target.read_text().startswith("<!doctype html>")
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_page_is_not_written_through_a_link(short_run: Path, tmp_path: Path) -> None:
    precious, target = tmp_path / "precious", tmp_path / "r.html"
    precious.write_text("mine")
    for link in (target, tmp_path / ".r.html.tmp", tmp_path / "r-convergence.png"):
        link.symlink_to(precious)
    assert main(["report", str(short_run), "--to", str(target), "--force"]) == 0
    assert precious.read_text() == "mine"
    assert target.read_text().startswith("<!doctype html>") and not target.is_symlink()


def test_invalid_arguments_are_refused(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "r.html"
    assert "is not a run folder, it has no config.json" in refused(capsys, tmp_path, "--to", target)
    assert "does not exist" in refused(capsys, run, tmp_path / "nowhere", "--to", target)
    assert "ends in .html" in refused(capsys, run, "--to", tmp_path / "r.pdf")
    (tmp_path / "folder.html").mkdir()
    assert "is a folder" in refused(capsys, run, "--to", tmp_path / "folder.html")
    (run / "result.json").write_text("{")
    assert "result.json is damaged: " in refused(capsys, run, "--to", target)
    assert list(tmp_path.glob("r*.html")) == []


def test_a_damaged_file_leaves_no_page(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "test_logits.safetensors").write_bytes(b"short")
    assert "test_logits.safetensors cannot be read" in refused(capsys, run, "--to", tmp_path / "r.html")
    assert list(tmp_path.glob("r*.html")) == []


def test_a_write_error_exits_with_1(short_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("")
    assert main(["report", str(short_run), "--to", str(tmp_path / "file" / "r.html")]) == 1
    assert "unikd report: error:" in capsys.readouterr().err


def python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)


def test_a_page_needs_the_extra_report_alone(short_run: Path, tmp_path: Path) -> None:
    done = python(
        "import sys; from unikd_fast.cli import main; "
        "sys.modules.update(dict.fromkeys(['torch', 'pydantic', 'torchvision', 'tqdm', 'scipy', 'psutil'])); "
        f"raise SystemExit(main(['report', '{short_run}', '--to', '{tmp_path}/r.html']))"
    )
    assert done.returncode == 0, done.stderr


def test_runs_with_one_environment_share_a_table(tmp_path: Path) -> None:
    folders = []
    for seed in range(9):
        folder = write_run_folder(tmp_path / "all" / f"s{seed}", config(run={"seed": seed}))
        write_result(folder, "student", seed=seed)
        folders.append(folder)
    (folders[8] / "environment.json").write_text('{"cpu": "another"}')
    few, many = tmp_path / "few.html", tmp_path / "many.html"
    assert main(["report", *map(str, folders[:2]), "--to", str(few)]) == 0
    assert f"Run folders: {folders[0]}, {folders[1]}<" in few.read_text()
    assert f"Environment of {folders[0]} and another, which differ only in time and command" in few.read_text()
    assert main(["report", *map(str, folders), "--to", str(many)]) == 0
    page = many.read_text()
    assert f"9 run folders in {tmp_path / 'all'}<" in page
    assert f"Environment of {folders[0]} and 7 others, which differ only in time and command" in page
    assert f"Environment of {folders[8]}<" in page
