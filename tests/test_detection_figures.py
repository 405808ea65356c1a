"""AP of detections: pycocotools' own figures, and errors where evaluators would go on."""

import contextlib
import io
from typing import Any

import numpy as np
import pytest

from unikd_fast.tasks import DETECTION, best_evaluation
from unikd_fast.tasks.detection import figures

CATEGORIES = {3: "cup", 7: "dog", 90: "tree"}


def make(images: int, seed: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Make annotations, with crowds, and detections that are off by some pixels, wrong or missing."""
    random = np.random.default_rng(seed)
    boxes, detections = [], []
    for image in range(images):
        for _ in range(int(random.integers(0, 6))):
            side = float(random.choice([12.0, 50.0, 140.0])) * random.uniform(0.8, 1.2, 2)
            box = [*random.uniform(0, 300, 2), *side]
            category = int(random.choice([*CATEGORIES]))
            boxes.append(
                {
                    "id": len(boxes) + 1,
                    "image_id": image * 10,
                    "category_id": category,
                    "bbox": box,
                    "area": float(side.prod()),
                    "iscrowd": int(random.random() < 0.1),
                }
            )
            if random.random() < 0.8:
                moved = (np.array(box) + random.normal(0, 4, 4)).clip(1).tolist()
                kind = category if random.random() < 0.9 else int(random.choice([*CATEGORIES]))
                score = float(random.random())
                detections.append({"image_id": image * 10, "category_id": kind, "bbox": moved, "score": score})
    truth = {
        "images": [{"id": 10 * i, "width": 480, "height": 480} for i in range(images)],
        "categories": [{"id": i, "name": name} for i, name in CATEGORIES.items()],
        "annotations": boxes,
    }
    return truth, detections


def pycocotools(truth: dict[str, Any], detections: list[dict[str, Any]]) -> Any:
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = truth
        coco.createIndex()
        evaluation = COCOeval(coco, coco.loadRes(detections), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation


def test_figures_are_those_of_pycocotools() -> None:
    truth, detections = make(40, seed=0)
    found = figures(truth, detections)
    expected = pycocotools(truth, detections)
    assert [found[key] for key in DETECTION.all] == pytest.approx(100 * expected.stats[:6], abs=1e-10)
    precision = expected.eval["precision"][:, :, :, 0, -1]
    assert found["ap_by_class"] == {
        name: pytest.approx(100 * precision[:, :, k].mean(), abs=1e-10) for k, name in enumerate(CATEGORIES.values())
    }
    assert found["samples"] == 40
    assert 10 < found["ap"] < 90


def test_what_is_not_annotated_has_no_figure() -> None:
    truth, detections = make(20, seed=1)
    truth["annotations"] = [box for box in truth["annotations"] if box["area"] < 32**2 and box["category_id"] != 7]
    found = figures(truth, detections)
    assert {"ap_medium", "ap_large"}.isdisjoint(found)
    assert "ap_small" in found
    assert set(found["ap_by_class"]) == {"cup", "tree"}


def test_no_detection_is_an_ap_of_0() -> None:
    truth, _ = make(5, seed=2)
    assert figures(truth, [])["ap"] == 0


def test_best_evaluation() -> None:
    assert best_evaluation([{"ap": 1.0}, {"ap": 3.0}, {"ap": 2.0}]) == {"ap": 3.0}


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("image_id", 5, "detection 1 has image 5"),
        ("category_id", 4, "detection 1 has category 4"),
        ("score", float("nan"), "detection 1 has numbers"),
        ("bbox", [0.0, 0.0, float("inf"), 1.0], "detection 1 has numbers"),
    ],
)
def test_bad_detections(key: str, value: object, said: str) -> None:
    truth, detections = make(5, seed=3)
    detections[1][key] = value
    with pytest.raises(ValueError, match=said):
        figures(truth, detections)


def test_nothing_to_find() -> None:
    truth, detections = make(5, seed=4)
    truth["annotations"] = [box | {"iscrowd": 1} for box in truth["annotations"]]
    with pytest.raises(ValueError, match="the 5 images have no annotated box"):
        figures(truth, detections)
