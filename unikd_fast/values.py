"""The values that travel between the layers. They move down only and nobody changes them in place.

Named tuples rather than dataclasses: they are pytrees, so torch.compile, DistributedDataParallel, DeepSpeed and CUDA
graphs see the tensors inside without being told.
"""

from typing import Any, Literal, NamedTuple

from torch import Tensor

Channels = tuple[float, float, float]
"""A number for each of red, green and blue."""

Interpolation = Literal["bilinear", "bicubic"]
"""How images are resized; antialiased."""


class Batch(NamedTuple):
    """One micro-batch on one process."""

    images: Tensor  # (N, 3, H, W) float, normalised
    labels: Tensor  # (N,) int64; (N, K) float weights of the classes where training samples are mixed
    sample_ids: Tensor  # (N,) int64, position of the sample in its data set
    second: Tensor | None = None  # another view of the same samples, where the loader was built to show one


class Features(NamedTuple):
    """What a network says about a batch: the logits, and of the rest what it was built to return."""

    levels: tuple[Tensor, ...]  # L x (N, C_l, H_l, W_l): the end of each stage, fine to coarse
    logits: Tensor  # (N, K)
    before_activation: tuple[Tensor, ...] = ()  # L x (N, C_l, H_l, W_l): the levels before their activation
    embedding: Tensor | None = None  # (N, D): the vector that the classifier, its last linear layer, sees


class Gaussian(NamedTuple):
    """A diagonal Gaussian over the class axis (section 3.2 of the UniKD paper), in log-variance form."""

    mean: Tensor  # (N, K)
    log_var: Tensor  # (N, K)


class QuantizedLogits(NamedTuple):
    """A teacher's logits in one or two bytes a class: z ≈ scale values + offset, row by row."""

    values: Tensor  # (..., K) uint8 or fp16
    scale: Tensor  # (...,) fp32
    offset: Tensor  # (...,) fp32


class TopKLogits(NamedTuple):
    """A teacher's k largest logits, and the log-sum-exp of all K of them at τ = 1."""

    values: Tensor  # (..., k)
    indices: Tensor  # (..., k) int32 or int64, distinct in a row
    log_sum_exp: Tensor  # (...,)


class StudentOutput(NamedTuple):
    """The student's side of a step."""

    logits: Tensor  # (N, K)
    adapted: Any = None  # what the method's adapter makes of the Features: any pytree of tensors
    second_logits: Tensor | None = None  # (N, K) of the second view, for methods that need one


class Target(NamedTuple):
    """The teacher's side of a step, what the student is held to; a constant of the view unless the head learns.

    The first two are what a cache stores. A method that fills another field therefore cannot be cached.
    """

    logits: Tensor | QuantizedLogits | TopKLogits  # (N, K), or what a cache stores; the teacher's own, unchanged
    gaussian: Gaussian | None = None
    second_logits: Tensor | None = None  # (N, K) of the second view
    extra: Any = None  # whatever else a method makes of the teacher's Features: any pytree of tensors


class Loss(NamedTuple):
    """What a method makes of a micro-batch: 0-d tensors on the device, fp32.

    The terms are those that the method's `term_names` states, unweighted, for the log; `total` carries the gradient of
    the student's side. A term carries one only where the method itself trains something by it (`train_head`).
    """

    total: Tensor
    terms: dict[str, Tensor]
