"""The whole objective of UniKD and all of its gradients in one launch (Eq. 7).

    L = w L_CE + α L_FL + β L_L

The first programs take rows of logits: cross-entropy and softmax KL share the reading of the student's row. The others
take rows of Gaussians: L_FL, and on request L_anchor of the teacher's head. Each program keeps sums of its own; the
last one to finish adds them up in a fixed order and forms the total. Bytes moved: two logits read and a gradient
written; four parameters read and two to four gradients written. At 512 x 1000 that is nothing: there only launches
count, one forward and one backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from unikd_fast.kernels._autograd import FusedLoss, Tensors
from unikd_fast.kernels._device import (
    block_sum,
    last_to_arrive,
    load_logits,
    online_max_sum,
    row_pointers,
    row_sum,
    scalar,
    store_tile,
    sum_of_partials,
    tile_pointers,
)
from unikd_fast.kernels._device import kl_terms as kl_terms_of
from unikd_fast.kernels._launch import (
    MAX_PROGRAMS,
    elementwise_launch_for,
    flat,
    new_gradient,
    on_device,
    programs_for,
    row_launch_for,
    rows_of,
    strides,
    ticket,
)
from unikd_fast.kernels.gaussian_kl import gaussian_rows, load_dense

# Up to so many labels each program counts the labelled rows itself, which is cheaper than another launch.
COUNTED_IN_KERNEL = 4096


@triton.jit
def _labelled_rows(labels_ptr, N, ignore_index):
    count = 0
    for start in range(0, N, 1024):
        at = start + tl.arange(0, 1024)
        label = tl.load(labels_ptr + at, mask=at < N, other=ignore_index)
        count += tl.sum((label != ignore_index).to(tl.int32), axis=0)
    return tl.maximum(count, 1).to(tl.float32)


@triton.jit
def _class_weights(
    labels_ptr, rows, target, cols, live, smoothing, SOFT: tl.constexpr, SMOOTH: tl.constexpr, K: tl.constexpr
):
    """What cross-entropy weighs each class with, (ROWS, BLOCK_K); 0 past the last class."""
    inside = (cols < K)[None, :]
    if SOFT:
        ptrs = tile_pointers(row_pointers(labels_ptr, rows, K), cols, 1)
        weights = tl.load(ptrs, mask=live[:, None] & inside, other=0.0).to(tl.float32)
    else:
        weights = tl.where(cols[None, :] == target, 1.0, 0.0)
    if SMOOTH:
        weights = tl.where(inside, (1 - smoothing) * weights + smoothing / K, 0.0)
    return weights


@triton.jit
def _anchor_rows(
    teacher_ptr, scale_ptr, mean_ptr, log_var_ptr, mean_grad_ptr, log_var_grad_ptr, rows, live, weight,
    TEACHER_ROW: tl.constexpr, TEACHER_COL: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean over k of 1/2 ((y - m)² e^-l + l), y the standardised logits (`reference.gaussian_anchor`), (ROWS, 1)."""
    scale = tl.full([ROWS, 1], 1.0, tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + rows, mask=live, other=1.0).to(tl.float32)[:, None]
    teacher_rows = row_pointers(teacher_ptr, rows, TEACHER_ROW)
    total = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x = load_logits(teacher_rows, cols, live, TEACHER_COL, K)
        total += row_sum(tl.where((cols < K)[None, :], x, 0.0))
    centre = total / K
    total = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        x = load_logits(teacher_rows, cols, live, TEACHER_COL, K) - centre
        total += row_sum(tl.where((cols < K)[None, :], x * x, 0.0))
    factor = scale / tl.sqrt(scale * scale * total / K + 1e-5)
    total = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        inside = live[:, None] & (cols < K)[None, :]
        x = load_logits(teacher_rows, cols, live, TEACHER_COL, K)
        log_var = load_dense(log_var_ptr, rows, cols, inside, K)
        distance = (x - centre) * factor - load_dense(mean_ptr, rows, cols, inside, K)
        scaled = distance * tl.exp(-log_var)
        total += row_sum(tl.where(inside, 0.5 * (distance * scaled + log_var), 0.0))
        if mean_grad_ptr is not None:
            store_tile(row_pointers(mean_grad_ptr, rows, K), cols, live, -scaled * (weight / K), K)
        if log_var_grad_ptr is not None:
            g = 0.5 * (1.0 - distance * scaled) * (weight / K)
            store_tile(row_pointers(log_var_grad_ptr, rows, K), cols, live, g, K)
    return total / K


