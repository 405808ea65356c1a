"""One set of images in every form that is read: a folder, Arrow files, and in memory."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from support.generated_images import draw_image
from unikd_fast.data.arrow import load_arrow
from unikd_fast.data.files import Decoder
from unikd_fast.data.images import read_rgb
from unikd_fast.data.pack import pack_folder
from unikd_fast.data.sets.image_folder import load_image_folder
from unikd_fast.data.splits import DataSplits, ImageFiles, TensorImages
from unikd_fast.data.views import Windows

SIZE, SHORT = 24, 29
TRAIN, VAL = 29, 7
SIDES = ((40, 50), (37, 50), (50, 33), (26, 90), (70, 25), (24, 24), (61, 61))
LABELS = [0] * 2 + [1] + [2] * (TRAIN - 3)
"""Of train: a class of two samples and one of a single sample."""


def write_every_form(root: Path) -> dict[str, DataSplits]:
    """Write 29 images to train on and 7 to evaluate on, JPEGs of several sizes, and open them in every form.

    Those in memory are the central views of the others, SIZE pixels high and wide, as PIL makes them.
    """
    folder = write_folder(root / "folder")
    pack_folder(root / "folder", root / "arrow", images_per_file=12)
    in_memory = replace(folder, train=central_views(folder.train), val=central_views(folder.val))
    return {
        "folder": folder,
        "arrow": load_arrow(root / "arrow", SIZE),
        "memory": replace(in_memory, test=in_memory.val),
    }


def write_folder(root: Path) -> DataSplits:
    generator = np.random.default_rng(0)
    for part, labels in (("train", LABELS), ("val", [i % 3 for i in range(VAL)])):
        for i, label in enumerate(labels):
            path = root / part / f"class_{label}" / f"{i:02}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            draw_image(generator, *SIDES[i % len(SIDES)]).save(path, quality=92, progressive=i % 5 == 4)
    return load_image_folder(root, SIZE)


def central_views(split: object) -> TensorImages:
    assert isinstance(split, ImageFiles)
    decoder = Decoder(Windows(SIZE, SHORT))
    views = [np.asarray(decoder.central_view(read_rgb(stored))) for stored in split.images(range(len(split)))]
    return TensorImages(torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2).contiguous(), split.labels)
