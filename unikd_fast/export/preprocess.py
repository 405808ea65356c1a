"""Preprocessing inside an ONNX file: from uint8 images of any size to the network's input, as the loader does it.

ONNX Runtime resizes uint8 images with Pillow's fixed-point arithmetic. Over images of noise of 380 sizes, both
interpolations, levels differed from those of Pillow 13 by at most 1 of 255, at 6 % of the places or fewer.
"""

from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from unikd_fast.data.files import Decoder
from unikd_fast.data.views import Windows
from unikd_fast.models import Preprocessing

if TYPE_CHECKING:
    import onnx

INNER = "normalised"
"""Name of the network's own input, which the graph of the preprocessing makes."""

_MODES = {"bilinear": "linear", "bicubic": "cubic"}
_RESIZE = (
    'mode = "{mode}", antialias = 1, coordinate_transformation_mode = "half_pixel", cubic_coeff_a = -0.5, '
    "exclude_outside = 1"
)
# Sizes are computed in whole numbers, as the loader's; Round is Python's, half to even. Pillow rounds between its
# passes, so their order shows: the height comes first where it shrinks by more than twice as much as the width.
_GRAPH = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
preprocessing (uint8[batch, height, width, 3] images) => (float[batch, 3, {size}, {size}] {inner})
<
  int64[1] short_side = {{{short_side}}}, int64[2] cut = {{{size}, {size}}}, int64[2] axes = {{2, 3}},
  int64[1] zero = {{0}}, int64[1] two = {{2}}, int64[1] four = {{4}}, int64[2] one_two = {{1, 2}},
  float half = {{0.5}}, bool[2] second = {{0, 1}},
  float[1, 3, 1, 1] mean = {{{mean}}}, float[1, 3, 1, 1] deviation = {{{std}}}
>
{{
  planes = Transpose<perm = [0, 3, 1, 2]>(images)
  whole = Shape(planes)
  count = Slice(whole, zero, two)
  sides = Slice(whole, two, four)
  shortest = ReduceMin<keepdims = 1>(sides)
  scaled = Mul(sides, short_side)
  new_sides = Div(scaled, {divisor})
  less = Sub(sides, new_sides)
  doubled = Mul(less, one_two)
  less_high, less_wide = Split<axis = 0, num_outputs = 2>(doubled)
  shrinks = Greater(less_high, zero)
  more = Greater(less_high, less_wide)
  high_first = And(shrinks, more)
  changed = Xor(high_first, second)
  between = Where(changed, new_sides, sides)
  whole_between = Concat<axis = 0>(count, between)
  half_resized = Resize<{resize}>(planes, , , whole_between)
  new_whole = Concat<axis = 0>(count, new_sides)
  resized = Resize<{resize}>(half_resized, , , new_whole)
  spare = Sub(new_sides, cut)
  spare_float = Cast<to = 1>(spare)
  middle = Mul(spare_float, half)
  rounded = Round(middle)
  first = Cast<to = 7>(rounded)
  last = Add(first, cut)
  centre = Slice(resized, first, last, axes)
  levels = Cast<to = 1>(centre)
  centred = Sub(levels, mean)
  {inner} = Div(centred, deviation)
}}
"""


def with_preprocessing(network: "onnx.ModelProto", wanted: Preprocessing) -> "onnx.ModelProto":
    """Return a network that takes uint8 images (N, H, W, 3) of any size, of one whose input is `INNER`."""
    import onnx

    text = _GRAPH.format(
        ir_version=network.ir_version,
        opset=next(each.version for each in network.opset_import if not each.domain),
        inner=INNER,
        size=wanted.image_size,
        short_side=wanted.short_side(wanted.image_size),
        resize=_RESIZE.format(mode=_MODES[wanted.interpolation]),
        divisor="sides" if wanted.squash else "shortest",
        mean=", ".join(repr(255.0 * value) for value in wanted.mean),
        std=", ".join(repr(255.0 * value) for value in wanted.std),
    )
    before = onnx.compose.add_prefix(onnx.parser.parse_model(text), "preprocessing/", rename_inputs=False)
    made = f"preprocessing/{INNER}"
    return onnx.compose.merge_models(before, network, io_map=[(made, INNER)])


def preprocess(images: np.ndarray, wanted: Preprocessing) -> Tensor:
    """Return what the loader makes of images (N, H, W, 3) of uint8 for an evaluation: (N, 3, size, size)."""
    windows = Windows(wanted.image_size, wanted.short_side(wanted.image_size), squash=wanted.squash)
    decoder = Decoder(windows, wanted.interpolation)
    levels = np.stack([np.asarray(decoder.central_view(Image.fromarray(image))) for image in images])
    mean, std = (torch.tensor(values)[:, None, None] for values in (wanted.mean, wanted.std))
    return (torch.from_numpy(levels).permute(0, 3, 1, 2) / 255 - mean) / std
