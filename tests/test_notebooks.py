"""The notebooks of examples/ run from top to bottom, and what they find is true."""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def run(name: str, folder: Path, monkeypatch: pytest.MonkeyPatch, variables: str) -> dict[str, Any]:
    """Run all cells in a folder and return these variables as they are at the end."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")  # of the command unikd
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    notebook = nbformat.read(ROOT / "examples" / f"{name}.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(f"import json; print(json.dumps(dict({variables})))"))
    NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}}).execute()
    found: dict[str, Any] = json.loads(notebook.cells[-1].outputs[0]["text"])
    return found


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_is_committed_without_outputs(path: Path) -> None:
    import nbformat

    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.read_text() == nbformat.writes(notebook) + "\n"
    assert [cell.id for cell in notebook.cells] == [f"cell-{place:02}" for place in range(1, len(notebook.cells) + 1)]
    for cell in notebook.cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None)
        for target in re.findall(r"\]\(([^)\s]+)\)", cell.source):
            assert (path.parent / target).exists(), target


@pytest.mark.long
def test_own_loop_is_better_than_labels_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    accuracy = "teacher=teacher_accuracy, alone=alone_accuracy, student=student_accuracy"
    found = run("own_loop", tmp_path, monkeypatch, accuracy)
    # 50 labels alone give 60 to 80 %, and the teacher is right on about 98 %: the student must come closer to it.
    assert found["teacher"] > 95
    assert found["student"] > (found["alone"] + found["teacher"]) / 2
    assert (tmp_path / "student.pt").stat().st_size < (tmp_path / "distiller.pt").stat().st_size


@pytest.mark.long
def test_own_images_end_in_a_file_that_predicts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = "accuracy=run.accuracy, predicted=list(predicted), page=str(page), classes=len(train_set.classes)"
    found = run("own_images", tmp_path, monkeypatch, said)
    assert found["accuracy"] > 80  # of ten classes, after a hundred steps; a network that learned nothing has 10
    predictions = [line.split() for line in found["predicted"] if ".png" in line]
    right = [Path(path).parent.name == words[0] for path, *words in predictions]
    assert len(right) == 6 and sum(right) >= 4  # the accuracy, less what six images allow for
    assert "<html" in (tmp_path / found["page"]).read_text().lower()


@pytest.mark.long
def test_a_vit_teaches_a_cnn_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = run(
        "vit_to_cnn",
        tmp_path,
        monkeypatch,
        "teacher=teacher_accuracy, kd=kd_accuracy, unikd=unikd_accuracy",
    )
    assert found["teacher"] > 85
    # Nothing but the teacher tells it of the classes; in a few hundred steps it comes near.
    assert min(found["kd"], found["unikd"]) > found["teacher"] - 8
