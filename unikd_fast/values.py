"""The values passed between layers. They are passed downwards only, and nobody changes them in place.

Named tuples rather than dataclasses, because they are pytrees: torch.compile, DistributedDataParallel, DeepSpeed and
CUDA graphs see the tensors inside without registration.
"""

from typing import Any, Literal, NamedTuple

from torch import Tensor

Channels = tuple[float, float, float]
"""One number each for red, green and blue."""

Interpolation = Literal["bilinear", "bicubic"]
"""Interpolation used to resize images, with antialiasing."""

NO_LABEL = -100
"""Label of a sample without one: the cross-entropy leaves it out."""


class Batch(NamedTuple):
    """One micro-batch on one process."""

    images: Tensor  # (N, 3, H, W) float, normalised
    labels: Tensor  # (N,) int64, perhaps NO_LABEL; (N, K) float class weights if training samples are mixed
    sample_ids: Tensor  # (N,) int64, position of each sample in its data set
    second: Tensor | None = None  # another view of the same samples, if the loader makes one


class DetectionBatch(NamedTuple):
    """One micro-batch of images with boxes on one process."""

    images: Tensor  # (N, 3, H, W) float, normalised; 0 beyond each image's size
    sizes: Tensor  # (N, 2) int64, height and width of each image in it
    boxes: tuple[Tensor, ...]  # N x (n, 4) fp32, x1, y1, x2, y2 in pixels of the image as it is here
    labels: tuple[Tensor, ...]  # N x (n,) int64, classes from 0
    sample_ids: Tensor  # (N,) int64, position of each sample in its data set
    seeds: Tensor  # (N,) int64, of the random choices that a step makes in each image


class RegionBatch(NamedTuple):
    """A micro-batch of regions, as a `Batch` of samples, of the images that they lie in."""

    images: Tensor  # (N, 3, H, W)
    labels: Tensor  # (R,) int64, 0 for background
    sample_ids: Tensor  # (R,) int64, of each region's image
    second: None = None
    near_objects: tuple[Tensor, ...] | None = None  # L x (N, 1, H_l, W_l) bool, places of the maps, if a method asks


class Features(NamedTuple):
    """A network's outputs for a batch: the logits, and the features it was built to return."""

    levels: tuple[Tensor, ...]  # L x (N, C_l, H_l, W_l): the end of each stage, from fine to coarse
    logits: Tensor  # (N, K)
    before_activation: tuple[Tensor, ...] = ()  # L x (N, C_l, H_l, W_l): the levels before their activation
    embedding: Tensor | None = None  # (N, D): the input of the classifier, its last linear layer


class Gaussian(NamedTuple):
    """A diagonal Gaussian over the class axis (section 3.2 of the UniKD paper), in log-variance form."""

    mean: Tensor  # (N, K)
    log_var: Tensor  # (N, K)


class QuantizedLogits(NamedTuple):
    """A teacher's logits in one or two bytes per class: z ≈ scale values + offset, row by row."""

    values: Tensor  # (..., K) uint8 or fp16
    scale: Tensor  # (...,) fp32
    offset: Tensor  # (...,) fp32


class TopKLogits(NamedTuple):
    """A teacher's k largest logits, and the log-sum-exp of all K of them at τ = 1."""

    values: Tensor  # (..., k)
    indices: Tensor  # (..., k) int32 or int64, distinct in a row
    log_sum_exp: Tensor  # (...,)


class StudentOutput(NamedTuple):
    """The student's outputs in a step."""

    logits: Tensor  # (N, K)
    adapted: Any = None  # output of the method's adapter for the Features: any pytree of tensors
    second_logits: Tensor | None = None  # (N, K) for the second view, for methods that need one
    second_adapted: Any = None  # what an adapter with a method ``second`` makes of the second view's Features


class Target(NamedTuple):
    """The teacher's outputs in a step, which the student is trained towards; constant per view unless the head learns.

    The first two are what a cache stores, so a method that fills another field cannot be cached.
    """

    logits: Tensor | QuantizedLogits | TopKLogits  # (N, K), or what a cache stores; the teacher's own, unchanged
    gaussian: Gaussian | None = None
    second_logits: Tensor | None = None  # (N, K) for the second view
    extra: Any = None  # whatever else a method computes from the teacher's Features: any pytree of tensors


class Loss(NamedTuple):
    """A method's loss on a micro-batch: 0-d tensors on the device, in fp32.

    The terms are those named in the method's `term_names`, unweighted, for the log; `total` carries the gradient of the
    student. A term carries one only if the method's head is trained by it.
    """

    total: Tensor
    terms: dict[str, Tensor]
