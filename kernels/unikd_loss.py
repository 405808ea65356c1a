"""The whole objective of UniKD and all of its gradients in one launch (Eq. 7).

    L = w L_CE + α L_FL + β L_L

The first programs take rows of logits: cross-entropy and softmax KL read the student's row once. The others take rows
of Gaussians: L_FL and, on request, L_anchor. Each program keeps its own sums; the last one to finish adds them in a
fixed order and forms the total. Bytes moved: two logits read and a gradient written; four parameters read and two to
four gradients written. At 512 x 1000 that is negligible and only launches count: one forward, after a fill of 64 KB for
the sums, and one backward.
"""

from torch import Tensor

from unikd_fast.kernels._autograd import FusedLoss, Tensors
from unikd_fast.kernels._launch import (
    COUNTED_IN_KERNEL,
    LOG2E,
    MAX_PROGRAMS,
    care_for,
    elementwise_launch_for,
    flat,
    inner_rows,
    lane_of,
    logit_rows,
    normalizer_or_rows,
    partial_sums,
    programs_for,
    row_launch_for,
    rows_of,
)
from unikd_fast.kernels._unikd_device import unikd_kernel
from unikd_fast.kernels.reference import is_ignored

_INPUTS = (
    "student_logits",
    "teacher_logits",
    "scale",
    "labels",
    "student_mean",
    "student_log_var",
    "teacher_mean",
    "teacher_log_var",
    "anchor_mean",
    "anchor_log_var",
    "alpha",
    "beta",
    "normalizer",
)


