"""Image classifiers of Hugging Face, by the name of a repository or a local folder, and how their images are made."""

import difflib
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from unikd_fast.models.preprocessing import Preprocessing
from unikd_fast.models.weights import another_classifier, log_new_classifier
from unikd_fast.values import Interpolation

T = TypeVar("T")

_logger = logging.getLogger("unikd_fast")

_TIMEOUT = 10.0  # seconds for the hub to answer at all
_FOLDER = "give a folder that save_pretrained wrote, or the name of a model on the hub"
_SAVE = "save_pretrained it to a folder on a connected machine and name that folder, hf/<folder>"


def hugging_face_model(
    name: str,
    num_classes: int,
    model_args: Mapping[str, Any],
    *,
    pretrained: bool,
    new_classifier: bool = False,
    role: str = "model",
) -> nn.Module:
    """Build a classifier by transformers' AutoModelForImageClassification, in fp32.

    Files of the local cache come first, and the hub is asked once, without retries, for those that are not there. No
    code of a repository is executed.

    Args:
        name: folder that `save_pretrained` wrote, or name of a repository.
        num_classes: number of classes K.
        model_args: attributes of its configuration that differ from the stored ones.
        pretrained: whether to load its weights. If not, they are random.
        new_classifier, role: as in `build_model`.

    Raises:
        ValueError: transformers is not installed, there is no such model, it is not an image classifier, or its
            weights have other classes or other shapes.
        ConnectionError: the hub cannot be reached, and the files are not in the cache.

    Example:
        >>> hugging_face_model("microsoft/resnet-18", 10, {}, pretrained=False).config.num_labels
        10
    """
    what = f"{role}.model = hf/{name}"
    config = _config(name, num_classes, model_args, what)
    with _quiet() as transformers:
        auto = transformers.AutoModelForImageClassification
        if type(config) not in auto._model_mapping:
            raise ValueError(
                f"{what}: transformers has no image classifier of a {config.model_type}; choose a model of the task "
                "image-classification"
            )
        if not pretrained:
            try:
                return auto.from_config(config, dtype=torch.float32, trust_remote_code=False).train()
            except (ValueError, TypeError, KeyError, RuntimeError, ZeroDivisionError) as error:
                raise ValueError(
                    f"{what} cannot be built with {dict(model_args)} ({type(error).__name__}: {_line(error)}); correct "
                    f"{role}.model_args"
                ) from error

        def load(local: bool) -> tuple[nn.Module, dict[str, Any]]:
            found: tuple[nn.Module, dict[str, Any]] = auto.from_pretrained(
                _expanded(name),
                config=config,
                dtype=torch.float32,
                local_files_only=local,
                trust_remote_code=False,
                ignore_mismatched_sizes=True,
                output_loading_info=True,
            )
            return found

        model, info = _opened(load, name, what)
    _check_loaded(model, info, num_classes, what, new_classifier=new_classifier, role=role)
    return model.train()


def hugging_face_preprocessing(name: str) -> Preprocessing | None:
    """Return how the processor of a model makes its images, or None if there is none, or it cannot be had.

    Its resize, crop, mean and deviation are taken over, and both are compared on an image. An interpolation other than
    bilinear and bicubic becomes the nearer of the two.

    Raises:
        ValueError: the processor makes images that a `Preprocessing` cannot describe.
    """
    with _quiet() as transformers:

        def load(local: bool) -> Any:
            return transformers.AutoImageProcessor.from_pretrained(_expanded(name), local_files_only=local)

        try:
            processor = _opened(load, name, f"hf/{name}")
        except (ValueError, ConnectionError):
            return None  # building the network reports what is wrong; a network without processor has none
        said = f"hf/{name}: its processor, a {type(processor).__name__},"
        try:
            found = _from_fields(processor.to_dict())
            error = _largest_error(processor, found)
        except Exception as reason:  # of a processor that asks for other inputs, or lacks a field
            raise ValueError(
                f"{said} cannot be followed ({type(reason).__name__}: {_line(reason)}); {_OWN_PROCESSOR}"
            ) from reason
    if error > _TOLERANCE:
        raise ValueError(
            f"{said} makes other images than resize, central crop, mean and deviation do (pixels differ by up to "
            f"{error:.2f}, and {_TOLERANCE} is allowed); {_OWN_PROCESSOR}"
        )
    return found


