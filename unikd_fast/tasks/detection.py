"""Object detection: average precision by COCO's rules."""

from collections.abc import Mapping, Sequence
from typing import Any

from unikd_fast.tasks import DETECTION

_STATISTICS = ("AP_all", "AP_50", "AP_75", "AP_small", "AP_medium", "AP_large")


def figures(ground_truth: dict[str, Any], detections: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the figures of detections in percent, the AP of each class by its name, and the number of images.

    AP is over IoU 0.5 to 0.95; ap50 and ap75 are at one IoU; the rest is of boxes of less than 32² pixels, of up to 96²
    and of more, where there are such boxes.

    Args:
        ground_truth: annotations in COCO's format: images, categories, annotations.
        detections: image_id, category_id, bbox (x, y, width, height, in pixels of the annotations) and score of each.

    Raises:
        ValueError: there is no annotation to find, a detection is of an image or a category that the annotations do
            not have, or is not finite: COCO's evaluators accept that, and would give a wrong number.
    """
    import numpy as np
    from faster_coco_eval import COCO, COCOeval_faster

    images = {image["id"] for image in ground_truth["images"]}
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    _check(detections, images, set(names))
    if not any(not box.get("iscrowd") for box in ground_truth["annotations"]):
        raise ValueError(
            f"figures: the {len(images)} images have no annotated box, so that there is no AP; evaluate on images with "
            "boxes"
        )
    # The evaluator writes into annotations and detections.
    truth = COCO({**ground_truth, "annotations": [dict(box) for box in ground_truth["annotations"]]})
    found = truth.loadRes([dict(each) for each in detections])
    evaluation = COCOeval_faster(truth, found, "bbox", print_function=_silent)
    evaluation.run()
    statistics = (evaluation.stats_as_dict[key] for key in _STATISTICS)
    values = dict(zip(DETECTION.all, statistics, strict=True))
    # (IoUs, recalls, classes, areas, numbers of detections)
    precision = np.asarray(evaluation.eval["precision"])[:, :, :, 0, -1]
    of_class = {
        names[category]: 100 * float(precision[:, :, k].mean())
        for k, category in enumerate(evaluation.params.catIds)
        if (precision[:, :, k] > -1).all()
    }
    return {
        **{key: 100 * float(value) for key, value in values.items() if value > -1},
        DETECTION.by_class: of_class,
        "samples": len(images),
    }


def _check(detections: Sequence[Mapping[str, Any]], images: set[int], categories: set[int]) -> None:
    import numpy as np

    numbers = np.array([[*each["bbox"], each["score"]] for each in detections]).reshape(-1, 5)
    wrong = {
        place
        for key, known in (("image_id", images), ("category_id", categories))
        for place, each in enumerate(detections)
        if each[key] not in known
    } | set(np.flatnonzero(~np.isfinite(numbers).all(1)).tolist())
    if not wrong:
        return
    place = min(wrong)
    each = detections[place]
    if each["image_id"] not in images:
        what = f"image {each['image_id']}"
    elif each["category_id"] not in categories:
        what = f"category {each['category_id']}"
    else:
        what = f"numbers {[*each['bbox'], each['score']]}"
    raise ValueError(
        f"figures: detection {place} has {what}; detections must be finite, of one of the {len(images)} images and "
        f"{len(categories)} categories that are annotated"
    )


def _silent(*said: object) -> None:
    """Print nothing."""
