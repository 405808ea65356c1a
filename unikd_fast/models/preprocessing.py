"""How images are preprocessed for a network: as published with its weights, or as stored in their file."""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast, get_args

from safetensors import SafetensorError, safe_open

from unikd_fast.values import Channels, Interpolation

METADATA_KEY = "preprocessing"
"""Metadata key under which the safetensors files we write hold a `Preprocessing` as JSON."""
_CARD_KEY = "student"


@dataclass(frozen=True)
class Preprocessing:
    """How an image becomes an input of a network.

    Args:
        mean, std: statistics per channel, of images in [0, 1].
        interpolation: interpolation of every resize.
        crop_pct: share of the resized short side that the central crop keeps; timm's term.
        squash: whether both sides are resized to that length, ignoring the aspect ratio.
        image_size: height and width in pixels of the images that the weights were trained on.

    Raises:
        ValueError: a field is out of range.

    Example:
        >>> published_preprocessing("torchvision/resnet50", "IMAGENET1K_V2").short_side(224)
        232
    """

    mean: Channels
    std: Channels
    interpolation: Interpolation
    crop_pct: float
    squash: bool
    image_size: int

    def __post_init__(self) -> None:
        for name, values, low in (("mean", self.mean, -math.inf), ("std", self.std, 0.0)):
            numbers = [value for value in values if isinstance(value, int | float)]
            if len(values) != 3 or len(numbers) != 3 or not all(low < value < math.inf for value in numbers):
                raise ValueError(f"Preprocessing: {name} must be three finite numbers above {low}, got {values}")
        if self.interpolation not in get_args(Interpolation):
            raise ValueError(
                f"Preprocessing: interpolation must be one of {get_args(Interpolation)}, got {self.interpolation!r}"
            )
        if not isinstance(self.crop_pct, int | float) or not 0.01 <= self.crop_pct <= 100:
            raise ValueError(f"Preprocessing: crop_pct must be a number in [0.01, 100], got {self.crop_pct!r}")
        if type(self.squash) is not bool or type(self.image_size) is not int or self.image_size < 1:
            raise ValueError(
                "Preprocessing: squash must be a bool and image_size an int of at least 1, got "
                f"{self.squash!r} and {self.image_size!r}"
            )

    def short_side(self, image_size: int) -> int:
        """Return the length in pixels that the short side is resized to before `image_size` is cropped.

        The rule is timm's. Three of its weights have crop_pct 1.15, more than the image; nothing is cropped for them.
        """
        return max(image_size, math.floor(round(image_size / self.crop_pct, 6)))


@dataclass(frozen=True)
class StudentCard:
    """What one must know to use a trained student.

    Args:
        model, model_args: network by name, and further arguments of it, as in `build_model`.
        num_classes: number of classes K.
        class_names: K names, or None.
        preprocessing: how an image becomes its input.
        preprocesses: whether an exported file does that itself, and takes uint8 images (N, H, W, 3) of any size.
        long_side: of a detector, whose images are not cropped: the largest length in pixels of their long side, where
            the short one is resized to `preprocessing.image_size`. If None, it is a classifier.

    Example:
        >>> StudentCard.read(Path("runs/photos/student.safetensors")).class_names
        ('cat', 'dog')
    """

    model: str
    model_args: dict[str, Any]
    num_classes: int
    class_names: tuple[str, ...] | None
    preprocessing: Preprocessing
    preprocesses: bool = False
    long_side: int | None = None

    def as_dict(self) -> dict[str, Any]:
        """Return the content of student.json."""
        return asdict(self)

    @classmethod
    def from_dict(cls, found: dict[str, Any]) -> "StudentCard":
        """Return the card of what `as_dict` returned.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        names, fields, classes = found["class_names"], found["preprocessing"], int(found["num_classes"])
        if classes < 1 or (names is not None and len(names) != classes):
            raise ValueError(f"{classes} classes with the names {names}")
        return cls(
            str(found["model"]),
            dict(found["model_args"]),
            classes,
            None if names is None else tuple(map(str, names)),
            Preprocessing(**{**fields, "mean": tuple(fields["mean"]), "std": tuple(fields["std"])}),
            bool(found.get("preprocesses", False)),
            None if found.get("long_side") is None else int(found["long_side"]),
        )

    def in_words(self) -> dict[str, str]:
        """Return the metadata for a file of the student's weights, to be read by `read` and `stored_preprocessing`."""
        rest = {key: value for key, value in self.as_dict().items() if key != METADATA_KEY}
        return {METADATA_KEY: json.dumps(asdict(self.preprocessing)), _CARD_KEY: json.dumps(rest)}

    @classmethod
    def read(cls, path: Path) -> "StudentCard | None":
        """Return what a .safetensors file holds, or None if it holds no card.

        Raises:
            ValueError: it is damaged.
        """
        preprocessing = stored_preprocessing(path)
        if preprocessing is None:
            return None
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get(_CARD_KEY)
        try:
            return (
                None if stored is None else cls.from_dict({**json.loads(stored), METADATA_KEY: asdict(preprocessing)})
            )
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(
                f"StudentCard: the metadata {_CARD_KEY!r} of {path} cannot be used ({error}); export the file again"
            ) from error