_OWN_PROCESSOR = "put what it does into a network of your own, <module>:<class>"

# Interpolations differ by less on the smooth image they are compared on; an eighth of crop more differs by 0.06, and
# exchanged channels by 0.5.
_TOLERANCE = 0.03

_INTERPOLATIONS: dict[int, Interpolation] = {1: "bicubic", 3: "bicubic", 5: "bicubic"}  # Pillow's numbers


def _from_fields(fields: Mapping[str, Any]) -> Preprocessing:
    if fields.get("do_flip_channel_order"):
        raise ValueError("it takes blue, green and red, in this order")
    size, scale, crop = fields["size"], fields.get("rescale_factor") or 1 / 255, fields.get("crop_size")
    if not fields.get("do_rescale", True):
        scale = 1.0
    squash = "height" in size
    resized, pct = int(size["height" if squash else "shortest_edge"]), fields.get("crop_pct")
    kind = str(fields.get("image_processor_type", ""))
    if fields.get("do_center_crop") and crop is not None:
        side = int(crop["height"])
        if pct:  # PoolFormer
            resized = int(resized / pct)
        if kind.startswith("Levit"):
            resized, squash = int(256 / 224 * resized), False
    else:
        side = resized
        if not squash and pct:  # ConvNeXt, ResNet
            squash = side >= 384
            resized = side if squash else int(side / pct)
    # Images in [0, 1] times 255 * scale, less the offset, less mean, over std.
    times, offset = 255 * scale, float(bool(fields.get("rescale_offset")))
    plain = not fields.get("do_normalize", True)
    mean = (0.0,) * 3 if plain else fields["image_mean"]
    std = (1.0,) * 3 if plain else fields["image_std"]
    if fields.get("include_top"):  # EfficientNet divides by it twice
        std = [value**2 for value in std]
    own_mean: Any = tuple((float(value) + offset) / times for value in mean)
    own_std: Any = tuple(float(value) / times for value in std)
    interpolation = _INTERPOLATIONS.get(int(fields.get("resample", 2)), "bilinear")
    return Preprocessing(own_mean, own_std, interpolation, side / resized, squash, side)


def _largest_error(processor: Any, found: Preprocessing) -> float:
    """Return the largest difference of pixels in [0, 1] between the processor's image and ours."""
    from PIL import Image
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.v2 import functional

    height, width = 384, 512
    rows, columns = np.linspace(0, 1, height)[:, None], np.linspace(0, 1, width)[None]
    planes = [rows + 0 * columns, columns + 0 * rows, 0.25 + 0 * (rows + columns)]
    image = Image.fromarray((255 * np.stack(planes, axis=2)).round().astype(np.uint8))
    theirs: Tensor = processor(images=image, return_tensors="pt")["pixel_values"][0].float()
    short = found.short_side(found.image_size)
    size = [short, short] if found.squash else [short]
    resized = functional.resize(image, size, interpolation=InterpolationMode(found.interpolation), antialias=True)
    ours = functional.to_dtype(functional.to_image(functional.center_crop(resized, found.image_size)), scale=True)
    if theirs.shape != ours.shape:
        raise ValueError(f"an image of {width}x{height} pixels becomes {tuple(theirs.shape)}")
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (found.mean, found.std))
    return float((theirs * std + mean - ours).abs().max())


def _config(name: str, num_classes: int, model_args: Mapping[str, Any], what: str) -> Any:
    with _quiet() as transformers:

        def load(local: bool) -> tuple[Any, dict[str, Any]]:
            found: tuple[Any, dict[str, Any]] = transformers.AutoConfig.from_pretrained(
                _expanded(name),
                local_files_only=local,
                trust_remote_code=False,
                return_unused_kwargs=True,
                **{**model_args, "num_labels": num_classes},
            )
            return found

        config, unused = _opened(load, name, what)
    if unknown := sorted(unused):
        near = difflib.get_close_matches(unknown[0], config.to_dict(), n=3)
        raise ValueError(
            f"{what}: its {type(config).__name__} has no {unknown[0]!r} of {what.partition('.')[0]}.model_args; "
            f"nearest: {', '.join(near) or 'none'}"
        )
    return config


