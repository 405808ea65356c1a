"""The graphs that DALI runs: encoded images in; the parts that are asked for, or finished views, out."""

from collections.abc import Callable
from typing import Any

import numpy as np
import nvidia.dali.fn as fn
import nvidia.dali.types as types
from numpy.typing import NDArray
from nvidia.dali import Pipeline

from unikd_fast.data.image_feed import ReadViews
from unikd_fast.values import Interpolation

_KERNELS = {"bilinear": types.INTERP_LINEAR, "bicubic": types.INTERP_CUBIC}

Source = Callable[[], list[ReadViews]]
"""Returns the images of the next batch, at least one, or raises StopIteration."""


def decoding_pipeline(source: Source, *, batch_size: int, threads: int, prefetch: int) -> Pipeline:
    """Return a pipeline on the CPU whose one output is the part of each image that is asked for, (H_i, W_i, 3) uint8.

    Args:
        source: of the batches.
        batch_size: images of the largest one.
        threads: of DALI.
        prefetch: batches under way at a time.

    Example:
        >>> (parts,) = decoding_pipeline(source, batch_size=64, threads=2, prefetch=2).run()
    """
    # The dynamic executor gives each output memory of its own, which lives as long as somebody holds it.
    pipeline = Pipeline(batch_size, threads, None, prefetch_queue_depth=prefetch, exec_dynamic=True, seed=0)
    with pipeline:
        inputs = fn.external_source(lambda: _inputs(source(), by_parts=True, views=0, padded=False), num_outputs=3)
        pipeline.set_outputs(_decoded(inputs, "cpu", by_parts=True))
    pipeline.build()
    return pipeline


def view_pipeline(
    source: Source,
    *,
    batch_size: int,
    views: int,
    image_size: int,
    interpolation: Interpolation = "bilinear",
    padded: bool,
    by_parts: bool,
    device_id: int | None,
    threads: int,
    prefetch: int,
) -> Pipeline:
    """Return a pipeline whose outputs are views, (N, image_size, image_size, 3) uint8, one output for each of `views`.

    Args:
        source: of the batches.
        batch_size: images of the largest one.
        views: of each image.
        image_size: height and width of the views in pixels.
        interpolation: of every resize.
        padded: whether views are shifted.
        by_parts: decode the parts that are asked for and not whole images.
        device_id: the GPU that decodes and resizes; None: the CPU does, which serves to check the graph.
        threads: of DALI on the CPU.
        prefetch: batches under way at a time.

    Example:
        >>> (shown,) = view_pipeline(source, batch_size=64, views=1, image_size=224, padded=False, by_parts=False,
        ...                          device_id=0, threads=4, prefetch=2).run()
    """
    pipeline = Pipeline(batch_size, threads, device_id, prefetch_queue_depth=prefetch, exec_dynamic=True, seed=0)
    square: dict[str, Any] = {"shape": [image_size, image_size], "axes": [0, 1]}
    with pipeline:
        of_image, of_view = 1 + 2 * by_parts, 5 + padded
        columns = of_image + of_view * views
        inputs = fn.external_source(lambda: _inputs(source(), by_parts, views, padded), num_outputs=columns)
        decoded = _decoded(inputs, "cpu" if device_id is None else "mixed", by_parts=by_parts)
        outputs = []
        for first in range(of_image, columns, of_view):
            start, shape, size, cut, flip, *shift = inputs[first : first + of_view]
            view = fn.slice(decoded, start=start, shape=shape, axes=[0, 1])
            view = fn.resize(view, size=size, interp_type=_KERNELS[interpolation], antialias=True)
            view = fn.slice(view, start=cut, **square)
            if padded:
                view = fn.slice(view, start=shift[0], out_of_bounds_policy="pad", **square)
            outputs.append(fn.flip(view, horizontal=flip))
        pipeline.set_outputs(*outputs)
    pipeline.build()
    return pipeline


def _decoded(inputs: Any, device: str, *, by_parts: bool) -> Any:
    if not by_parts:
        return fn.decoders.image(inputs[0], device=device, adjust_orientation=False)
    return fn.decoders.image_slice(
        inputs[0], device=device, start=inputs[1], shape=inputs[2], axes=[0, 1], adjust_orientation=False
    )


def _encoded(image: ReadViews) -> NDArray[np.uint8]:
    """Return bytes for DALI's decoder; of pixels those of a PNM file, which are the pixels behind a header."""
    if not image.is_decoded:
        return image.content
    height, width, _ = image.content.shape
    header = np.frombuffer(f"P6\n{width} {height}\n255\n".encode(), np.uint8)
    return np.concatenate([header, image.content.reshape(-1)])


def _inputs(images: list[ReadViews], by_parts: bool, views: int, padded: bool) -> tuple[Any, ...]:
    """Return the columns that the graphs take, each N long."""
    columns: list[Any] = [[_encoded(image) for image in images]]
    if by_parts:
        columns += [
            np.array([image.part[:2] for image in images], np.int32),
            np.array([image.part[2:] for image in images], np.int32),
        ]
    for view in range(views):
        windows = [image.windows[view] for image in images]
        starts = np.array([window.box[:2] for window in windows], np.int32)
        if not by_parts:
            starts += np.array([image.part[:2] for image in images], np.int32)
        columns += [
            starts,
            np.array([window.box[2:] for window in windows], np.int32),
            np.array([window.size for window in windows], np.float32),
            np.array([window.cut for window in windows], np.int32),
            np.array([window.flip for window in windows], np.int32),
        ]
        if padded:
            columns.append(np.array([window.shift for window in windows], np.int32))
    return tuple(columns)
