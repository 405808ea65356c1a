"""Device code of `unikd_loss`: rows of logits, rows of Gaussians, and the sum of all."""

import triton
import triton.language as tl

from unikd_fast.kernels._divergence_device import (
    dominant_class,
    exp,
    exponents,
    forward_kl,
    forward_terms,
    load_pair,
    row_sums,
    without_cancellation,
)
from unikd_fast.kernels._rows_device import (
    add_to_class,
    added,
    block_sum,
    gradient_pointers,
    labelled_rows,
    last_to_arrive,
    load_logits,
    logit_pointers,
    mean_std,
    on_axes,
    row_pointers,
    row_sum,
    scalar,
    store_class,
    store_cols,
    store_tile,
    sum_of_partials,
    teacher_scale,
    tile_cols,
    tile_count,
    tile_rows,
    tile_sum,
)
from unikd_fast.kernels.gaussian_kl import gaussian_rows, load_dense

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def _class_weights(
    labels_ptr, rows, target, cols, live, smoothing, SOFT: tl.constexpr, SMOOTH: tl.constexpr, K: tl.constexpr
):
    """The class weights of the cross-entropy for the classes `cols`; 0 past the last class."""
    if SOFT:
        ptrs = row_pointers(labels_ptr, rows, K) + cols
        weights = tl.load(ptrs, mask=live[:, None] & (cols < K), other=0.0).to(tl.float32)
    else:
        weights = tl.where(cols == target, 1.0, 0.0)
    if SMOOTH:
        weights = tl.where(cols < K, (1 - smoothing) * weights + smoothing / K, 0.0)
    return weights


