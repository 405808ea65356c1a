"""What `unikd predict` does with the student of a detection run: objects in images, in words, JSON and pictures."""

import io
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torchvision.models.detection import FasterRCNN

from unikd_fast.data.detection.pictures import draw_boxes
from unikd_fast.data.detection.views import padded_size, resized
from unikd_fast.data.device import Normalise
from unikd_fast.data.images import BadImage, StoredImage, read_rgb
from unikd_fast.engine.folder import export_student
from unikd_fast.errors import DataError, RunError
from unikd_fast.io import make_folder, write_file
from unikd_fast.models import StudentCard
from unikd_fast.models.detector import Detector
from unikd_fast.models.faster_rcnn import build_detector


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


def export_detector(card: StudentCard, tensors: dict[str, Tensor], target: Path) -> None:
    """Write a student's weights, which load strictly into its plain network, as safetensors with its card.

    Raises:
        FileError: the disk is full, or cannot be written to.
        RunError: they do not load.
    """
    export_student(_plain(card, tensors), target, card)


def _plain(card: StudentCard, tensors: dict[str, Tensor]) -> FasterRCNN:
    network = build_detector(card.model, num_classes=card.num_classes, model_args=card.model_args, role="student")
    try:
        network.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise RunError(f"the weights do not load into {card.model} ({said}); export the student again") from error
    return network


def detect_in(
    card: StudentCard, tensors: dict[str, Tensor], images: Sequence[Path], *, least_score: float, most: int
) -> Iterator[Detected | BadImage]:
    """Yield the objects in each image, preprocessed as in the student's evaluation, and images that cannot be decoded.

    Args:
        card: what is known of the student.
        tensors: its weights.
        images: paths of images.
        least_score: smallest score of an object.
        most: largest number of objects of an image.
    """
    assert card.long_side is not None
    detector = Detector(_plain(card, tensors)).eval()
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
        padded_height, padded_width = padded_size([(height, width)])
        shown = torch.zeros(1, 3, padded_height, padded_width)
        shown[:, :, :height, :width] = normalise(torch.from_numpy(pixels).permute(2, 0, 1)[None])
        with torch.no_grad():
            (found,) = detector(shown, [(height, width)])
        kept = (found["scores"] >= least_score).nonzero()[:most, 0]
        scale = torch.tensor([image.width / width, image.height / height] * 2)
        yield Detected(
            str(path),
            tuple(names[label - 1] for label in found["labels"][kept].tolist()),
            tuple(found["scores"][kept].tolist()),
            tuple(tuple(box) for box in (found["boxes"][kept] * scale).tolist()),
        )
