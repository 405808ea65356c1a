"""What `unikd predict` does with the student of a detection run: objects in images, in words, JSON and pictures."""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from unikd_fast.data.detection.pictures import draw_boxes
from unikd_fast.data.detection.views import resized
from unikd_fast.data.device import Normalise
from unikd_fast.data.images import BadImage, StoredImage, read_rgb
from unikd_fast.errors import DataError, FileError
from unikd_fast.export.detectors import Detect
from unikd_fast.io import make_folder, write_file
from unikd_fast.models import StudentCard


@dataclass(frozen=True)
class Detected:
    """The objects that are found in an image, the surest first.

    Attributes:
        image: path of the image.
        classes: name of the class of each.
        scores: probability of each.
        boxes: x1, y1, x2, y2 of each in pixels of the image.
    """

    image: str
    classes: tuple[str, ...]
    scores: tuple[float, ...]
    boxes: tuple[tuple[float, ...], ...]

    def __str__(self) -> str:
        found = (
            f"{name} {100 * score:.1f} % at {', '.join(f'{number:.0f}' for number in box)}"
            for name, score, box in zip(self.classes, self.scores, self.boxes, strict=True)
        )
        return f"{self.image}: {'; '.join(found) or 'nothing'}"

    def as_json(self) -> str:
        """Return it as a line of JSON."""
        objects = [
            {"class": name, "score": round(score, 6), "box": [round(number, 2) for number in box]}
            for name, score, box in zip(self.classes, self.scores, self.boxes, strict=True)
        ]
        return json.dumps({"image": self.image, "objects": objects})

    def draw(self, target: Path) -> None:
        """Write a copy of the image with the boxes, as PNG; its folder is made.

        Raises:
            DataError: the image cannot be decoded.
        """
        words = [f"{name} {100 * score:.0f}" for name, score in zip(self.classes, self.scores, strict=True)]
        picture = draw_boxes(read_rgb(StoredImage(self.image)), self.boxes, words)
        make_folder(target.parent)
        content = io.BytesIO()
        picture.save(content, "PNG")
        write_file(target, content.getvalue())


def detect_in(
    detect: Detect, card: StudentCard, images: Sequence[Path], *, least_score: float, most: int
) -> Iterator[Detected | BadImage]:
    """Yield the objects in each image, preprocessed as in the student's evaluation, and images that cannot be decoded.

    Args:
        detect: the student, as `open_detector` returns it.
        card: what is known of it.
        images: paths of images.
        least_score: smallest score of an object.
        most: largest number of objects of an image.

    Raises:
        FileError: the card has fewer classes than the detector.
    """
    assert card.long_side is not None
    names = card.class_names or tuple(map(str, range(card.num_classes)))
    wanted = card.preprocessing
    normalise = Normalise(wanted.mean, wanted.std, device=torch.device("cpu"))
    for place, path in enumerate(images):
        try:
            image = read_rgb(StoredImage(str(path)))
        except DataError as error:
            yield BadImage(str(path), place, str(error))
            continue
        height, width = resized(image.height, image.width, wanted.image_size, card.long_side)
        pixels = np.array(image.resize((width, height), Image.Resampling.BILINEAR))
        with torch.no_grad():
            found = detect(normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None]))
        if len(found.labels) and int(found.labels.max()) > len(names):
            raise FileError(
                f"the detector finds class {int(found.labels.max())}, and its card has only {len(names)}; export the "
                "student again"
            )
        kept = (found.scores >= least_score).nonzero()[:most, 0]
        scale = torch.tensor([image.width / width, image.height / height] * 2)
        yield Detected(
            str(path),
            tuple(names[label - 1] for label in found.labels[kept].tolist()),
            tuple(found.scores[kept].tolist()),
            tuple(tuple(box) for box in (found.boxes[kept] * scale).tolist()),
        )
