"""Device code of `unikd_loss`: rows of logits, rows of Gaussians, and the sum of all."""

import triton
import triton.language as tl

from unikd_fast.kernels._device import (
    block_sum,
    difference,
    exp,
    kl_terms,
    last_to_arrive,
    load_logits,
    log_ratio_of,
    log_sum,
    mean_std,
    online_max_sum,
    probabilities,
    row_pointers,
    row_sum,
    scalar,
    store_tile,
    sum_of_partials,
    tile_pointers,
)
from unikd_fast.kernels.gaussian_kl import gaussian_rows, load_dense


@triton.jit
def _labelled_rows(labels_ptr, N, ignore_index):
    count = 0
    for start in range(0, N, 1024):
        at = start + tl.arange(0, 1024)
        # Pad with 0: -100 would wrap around in small integer types.
        label = tl.load(labels_ptr + at, mask=at < N, other=0).to(tl.int64)
        count += tl.sum(((at < N) & (label != ignore_index)).to(tl.int32), axis=0)
    return tl.maximum(count, 1).to(tl.float32)


@triton.jit
def _class_weights(
    labels_ptr, rows, target, cols, live, smoothing, SOFT: tl.constexpr, SMOOTH: tl.constexpr, K: tl.constexpr
):
    """The class weights of the cross-entropy, (ROWS, BLOCK_K); 0 past the last class."""
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
    centre, std = mean_std(teacher_rows, live, scale, K, TEACHER_COL, K, BLOCK_K, ROWS)
    # From 1e10 on the square would leave the range.
    factor = tl.div_rn(scale, tl.where(std < 1e10, tl.sqrt_rn(std * std + 1e-5), std))
    total = tl.zeros([ROWS, 1], tl.float32)
    for start in range(0, K, BLOCK_K):
        cols = start + tl.arange(0, BLOCK_K)
        inside = live[:, None] & (cols < K)[None, :]
        x = load_logits(teacher_rows, cols, live, TEACHER_COL, K)
        log_var = load_dense(log_var_ptr, rows, cols, inside, K)
        distance = (x - centre) * factor - load_dense(mean_ptr, rows, cols, inside, K)
        scaled = distance * exp(-log_var)
        total += row_sum(tl.where(inside, 0.5 * (distance * scaled + log_var), 0.0))
        if mean_grad_ptr is not None:
            store_tile(row_pointers(mean_grad_ptr, rows, K), cols, live, -scaled * (weight / K), K)
        if log_var_grad_ptr is not None:
            g = 0.5 * (1.0 - distance * scaled) * (weight / K)
            store_tile(row_pointers(log_var_grad_ptr, rows, K), cols, live, g, K)
    return total / K


