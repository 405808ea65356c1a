"""Argument checks of the losses: each message names the function, the problem, both values and the remedy.

They look at shapes, types and devices only, without synchronising with a GPU, and leave nothing in a compiled graph.
Values are checked where that is free, on the CPU outside of compiled graphs: labels, and the indices and probabilities
of top-k logits.
"""

import importlib.util
import math
import os
from collections.abc import Sequence

import torch
from torch import Tensor

from unikd_fast.kernels.reference import DIVERGENCES, transform_of
from unikd_fast.values import QuantizedLogits, TopKLogits

_REDUCTIONS = ("batchmean", "mean", "sum", "none")
_FEATURE_REDUCTIONS = ("mean", "sum")
_IMPLS = ("auto", "reference", "fused")


def choose_impl(function: str, impl: str, *tensors: Tensor) -> str:
    """Return the implementation to run for `impl`, "fused" or "reference"; "fused" never falls back."""
    check_impl(function, impl)
    if impl == "reference":
        return impl
    device, transform = tensors[0].device, transform_of(*tensors)
    reason = ""
    if transform is not None:
        reason = f"supports autograd in reverse mode only, got tensors under {transform}; use impl='auto'"
    elif device.type not in ("cuda", "cpu"):
        reason = f"needs a GPU, got tensors on {device}; move them to one or use impl='auto'"
    elif any(x.dtype == torch.float64 for x in tensors):
        reason = "computes in fp32, got torch.float64; use impl='auto', or pass .float()"
    elif device.type == "cpu" and (impl == "auto" or os.environ.get("TRITON_INTERPRET") != "1"):
        reason = "needs a GPU, got tensors on cpu; move them to one or use impl='auto'"
    elif importlib.util.find_spec("triton") is None:
        reason = "needs the package triton, which is not installed; install it or use impl='auto'"
    if not reason:
        return "fused"
    if impl == "fused":
        raise RuntimeError(f"{function}: impl='fused' {reason}")
    return "reference"


def without_teacher_gradient(function: str, impl: str, teacher: Tensor | QuantizedLogits | TopKLogits) -> str:
    """Return the `impl` for a loss whose kernel treats the teacher's logits as a constant."""
    if impl == "reference" or not (isinstance(teacher, Tensor) and teacher.requires_grad and torch.is_grad_enabled()):
        return impl
    if impl == "fused":
        raise ValueError(
            f"{function}: impl='fused' treats the teacher's logits as a constant, got logits that require a gradient; "
            f"detach them, or use impl='reference'"
        )
    return "reference"


def check_impl(function: str, impl: str) -> None:
    _check_one_of(function, "impl", impl, _IMPLS)


def check_reduction(function: str, reduction: str) -> None:
    _check_one_of(function, "reduction", reduction, _REDUCTIONS)


def check_feature_reduction(function: str, feature_reduction: str) -> None:
    _check_one_of(function, "feature_reduction", feature_reduction, _FEATURE_REDUCTIONS)


def check_temperature(function: str, temperature: float | Tensor) -> None:
    if isinstance(temperature, Tensor):
        raise TypeError(f"{function}: temperature must be a number, got a tensor; pass temperature.item()")
    if not 0 < temperature < float("inf"):  # rejects NaN too and, unlike math.isfinite, accepts a symbolic float
        raise ValueError(
            f"{function}: temperature must be finite and above 0, got {temperature}; 4.0 is usual on CIFAR"
        )


def check_label_smoothing(function: str, label_smoothing: float) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{function}: label_smoothing must lie in [0, 1], got {label_smoothing}")


def check_divergence(function: str, divergence: str, beta: float) -> None:
    _check_one_of(function, "divergence", divergence, DIVERGENCES)
    if divergence == "jsd" and not 0 < beta < 1:
        raise ValueError(
            f"{function}: beta must lie in (0, 1) for divergence='jsd', got {beta}; its limits are "
            f"divergence='forward' and 'reverse'"
        )


def check_standardizable(function: str, logits: Tensor) -> None:
    if logits.shape[-1] < 2:
        raise ValueError(f"{function}: standardized=True needs at least 2 classes, got {logits.shape[-1]}; omit it")


