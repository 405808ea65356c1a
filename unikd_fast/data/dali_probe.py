"""Whether DALI works on this machine, and who is to decode: found by trying, once per process and device."""

import io
import logging
import os
import subprocess
import sys
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image

from unikd_fast.data.image_feed import ReadViews
from unikd_fast.data.view_windows import Box, ViewWindow
from unikd_fast.values import Interpolation

Decoding = Literal["cpu", "gpu", "gpu_parts"]
"""Who decodes: "cpu" and "gpu_parts" only the part of an image that is shown, "gpu" all of it.

nvImageCodec 0.9 was reported to crash where a GPU decodes parts (its issue 55), so that is tried in a process of its
own. Neither way on a GPU has run on one yet.
"""

_TIMEOUT_S = 120
_SIZE = 64
_MAX_MEAN_DIFFERENCE = 8.0  # in levels: chroma is smoothed differently, a broken decoder is farther off

_logger = logging.getLogger("unikd_fast")


@cache
def dali_problem() -> str | None:
    """Return why DALI cannot be used on this machine; None if it can.

    Example:
        >>> dali_problem()  # without it
        "No module named 'nvidia.dali'"
    """
    try:
        from unikd_fast.data.dali_pipeline import decoding_pipeline

        images = _samples()
        (parts,) = decoding_pipeline(iter([images]).__next__, batch_size=len(images), threads=1, prefetch=1).run()
        shapes, expected = parts.shape(), [(*image.part[2:], 3) for image in images]
    except Exception as error:  # an import or a library may fail in any way, and then others decode
        return f"{type(error).__name__}: {error}"
    return None if shapes == expected else f"it decodes {shapes} where {expected} is right"


@cache
def choose_decoding(device: torch.device) -> Decoding:
    """Return who decodes for a device on which `dali_problem` is None: on a GPU the first of its ways that works there.

    Example:
        >>> choose_decoding(torch.device("cpu"))
        'cpu'
    """
    if device.type != "cuda":
        return "cpu"
    ways: tuple[Decoding, ...] = ("gpu_parts", "gpu")
    for way in ways:
        problem = _try_in_a_process(way, gpu_number(device))
        if problem is None:
            return way
        _logger.warning("DALI: decoding by %r does not work on %s: %s", way, device, problem)
    return "cpu"


def gpu_number(device: torch.device) -> int:
    """Return which GPU a CUDA device is."""
    return torch.cuda.current_device() if device.index is None else device.index


def pixels_of(decoding: Decoding, interpolation: Interpolation = "bilinear") -> dict[str, str]:
    """Return what decides the pixels of views, as in `Loader.pixels`."""
    from nvidia.dali import __version__ as dali

    where = {"cpu": "cpu", "gpu": "gpu", "gpu_parts": "gpu, by parts"}[decoding]
    torch_version = ".".join(torch.__version__.split(".")[:2])
    resize = f"torch {torch_version}" if decoding == "cpu" else f"dali {dali} gpu"
    return {
        "decoder": f"dali {dali} {where}, nvimgcodec {_nvimgcodec_version()}",
        "resize": f"{resize}, {interpolation}, antialiased",
    }


def _nvimgcodec_version() -> str:
    for cuda in (13, 12):
        try:
            return version(f"nvidia-nvimgcodec-cu{cuda}")
        except PackageNotFoundError:
            continue
    return "unknown"


def _samples() -> list[ReadViews]:
    """Return JPEGs of several sizes and chroma subsamplings, and a window within each."""
    samples = []
    for i, (height, width) in enumerate(((120, 160), (333, 97), (48, 500), (64, 64))):
        rows, columns = np.mgrid[:height, :width]
        pixels = np.stack((rows * 255 // height, columns * 255 // width, (rows + columns) % 256), axis=-1)
        file = io.BytesIO()
        Image.fromarray(pixels.astype(np.uint8)).save(file, "JPEG", quality=90, subsampling=i % 3, progressive=i == 1)
        part = Box(height // 5, width // 7, height // 2, width // 3)
        window = ViewWindow(part.within(part), (_SIZE, _SIZE), (0, 0), (0, 0), i % 2 == 1)
        samples.append(ReadViews(np.frombuffer(file.getvalue(), np.uint8), part, (window,)))
    return samples


def _try_in_a_process(way: Decoding, device_id: int) -> str | None:
    """Return what goes wrong where a GPU decodes in this way; None if nothing does."""
    path = os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "unikd_fast.data.dali_probe", way, str(device_id)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, env={**os.environ, "PYTHONPATH": path}
        )
    except subprocess.TimeoutExpired:
        return f"a trial had not ended after {_TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    last = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
    return f"a trial ended with status {done.returncode}: {last[0]}"


def _try(way: Decoding, device_id: int | None) -> None:
    """Hold the views that a way of decoding gives against those of the CPU.

    Raises:
        RuntimeError: it fails, or they are far apart.
    """
    from unikd_fast.data.dali_pipeline import view_pipeline

    images = _samples()

    def views(by_parts: bool, where: int | None) -> np.ndarray:
        (shown,) = view_pipeline(
            iter([images]).__next__,
            batch_size=len(images),
            views=1,
            image_size=_SIZE,
            padded=False,
            by_parts=by_parts,
            device_id=where,
            threads=1,
            prefetch=1,
        ).run()
        return np.array(shown.as_cpu().as_array(), np.float64)

    difference = np.abs(views(way == "gpu_parts", device_id) - views(False, None)).mean(axis=(1, 2, 3))
    if difference.max() > _MAX_MEAN_DIFFERENCE:
        raise RuntimeError(f"views differ from those of the CPU by {difference.round(1).tolist()} levels on average")


if __name__ == "__main__":
    asked, number = sys.argv[1:]
    _try({way: way for way in get_args(Decoding)}[asked], int(number))