@triton.jit(do_not_specialize=["N", "LOGIT_PROGRAMS", "GAUSSIAN_ROWS"])
def _unikd_kernel(
    student_ptr,  # (N, K)
    teacher_ptr,  # (N, K), or None: no L_L
    scale_ptr,  # (N,), or None
    labels_ptr,  # (N,) integer, or (N, K) dense if SOFT
    student_mean_ptr,  # (GAUSSIAN_ROWS, KG) dense, or None: no L_FL
    student_log_var_ptr,
    teacher_mean_ptr,
    teacher_log_var_ptr,
    anchor_mean_ptr,  # (N, K) dense, or None: no L_anchor
    anchor_log_var_ptr,
    normalizer,  # of logit rows: number, or 0-d
    ce_normalizer,
    gaussian_normalizer,
    alpha,
    beta,
    upstream_ptr,  # of the total: 0-d, or None
    anchor_upstream_ptr,
    total_ptr,  # 0-d, as the other terms; None to leave them out
    anchor_ptr,
    ce_ptr,
    feature_kl_ptr,
    logit_kl_ptr,
    partial_ptr,  # (4, PROGRAMS)
    ticket_ptr,
    student_grad_ptr,  # dense gradients, or None
    student_mean_grad_ptr,
    student_log_var_grad_ptr,
    teacher_mean_grad_ptr,
    teacher_log_var_grad_ptr,
    anchor_mean_grad_ptr,
    anchor_log_var_grad_ptr,
    N,
    LOGIT_PROGRAMS,
    GAUSSIAN_ROWS,
    ignore_index,
    inverse_temperature,
    t2,  # τ², or 1
    ce_weight,
    smoothing,
    feature_weight,  # 1 / KG, or 1
    STUDENT_ROW: tl.constexpr,
    STUDENT_COL: tl.constexpr,
    TEACHER_ROW: tl.constexpr,
    TEACHER_COL: tl.constexpr,
    K: tl.constexpr,
    KG: tl.constexpr,
    SOFT: tl.constexpr,
    SMOOTH: tl.constexpr,
    COUNT_LABELS: tl.constexpr,
    NORMALIZER_IS_POINTER: tl.constexpr,
    CE_NORMALIZER_IS_POINTER: tl.constexpr,
    ALPHA_IS_POINTER: tl.constexpr,
    BETA_IS_POINTER: tl.constexpr,
    SINGLE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS_G: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    a = scalar(alpha, ALPHA_IS_POINTER)
    b = scalar(beta, BETA_IS_POINTER)
    rows_norm = scalar(normalizer, NORMALIZER_IS_POINTER)
    gaussian_norm = scalar(gaussian_normalizer, NORMALIZER_IS_POINTER)
    if COUNT_LABELS:
        ce_norm = _labelled_rows(labels_ptr, N, ignore_index)
    else:
        ce_norm = scalar(ce_normalizer, CE_NORMALIZER_IS_POINTER)
    up = 1.0
    if upstream_ptr is not None:
        up = tl.load(upstream_ptr).to(tl.float32)
    ce_sum = 0.0
    kl_sum = 0.0
    feature_sum = 0.0
    anchor_sum = 0.0
    if pid < LOGIT_PROGRAMS:
        for tile in range(pid, tl.cdiv(N, ROWS), LOGIT_PROGRAMS):
            rows = tile * ROWS + tl.arange(0, ROWS)
            live = rows < N
            student_rows = row_pointers(student_ptr, rows, STUDENT_ROW)
            if SOFT:
                target = tl.zeros([ROWS, 1], tl.int64)
                labelled = live
                wrong = rows < 0
            else:
                label = tl.load(labels_ptr + rows, mask=live, other=ignore_index).to(tl.int64)
                labelled = live & (label != ignore_index)
                wrong = labelled & ((label < 0) | (label >= K))
                target = label[:, None]
            f_s = tl.full([ROWS, 1], 1.0, tl.float32) * inverse_temperature
            one = tl.full([ROWS, 1], 1.0, tl.float32)
            f_t = f_s
            teacher_rows = student_rows  # replaced where there is a teacher
            if teacher_ptr is not None:
                teacher_rows = row_pointers(teacher_ptr, rows, TEACHER_ROW)
                if scale_ptr is not None:
                    f_t = f_s * tl.load(scale_ptr + rows, mask=live, other=1.0).to(tl.float32)[:, None]
            weight_sum = one
            sum_s = one
            sum_t = one
            max_t = one
            if SINGLE:
                cols0 = tl.arange(0, BLOCK_K)
                s0 = load_logits(student_rows, cols0, live, STUDENT_COL, K)
                max_s = tl.max(s0, axis=1)[:, None]
                sum_1 = row_sum(tl.exp(s0 - max_s))
                if teacher_ptr is not None:
                    t0 = load_logits(teacher_rows, cols0, live, TEACHER_COL, K)
                    max_t = tl.max(t0, axis=1)[:, None]
                    sum_s = row_sum(tl.exp((s0 - max_s) * f_s))
                    sum_t = row_sum(tl.exp((t0 - max_t) * f_t))
                if SOFT:
                    w0 = _class_weights(labels_ptr, rows, target, cols0, live, smoothing, SOFT, SMOOTH, K)
                    weight_sum = row_sum(w0)
            else:
                max_s = tl.full([ROWS, 1], -float("inf"), tl.float32)
                sum_1 = tl.zeros([ROWS, 1], tl.float32)
                max_t = max_s
                max_2 = max_s
                sum_s = sum_1
                sum_t = sum_1
                if SOFT:
                    weight_sum = sum_1
                for i in range(BLOCKS):
                    cols = i * BLOCK_K + tl.arange(0, BLOCK_K)
                    s = load_logits(student_rows, cols, live, STUDENT_COL, K)
                    max_s, sum_1 = online_max_sum(max_s, sum_1, s, one)
                    if teacher_ptr is not None:
                        t = load_logits(teacher_rows, cols, live, TEACHER_COL, K)
                        max_2, sum_s = online_max_sum(max_2, sum_s, s, f_s)
                        max_t, sum_t = online_max_sum(max_t, sum_t, t, f_t)
                    if SOFT:
                        w = _class_weights(labels_ptr, rows, target, cols, live, smoothing, SOFT, SMOOTH, K)
                        weight_sum += row_sum(w)
            log_sum_1 = tl.log(sum_1)
            log_ratio = tl.log(sum_s) - tl.log(sum_t)
            nan = tl.where(wrong[:, None], float("nan"), 1.0)
            ce_scale = tl.where(labelled[:, None], nan * (up * ce_weight / ce_norm), 0.0)
            kl_scale = f_s * (up * b * t2 / rows_norm)
            ce_rows = tl.zeros([ROWS, 1], tl.float32)
            kl_rows = tl.zeros([ROWS, 1], tl.float32)
            for i in range(BLOCKS):
                cols = (BLOCKS - 1 - i) * BLOCK_K + tl.arange(0, BLOCK_K)
                if SINGLE:
                    d = s0 - max_s
                else:
                    d = load_logits(student_rows, cols, live, STUDENT_COL, K) - max_s
                w = _class_weights(labels_ptr, rows, target, cols, live, smoothing, SOFT, SMOOTH, K)
                ce_rows += row_sum(tl.where(w != 0, w * (log_sum_1 - d), 0.0))
                g = (tl.exp(d) / sum_1 * weight_sum - w) * ce_scale
                # A row without a label may hold what it likes in the cross-entropy.
                g = tl.where(labelled[:, None], g, 0.0)
                if teacher_ptr is not None:
                    if SINGLE:
                        d_t = (t0 - max_t) * f_t
                    else:
                        d_t = (load_logits(teacher_rows, cols, live, TEACHER_COL, K) - max_t) * f_t
                    d_s = d * f_s
                    q = tl.exp(d_s) / sum_s
                    p = tl.exp(d_t) / sum_t
                    kl_rows += row_sum(kl_terms_of(p, q, (d_s - d_t) - log_ratio))
                    g += (q - p) * kl_scale
                if student_grad_ptr is not None:
                    store_tile(row_pointers(student_grad_ptr, rows, K), cols, live, g, K)
            ce_sum += block_sum(tl.where(labelled[:, None], ce_rows * nan, 0.0))
            kl_sum += block_sum(tl.where(live[:, None], kl_rows, 0.0))
    else:
        for tile in range(pid - LOGIT_PROGRAMS, tl.cdiv(GAUSSIAN_ROWS, ROWS_G), tl.num_programs(0) - LOGIT_PROGRAMS):
            rows = tile * ROWS_G + tl.arange(0, ROWS_G)
            live = rows < GAUSSIAN_ROWS
            if student_mean_ptr is not None:
                weight = tl.full([ROWS_G, 1], 1.0, tl.float32) * (up * a * feature_weight / gaussian_norm)
                sums = gaussian_rows(
                    student_mean_ptr, student_log_var_ptr, teacher_mean_ptr, teacher_log_var_ptr,
                    student_mean_grad_ptr, student_log_var_grad_ptr,
                    teacher_mean_grad_ptr, teacher_log_var_grad_ptr,
                    rows, live, weight, KG, ROWS_G, BLOCK_G,
                )  # fmt: skip
                feature_sum += block_sum(sums) * feature_weight
            if anchor_mean_ptr is not None:
                anchor_up = 1.0
                if anchor_upstream_ptr is not None:
                    anchor_up = tl.load(anchor_upstream_ptr).to(tl.float32)
                sums = _anchor_rows(
                    teacher_ptr, scale_ptr, anchor_mean_ptr, anchor_log_var_ptr,
                    anchor_mean_grad_ptr, anchor_log_var_grad_ptr, rows, live, anchor_up / gaussian_norm,
                    TEACHER_ROW, TEACHER_COL, K, ROWS_G, BLOCK_G,
                )  # fmt: skip
                anchor_sum += block_sum(sums)
    if total_ptr is not None:
        tl.store(partial_ptr + pid, ce_sum)
        tl.store(partial_ptr + PROGRAMS + pid, kl_sum)
        tl.store(partial_ptr + 2 * PROGRAMS + pid, feature_sum)
        tl.store(partial_ptr + 3 * PROGRAMS + pid, anchor_sum)
        if last_to_arrive(ticket_ptr):
            ce = sum_of_partials(partial_ptr, PROGRAMS) / ce_norm
            logit_kl = sum_of_partials(partial_ptr + PROGRAMS, PROGRAMS) * (t2 / rows_norm)
            feature_kl = sum_of_partials(partial_ptr + 2 * PROGRAMS, PROGRAMS) / gaussian_norm
            tl.store(ce_ptr, ce)
            tl.store(logit_kl_ptr, logit_kl)
            tl.store(feature_kl_ptr, feature_kl)
            tl.store(anchor_ptr, sum_of_partials(partial_ptr + 3 * PROGRAMS, PROGRAMS) / gaussian_norm)
            tl.store(total_ptr, ce_weight * ce + a * feature_kl + b * logit_kl)


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
    wanted: Sequence[bool],
    upstream: Tensors | None,
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
) -> tuple[list[Tensor | None], list[Tensor | None]]:
    student, teacher, scale, labels, *parameters, alpha, beta, normalizer = tensors
    assert student is not None
    assert labels is not None
    device, classes = student.device, student.shape[-1]
    gradients = [new_gradient(x, w) for x, w in zip(tensors, wanted, strict=True)]
    outputs: list[Tensor | None] = []
    if upstream is None:
        outputs = [torch.empty((), dtype=torch.float32, device=device) for _ in range(5)]
    rows = student.numel() // classes
    of_gaussians = next((x for x in parameters if x is not None), None)
    gaussian_rows = 0 if of_gaussians is None else of_gaussians.numel() // of_gaussians.shape[-1]
    if rows == 0 and gaussian_rows == 0:
        return [x.zero_() for x in outputs if x is not None], gradients
    s = rows_of(student)
    t = s if teacher is None else rows_of(teacher)
    soft = labels.is_floating_point()
    launch = row_launch_for(s, t, heavy=True)
    dense = [None if x is None else rows_of(x).contiguous() for x in parameters]
    of_dense = s if of_gaussians is None else rows_of(of_gaussians)
    gaussian = elementwise_launch_for(of_dense)
    logit_programs = programs_for(launch, rows, device) if rows else 0
    programs = logit_programs + (programs_for(gaussian, gaussian_rows, device) if gaussian_rows else 0)
    given = normalizer is not None or normalizer_value > 0
    ce_normalizer: Any = normalizer if normalizer is not None else normalizer_value or float(max(rows, 1))
    count = not soft and not given
    with on_device(student):
        if count and rows > COUNTED_IN_KERNEL:
            count, ce_normalizer = False, (labels != ignore_index).sum().clamp(min=1)
        partial = torch.empty((4, 2 * MAX_PROGRAMS), dtype=torch.float32, device=device) if outputs else None
        _unikd_kernel[(programs,)](
            s,
            None if teacher is None else t,
            flat(scale),
            rows_of(labels).contiguous() if soft else flat(labels),
            *dense,
            normalizer if normalizer is not None else normalizer_value or float(max(rows, 1)),
            ce_normalizer,
            normalizer if normalizer is not None else normalizer_value or float(max(gaussian_rows, 1)),
            alpha_value if alpha is None else alpha,
            beta_value if beta is None else beta,
            *(None if upstream is None else flat(x) for x in (upstream or (None, None))),
            *(outputs or [None] * 5),
            partial,
            None if partial is None else ticket(device),
            gradients[0],
            *gradients[4:10],
            rows,
            logit_programs,
            gaussian_rows,
            ignore_index,
            1.0 / temperature,
            temperature**2 if scale_by_t2 else 1.0,
            ce_weight,
            label_smoothing,
            1.0 / of_dense.shape[-1] if mean_over_features else 1.0,
            *strides(s),
            *strides(t),
            classes,
            of_dense.shape[-1],
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
            ROWS_G=gaussian.rows,
            BLOCK_G=gaussian.block_k,
            PROGRAMS=2 * MAX_PROGRAMS,
            **launch.options,
        )
    return outputs, gradients


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
    output_shapes=lambda student, **_: [()] * 5,
)


def fused_unikd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor | None,
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
    """Give total, ce, feature_kl, logit_kl and anchor; terms whose inputs are None are 0."""
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
    """Give the least there is to move: logits as `softmax_kl`, Gaussians as `gaussian_kl`."""
    return 9 * rows * classes * element_bytes