@triton.jit
def _anchor_rows(
    teacher_ptr, scale_ptr, mean_ptr, log_var_ptr, mean_grad_ptr, log_var_grad_ptr, rows, live, weight,
    inner, teacher_outer,
    TEACHER_ROW: tl.constexpr, TEACHER_COL: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Mean over k of 1/2 ((y - m)² e^-l + l), y the standardised logits (`reference.gaussian_anchor`), (ROWS, 1)."""
    scale = tl.full([ROWS, 1], 1.0, tl.float32)
    if scale_ptr is not None:
        scale = tl.load(scale_ptr + rows, mask=live, other=1.0).to(tl.float32)[:, None]
    teacher_rows = logit_pointers(teacher_ptr, on_axes(rows, inner), teacher_outer, TEACHER_ROW)
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


@triton.jit(do_not_specialize=["N", "inner", "LOGIT_PROGRAMS", "GAUSSIAN_ROWS"])
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
    student_grad_ptr,  # or None, as the other gradients, which are dense
    student_mean_grad_ptr,
    student_log_var_grad_ptr,
    teacher_mean_grad_ptr,
    teacher_log_var_grad_ptr,
    anchor_mean_grad_ptr,
    anchor_log_var_grad_ptr,
    N,
    inner,  # rows of the inner of two axes, of pixels divided by PIXELS
    student_outer,  # stride of the outer one, or None if there is one axis
    teacher_outer,
    LOGIT_PROGRAMS,
    GAUSSIAN_ROWS,
    ignore_index,
    inverse_temperature,
    exponent_scale,  # log2 e / τ, rounded once
    t2,  # τ², or 1
    ce_weight,
    smoothing,
    feature_weight,  # 1 / KG, or 1
    STUDENT_ROW: tl.constexpr,
    STUDENT_COL: tl.constexpr,
    TEACHER_ROW: tl.constexpr,
    TEACHER_COL: tl.constexpr,
    GRAD_STRIDED: tl.constexpr,  # with the strides of the student's logits, else dense
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
    LANE: tl.constexpr,
    CARE: tl.constexpr,
    PIXELS: tl.constexpr,  # the power of 2 that divides those of an image if tiles run along them, else 0
    ROWS_G: tl.constexpr,
    BLOCK_G: tl.constexpr,
    PROGRAMS: tl.constexpr,
):
    HEIGHT: tl.constexpr = ROWS if SINGLE else BLOCK_K // LANE
    BLOCKS: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    WIDTH: tl.constexpr = LANE if not SINGLE else BLOCK_K if BLOCKS == 1 else 1
    PADDED: tl.constexpr = K % BLOCK_K != 0
    GRAD_COL: tl.constexpr = STUDENT_COL if GRAD_STRIDED else 1
    tiles_of_logits, inner = tile_count(N, inner, ROWS, PIXELS)
    pid = tl.program_id(0)
    a = scalar(alpha, ALPHA_IS_POINTER)
    b = scalar(beta, BETA_IS_POINTER)
    rows_norm = scalar(normalizer, NORMALIZER_IS_POINTER)
    gaussian_norm = scalar(gaussian_normalizer, NORMALIZER_IS_POINTER)
    if COUNT_LABELS:
        ce_norm = labelled_rows(labels_ptr, N, ignore_index)
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
        ce_factor = up * ce_weight / ce_norm
        kl_scale = up * b * t2 / rows_norm * inverse_temperature
        for tile in range(pid, tiles_of_logits, LOGIT_PROGRAMS):
            rows, live, at = tile_rows(tile, N, inner, ROWS, PIXELS)
            student_rows = logit_pointers(student_ptr, at, student_outer, STUDENT_ROW)
            if SOFT:
                target = tl.zeros([ROWS, 1], tl.int32)
                labelled = live
                wrong = rows < 0
            else:
                label = tl.load(labels_ptr + rows, mask=live, other=0).to(tl.int64)
                labelled = live & (label != ignore_index)
                wrong = labelled & ((label < 0) | (label >= K))
                target = label.to(tl.int32)[:, None]
            teacher_rows = logit_pointers(teacher_ptr, at, teacher_outer, TEACHER_ROW)
            student_grads = gradient_pointers(student_grad_ptr, at, student_outer, STUDENT_ROW, K, GRAD_STRIDED)
            l_t = teacher_scale(scale_ptr, rows, live, ROWS) * exponent_scale
            tiles, lanes, row, _sum_s, sum_t, sum_1 = row_sums(
                student_rows, teacher_rows, live, None, exponent_scale, l_t, LOG2E,
                STUDENT_COL, TEACHER_COL, K, SINGLE, BLOCK_K, LANE,
            )  # fmt: skip
            max_s = row[2]
            r_1 = 1.0 / sum_1
            nan = tl.where(wrong[:, None], float("nan"), 1.0)
            ce_scale = tl.where(labelled[:, None], nan * ce_factor, 0.0)
            weight_sum = tl.full([ROWS, 1], 1.0, tl.float32)
            if SOFT:
                weight_sum = tl.zeros([ROWS, 1], tl.float32)
                for i in range(BLOCKS):
                    cols = tile_cols(i, BLOCK_K, LANE, SINGLE)
                    w = _class_weights(labels_ptr, rows, target, cols, live, smoothing, SOFT, SMOOTH, K)
                    weight_sum += tile_sum(w, SINGLE)
                r_1 *= weight_sum
            if not SINGLE:
                dominated, top_class, top_moved, _p = dominant_class(
                    student_rows, teacher_rows, live, None, row, lanes, sum_t,
                    STUDENT_COL, TEACHER_COL, K, BLOCK_K, LANE,
                )  # fmt: skip
            terms = tl.zeros([HEIGHT, WIDTH], tl.float32)
            balance = terms
            picked = terms  # Σ w (z - max z)
            top = tl.zeros([ROWS, 1], tl.int32)  # 1 + the dominant class of a pixel
            for i in range(BLOCKS):
                cols = tile_cols(BLOCKS - 1 - i, BLOCK_K, LANE, SINGLE)
                if BLOCKS == 1:
                    s, t = tiles
                else:
                    s, t = load_pair(student_rows, teacher_rows, cols, live, STUDENT_COL, TEACHER_COL, K, PADDED)
                w = _class_weights(labels_ptr, rows, target, cols, live, smoothing, SOFT, SMOOTH, K)
                if SOFT or SMOOTH:
                    picked = added(picked, tl.where(w != 0, w * (s - max_s), 0.0), BLOCKS == 1)
                p, _q, term, moved = forward_terms(s, t, row, CARE)
                terms = added(terms, term, BLOCKS == 1)
                balance = added(balance, moved, BLOCKS == 1)
                if student_grad_ptr is not None:
                    if BLOCKS == 1:
                        moved = without_cancellation(moved, p)
                    elif SINGLE:
                        top = added(top, tl.where(p > 0.5, cols + 1, 0), False)
                    g = moved * kl_scale + tl.exp2(exponents(s, LOG2E, max_s)) * (r_1 * ce_scale)
                    g = tl.where(w != 0, g - w * ce_scale, g)
                    store_cols(student_grads, cols, live, g, GRAD_COL, PADDED, K)
            if student_grad_ptr is not None and BLOCKS > 1:
                if SINGLE:  # what they sum to is the error of the class with more than half of a pixel
                    add_to_class(student_grads, top, live, -balance * kl_scale, GRAD_COL)
                elif dominated:
                    s = tl.load(student_rows + top_class * STUDENT_COL, mask=live[:, None], other=0).to(tl.float32)
                    w = _class_weights(labels_ptr, rows, target, top_class, live, smoothing, SOFT, SMOOTH, K)
                    g = top_moved * kl_scale + (tl.exp2(exponents(s, LOG2E, max_s)) * r_1 - w) * ce_scale
                    store_class(student_grads, top_class, live, g, GRAD_COL)
            kl_rows = forward_kl(
                student_rows, teacher_rows, live, None, row, terms, balance,
                STUDENT_COL, TEACHER_COL, K, SINGLE, BLOCK_K, LANE, CARE,
            )  # fmt: skip
            if SOFT or SMOOTH:
                ce_rows = tile_sum(picked, SINGLE)
            else:
                there = (labelled & (wrong == 0))[:, None]
                z = tl.load(student_rows + target.to(tl.int64) * STUDENT_COL, mask=there, other=0).to(tl.float32)
                ce_rows = tl.where(there, z - max_s, 0.0)
            ce_rows = weight_sum * tl.log(sum_1) - ce_rows
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
                    inner, teacher_outer, TEACHER_ROW, TEACHER_COL, K, ROWS_G, BLOCK_G,
                )  # fmt: skip
                anchor_sum += block_sum(sums)
    if total_ptr is not None:
        tl.store(partial_ptr + pid, ce_sum)
        tl.store(partial_ptr + PROGRAMS + pid, kl_sum)
        tl.store(partial_ptr + 2 * PROGRAMS + pid, feature_sum)
        tl.store(partial_ptr + 3 * PROGRAMS + pid, anchor_sum)
        if last_to_arrive(partial_ptr, 4 * PROGRAMS):
            ce = sum_of_partials(partial_ptr) / ce_norm
            logit_kl = sum_of_partials(partial_ptr + PROGRAMS) * (t2 / rows_norm)
            feature_kl = sum_of_partials(partial_ptr + 2 * PROGRAMS) / gaussian_norm
            tl.store(ce_ptr, ce)
            tl.store(logit_kl_ptr, logit_kl)
            tl.store(feature_kl_ptr, feature_kl)
            tl.store(anchor_ptr, sum_of_partials(partial_ptr + 3 * PROGRAMS) / rows_norm)
            tl.store(total_ptr, ce_weight * ce + a * feature_kl + b * logit_kl)
