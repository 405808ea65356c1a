"""Statistics of test logits: accuracy, agreement with the teacher, and the arrays of the paper's figures 4 and 5.

Logits are (N, K), labels (N,). Blocks of rows are widened to float64 one after another, so that a split of ImageNet's
size needs little memory beyond the fp16 it is stored in.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Logits = NDArray[Any]

DIFFERENCES: Floats = np.arange(401) / 20
"""Where the distribution of |z_s - z_t| is taken: 0 to 20 in steps of 0.05, the same for all runs."""
PROBE_TEMPERATURE = 4.0

_BLOCK = 2**22  # entries


class LogitComparison(NamedTuple):
    """A student beside its teacher, over one split of N samples and K classes.

    Args:
        student_accuracy, teacher_accuracy: top-1, in percent.
        agreement: of samples to which both give the same class, in percent.
        agreement_where_right: the same among those where the teacher is right; NaN if it never is.
        probe_kl: τ² KL(p_t || p_s) at τ = 4, nats a sample.
        cdf: share of the entries with |z_s - z_t| up to each of DIFFERENCES.
        class_difference: |M_s - M_t|, (K, K), in logits, zero on the diagonal; see ``class_means``.
        correlation_difference: corrcoef of the student's logits less the teacher's, (K, K).
    """

    student_accuracy: float
    teacher_accuracy: float
    agreement: float
    agreement_where_right: float
    probe_kl: float
    cdf: Floats
    class_difference: Floats
    correlation_difference: Floats


def compare_logits(student: Logits, teacher: Logits, labels: NDArray[np.int64]) -> LogitComparison:
    """All statistics of a student and a teacher.

    Raises:
        ValueError: the shapes differ, or a logit is not finite.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"compare_logits: logits must have one shape, got {student.shape} and {teacher.shape}")
    if labels.shape != student.shape[:1]:
        raise ValueError(f"compare_logits: labels must be {student.shape[:1]}, got {labels.shape}")
    for name, logits in (("student's", student), ("teacher's", teacher)):
        if bad := sum(int((~np.isfinite(block).all(axis=1)).sum()) for block in _blocks(logits)):
            raise ValueError(f"compare_logits: the {name} logits of {bad} of {len(logits)} samples are not finite")
    right = teacher.argmax(axis=1) == labels
    same = student.argmax(axis=1) == teacher.argmax(axis=1)
    return LogitComparison(
        student_accuracy=accuracy(student, labels),
        teacher_accuracy=accuracy(teacher, labels),
        agreement=100 * float(same.mean()),
        agreement_where_right=100 * float(same[right].mean()) if right.any() else float("nan"),
        probe_kl=probe_kl(student, teacher),
        cdf=difference_cdf(student, teacher, DIFFERENCES),
        class_difference=class_difference(class_means(student, labels), class_means(teacher, labels)),
        correlation_difference=correlation(student) - correlation(teacher),
    )


def accuracy(logits: Logits, labels: NDArray[np.int64]) -> float:
    """Top-1 accuracy in percent."""
    return 100 * float((logits.argmax(axis=1) == labels).mean())


def probe_kl(student: Logits, teacher: Logits, *, temperature: float = PROBE_TEMPERATURE) -> float:
    """τ² KL(p_t(τ) || p_s(τ)), mean over samples: the same measure for all methods, whatever their own loss."""
    total = 0.0
    for own, other in zip(_blocks(student), _blocks(teacher), strict=True):
        log_s, log_t = _log_softmax(own / temperature), _log_softmax(other / temperature)
        total += float((np.exp(log_t) * (log_t - log_s)).sum())
    return temperature**2 * total / len(student)


def difference_cdf(student: Logits, teacher: Logits, grid: Floats) -> Floats:
    """The share of the N x K entries with |z_s - z_t| <= g, for each g of the ascending ``grid``."""
    counts = np.zeros(len(grid) + 1, dtype=np.int64)
    for own, other in zip(_blocks(student), _blocks(teacher), strict=True):
        first = np.searchsorted(grid, np.abs(own - other).ravel(), side="left")  # the first g that is not less
        counts += np.bincount(first, minlength=len(counts))
    shares: Floats = np.cumsum(counts[:-1]) / student.size
    return shares


def class_means(logits: Logits, labels: NDArray[np.int64]) -> Floats:
    """M (K, K): row c is the mean of the logits over the samples of true class c; NaN where there is none."""
    classes = logits.shape[1]
    sums = np.zeros((classes, classes))
    start = 0
    for block in _blocks(logits):
        own = labels[start : start + len(block)]
        start += len(block)
        order = np.argsort(own, kind="stable")
        present, first = np.unique(own[order], return_index=True)
        sums[present] += np.add.reduceat(block[order], first, axis=0)
    counts = np.bincount(labels, minlength=classes)
    with np.errstate(invalid="ignore"):
        means: Floats = sums / counts[:, None]
    return means


def class_difference(student_means: Floats, teacher_means: Floats) -> Floats:
    """|M_s - M_t| with zeros on the diagonal, whose logits are so much larger that they would hide the rest."""
    difference: Floats = np.abs(student_means - teacher_means)
    np.fill_diagonal(difference, 0.0)
    return difference


def correlation(logits: Logits) -> Floats:
    """The correlation coefficients of the K logits over the N samples, (K, K); NaN for one that never changes."""
    classes = logits.shape[1]
    mean = sum((block.sum(axis=0) for block in _blocks(logits)), np.zeros(classes)) / len(logits)
    products = np.zeros((classes, classes))
    for block in _blocks(logits):
        block -= mean
        products += block.T @ block
    deviation = np.sqrt(np.diag(products))
    deviation[deviation <= 1e-10 * np.sqrt(len(logits)) * np.abs(mean)] = np.nan  # what is left of rounding
    coefficients: Floats = products / deviation / deviation[:, None]
    return np.clip(coefficients, -1.0, 1.0)


def _blocks(logits: Logits) -> Iterator[Floats]:
    """Rows in float64, a few megabytes at a time; each block is a copy."""
    rows = max(1, _BLOCK // logits.shape[1])
    for start in range(0, len(logits), rows):
        yield logits[start : start + rows].astype(np.float64)


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result