def _check_loaded(
    model: nn.Module, info: Mapping[str, Any], num_classes: int, what: str, *, new_classifier: bool, role: str
) -> None:
    """Refuse a network of which more than the classifier is new, or that too if it may not be."""
    expected = model.state_dict()
    shapes = {name: (tuple(stored), tuple(own)) for name, stored, own in info["mismatched_keys"]}
    other = [name for name, (stored, own) in shapes.items() if stored[1:] != own[1:] or own[0] != num_classes]
    if other:
        stored, own = shapes[other[0]]
        raise ValueError(
            f"{what}: {other[0]} is {stored} in its weights and {own} in the network; correct {role}.model_args"
        )
    missing = [name for name in info["missing_keys"] if not name.endswith("num_batches_tracked")]
    absent = [name for name in missing if name not in expected or expected[name].shape[:1] != (num_classes,)]
    if absent:
        raise ValueError(
            f"{what}: its weights have no {absent[0]}, nor {len(absent) - 1} more tensors of "
            f"{type(model).__name__}; name the model they belong to"
        )
    if not (shapes or missing):
        return
    classes = next((stored[0] for stored, _ in shapes.values()), 0)
    if new_classifier and classes:
        log_new_classifier(what.partition(" = ")[2], classes, num_classes, role)
    elif new_classifier:
        _logger.info("%s: a new classifier for %d classes, the weights have none", what, num_classes)
    elif classes:
        raise ValueError(
            f"{what}: its weights have {classes} classes and num_classes is {num_classes}: {min(shapes)} would not "
            f"fit; {another_classifier(role, classes)}"
        )
    else:
        raise ValueError(f"{what}: its weights have no classifier; {another_classifier(role, num_classes)}")


def _opened(load: Callable[[bool], T], name: str, what: str) -> T:
    """Call a loader with files of this machine alone, and if some are missing, with those of the hub."""
    try:
        return load(True)
    except OSError as error:
        if Path(_expanded(name)).is_dir():
            raise _unusable(what, error) from error
    except MemoryError:
        raise
    except Exception as error:  # of a damaged file, or a class that takes no such arguments
        raise _unusable(what, error) from error
    _ask_hub(name, what)
    try:
        return load(False)
    except MemoryError:
        raise
    except Exception as error:
        raise _unusable(what, error) from error


def _unusable(what: str, error: Exception) -> ValueError:
    return ValueError(f"{what} cannot be used ({type(error).__name__}: {_line(error)}); {_FOLDER}")


def _expanded(name: str) -> str:
    return str(Path(name).expanduser()) if name.startswith("~") else name


def _ask_hub(name: str, what: str) -> None:
    """Require that the hub has the repository: transformers would try again for half a minute without network."""
    kind, said = _answer(name)
    if kind == "absent":
        raise ValueError(f"{what}: there is no such folder, nor such a model on the hub ({said}); {_FOLDER}")
    if kind == "silent":
        raise ConnectionError(f"{what}: there is no such folder, and the hub cannot be reached ({said}); {_SAVE}")


@cache
def _answer(name: str) -> tuple[str, str]:
    """Return "there", "absent" or "silent", and what was said; asked once."""
    import huggingface_hub
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        huggingface_hub.model_info(name, timeout=_TIMEOUT)
    except (HFValidationError, RepositoryNotFoundError) as error:
        return "absent", _line(error)
    except Exception as error:  # of the HTTP client, which is another one with every major version
        return "silent", _line(error)
    return "there", ""


@contextmanager
def _quiet() -> Iterator[Any]:
    """Yield transformers, without its progress bars and reports on weights: what matters in them we say ourselves."""
    try:
        import transformers
    except ImportError as error:
        raise ValueError(
            f"hf/<name> needs transformers, which cannot be imported ({error}); pip install 'unikd-fast[hf]'"
        ) from error
    from transformers.utils import logging as logs

    verbosity, bars = logs.get_verbosity(), logs.is_progress_bar_enabled()
    logs.set_verbosity_error()
    logs.disable_progress_bar()
    try:
        yield transformers
    finally:
        logs.set_verbosity(verbosity)
        if bars:
            logs.enable_progress_bar()


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0]
