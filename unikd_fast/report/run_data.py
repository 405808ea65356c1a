"""What the files of each run hold for the figures: curves over epochs, logit statistics, step times."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from unikd_fast.report.run_files import TEST_LOGITS, StepTime, is_number, read_records, read_step_time, read_test_logits
from unikd_fast.report.runs import Run, RunGroup
from unikd_fast.tasks import Figures

Floats = NDArray[np.float64]
Records = Sequence[dict[str, Any]]

# Keys of a "train" record that are not loss terms of the method. The terms come before the learning rate.
_NOT_TERMS = {"kind", "step", "epoch", "total", "ce"}
_AFTER_TERMS = "lr"


class Line(NamedTuple):
    """One group's curve.

    Args:
        name: name of the group.
        x, mean: (P,) each.
        low, high: (P,), minimum and maximum over the seeds; equal to the mean if there is one seed.
        seeds: number of seeds.
    """

    name: str
    x: Floats
    mean: Floats
    low: Floats
    high: Floats
    seeds: int


def course(records: Records, kind: str, key: str) -> dict[float, float]:
    """Return epoch -> value for the records of a kind that have the key; the latest record of an epoch counts."""
    return {
        float(record["epoch"]): float(record[key])
        for record in records
        if record.get("kind") == kind and "epoch" in record and is_number(record.get(key))
    }


def line_over_seeds(name: str, courses: Sequence[dict[float, float]]) -> Line | None:
    """Average several courses at the epochs they share; return None if they share none."""
    shared = sorted(set.intersection(*map(set, courses))) if courses else []
    if not shared:
        return None
    values = np.array([[one[epoch] for epoch in shared] for one in courses])
    return line(name, np.array(shared), values)


def line(name: str, x: Floats, values: Floats) -> Line:
    """Return the Line of ``values`` (S, P) over S seeds."""
    return Line(name, x, values.mean(axis=0), values.min(axis=0), values.max(axis=0), len(values))


def loss_terms(records: Records) -> list[str]:
    """Return the method's own loss terms, without cross-entropy, the total and terms that are always zero."""
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
    """Return the keys of a kind's records that are ``wanted`` and hold numbers, in order of first appearance."""
    found: dict[str, None] = {}
    for record in records:
        if record.get("kind") == kind:
            found |= {key: None for key, value in record.items() if wanted(key) and is_number(value)}
    return list(found)


Logits = NDArray[Any]

DIFFERENCES: Floats = np.arange(401) / 20
"""Grid for the distribution of |z_s - z_t|: 0 to 20 in steps of 0.05, the same for all runs."""
PROBE_TEMPERATURE = 4.0

_BLOCK = 2**22  # entries