@triton.jit(do_not_specialize=["N", "LOGIT_PROGRAMS", "GAUSSIAN_ROWS"])
def unikd_kernel(
    student_ptr,  # (N, K)
    teacher_ptr,  # (N, K)
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
    partial_ptr,  # (4 PROGRAMS + 1,)
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
                label = tl.load(labels_ptr + rows, mask=live, other=0).to(tl.int64)
                labelled = live & (label != ignore_index)
                wrong = labelled & ((label < 0) | (label >= K))
                target = label[:, None]
            f_s = tl.full([ROWS, 1], 1.0, tl.float32) * inverse_temperature
            one = tl.full([ROWS, 1], 1.0, tl.float32)
            f_t = f_s
            teacher_rows = row_pointers(teacher_ptr, rows, TEACHER_ROW)
            if scale_ptr is not None:
                f_t = f_s * tl.load(scale_ptr + rows, mask=live, other=1.0).to(tl.float32)[:, None]
            weight_sum = one
            if SINGLE:
                cols0 = tl.arange(0, BLOCK_K)
                s0 = load_logits(student_rows, cols0, live, STUDENT_COL, K)
                max_s = tl.max(s0, axis=1)[:, None]
                n_s = row_sum((s0 == max_s).to(tl.float32))
                rest_1 = row_sum(tl.where(s0 == max_s, 0.0, tl.exp(s0 - max_s)))
                t0 = load_logits(teacher_rows, cols0, live, TEACHER_COL, K)
                max_t = tl.max(t0, axis=1)[:, None]
                rest_s = row_sum(tl.where(s0 == max_s, 0.0, tl.exp((s0 - max_s) * f_s)))
                n_t = row_sum((t0 == max_t).to(tl.float32))
                rest_t = row_sum(tl.where(t0 == max_t, 0.0, tl.exp((t0 - max_t) * f_t)))
                if SOFT:
                    w0 = _class_weights(labels_ptr, rows, target, cols0, live, smoothing, SOFT, SMOOTH, K)
                    weight_sum = row_sum(w0)
            else:
                max_s = tl.full([ROWS, 1], -float("inf"), tl.float32)
                n_s = tl.zeros([ROWS, 1], tl.float32)
                rest_1 = n_s
                max_t = max_s
                max_2 = max_s
                n_2 = n_s
                rest_s = n_s
                n_t = n_s
                rest_t = n_s
                if SOFT:
                    weight_sum = n_s
                for i in range(BLOCKS):
                    cols = i * BLOCK_K + tl.arange(0, BLOCK_K)
                    s = load_logits(student_rows, cols, live, STUDENT_COL, K)
                    max_s, n_s, rest_1 = online_max_sum(max_s, n_s, rest_1, s, one)
                    t = load_logits(teacher_rows, cols, live, TEACHER_COL, K)
                    max_2, n_2, rest_s = online_max_sum(max_2, n_2, rest_s, s, f_s)
                    max_t, n_t, rest_t = online_max_sum(max_t, n_t, rest_t, t, f_t)
                    if SOFT:
                        w = _class_weights(labels_ptr, rows, target, cols, live, smoothing, SOFT, SMOOTH, K)
                        weight_sum += row_sum(w)
            sum_1 = n_s + rest_1
            sum_s = n_s + rest_s
            sum_t = n_t + rest_t
            log_sum_1 = log_sum(n_s, rest_1)
            log_ratio = log_ratio_of(n_s, rest_s, n_t, rest_t)
            nan = tl.where(wrong[:, None], float("nan"), 1.0)
            ce_scale = tl.where(labelled[:, None], nan * (up * ce_weight / ce_norm), 0.0)
            kl_scale = f_s * (up * b * t2 / rows_norm)
            ce_rows = tl.zeros([ROWS, 1], tl.float32)
            kl_rows = tl.zeros([ROWS, 1], tl.float32)
            for i in range(BLOCKS):
                cols = (BLOCKS - 1 - i) * BLOCK_K + tl.arange(0, BLOCK_K)
                if SINGLE:
                    s = s0
                else:
                    s = load_logits(student_rows, cols, live, STUDENT_COL, K)
                d = s - max_s
                w = _class_weights(labels_ptr, rows, target, cols, live, smoothing, SOFT, SMOOTH, K)
                ce_rows += row_sum(tl.where(w != 0, w * (log_sum_1 - d), 0.0))
                g = (tl.exp(d) / sum_1 * weight_sum - w) * ce_scale
                # In the cross-entropy an unlabelled row may hold anything.
                g = tl.where(labelled[:, None], g, 0.0)
                if SINGLE:
                    t = t0
                else:
                    t = load_logits(teacher_rows, cols, live, TEACHER_COL, K)
                q, p, u = probabilities(s, t, max_s, max_t, f_s, f_t, sum_s, sum_t, log_ratio)
                kl_rows += row_sum(kl_terms(p, q, u))
                g += difference(p, q, u) * kl_scale
                if student_grad_ptr is not None:
                    store_tile(row_pointers(student_grad_ptr, rows, K), cols, live, g, K)
            ce_sum += block_sum(tl.where(labelled[:, None], ce_rows * nan, 0.0))
            kl_sum += block_sum(tl.where(live[:, None], kl_rows, 0.0))
    else:
        other_rows = GAUSSIAN_ROWS
        if anchor_mean_ptr is not None:  # its rows are those of the logits
            other_rows = tl.maximum(GAUSSIAN_ROWS, N)
        for tile in range(pid - LOGIT_PROGRAMS, tl.cdiv(other_rows, ROWS_G), tl.num_programs(0) - LOGIT_PROGRAMS):
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
                    anchor_mean_grad_ptr, anchor_log_var_grad_ptr, rows, rows < N, anchor_up / rows_norm,
                    TEACHER_ROW, TEACHER_COL, K, ROWS_G, BLOCK_G,
                )  # fmt: skip
                anchor_sum += block_sum(sums)
    if total_ptr is not None:
        tl.store(partial_ptr + pid, ce_sum)
        tl.store(partial_ptr + PROGRAMS + pid, kl_sum)
        tl.store(partial_ptr + 2 * PROGRAMS + pid, feature_sum)
        tl.store(partial_ptr + 3 * PROGRAMS + pid, anchor_sum)
        if last_to_arrive(partial_ptr, 4 * PROGRAMS):
            ce = sum_of_partials(partial_ptr, PROGRAMS) / ce_norm
            logit_kl = sum_of_partials(partial_ptr + PROGRAMS, PROGRAMS) * (t2 / rows_norm)
            feature_kl = sum_of_partials(partial_ptr + 2 * PROGRAMS, PROGRAMS) / gaussian_norm
            tl.store(ce_ptr, ce)
            tl.store(logit_kl_ptr, logit_kl)
            tl.store(feature_kl_ptr, feature_kl)
            tl.store(anchor_ptr, sum_of_partials(partial_ptr + 3 * PROGRAMS, PROGRAMS) / rows_norm)
            tl.store(total_ptr, ce_weight * ce + a * feature_kl + b * logit_kl)
