"""The page of detectors: pictures beside the tables, and nothing that is for classifiers alone."""

import base64
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from support.report_runs import config, evaluation, training, write_metrics, write_result, write_run_folder
from unikd_fast.cli import main
from unikd_fast.report.command import _sections
from unikd_fast.report.figures import LIGHT
from unikd_fast.report.page import Missing, Picture, Section
from unikd_fast.report.run_files import PICTURE, RunFileError
from unikd_fast.report.runs import find_runs

DETECTOR = "frcnn/timm/test_resnet"


def sheet(seed: int, side: int = 32) -> bytes:
    """A PNG of noise, which is larger than as a JPEG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def detectors(tmp_path: Path) -> Path:
    """A teacher and a student by two seeds, whose pictures differ."""
    runs = {"KD": {"distill.method": "kd"}}
    content = config(data={"name": "toy_scenes"}, compare={"seeds": [0, 1], "runs": runs})
    root = write_run_folder(tmp_path / "boxes", content)
    for seed in (0, 1):
        for number, label in enumerate(("teacher", "KD")):
            folder = root / f"seed-{seed}" / label
            write_result(folder, label, seed=seed, method="kd", model=DETECTOR, classes_with_boxes=3, last=40.0 + seed)
            records = [training(1.0, loss_objectness=0.5), evaluation(1, ap=20.0 + seed, ap50=30.0)]
            write_metrics(folder, records)
            (folder / PICTURE).write_bytes(sheet(2 * number + seed))
    return root


def sections(*folders: Path) -> dict[str, Section]:
    return {section.anchor: section for section in _sections(find_runs(folders)) if section.parts}


def parts(section: Section, kind: type) -> list[Any]:
    return [part for part in section.parts if isinstance(part, kind)]


def test_pictures_of_each_run_are_those_of_the_first_seed(detectors: Path) -> None:
    pictures = parts(sections(detectors)["detections"], Picture)
    assert [(picture.name, picture.draw) for picture in pictures] == [
        ("detections-1", sheet(0)),
        ("detections-2", sheet(2)),
    ]
    assert pictures[1].caption.startswith("KD, seed 0: images of the test split as annotated and, below, as detected")
    assert pictures[1].alt == "Images with boxes. The AP on the whole split is 40.00 %."


def test_a_picture_that_is_missing_or_damaged(detectors: Path) -> None:
    path = detectors / "seed-0" / "KD" / PICTURE
    path.write_bytes(sheet(2)[:-40])
    with pytest.raises(RunFileError, match=rf"{path} cannot be read: .*; delete it, or run the evaluation again"):
        sections(detectors)
    path.unlink()
    section = sections(detectors)["detections"]
    assert [picture.name for picture in parts(section, Picture)] == ["detections-1"]
    (missing,) = parts(section, Missing)
    assert missing.text.startswith("Pictures are missing for KD; they appear once the run folder holds detections.png")


def test_sections_of_classifiers_are_left_out(detectors: Path) -> None:
    found = sections(detectors)
    assert [*found] == ["results", "detections", "convergence", "collapse", "step-time", "runs", "environment"]
    assert isinstance(found["detections"].parts[-1], str)  # says why
    (curves,) = found["convergence"].parts
    assert isinstance(curves, Picture) and not isinstance(curves.draw, bytes)
    assert curves.caption.startswith("AP on held-out data, then the loss terms") and "probe" not in curves.caption
    panel, _ = curves.draw(LIGHT).axes
    assert (panel.get_title(loc="left"), panel.get_ylabel()) == ("AP, test split", "AP (%)")
    assert panel.lines[0].get_xydata().tolist() == [[1.0, 20.5]]


def test_classifiers_beside_detectors_keep_their_sections(detectors: Path, tmp_path: Path) -> None:
    other = write_run_folder(tmp_path / "images", config())
    write_metrics(write_result(other, "student"), [evaluation(1, ce=2.0)])
    write_result(other / "teacher", "teacher", model="cifar/resnet56")
    found = sections(detectors, other)
    assert {"cost", "differences"} < found.keys()
    assert all(name not in str(found[anchor]) for anchor in ("cost", "differences") for name in ("KD", DETECTOR))
    (missing,) = parts(found["convergence"], Missing)
    assert missing.text.startswith("The common probe is missing for student. ")


def test_a_page_with_pictures(detectors: Path, tmp_path: Path) -> None:
    target = tmp_path / "r.html"
    small = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(small, "PNG")  # smaller than as a JPEG
    (detectors / "seed-0" / "teacher" / PICTURE).write_bytes(small.getvalue())
    assert main(["report", str(detectors), "--to", str(target)]) == 0
    page = target.read_text()
    kinds = dict(re.findall(r'src="data:image/(png|jpeg);base64,([^"]*)"', page))
    assert base64.b64decode(kinds["png"]) == small.getvalue()
    with Image.open(io.BytesIO(base64.b64decode(kinds["jpeg"]))) as shown:
        assert shown.size == (32, 32)
    assert (tmp_path / "r-detections-2.png").read_bytes() == sheet(2)
    assert not re.search("accuracy|top-1|probe", re.sub(r'"data:[^"]*"', "", page))