def _launch(
    tensors: Tensors,  # as _INPUTS
    outputs: Tensors,
    gradients: Tensors,
    upstream: Tensors,
    *,
    alpha_value: float,
    beta_value: float,
    normalizer_value: float,  # 0: the number of rows
    ce_weight: float,
    temperature: float,
    scale_by_t2: bool,
    mean_over_features: bool,
    label_smoothing: float,
    ignore_index: int,
) -> None:
    student, teacher, scale, labels, *parameters, alpha, beta, normalizer = tensors
    assert student is not None
    assert teacher is not None
    assert labels is not None
    s, t = logit_rows(student, teacher)
    dense = [None if x is None else rows_of(x).contiguous() for x in parameters]
    of_dense = next((x for x in dense if x is not None), student)
    rows, classes, width = s.number, student.shape[-1], of_dense.shape[-1]
    gaussian_rows = 0 if dense[0] is None else dense[0].shape[0]
    # L_anchor has the rows of the logits, which need not be those of L_FL.
    other_rows = gaussian_rows if dense[4] is None else max(gaussian_rows, rows)
    soft = labels.is_floating_point()
    launch = row_launch_for(s, t, numbers=4 if soft or student.dtype != teacher.dtype else 2)
    gaussian = elementwise_launch_for(of_dense, launch.num_warps)
    logit_programs = programs_for(launch, rows, student.device) if rows else 0
    most = MAX_PROGRAMS if launch.pixels else 2 * MAX_PROGRAMS  # whose sums the last program adds
    other_programs = min(programs_for(gaussian, other_rows, student.device), most // 2) if other_rows else 0
    programs = logit_programs + other_programs
    row_normalizer = ce_normalizer = normalizer_or_rows(normalizer_value, normalizer, rows)
    count = not soft and normalizer is None and normalizer_value == 0
    if count and rows > COUNTED_IN_KERNEL:
        count, ce_normalizer = False, (~is_ignored(labels, ignore_index)).sum().clamp(min=1)
    unikd_kernel[(programs,)](
        s.tensor,
        t.tensor,
        flat(scale),
        rows_of(labels).contiguous() if soft else flat(labels),
        *dense,
        row_normalizer,
        ce_normalizer,
        normalizer_or_rows(normalizer_value, normalizer, gaussian_rows),
        alpha_value if alpha is None else alpha,
        beta_value if beta is None else beta,
        *upstream,
        *outputs,
        partial_sums(outputs[0], 8 * MAX_PROGRAMS),
        gradients[0],
        *gradients[4:10],
        rows,
        inner_rows(s, t) // max(launch.pixels, 1),
        s.outer_stride,
        t.outer_stride,
        logit_programs,
        gaussian_rows,
        ignore_index,
        1.0 / temperature,
        LOG2E / temperature,
        temperature**2 if scale_by_t2 else 1.0,
        ce_weight,
        label_smoothing,
        1.0 / width if mean_over_features else 1.0,
        s.row_stride,
        s.class_stride,
        t.row_stride,
        t.class_stride,
        s.holds(gradients[0]),
        classes,
        width,
        SOFT=soft,
        SMOOTH=label_smoothing > 0,
        COUNT_LABELS=count,
        NORMALIZER_IS_POINTER=normalizer is not None,
        CE_NORMALIZER_IS_POINTER=isinstance(ce_normalizer, Tensor),
        ALPHA_IS_POINTER=alpha is not None,
        BETA_IS_POINTER=beta is not None,
        SINGLE=launch.single,
        ROWS=launch.rows,
        BLOCK_K=launch.block_k,
        LANE=lane_of(student),
        CARE=care_for(classes, launch),
        PIXELS=launch.pixels,
        ROWS_G=gaussian.rows,
        BLOCK_G=gaussian.block_k,
        PROGRAMS=most,
        **launch.options,
    )


_loss = FusedLoss(
    "unikd_loss",
    inputs=_INPUTS,
    # Outputs: total, anchor; then ce, feature_kl and logit_kl, which carry no gradient.
    gradient_of=(0, -1, -1, -1, 0, 0, 0, 0, 1, 1, -1, -1, -1),
    settings={
        "alpha_value": "float",
        "beta_value": "float",
        "normalizer_value": "float",
        "ce_weight": "float",
        "temperature": "float",
        "scale_by_t2": "bool",
        "mean_over_features": "bool",
        "label_smoothing": "float",
        "ignore_index": "int",
    },
    outputs=5,
    differentiable=2,
    launch=_launch,
    logits=True,
)


def fused_unikd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    scale: Tensor | None,
    labels: Tensor,
    student: tuple[Tensor, Tensor] | None,
    teacher: tuple[Tensor, Tensor] | None,
    anchor: tuple[Tensor, Tensor] | None,
    *,
    alpha: float | Tensor,
    beta: float | Tensor,
    ce_weight: float,
    temperature: float,
    scale_by_t2: bool,
    feature_reduction: str,
    label_smoothing: float,
    ignore_index: int,
    normalizer: float | Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return total, ce, feature_kl, logit_kl and anchor; terms whose inputs are None are 0."""
    none = (None, None)
    total, anchored, ce, feature_kl, logit_kl = _loss(
        (
            student_logits,
            teacher_logits,
            scale,
            labels,
            *(student or none),
            *(teacher or none),
            *(anchor or none),
            *(x if isinstance(x, Tensor) else None for x in (alpha, beta, normalizer)),
        ),
        alpha_value=0.0 if isinstance(alpha, Tensor) else float(alpha),
        beta_value=0.0 if isinstance(beta, Tensor) else float(beta),
        normalizer_value=0.0 if isinstance(normalizer, Tensor) or normalizer is None else float(normalizer),
        ce_weight=float(ce_weight),
        temperature=float(temperature),
        scale_by_t2=scale_by_t2,
        mean_over_features=feature_reduction == "mean",
        label_smoothing=float(label_smoothing),
        ignore_index=ignore_index,
    )
    return total, ce, feature_kl, logit_kl, anchored


def bytes_moved(rows: int, classes: int, element_bytes: int) -> int:
    """Return the least there is to move: logits as `softmax_kl`, Gaussians as `gaussian_kl`."""
    return 9 * rows * classes * element_bytes
