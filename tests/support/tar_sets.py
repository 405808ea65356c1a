"""Small sets of tar files as WebDataset lays them out."""

import io
import tarfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from support.generated_images import draw_image
from unikd_fast.data.datasets import open_data
from unikd_fast.data.splits import DataSplits, PackedImages

SIZE = 16
Member = tuple[str, bytes]


def image(number: int, extension: str = "jpg") -> bytes:
    file = io.BytesIO()
    kind = {"jpg": "JPEG", "jpeg": "JPEG", "png": "PNG", "webp": "WEBP"}[extension.lower()]
    draw_image(np.random.default_rng(number), 20 + number % 7, 30).save(file, kind)
    return file.getvalue()


def sample(number: int, label: int | str, key: str | None = None, extension: str = "jpg") -> list[Member]:
    key = f"{number:04}" if key is None else key
    return [(f"{key}.{extension}", image(number, extension)), (f"{key}.cls", str(label).encode())]


def write_tar(path: Path, members: Iterable[Member], tar_format: int = tarfile.PAX_FORMAT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=tar_format) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.type = tarfile.DIRTYPE if name.endswith("/") else tarfile.REGTYPE
            archive.addfile(member, io.BytesIO(content))
    return path


def write_set(root: Path, names: tuple[str, ...] = ("train-000.tar", "train-001.tar", "val-000.tar")) -> Path:
    """Eight samples a file, of classes 0 to 2."""
    for file, name in enumerate(names):
        write_tar(root / name, [m for i in range(8 * file, 8 * file + 8) for m in sample(i, i % 3)])
    return root


def open_tars(root: Path, num_classes: int | None = None) -> tuple[DataSplits, PackedImages, PackedImages]:
    splits = open_data("webdataset", root=root, image_size=SIZE, num_classes=num_classes)
    assert isinstance(splits.train, PackedImages)
    assert isinstance(splits.val, PackedImages)
    return splits, splits.train, splits.val


def contents(split: PackedImages) -> list[bytes]:
    return [stored.read() for stored in split.images(range(len(split)))]


def cut(path: Path, length: int) -> None:
    path.write_bytes(path.read_bytes()[:length])