def check_two_classes(function: str, logits: Tensor) -> None:
    if logits.shape[-1] < 2:
        raise ValueError(f"{function}: needs at least 2 classes, got {logits.shape[-1]}; there is nothing to decouple")


def check_weight(function: str, name: str, weight: float | Tensor, logits: Tensor) -> None:
    """Raise unless a weight is a number or a constant 0-d tensor on the logits' device."""
    if not isinstance(weight, Tensor):
        return
    if weight.ndim != 0:
        raise ValueError(f"{function}: {name} must be a number or a 0-d tensor, got shape {tuple(weight.shape)}")
    if weight.device != logits.device:
        raise ValueError(
            f"{function}: {name} must be on the logits' device, got {weight.device} and {logits.device}; "
            f"pass {name}.to(logits.device)"
        )
    if weight.requires_grad:
        raise ValueError(f"{function}: {name} is a constant, got a tensor that requires a gradient; detach it")


def check_normalizer(function: str, normalizer: float | Tensor | None, logits: Tensor) -> None:
    if normalizer is None:
        return
    check_weight(function, "normalizer", normalizer, logits)
    if not isinstance(normalizer, Tensor) and not 0 < normalizer < float("inf"):
        raise ValueError(
            f"{function}: normalizer must be finite and above 0, got {normalizer}; pass the number of rows"
        )


def check_teacher(function: str, student: Tensor, teacher: Tensor | QuantizedLogits | TopKLogits) -> None:
    """Raise if the teacher's logits, in whatever form they are stored, do not match the student's."""
    if isinstance(teacher, Tensor):
        _check_same(function, "student and teacher logits", "student logits", student, "teacher logits", teacher)
        return
    _check_floating(function, "student logits", student)
    if not isinstance(teacher, (QuantizedLogits, TopKLogits)):
        raise TypeError(
            f"{function}: the teacher must be logits, QuantizedLogits or TopKLogits, got {type(teacher).__name__}"
        )
    if isinstance(teacher, QuantizedLogits):
        if teacher.values.dtype not in (torch.uint8, torch.float16):
            raise TypeError(
                f"{function}: quantised values must be uint8 or float16, got {teacher.values.dtype}; "
                f"make them with quantize_logits"
            )
        if teacher.values.shape != student.shape:
            raise ValueError(
                f"{function}: student logits and the teacher's quantised values must have one shape, got "
                f"{tuple(student.shape)} and {tuple(teacher.values.shape)}"
            )
        per_row = {"scale": teacher.scale, "offset": teacher.offset}
    else:
        _check_topk(function, student, teacher)
        per_row = {"log_sum_exp": teacher.log_sum_exp}
    for name, x in per_row.items():
        _check_floating(function, f"the teacher's {name}", x)
        _check_rows(function, f"the teacher's {name}", x, student)
    for x in teacher:
        if x.device != student.device:
            raise ValueError(
                f"{function}: student and teacher must be on one device, got {student.device} and {x.device}; "
                f"move one of them"
            )


def check_maps(function: str, student: Tensor, teacher: Tensor) -> None:
    """Raise unless both are maps (N, C, ...) of one shape, with at least one position."""
    _check_floating(function, "student maps", student)
    _check_floating(function, "teacher maps", teacher)
    shapes = f"got {tuple(student.shape)} and {tuple(teacher.shape)}"
    if student.shape != teacher.shape:
        raise ValueError(f"{function}: student and teacher maps must have one shape, {shapes}; resize or project one")
    if student.ndim < 3 or 0 in student.shape[2:]:
        raise ValueError(f"{function}: maps must be (N, C, ...) with at least one position, {shapes}; use softmax_kl")
    if student.device != teacher.device:
        raise ValueError(
            f"{function}: student and teacher maps must be on one device, got {student.device} and {teacher.device}; "
            f"move one of them"
        )