class LogitComparison(NamedTuple):
    """A student compared with its teacher on one split of N samples and K classes.

    Args:
        student_accuracy, teacher_accuracy: top-1, in percent.
        agreement: percentage of samples that both assign to the same class.
        agreement_where_right: the same over the samples the teacher gets right; NaN if there are none.
        probe_kl: τ² KL(p_t || p_s) at τ = 4, in nats per sample.
        cdf: share of entries with |z_s - z_t| up to each value of DIFFERENCES.
        class_difference: |M_s - M_t|, (K, K), in logits, with a zero diagonal; see ``class_means``.
        correlation_difference: corrcoef of the student's logits minus the teacher's, (K, K).
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
    """Compute all statistics of a student and its teacher.

    Raises:
        ValueError: the shapes differ, or a logit is not finite.
    """
    if student.shape != teacher.shape:
        raise ValueError(f"compare_logits: logits must have the same shape, got {student.shape} and {teacher.shape}")
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
    """Return top-1 accuracy in percent."""
    return 100 * float((logits.argmax(axis=1) == labels).mean())


def probe_kl(student: Logits, teacher: Logits, *, temperature: float = PROBE_TEMPERATURE) -> float:
    """Return τ² KL(p_t(τ) || p_s(τ)), averaged over samples: the same measure for every method, whatever its loss."""
    total = 0.0
    for own, other in zip(_blocks(student), _blocks(teacher), strict=True):
        log_s, log_t = _log_softmax(own / temperature), _log_softmax(other / temperature)
        total += float((np.exp(log_t) * (log_t - log_s)).sum())
    return temperature**2 * total / len(student)


def difference_cdf(student: Logits, teacher: Logits, grid: Floats) -> Floats:
    """Return the share of the N x K entries with |z_s - z_t| <= g, for each g of the ascending ``grid``."""
    counts = np.zeros(len(grid) + 1, dtype=np.int64)
    for own, other in zip(_blocks(student), _blocks(teacher), strict=True):
        first = np.searchsorted(grid, np.abs(own - other).ravel(), side="left")  # the first g not below the difference
        counts += np.bincount(first, minlength=len(counts))
    shares: Floats = np.cumsum(counts[:-1]) / student.size
    return shares


def class_means(logits: Logits, labels: NDArray[np.int64]) -> Floats:
    """Return M (K, K): row c is the mean of the logits over the samples of true class c, or NaN if there are none."""
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
    """Return |M_s - M_t| with a zero diagonal: its entries are so large that they would hide the rest."""
    difference: Floats = np.abs(student_means - teacher_means)
    np.fill_diagonal(difference, 0.0)
    return difference


def correlation(logits: Logits) -> Floats:
    """Return the correlation coefficients (K, K) of the K logits over the N samples; NaN for constant logits."""
    classes = logits.shape[1]
    mean = sum((block.sum(axis=0) for block in _blocks(logits)), np.zeros(classes)) / len(logits)
    products = np.zeros((classes, classes))
    for block in _blocks(logits):
        block -= mean
        products += block.T @ block
    deviation = np.sqrt(np.diag(products))
    deviation[deviation <= 1e-10 * np.sqrt(len(logits)) * np.abs(mean)] = np.nan  # rounding error alone
    coefficients: Floats = products / deviation / deviation[:, None]
    return np.clip(coefficients, -1.0, 1.0)


def _blocks(logits: Logits) -> Iterator[Floats]:
    """Yield rows in float64, a few megabytes at a time; each block is a copy."""
    rows = max(1, _BLOCK // logits.shape[1])
    for start in range(0, len(logits), rows):
        yield logits[start : start + rows].astype(np.float64)


def _log_softmax(logits: Floats) -> Floats:
    shifted = logits - logits.max(axis=1, keepdims=True)
    result: Floats = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


_OFF = 0.2  # percentage points; fp16 moves a few ties


class RunData(NamedTuple):
    """What the files of one run hold.

    Args:
        run: the run.
        records: records of metrics.jsonl.
        comparison: its test logits compared with its teacher's. If None, ``without`` says why.
        without: why there is no comparison; empty if there is one.
        doubt: what contradicts the comparison; empty if nothing does.
        step_time: step times. If None, they were not measured.
    """

    run: Run
    records: list[dict[str, Any]]
    comparison: LogitComparison | None
    without: str
    doubt: str
    step_time: StepTime | None


class GroupData(NamedTuple):
    """What the files of a group's runs hold."""

    name: str
    seeds: tuple[RunData, ...]

    @property
    def figures(self) -> Figures:
        """Return the figures of its task."""
        return self.seeds[0].run.figures

    def name_of(self, one: RunData) -> str:
        return f"{self.name}, seed {one.run.seed}"

    @property
    def compared(self) -> list[LogitComparison]:
        return [one.comparison for one in self.seeds if one.comparison is not None]


def gather(groups: Sequence[RunGroup]) -> list[GroupData]:
    """Read the files of every run in the groups.

    Raises:
        RunFileError: a file is damaged.
    """
    return [GroupData(group.name, tuple(_run_data(run) for run in group.runs)) for group in groups]


def _run_data(run: Run) -> RunData:
    comparison, without, doubt = (None, "", "") if run.is_teacher else _compare(run)
    return RunData(run, read_records(run.folder), comparison, without, doubt, read_step_time(run.folder))


def _compare(run: Run) -> tuple[LogitComparison | None, str, str]:
    if run.teacher is None:
        return None, "it was trained without a teacher", ""
    own, other = read_test_logits(run.folder), read_test_logits(run.teacher)
    if own is None or other is None:
        lacking = [whose for whose, found in (("the student", own), ("its teacher", other)) if found is None]
        return None, f"{TEST_LOGITS} is missing for {' and '.join(lacking)}", ""
    if own.logits.shape != other.logits.shape or (own.labels != other.labels).any():
        shapes = f"{own.logits.shape} on {own.split}, the teacher's {other.logits.shape} on {other.split}"
        return None, f"its logits are not for the same samples as its teacher's: {shapes}", ""
    try:
        comparison = compare_logits(own.logits, other.logits, own.labels)
    except ValueError as error:
        return None, str(error), ""
    return comparison, "", _doubt(run, own.split, comparison)


def _doubt(run: Run, split: str, comparison: LogitComparison) -> str:
    """Return what contradicts that the logits are those result.json was computed from; empty if nothing does."""
    reported = [run.result[which].get(split, {}).get("accuracy") for which in ("best", "last")]
    known = [value for value in reported if value is not None]
    if not known or any(abs(value - comparison.student_accuracy) <= _OFF for value in known):
        return ""
    figures = " and ".join(f"{value:.2f} %" for value in known)
    return (
        f"its {TEST_LOGITS} give {comparison.student_accuracy:.2f} % top-1 on {split}, result.json says "
        f"{figures} (best and last epoch): the file holds other weights' logits, or another split's."
    )
