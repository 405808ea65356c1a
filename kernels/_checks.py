"""What the losses refuse: each message names the function, what was wrong, both values, and the remedy.

All but one of the checks look at shapes, types and devices alone: no synchronisation with a GPU, and nothing left of
them under torch.compile. `check_labels` reads the labels where that is free, on the CPU outside of a compiled graph.
"""

import torch
from torch import Tensor

_REDUCTIONS = ("batchmean", "mean", "sum", "none")
_FEATURE_REDUCTIONS = ("mean", "sum")
_IMPLS = ("auto", "reference", "fused")


def choose_impl(function: str, impl: str) -> str:
    """Give the implementation that runs for `impl`; "fused" never falls back."""
    _check_one_of(function, "impl", impl, _IMPLS)
    if impl == "fused":
        raise NotImplementedError(
            f"{function}: impl='fused' has no kernel in this version; use impl='auto' or impl='reference'"
        )
    return "reference"


def check_reduction(function: str, reduction: str) -> None:
    _check_one_of(function, "reduction", reduction, _REDUCTIONS)


def check_feature_reduction(function: str, feature_reduction: str) -> None:
    _check_one_of(function, "feature_reduction", feature_reduction, _FEATURE_REDUCTIONS)


def check_temperature(function: str, temperature: float | Tensor) -> None:
    if isinstance(temperature, Tensor):
        raise TypeError(f"{function}: temperature must be a number, got a tensor; pass temperature.item()")
    if not 0 < temperature < float("inf"):  # says no to NaN too, and unlike math.isfinite yes to a symbolic float
        raise ValueError(
            f"{function}: temperature must be finite and above 0, got {temperature}; 4.0 is usual on CIFAR"
        )


def check_label_smoothing(function: str, label_smoothing: float) -> None:
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{function}: label_smoothing must lie in [0, 1], got {label_smoothing}")


def check_logits(function: str, student: Tensor, teacher: Tensor) -> None:
    _check_same(function, "student and teacher logits", "student logits", student, "teacher logits", teacher)


def check_gaussians(function: str, student: tuple[Tensor, Tensor], teacher: tuple[Tensor, Tensor]) -> None:
    """Refuse what is not two pairs (mean, log_var) of four tensors of one shape (..., K)."""
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


def check_labels(function: str, labels: Tensor, logits: Tensor, ignore_index: int) -> None:
    if labels.dtype == torch.bool or labels.is_floating_point() or labels.is_complex():
        raise TypeError(f"{function}: labels must be integers, got {labels.dtype}; pass class indices as int64")
    _check_rows(function, "labels", labels, logits)
    if labels.device.type != "cpu" or torch.compiler.is_compiling():
        return
    classes = logits.shape[-1]
    wrong = labels[(labels != ignore_index) & ((labels < 0) | (labels >= classes))]
    if wrong.numel() > 0:
        raise ValueError(
            f"{function}: labels must lie in [0, {classes}) or be ignore_index {ignore_index}, got {wrong[0].item()}; "
            f"check that the network has as many classes as the data set"
        )


def _check_one_of(function: str, argument: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{function}: {argument} must be one of {', '.join(allowed)}, got {value!r}")


def _check_same(function: str, both: str, name_a: str, a: Tensor, name_b: str, b: Tensor) -> None:
    for name, tensor in ((name_a, a), (name_b, b)):
        if not tensor.is_floating_point():
            raise TypeError(f"{function}: {name} must be floating point, got {tensor.dtype}; pass {name}.float()")
    if a.shape != b.shape:
        raise ValueError(f"{function}: {both} must have one shape, got {tuple(a.shape)} and {tuple(b.shape)}")
    if a.ndim == 0 or a.shape[-1] == 0:
        raise ValueError(f"{function}: {both} must be (..., K) with at least one class, got {tuple(a.shape)}")
    if a.device != b.device:
        raise ValueError(f"{function}: {both} must be on one device, got {a.device} and {b.device}; move one of them")


def _check_rows(function: str, name: str, rows: Tensor, logits: Tensor) -> None:
    if rows.shape != logits.shape[:-1]:
        raise ValueError(
            f"{function}: {name} must have one entry per row of the logits, got {tuple(rows.shape)} for logits "
            f"{tuple(logits.shape)}"
        )
    if rows.device != logits.device:
        raise ValueError(f"{function}: {name} must be on the logits' device, got {rows.device} and {logits.device}")
