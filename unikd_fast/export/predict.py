"""What `unikd predict` does: the classes of images, by the student of a run or of an exported file."""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from torch import Tensor

from unikd_fast.config import ConfigError
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.device import Normalise
from unikd_fast.data.files import Decoder, DecodeRequest
from unikd_fast.data.images import BadImage, StoredImage, read_rgb
from unikd_fast.data.splits import DataSplits, ImageFiles
from unikd_fast.data.views import Windows
from unikd_fast.engine.folder import BEST, import_student
from unikd_fast.errors import DataError, FileError, RunError
from unikd_fast.export.command import card_path, read_run
from unikd_fast.export.formats import FORMATS, open_onnx, open_torchscript, with_logits
from unikd_fast.export.student import load_student, read_weights
from unikd_fast.io import read_json
from unikd_fast.models import StudentCard, bare_model

if TYPE_CHECKING:
    from unikd_fast.export.detect import Detected

T = TypeVar("T")

_BATCH = 16


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of an image.

    Attributes:
        image: path of the image.
        classes: names of classes, the most probable first.
        probabilities: their probabilities.
    """

    image: str
    classes: tuple[str, ...]
    probabilities: tuple[float, ...]

    def __str__(self) -> str:
        shown = (f"{name} {100 * share:.1f} %" for name, share in zip(self.classes, self.probabilities, strict=True))
        return f"{self.image}: {', '.join(shown)}"


def predict(
    source: Path,
    images: Sequence[Path],
    *,
    top: int | None = None,
    checkpoint: str = "best",
    least_score: float = 0.5,
) -> "Iterator[Prediction | Detected | BadImage]":
    """Yield the predictions for images, preprocessed as the student's were in its evaluation, and those that cannot be
    decoded, of 16 images at a time.

    Args:
        source: run folder, or a file that `unikd export` wrote.
        images: paths of images.
        top: number of classes for each image, or of objects. If None, 5 classes, or 100 objects.
        checkpoint: which checkpoint of a run, see `read_weights`.
        least_score: smallest score of an object.

    Raises:
        ConfigError: the source is neither, or nothing is known of its preprocessing; an image does not exist.
    """
    missing = [str(path) for path in images if not path.is_file()]
    if missing:
        raise ConfigError(f"there is no image {missing[0]}; give the paths of image files")
    card, tensors = _card_of_run(source, checkpoint) if source.is_dir() else (_card_of_file(source), None)
    if card.long_side is not None:
        from unikd_fast.export.detect import detect_in  # torchvision, half a second
        from unikd_fast.export.detectors import OneImage, open_detector, plain_detector

        detect = (
            _of_file(source, lambda: open_detector(card, source))
            if tensors is None
            else OneImage(plain_detector(card, tensors))
        )
        yield from detect_in(detect, card, images, least_score=least_score, most=100 if top is None else top)
        return
    run = _of_file(source, lambda: _opened(card, source)) if tensors is None else _classifier(source, card, tensors)
    top = 5 if top is None else top
    names = card.class_names or tuple(map(str, range(card.num_classes)))
    for batch, places, bad in _raw(images) if card.preprocesses else _batches(card, images):
        yield from bad
        if not len(batch):
            continue
        with torch.no_grad():
            logits = run(batch).float()
        if logits.shape != (len(batch), card.num_classes):
            raise FileError(
                f"{source} returns logits {tuple(logits.shape)} for {len(batch)} images, and what is known of it has "
                f"{card.num_classes} classes; export the student again"
            )
        probabilities, classes = logits.softmax(1).topk(min(top, card.num_classes), dim=1)
        for at, row, shares in zip(places, classes.tolist(), probabilities.tolist(), strict=True):
            yield Prediction(str(images[at]), tuple(names[place] for place in row), tuple(shares))


def _card_of_run(folder: Path, checkpoint: str) -> tuple[StudentCard, dict[str, Tensor]]:
    config = read_run(folder)
    if not (folder / BEST).is_file():
        raise ConfigError(f"{folder} has no {BEST}, which its first evaluation writes; let it train that far")
    weights = read_weights(folder, checkpoint, "auto", has_average=config.train.ema_decay is not None)
    card = StudentCard.read(folder / BEST)
    if card is None:
        raise FileError(f"{folder / BEST} is damaged, or does not say how to use the student; train it again")
    return card, weights.tensors


def _classifier(folder: Path, card: StudentCard, tensors: dict[str, Tensor]) -> Callable[[Tensor], Tensor]:
    config = read_run(folder)
    student = load_student(
        config.student.model,
        config.student.weights,
        tensors,
        num_classes=card.num_classes,
        model_args=config.student.model_args,
    )
    size = card.preprocessing.image_size
    return with_logits(student.network, torch.zeros(2, 3, size, size))


def _card_of_file(path: Path) -> StudentCard:
    if not path.is_file():
        raise ConfigError(f"there is no {path}; give a run folder, or a file that unikd export wrote")
    beside = card_path(path)
    if path.suffix not in FORMATS or not beside.is_file():
        raise ConfigError(
            f"{path} is not a file that unikd export wrote with a {beside.name} beside it; export it again"
        )
    try:
        return StudentCard.from_dict(read_json(beside))
    except (KeyError, TypeError, ValueError) as error:
        raise FileError(f"{beside} is damaged ({error}); export the student again") from error


def _of_file(path: Path, open_it: Callable[[], T]) -> T:
    """Return what an exported file holds.

    Raises:
        ConfigError: a package is missing.
        FileError: the file is damaged.
    """
    try:
        return open_it()
    except (RunError, MemoryError):
        raise
    except ModuleNotFoundError as error:
        raise ConfigError(f"{path} needs {error.name}, not installed: pip install 'unikd-fast[export]'") from error
    except Exception as error:  # of one of three libraries, each with its own kinds
        said = str(error).partition("\n")[0]
        raise FileError(f"{path} cannot be read ({type(error).__name__}: {said}); export the student again") from error


def _opened(card: StudentCard, path: Path) -> Callable[[Tensor], Tensor]:
    """Return the student of an exported file: images to logits."""
    if path.suffix == ".safetensors":
        try:
            network = bare_model(
                card.model,
                num_classes=card.num_classes,
                model_args=card.model_args,
                weights=str(path),
                role="student",
            )
        except ValueError as error:
            raise ConfigError(str(error)) from error
        import_student(network, path)
        return with_logits(network.eval(), torch.zeros(2, 3, *2 * (card.preprocessing.image_size,)))
    return open_onnx(path) if path.suffix == ".onnx" else open_torchscript(path)


Shown = tuple[Tensor, list[int], Sequence[BadImage]]
"""Images as a student takes them, their places, and those that cannot be decoded."""


def _raw(images: Sequence[Path]) -> Iterator[Shown]:
    """Yield each image as it is decoded, (1, H, W, 3) uint8, for a file that preprocesses it."""
    for place, path in enumerate(images):
        try:
            image = read_rgb(StoredImage(str(path)))
        except DataError as error:
            yield torch.empty(0), [], [BadImage(str(path), place, str(error))]
        else:
            yield torch.from_numpy(np.array(image))[None], [place], []


def _batches(card: StudentCard, images: Sequence[Path]) -> Iterator[Shown]:
    """Yield images as the loader shows them in an evaluation."""
    wanted = card.preprocessing
    files = ImageFiles([str(path) for path in images], np.zeros(len(images), np.int64))
    splits = DataSplits(
        train=files,
        val=files,
        test=files,
        num_classes=card.num_classes,
        class_names=card.class_names,
        mean=wanted.mean,
        std=wanted.std,
        image_size=wanted.image_size,
        interpolation=wanted.interpolation,
        eval_resize=wanted.short_side(wanted.image_size),
        squash=wanted.squash,
    )
    decoder = Decoder(Windows.of(splits, Augmentation()), splits.interpolation)
    normalise = Normalise(splits.mean, splits.std, device=torch.device("cpu"))
    for start in range(0, len(files), _BATCH):
        part = slice(start, min(start + _BATCH, len(files)))
        stored, ids = files.images(range(part.start, part.stop)), files.sample_ids[part]
        found = decoder[DecodeRequest(stored, files.labels[part], ids, None, on_bad="leave_out")]
        yield normalise(found.images), found.sample_ids.tolist(), found.bad


def as_json(prediction: Prediction) -> str:
    """Return a prediction as a line of JSON."""
    pairs = zip(prediction.classes, prediction.probabilities, strict=True)
    classes = [{"class": name, "probability": round(share, 6)} for name, share in pairs]
    return json.dumps({"image": prediction.image, "classes": classes})
