"""Published sets that fit into memory: scikit-learn's digits and CIFAR-100.

The digits are 1797 images of 8 x 8 greys, which come with the package and train in seconds. CIFAR-100 is read from its
published python layout: pickles, by a machine of our own that calls nothing they name.
"""

import gzip
import math
import pickletools
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from unikd_fast.data.splits import DataSplits, TensorImages, stratified_split

SPLIT_SIZES = (1000, 297, 500)
"""Samples of train, val and test."""

# Part of the definition of the data set, like the sizes: a teacher must never have seen its student's test images.
_SPLIT_SEED = 0

CIFAR_MEAN = (0.5071, 0.4867, 0.4408)
CIFAR_STD = (0.2675, 0.2565, 0.2761)
CIFAR_SIZE = 32

_CIFAR_CLASSES = 100
_HOLD_OUT_SEED = 0
_MAX_AXES = 4  # of an array in a pickle


def load_digits(image_size: int) -> DataSplits:
    """Load the digits as RGB images of `image_size` pixels, enlarged by bilinear interpolation.

    The split is fixed; the ids are positions within each part. Mean and deviation are those of the train part.

    Raises:
        ValueError: `image_size` is below the 8 pixels of the originals.
        ModuleNotFoundError: scikit-learn is not installed.

    Example:
        >>> len(load_digits(32).test)
        500
    """
    if image_size < 8:
        raise ValueError(f"load_digits: image_size must be at least the 8 pixels of the originals, got {image_size}")
    table = _read_digits()
    small = torch.from_numpy(table[:, :-1]).reshape(-1, 1, 8, 8) * (255 / 16)
    large = F.interpolate(small, size=(image_size, image_size), mode="bilinear", align_corners=False)
    images = large.round().to(torch.uint8).expand(-1, 3, -1, -1)
    labels = table[:, -1].astype(np.int64)
    train, val, test = (
        TensorImages(images[torch.from_numpy(part)].contiguous(), labels[part])
        for part in stratified_split(labels, SPLIT_SIZES, seed=_SPLIT_SEED)
    )
    # In whole numbers: a sum of fractions depends on the number of threads, and what is cached is keyed on these.
    levels = train.images[:, 0].long()
    count, total, squares = levels.numel(), int(levels.sum()), int(levels.square().sum())
    mean, std = total / count / 255, math.sqrt(count * squares - total**2) / count / 255
    return DataSplits(
        train=train,
        val=val,
        test=test,
        num_classes=10,
        class_names=tuple("0123456789"),
        mean=(mean, mean, mean),
        std=(std, std, std),
        image_size=image_size,
    )


