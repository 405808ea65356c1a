"""The values that travel between the layers. They move down only and nobody changes them in place.

Named tuples rather than dataclasses: they are pytrees, so torch.compile, DistributedDataParallel, DeepSpeed and CUDA
graphs see the tensors inside without being told.
"""

from typing import NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch on one process."""

    images: Tensor  # (N, 3, H, W) float, normalised
    labels: Tensor  # (N,) int64; (N, K) float weights of the classes where training samples are mixed
    sample_ids: Tensor  # (N,) int64, position of the sample in its data set
    second: Tensor | None = None  # another view of the same samples, where the loader was built to show one


class Features(NamedTuple):
    """What a network says about a batch: the end of each stage, fine to coarse, and the logits."""

    levels: tuple[Tensor, ...]  # L x (N, C_l, H_l, W_l)
    logits: Tensor  # (N, K)


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
    """The student's side of a step: its logits and, for methods that compare features, the fused and pooled vector."""

    logits: Tensor  # (N, K)
    pooled: Tensor | None  # (N, D)


class Target(NamedTuple):
    """The teacher's side of a step, what the student is held to; a constant of the view unless the head learns."""

    logits: Tensor | QuantizedLogits | TopKLogits  # (N, K), or what a cache stores
    gaussian: Gaussian | None = None
