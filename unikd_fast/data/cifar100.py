"""CIFAR-100 in its published python layout, read by an unpickler that can build arrays and lists and nothing else."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch

from unikd_fast.data.splits import DataSplits, TensorImages
from unikd_fast.data.subsets import stratified_split

MEAN = (0.5071, 0.4867, 0.4408)
STD = (0.2675, 0.2565, 0.2761)
NUM_CLASSES = 100
IMAGE_SIZE = 32

_HOLD_OUT_SEED = 0


def load_cifar100(folder: Path, *, val_samples: int = 0) -> DataSplits:
    """Load CIFAR-100 from the folder that holds the files train, test and meta.

    Args:
        folder: the unpacked `cifar-100-python`.
        val_samples: samples of the published train split to hold out for validation, stratified, the same in every
            run. With none, the published test split is both `val` and `test`, as in the literature.

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
    if not isinstance(names, list) or len(names) != NUM_CLASSES:
        raise ValueError(f"load_cifar100: {folder / 'meta'} must hold a list of 100 fine_label_names")
    return DataSplits(
        train=train,
        val=val,
        test=test,
        num_classes=NUM_CLASSES,
        class_names=tuple(_text(name) for name in names),
        mean=MEAN,
        std=STD,
        image_size=IMAGE_SIZE,
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
    images = torch.from_numpy(pixels.reshape(-1, 3, IMAGE_SIZE, IMAGE_SIZE).copy())
    return TensorImages(images, np.array(labels, np.int64))


def _read_pickle(path: Path) -> dict[str, Any]:
    """Return the dictionary in a file, its keys as text whatever Python wrote it."""
    with path.open("rb") as file:
        try:
            content = _ArrayUnpickler(file, encoding="bytes").load()
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError, IndexError, KeyError) as error:
            raise ValueError(
                f"load_cifar100: cannot read {path}: {error}; unpack the published cifar-100-python.tar.gz anew"
            ) from error
    if not isinstance(content, dict):
        raise ValueError(f"load_cifar100: {path} must hold a dictionary, got {type(content).__name__}")
    return {_text(key): value for key, value in content.items()}


def _is_class(label: object) -> bool:
    return isinstance(label, int) and 0 <= label < NUM_CLASSES


def _text(value: bytes | str) -> str:
    return value.decode("latin1") if isinstance(value, bytes) else str(value)


# Stand-ins for the callables in files written by Python 2 (the published ones) and by Python 3, each able to do no more
# than these files ask of it. The content of an array arrives in its state, after the call.


class _ArrayType:
    """Stand in for `numpy.ndarray`, of which the files only hold the name."""


def _empty_array(subtype: type, shape: tuple[int, ...], type_code: bytes | str) -> np.ndarray:
    if subtype is not _ArrayType:
        raise pickle.UnpicklingError(f"refused to rebuild an array as {subtype!r}")
    return np.empty(0, np.uint8)


def _empty_bytes() -> bytes:
    return b""


def _encode_latin1(text: str, encoding: str) -> bytes:
    # By this Python 3 writes bytes in protocol 2; other codecs may do anything.
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"refused to encode as {encoding!r}")
    return text.encode("latin1")


_ALLOWED_GLOBALS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy", "ndarray"): _ArrayType,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _encode_latin1,
    ("__builtin__", "bytes"): _empty_bytes,
    ("builtins", "bytes"): _empty_bytes,
}


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickle plain containers and numpy arrays. A pickle is a program: every other global is refused by name."""

    def find_class(self, module: str, name: str) -> Any:
        try:
            return _ALLOWED_GLOBALS[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"refused the global {module}.{name}, which CIFAR-100 does not use") from None
