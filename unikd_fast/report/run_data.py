"""What the files of each run hold for the figures: curves over the epochs, statistics of logits, step times."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unikd_fast.report.run_files import TEST_LOGITS, StepTime, is_number, read_records, read_step_time, read_test_logits
from unikd_fast.report.runs import Group, Run

Floats = NDArray[np.float64]
Records = Sequence[dict[str, Any]]

# What stands in a "train" record and is no loss term of the method. The terms stand before the learning rate.
_NOT_TERMS = {"kind", "step", "epoch", "total", "ce"}
_AFTER_TERMS = "lr"


class Line(NamedTuple):
    """One group's course.

    Args:
        name: of the group.
        x, mean: (P,) each.
        low, high: (P,), the lowest and the highest seed; the mean itself where there is one.
        seeds: how many.
    """

    name: str
    x: Floats
    mean: Floats
    low: Floats
    high: Floats
    seeds: int


def course(records: Records, kind: str, key: str) -> dict[float, float]:
    """Epoch -> value, of the records of a kind that have the key; a later record of an epoch replaces an earlier."""
    return {
        float(record["epoch"]): float(record[key])
        for record in records
        if record.get("kind") == kind and "epoch" in record and is_number(record.get(key))
    }


def line_over_seeds(name: str, courses: Sequence[dict[float, float]]) -> Line | None:
    """The mean of several courses at the epochs that all have; None if there is no such epoch."""
    shared = sorted(set.intersection(*map(set, courses))) if courses else []
    if not shared:
        return None
    values = np.array([[one[epoch] for epoch in shared] for one in courses])
    return line(name, np.array(shared), values)


def line(name: str, x: Floats, values: Floats) -> Line:
    """A Line of the ``values`` (S, P) of S seeds."""
    return Line(name, x, values.mean(axis=0), values.min(axis=0), values.max(axis=0), len(values))


def loss_terms(records: Records) -> list[str]:
    """The method's own terms in training, besides cross-entropy and total; those that are always zero are left out."""
    terms: dict[str, bool] = {}
    for record in records:
        if record.get("kind") != "train":
            continue
        for key, value in record.items():
            if key == _AFTER_TERMS:
                break
            if key not in _NOT_TERMS and is_number(value):
                terms[key] = terms.get(key, False) or value != 0
    return [key for key, used in terms.items() if used]


def keys_with(records: Records, kind: str, wanted: Callable[[str], bool]) -> list[str]:
    """The keys of a kind's records that are ``wanted`` and numbers, in the order of their appearance."""
    found: dict[str, None] = {}
    for record in records:
        if record.get("kind") == kind:
            found |= {key: None for key, value in record.items() if wanted(key) and is_number(value)}
    return list(found)


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


_OFF = 0.2  # percentage points; fp16 moves a few ties


class Evidence(NamedTuple):
    """One run's material.

    Args:
        run: which.
        records: of metrics.jsonl.
        comparison: of its test logits with its teacher's; None without them.
        without: why there is no comparison.
        doubt: what does not fit about it; empty if all does.
        step_time: None where it was not measured.
    """

    run: Run
    records: list[dict[str, Any]]
    comparison: LogitComparison | None
    without: str
    doubt: str
    step_time: StepTime | None


class Material(NamedTuple):
    """A group with the evidence of each of its seeds."""

    group: Group
    seeds: tuple[Evidence, ...]

    @property
    def name(self) -> str:
        return self.group.name

    def name_of(self, one: Evidence) -> str:
        return f"{self.name}, seed {one.run.seed}"

    @property
    def compared(self) -> list[LogitComparison]:
        return [one.comparison for one in self.seeds if one.comparison is not None]


def gather(groups: Sequence[Group]) -> list[Material]:
    """Reads what the runs of the groups hold.

    Raises:
        RunFileError: a file is damaged.
    """
    return [Material(group, tuple(_evidence(run) for run in group.runs)) for group in groups]


def _evidence(run: Run) -> Evidence:
    comparison, without, doubt = (None, "", "") if run.is_teacher else _compare(run)
    return Evidence(run, read_records(run.folder), comparison, without, doubt, read_step_time(run.folder))


def _compare(run: Run) -> tuple[LogitComparison | None, str, str]:
    if run.teacher is None:
        return None, "there is no teacher's folder beside it", ""
    own, other = read_test_logits(run.folder), read_test_logits(run.teacher)
    if own is None or other is None:
        lacking = [whose for whose, found in (("the student", own), ("its teacher", other)) if found is None]
        return None, f"no {TEST_LOGITS} of {' and of '.join(lacking)}", ""
    if own.logits.shape != other.logits.shape or (own.labels != other.labels).any():
        shapes = f"{own.logits.shape} on {own.split}, the teacher's {other.logits.shape} on {other.split}"
        return None, f"its logits are of other samples than its teacher's: {shapes}", ""
    try:
        comparison = compare_logits(own.logits, other.logits, own.labels)
    except ValueError as error:
        return None, str(error), ""
    return comparison, "", _doubt(run, own.split, comparison)


def _doubt(run: Run, split: str, comparison: LogitComparison) -> str:
    """Whether the logits are those that result.json speaks of."""
    reported = [run.result[which].get(split, {}).get("accuracy") for which in ("best", "last")]
    known = [value for value in reported if value is not None]
    if not known or any(abs(value - comparison.student_accuracy) <= _OFF for value in known):
        return ""
    figures = " and ".join(f"{value:.2f} %" for value in known)
    return (
        f"its {TEST_LOGITS} give {comparison.student_accuracy:.2f} % top-1 on {split}, result.json says "
        f"{figures} (best and last epoch): the file is of other weights or of another split."
    )
