"""Where data sets and weights lie. Imports neither torch nor numpy, so that a wrong path is reported at once."""

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

_VARIABLE = re.compile(r"\$\{(\w+)\}")
_CIFAR_FOLDER = "cifar-100-python"
# What must be there before anything is loaded.
_LAYOUTS: dict[str, tuple[str, ...]] = {
    "cifar100": ("train", "test", "meta"),
    "image_folder": ("train", "val"),
    "imagenet": ("train", "val"),
    "arrow": (),
    "coco": (),
    "voc": ("JPEGImages", "Annotations", "ImageSets/Main"),
}

# Data set -> layout below the root in words; None where no files are needed.
_ROOTS: dict[str, str | None] = {
    "digits": None,
    "cifar100": f"{_CIFAR_FOLDER}/{{train,test,meta}}, the published python version unpacked",
    "image_folder": "train/<class>/<image> and val/<class>/<image>",
    "imagenet": "train/<class>/<image> and val/<class>/<image>",
    "arrow": "a store of `unikd data pack`, or what Hugging Face datasets reads",
    "synthetic": None,
    "given": None,
    "coco": "annotations/instances_train<year>.json and train<year>/, or train.json and train/, and the same for val",
    "voc": "JPEGImages, Annotations and ImageSets/Main/{train,val}.txt",
    "toy_scenes": None,
}
DATA_NAMES = tuple(_ROOTS)


def check_root(name: str, root: str | None, *, val_samples: int = 0, needs_train: bool = True) -> Path | None:
    """Return the folder of a data set, or None for those that need none.

    Args:
        name: one of `DATA_NAMES`.
        root: path; `${VARIABLE}` and `~` are expanded. The root of cifar100 may be the unpacked folder or its parent.
        val_samples: number of samples held out for validation; an image_folder then needs no val of its own.
        needs_train: whether an image folder must have train, because there is no `data.unlabeled_root`.

    Raises:
        ValueError: the data set is unknown, or the root is not given or names an environment variable that is not set.
        FileNotFoundError: the folder or a part of it is missing.

    Example:
        >>> check_root("digits", None) is None
        True
    """
    if name not in _ROOTS:
        raise ValueError(f"check_root: data set must be one of {', '.join(DATA_NAMES)}, got {name!r}")
    layout = _ROOTS[name]
    if layout is None:
        return None
    held_out = name == "image_folder" and val_samples > 0
    if held_out:
        layout = "<class>/<image>"
    if not root:
        raise ValueError(f"check_root: data set {name} needs a root folder and got none; {_remedy(name)}")
    expanded = _expand(root, f"check_root: the root of data set {name}", lambda unset: _remedy(name, [unset]))
    folder = Path(expanded).expanduser()
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "is missing"
        raise FileNotFoundError(
            f"check_root: the root of data set {name}, {root}, {state}; it must hold {layout}; "
            f"{_remedy(name, _VARIABLE.findall(root))}"
        )
    if name == "cifar100" and (folder / _CIFAR_FOLDER).is_dir():
        folder = folder / _CIFAR_FOLDER
    parts = () if held_out else _LAYOUTS[name]
    for part in parts:
        if not (folder / part).exists() and (part != "train" or needs_train):
            shown = Path(root, *folder.parts[len(Path(expanded).expanduser().parts) :], part)
            raise FileNotFoundError(
                f"check_root: {shown} is missing; the root of data set {name} must hold {layout}; "
                f"{_remedy(name, _VARIABLE.findall(root))}"
            )
    return folder


def check_unlabeled_root(name: str, root: str | None) -> Path | None:
    """Return the folder of images without labels that belongs to a data set, or None if there is none.

    Raises:
        ValueError: the data set cannot have one, or the root names an environment variable that is not set.
        FileNotFoundError: the folder is missing.
    """
    if root is None:
        return None
    if name not in ("image_folder", "imagenet"):
        raise ValueError(
            f"data.unlabeled_root = {root!r} with data.name = {name!r}: images without labels go with image_folder and "
            "imagenet; set it to null, or unpack the data set into folders"
        )
    expanded = _expand(root, "data.unlabeled_root", lambda variable: f"set it by `export {variable}=/path/to/images`")
    folder = Path(expanded).expanduser()
    if not folder.is_dir():
        state = "is not a folder" if folder.exists() else "is missing"
        raise FileNotFoundError(f"data.unlabeled_root = {root} {state}; give a folder of images, or null")
    return folder


def expand_weights(role: str, weights: str) -> str:
    """Return the weights of a network as they are loaded: a file, `${VARIABLE}` and `~` expanded, or an identifier.

    Args:
        role: "teacher" or "student".
        weights: weights as configured.

    Raises:
        ValueError: an environment variable is not set.

    Example:
        >>> expand_weights("teacher", "IMAGENET1K_V1")
        'IMAGENET1K_V1'
    """
    key = f"{role}.weights"

    def remedy(variable: str) -> str:
        return f"set it by `export {variable}=/path/to/{role}s`, or give the file by `--set {key}=/path/to/file`"

    expanded = _expand(weights, key, remedy)
    return str(Path(expanded).expanduser()) if expanded.startswith("~") else expanded


@contextmanager
def named_as_configured(role: str, weights: str) -> Iterator[str]:
    """Yield the weights of a network as `expand_weights` returns them, and name them in errors as they are configured.

    The value of an environment variable may be a secret that was meant for something else.

    Raises:
        ValueError: an environment variable is not set.
    """
    expanded = expand_weights(role, weights)
    try:
        yield expanded
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        if expanded == weights or expanded not in str(error):
            raise
        raise type(error)(str(error).replace(expanded, weights)) from error


def _expand(text: str, what: str, remedy: Callable[[str], str]) -> str:
    """Expand environment variables; a variable without a value is an error, not a literal name."""

    def value(match: re.Match[str]) -> str:
        found = os.environ.get(match[1])
        if not found:
            raise ValueError(f"{what} is {text!r} and {match[1]} is not set; {remedy(match[1])}")
        return found

    return _VARIABLE.sub(value, text)


def _remedy(name: str, variables: Sequence[str] = ()) -> str:
    """Return how to give a data set its root; `variables` are those that the configured root names."""
    options = [*(f"export {variable}=" for variable in variables), "--set data.root="]
    return "set it by " + " or ".join(f"`{option}/path/to/{name}`" for option in options)