def published_preprocessing(name: str, weights: str | None, *, image_size: int | None = None) -> Preprocessing | None:
    """Return how images are preprocessed for a network with these weights, or None if it is not published.

    A .safetensors file may state it (`METADATA_KEY`; students that we write do). Any other file is treated like the
    default weights of the network's name, as in timm: for "timm/vit_base_patch16_224.augreg_in21k" those of the tag.
    Of a Hugging Face model, the processor that belongs to it. No weights are downloaded, and errors about missing ones
    are left to `build_model`.

    Args:
        name, weights: as in `build_model`.
        image_size: height and width of the images; if timm states a test crop for this size, it is used.

    Raises:
        ValueError: see `stored_preprocessing`; or the processor of a Hugging Face model does something else.

    Example:
        >>> published_preprocessing("timm/vit_base_patch16_224", "augreg_in21k_ft_in1k").mean
        (0.5, 0.5, 0.5)
    """
    if weights is None or weights == "random":
        return None
    if (stored := stored_preprocessing(Path(weights))) is not None:
        return stored
    source, _, model = name.partition("/")
    if source == "torchvision":
        return _of_torchvision(model, weights)
    if source == "hf":
        from unikd_fast.models.hugging_face import hugging_face_preprocessing

        return hugging_face_preprocessing(model)
    return _of_timm(model, weights, image_size) if source == "timm" else None


def attached_preprocessing(network: Any) -> Preprocessing | None:
    """Return how images are preprocessed for a network that timm built, or None for another network.

    Example:
        >>> attached_preprocessing(timm.create_model("resnet10t")).crop_pct
        0.95
    """
    cfg = getattr(network, "pretrained_cfg", None)
    if not isinstance(cfg, dict) or not {"mean", "std", "input_size", "interpolation"} <= cfg.keys():
        return None
    return Preprocessing(
        tuple(cfg["mean"]),
        tuple(cfg["std"]),
        cast(Interpolation, cfg["interpolation"]),
        cfg.get("crop_pct") or 0.875,
        cfg.get("crop_mode") == "squash",
        cfg["input_size"][-1],
    )


def stored_preprocessing(path: Path) -> Preprocessing | None:
    """Return what a .safetensors file holds under `METADATA_KEY`, or None if there is nothing or for other files.

    Raises:
        ValueError: it is damaged.

    Example:
        >>> stored_preprocessing(Path("runs/digits/student.safetensors")).image_size
        32
    """
    if path.suffix != ".safetensors":
        return None
    try:
        with safe_open(path, framework="pt") as file:
            stored = (file.metadata() or {}).get(METADATA_KEY)
    except (OSError, SafetensorError):
        return None  # loading the weights reports what is wrong with the file
    if stored is None:
        return None
    try:
        fields: dict[str, Any] = json.loads(stored)
        return Preprocessing(**{**fields, "mean": tuple(fields["mean"]), "std": tuple(fields["std"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"stored_preprocessing: the metadata {METADATA_KEY!r} of {path} cannot be used ({error}); export the "
            "file again, or save its tensors without metadata"
        ) from error


def _of_torchvision(model: str, weights: str) -> Preprocessing | None:
    import torchvision
    from torchvision.transforms import InterpolationMode

    if model not in torchvision.models.list_models(module=torchvision.models):
        return None
    members = torchvision.models.get_model_weights(model)
    chosen = members.__members__.get(weights) or members.__members__.get("DEFAULT")
    if chosen is None:
        return None
    transform = chosen.transforms()
    (crop,), (resize,) = transform.crop_size, transform.resize_size
    interpolation: Interpolation = "bicubic" if transform.interpolation is InterpolationMode.BICUBIC else "bilinear"
    return Preprocessing(tuple(transform.mean), tuple(transform.std), interpolation, crop / resize, False, crop)


def _of_timm(model: str, weights: str, image_size: int | None) -> Preprocessing | None:
    import timm

    arch, *_ = model.partition(".")
    if not timm.is_model(arch):
        return None
    found = next((cfg for cfg in map(_timm_cfg, (f"{arch}.{weights}", model, arch)) if cfg is not None), None)
    if found is None:
        return None
    size, crop_pct = found.input_size[-1], found.crop_pct
    if image_size not in (None, size) and found.test_input_size and found.test_input_size[-1] == image_size:
        size, crop_pct = image_size, found.test_crop_pct or crop_pct
    interpolation = cast(Interpolation, found.interpolation)
    return Preprocessing(
        tuple(found.mean), tuple(found.std), interpolation, crop_pct, found.crop_mode == "squash", size
    )


def _timm_cfg(name: str) -> Any:
    from timm.models import get_pretrained_cfg

    try:
        return get_pretrained_cfg(name)
    except RuntimeError:  # the network has no weights with this tag
        return None