def check_linear(function: str, role: str, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """Raise unless hidden states (..., D), weight (K, D) and bias (K,) make a linear layer."""
    named = {f"{role}_hidden": hidden, f"{role}_weight": weight, f"{role}_bias": bias}
    for name, x in named.items():
        if x is not None:
            _check_floating(function, name, x)
    if hidden.ndim == 0 or weight.ndim != 2 or hidden.shape[-1] != weight.shape[1] or weight.numel() == 0:
        raise ValueError(
            f"{function}: {role}_hidden must be (..., D) and {role}_weight (K, D) with at least one class, got "
            f"{tuple(hidden.shape)} and {tuple(weight.shape)}; pass the weight of a torch.nn.Linear"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(
            f"{function}: {role}_bias must have one entry per class, got {tuple(bias.shape)} for {role}_weight "
            f"{tuple(weight.shape)}"
        )
    for name, x in named.items():
        if x is not None and x.dtype != hidden.dtype:
            raise TypeError(
                f"{function}: {role}_hidden and {name} must have one dtype, got {hidden.dtype} and {x.dtype}; cast "
                f"one, or use torch.autocast"
            )
        if x is not None and x.device != hidden.device:
            raise ValueError(
                f"{function}: {role}_hidden and {name} must be on one device, got {hidden.device} and {x.device}; "
                f"move one of them"
            )


def check_constant(function: str, **tensors: Tensor | None) -> None:
    """Raise if one of the tensors, by argument, wants a gradient that it would not get."""
    for name, x in tensors.items():
        if x is not None and x.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{function}: {name} is a constant, got a tensor that requires a gradient; detach it")


def check_transforms(function: str, tensors: Sequence[Tensor], remedy: str) -> None:
    transform = transform_of(*tensors)
    if transform is not None:
        raise RuntimeError(
            f"{function}: can be differentiated in reverse mode by autograd, got a tensor under {transform}; use "
            f"{remedy}"
        )


def check_topk_settings(function: str, temperature: float, divergence: str, standardized: bool, impl: str) -> None:
    check_impl(function, impl)
    if impl == "fused":
        raise ValueError(f"{function}: impl='fused' has no kernel for TopKLogits; use impl='auto'")
    if temperature != 1 or divergence != "forward" or standardized:
        raise ValueError(
            f"{function}: TopKLogits hold the teacher at temperature 1, for the forward divergence of logits as they "
            f"are, got temperature {temperature}, divergence {divergence!r}, standardized {standardized}; store "
            f"QuantizedLogits instead"
        )


def check_anchor(function: str, anchor: tuple[Tensor, Tensor], teacher: Tensor | QuantizedLogits | TopKLogits) -> None:
    if isinstance(teacher, TopKLogits):
        raise TypeError(f"{function}: anchor needs all of the teacher's logits, got TopKLogits; store QuantizedLogits")
    if len(anchor) != 2:
        raise ValueError(f"{function}: anchor must be a pair (mean, log_var), got {len(anchor)} items")
    _check_same(function, "anchor mean and log_var", "anchor mean", anchor[0], "anchor log_var", anchor[1])
    logits = teacher.values if isinstance(teacher, QuantizedLogits) else teacher
    if anchor[0].shape != logits.shape:
        raise ValueError(
            f"{function}: anchor and teacher logits must have one shape, got {tuple(anchor[0].shape)} and "
            f"{tuple(logits.shape)}"
        )


def check_gaussians(function: str, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> None:
    """Raise unless both are pairs (mean, log_var) and all four tensors have one shape (..., K)."""
    for role, pair in (("student", student), ("teacher", teacher)):
        if len(pair) != 2:
            raise ValueError(f"{function}: {role} must be a pair (mean, log_var), got {len(pair)} items")
    mean_s, log_var_s = student
    mean_t, log_var_t = teacher
    _check_same(function, "student mean and log_var", "student mean", mean_s, "student log_var", log_var_s)
    _check_same(function, "teacher mean and log_var", "teacher mean", mean_t, "teacher log_var", log_var_t)
    _check_same(function, "student and teacher means", "student mean", mean_s, "teacher mean", mean_t)


def check_mask(function: str, mask: Tensor | None, logits: Tensor) -> None:
    if mask is None:
        return
    if mask.dtype != torch.bool:
        raise TypeError(f"{function}: ignore_mask must be bool, got {mask.dtype}; pass mask.bool(), True to ignore")
    _check_rows(function, "ignore_mask", mask, logits)


def check_labels(function: str, labels: Tensor, logits: Tensor, ignore_index: int, *, soft: bool = False) -> None:
    """Raise unless labels are class indices (...,) or, if `soft`, class weights (..., K)."""
    if soft and labels.is_floating_point() and labels.shape == logits.shape:
        if labels.device != logits.device:
            raise ValueError(
                f"{function}: labels must be on the logits' device, got {labels.device} and {logits.device}"
            )
        return
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        also = f", or as weights of the classes of shape {tuple(logits.shape)}" if soft else ""
        raise TypeError(
            f"{function}: labels must be integers, got {labels.dtype} of shape {tuple(labels.shape)}; pass class "
            f"indices as int64{also}"
        )
    _check_rows(function, "labels", labels, logits)
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or transform_of(labels) is not None:
        return
    classes, values = logits.shape[-1], labels.long()  # in their own type small integers would wrap around
    wrong = values[(values != ignore_index) & ((values < 0) | (values >= classes))]
    if wrong.numel() > 0:
        raise ValueError(
            f"{function}: labels must lie in [0, {classes}) or be ignore_index {ignore_index}, got {wrong[0].item()}; "
            f"check that the network has as many classes as the data set"
        )


def _check_one_of(function: str, argument: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{function}: {argument} must be one of {', '.join(allowed)}, got {value!r}")


def _check_floating(function: str, name: str, tensor: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{function}: {name} must be floating point, got {tensor.dtype}; pass {name}.float()")


def _check_same(function: str, both: str, name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    _check_floating(function, name_a, a)
    _check_floating(function, name_b, b)
    if a.shape != b.shape:
        raise ValueError(f"{function}: {both} must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.ndim == 0 or a.shape[-1] == 0:
        raise ValueError(f"{function}: {both} must be (..., K) with at least one class, got {tuple(a.shape)}")
    if a.device != b.device:
        raise ValueError(f"{function}: {both} must be on one device, got {a.device} and {b.device}; move one of them")


def _check_topk(function: str, student: Tensor, teacher: TopKLogits) -> None:
    values, indices, _ = teacher
    _check_floating(function, "the teacher's values", values)
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{function}: the teacher's indices must be int32 or int64, got {indices.dtype}")
    k, classes = values.shape[-1], student.shape[-1]
    if values.shape != indices.shape or values.shape[:-1] != student.shape[:-1] or not 0 < k <= classes:
        raise ValueError(
            f"{function}: the teacher's values and indices must both be (..., k), 0 < k <= {classes}, for student "
            f"logits {tuple(student.shape)}, got {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    if indices.device.type != "cpu" or torch.compiler.is_compiling() or indices.numel() == 0:
        return
    if transform_of(*teacher) is not None:
        return
    low, high = indices.min().item(), indices.max().item()
    if low < 0 or high >= classes:
        raise ValueError(
            f"{function}: the teacher's indices must lie in [0, {classes}), got {low if low < 0 else high}; check that "
            f"teacher and student have the same classes"
        )
    excess = (values.double().logsumexp(-1) - teacher.log_sum_exp.double()).max().item()
    if excess > 1e-2:
        raise ValueError(
            f"{function}: the teacher's stored probabilities must sum to at most 1, got {math.exp(excess):.4f}; "
            f"log_sum_exp must span all of the teacher's logits at temperature 1"
        )


def _check_rows(function: str, name: str, rows: Tensor, logits: Tensor) -> None:
    if rows.shape != logits.shape[:-1]:
        raise ValueError(
            f"{function}: {name} must have one entry per row of the logits, got {tuple(rows.shape)} for logits "
            f"{tuple(logits.shape)}"
        )
    if rows.device != logits.device:
        raise ValueError(f"{function}: {name} must be on the logits' device, got {rows.device} and {logits.device}")