def _read_digits() -> NDArray[np.float64]:
    """Return scikit-learn's table of digits, (1797, 65): greys in 0..16, then the label.

    It is read from the file of the installed package, because importing scikit-learn takes more than a second.
    """
    package = find_spec("sklearn")
    if package is None or package.origin is None:
        raise ModuleNotFoundError("digits come with scikit-learn, which is not installed", name="sklearn")
    with gzip.open(Path(package.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
        return np.loadtxt(file, delimiter=",")


def load_cifar100(folder: Path, *, val_samples: int = 0) -> DataSplits:
    """Load CIFAR-100 from the folder that holds the files train, test and meta.

    Args:
        folder: unpacked `cifar-100-python`.
        val_samples: number of samples of the published train split to hold out for validation, stratified, the same in
            every run. With none, the published test split is both `val` and `test`, as in the literature.

    Raises:
        ValueError: a file is not what the published ones are, or val_samples leaves nothing to train on.

    Example:
        >>> splits = load_cifar100(Path("data/cifar-100-python"))
        >>> len(splits.train), splits.test_is_val
        (50000, True)
    """
    train, test = (_read_images(folder / part) for part in ("train", "test"))
    val = test
    if val_samples:
        if not 0 < val_samples < len(train):
            raise ValueError(
                f"load_cifar100: val_samples must be in [0, {len(train)}), the size of the train split, "
                f"got {val_samples}"
            )
        kept, held_out = stratified_split(train.labels, (len(train) - val_samples, val_samples), seed=_HOLD_OUT_SEED)
        train, val = train.select(kept), train.select(held_out)
    names = _read_pickle(folder / "meta").get("fine_label_names")
    if not isinstance(names, list) or len(names) != _CIFAR_CLASSES or not all(map(_is_text, names)):
        raise ValueError(f"load_cifar100: {folder / 'meta'} must hold a list of 100 fine_label_names")
    return DataSplits(
        train=train,
        val=val,
        test=test,
        num_classes=_CIFAR_CLASSES,
        class_names=tuple(_text(name) for name in names),
        mean=CIFAR_MEAN,
        std=CIFAR_STD,
        image_size=CIFAR_SIZE,
    )


def _read_images(path: Path) -> TensorImages:
    content = _read_pickle(path)
    pixels, labels = content.get("data"), content.get("fine_labels")
    if not isinstance(pixels, np.ndarray) or pixels.dtype != np.uint8 or pixels.ndim != 2 or pixels.shape[1] != 3072:
        found = f"{pixels.shape} {pixels.dtype}" if isinstance(pixels, np.ndarray) else type(pixels).__name__
        raise ValueError(f"load_cifar100: `data` in {path} must be (N, 3072) uint8, got {found}")
    if not isinstance(labels, list) or len(labels) != len(pixels) or not all(map(_is_class, labels)):
        raise ValueError(
            f"load_cifar100: `fine_labels` in {path} must be one class in [0, 100) per image, {len(pixels)} in all"
        )
    # Rows are red, green and blue planes, one after the other. The copy makes the array writable, as torch wants it.
    images = torch.from_numpy(pixels.reshape(-1, 3, CIFAR_SIZE, CIFAR_SIZE).copy())
    return TensorImages(images, np.array(labels, np.int64))


def _read_pickle(path: Path) -> dict[str, Any]:
    """Return the dictionary in a file, its keys as text whatever Python wrote it."""
    try:
        content = _values(path.read_bytes())
    except (ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
        raise ValueError(
            f"load_cifar100: cannot read {path}: {error}; unpack the published cifar-100-python.tar.gz again"
        ) from error
    if not isinstance(content, dict):
        raise ValueError(f"load_cifar100: {path} must hold a dictionary, got {type(content).__name__}")
    return {_text(key): value.pixels if isinstance(value, _Array) else value for key, value in content.items()}


def _is_class(label: object) -> bool:
    return isinstance(label, int) and 0 <= label < _CIFAR_CLASSES


def _is_text(value: object) -> bool:
    return isinstance(value, bytes | str)


def _text(value: bytes | str) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else value


# A pickle is a program. Python's own machine for it calls what the program names and takes the memory it asks for. This
# one knows the few operations that the published files and newer copies of them are made of. It takes memory for what a
# file holds and not for what it announces, and knows of the names what they stand for.


class _Name(NamedTuple):
    """A global of Python; nothing is imported."""

    module: str
    name: str


_NAMES = frozenset(
    (
        _Name("numpy.core.multiarray", "_reconstruct"),
        _Name("numpy._core.multiarray", "_reconstruct"),
        _Name("numpy", "ndarray"),
        _Name("numpy", "dtype"),
        _Name("__builtin__", "bytes"),
        _Name("builtins", "bytes"),
        _Name("_codecs", "encode"),
    )
)


class _Bytes:
    """Stand in for `numpy.dtype`, of uint8."""

    def set_state(self, state: tuple[Any, ...]) -> None:
        """Take version, byte order, subtype, names, fields, size, alignment and flags."""
        _, order, *structure = state
        if order not in (b"|", "|") or structure[:3] != [None, None, None]:
            raise ValueError("refused an array of other elements than single bytes")


class _Array:
    """Stand in for `numpy.ndarray`, whose content comes as its state."""

    def __init__(self) -> None:
        self.pixels: NDArray[np.uint8] = np.empty(0, np.uint8)

    def set_state(self, state: tuple[Any, ...]) -> None:
        """Take version, shape, type, whether columns come first, and the content."""
        _, shape, kind, by_columns, content = state
        if not isinstance(kind, _Bytes) or not isinstance(content, bytes) or not isinstance(by_columns, bool | int):
            raise ValueError("refused an array of other content than single bytes, by rows or by columns")
        if not isinstance(shape, tuple) or len(shape) > _MAX_AXES or not all(isinstance(side, int) for side in shape):
            raise ValueError("refused an array without a usual shape")
        if min(shape, default=0) < 0 or math.prod(shape) != len(content):
            raise ValueError(f"an array of shape {shape} holds {len(content)} bytes")
        self.pixels = np.frombuffer(content, np.uint8).reshape(shape, order="F" if by_columns else "C")


def _named(module: object, name: object) -> _Name:
    # Looked up as text alone: the hash of tuples within tuples, as deep as a file likes, overruns the stack.
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("refused a global without a name")
    if (module, name) not in _NAMES:
        raise ValueError(f"refused the global {module}.{name}, which CIFAR-100 does not use")
    return _Name(module, name)


def _called(function: object, arguments: object) -> object:
    """Return what a global of the published files makes of these arguments."""
    match function, arguments:
        case _Name(_, "_reconstruct"), (_Name("numpy", "ndarray"), *_):
            return _Array()
        case _Name("numpy", "dtype"), (b"u1" | "u1", *_):
            return _Bytes()
        case _Name("numpy", "dtype"), (bytes() | str() as code, *_):
            raise ValueError(f"refused an array of {_text(code)[:9]}, CIFAR-100 holds u1")
        case _Name(_, "bytes"), ():
            return b""
        case _Name("_codecs", "encode"), (str() as text, "latin1"):  # how Python 3 writes bytes in protocol 2
            return text.encode("latin1")
    shown = ".".join(function) if isinstance(function, _Name) else f"a {type(function).__name__}"
    raise ValueError(f"refused to call {shown} with other arguments than those of CIFAR-100")


def _pairs(values: list[Any]) -> Iterator[tuple[bytes | str, Any]]:
    for key, value in zip(values[::2], values[1::2], strict=True):
        if not _is_text(key):
            raise ValueError(f"refused a key that is a {type(key).__name__}")
        yield key, value


def _values(content: bytes) -> object:
    """Return what a pickle holds.

    Raises:
        ValueError: it is damaged, or contains what the published files do not.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[int, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        values = stack[start:]
        del stack[start:]
        return values

    argument: Any
    for operation, argument, _ in pickletools.genops(content):
        match operation.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "BININT" | "BININT1" | "BININT2" | "BINUNICODE" | "SHORT_BINUNICODE" | "BINBYTES" | "SHORT_BINBYTES":
                stack.append(argument)
            case "BINSTRING" | "SHORT_BINSTRING":  # the bytes of Python 2
                stack.append(argument.encode("latin1"))
            case "NONE":
                stack.append(None)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(operation.name == "NEWTRUE")
            case "MARK":
                marks.append(len(stack))
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE":
                stack.append(tuple(since_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(operation.name[-1])
                stack[-length:] = [tuple(stack[-length:])]
            case "APPEND":
                value = stack.pop()
                stack[-1].append(value)
            case "APPENDS":
                values = since_mark()
                stack[-1].extend(values)
            case "SETITEM":
                pair = stack[-2:]
                del stack[-2:]
                stack[-1].update(_pairs(pair))
            case "SETITEMS":
                values = since_mark()
                stack[-1].update(_pairs(values))
            case "BINPUT" | "LONG_BINPUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[argument])
            case "GLOBAL":
                stack.append(_named(*argument.split(" ", 1)))
            case "STACK_GLOBAL":
                stack[-2:] = [_named(*stack[-2:])]
            case "REDUCE":
                function, arguments = stack[-2:]
                stack[-2:] = [_called(function, arguments)]
            case "BUILD":
                state = stack.pop()
                stack[-1].set_state(state)
            case name:
                raise ValueError(f"refused the operation {name}, which CIFAR-100 does not use")
    raise ValueError("it has no end")
