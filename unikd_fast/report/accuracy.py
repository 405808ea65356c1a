"""The tables of results: mean and deviation over seeds, next to the paper's figures, and every single run."""

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from unikd_fast.report.page import Missing, Part, Section, Table
from unikd_fast.report.printed import FIGURES, Metric, Pair, Printed, printed_alone, printed_anywhere
from unikd_fast.report.runs import Run, RunGroup
from unikd_fast.report.table import NONE, TEACHER, figure_cells
from unikd_fast.tasks import CLASSIFICATION, DETECTION

_CIFAR100 = "cifar100"
_IMAGE_FOLDERS = ("image_folder", "arrow")
_COCO, _COCO_CLASSES, _COCO_STEPS = "coco", 80, 180_000
_EPOCHS = {_CIFAR100: 240, "imagenet": 100, _COCO: 13}
"""Epochs of the recipes behind the paper's figures; the last one of COCO's ends early."""


class Spread(NamedTuple):
    """Mean and sample standard deviation of some values; the deviation of a single value is NaN."""

    mean: float
    deviation: float
    seeds: int

    def text(self, digits: int = 2) -> str:
        """Return ``73.01 ± 0.20``, or the mean alone."""
        mean = f"{self.mean:.{digits}f}"
        return mean if math.isnan(self.deviation) else f"{mean} ± {self.deviation:.{digits}f}"


class AccuracyRow(NamedTuple):
    """One figure of a group on the test split, in percent.

    Args:
        name: name of the group.
        model: name of its network.
        best, last: figure at the best and at the last epoch.
        printed: figures the paper prints; several if its tables disagree.
        remarks: what limits the comparison with the printed figure.
    """

    name: str
    model: str
    best: Spread
    last: Spread
    printed: tuple[Printed, ...]
    remarks: tuple[str, ...]


def spread(values: Sequence[float]) -> Spread:
    """Return the mean of at least one value, and the sample standard deviation."""
    deviation = statistics.stdev(values) if len(values) > 1 else math.nan
    return Spread(statistics.mean(values), deviation, len(values))


def accuracy_rows(groups: Sequence[RunGroup], metric: Metric = "top1") -> list[AccuracyRow]:
    """Return one row per group that has the figure; if it is not its main one, only if the paper prints it."""
    key = FIGURES[metric]
    rows = []
    for group in groups:
        if key not in group.runs[0].result["last"]["test"]:
            continue
        found = tuple(printed_for(group, metric))
        if key != group.figures.main and not found:
            continue
        best, last = (spread([run.result[which]["test"][key] for run in group.runs]) for which in ("best", "last"))
        remarks = tuple(_remarks(group)) if found else ()
        rows.append(AccuracyRow(group.name, str(group.runs[0].result["model"]), best, last, found, remarks))
    return rows


# The public development code's UniKD of 480 epochs; see docs/methods.md.
_DEVELOPMENT = "unikd_dev+mlkd"
_PRINTED_BY = (
    "the printed 78.18 of ResNet32x4 to ResNet8x4 is by all signs of 480 epochs with MLKD's losses of two views, "
    f"{_DEVELOPMENT}, and not of the paper's text"
)


def printed_for(group: RunGroup, metric: Metric = "top1") -> list[Printed]:
    """Return what the paper prints for a group's method and pair; nothing for data sets and pairs it does not cover."""
    run = group.runs[0]
    config = run.config
    dataset = _dataset(config)
    classes = run.result["last"]["test"].get(run.figures.by_class, ())
    if dataset is None or (dataset == _COCO and len(classes) != _COCO_CLASSES):  # another set in its format
        return []
    teacher = (config.get("teacher") or {}).get("model")
    if teacher is None:
        return printed_alone(str(run.result["model"]), metric) if run.result["method"] == "none" else []
    student = config["student"]["model"] if group.is_teacher else run.result["model"]
    pair: Pair = (teacher, student)
    if group.is_teacher:
        return printed_anywhere(TEACHER, pair, metric)
    distill = config.get("distill") or {}
    row = _row_on_coco(run.result["method"], distill) if dataset == _COCO else _row(run.result["method"], distill)
    return printed_anywhere(row, pair, metric)


def method_name(method: Any) -> str:
    """Return the method of a result; the parts of a hybrid are joined by a plus."""
    return "+".join(map(str, method)) if isinstance(method, list) else str(method)


def _row(method: Any, distill: dict[str, Any]) -> str:
    """Return the paper's row. Its ablation (Table 6) is UniKD with parts left out, without KD, weighted as in Eq. 7.

    What the public development code calls by the printed figure of UniKD has MLKD's losses of the logits.
    """
    name = method_name(method)
    if name == _DEVELOPMENT:
        return "unikd"
    section = distill.get(name)
    own = section if isinstance(section, dict) else {}
    if name == "dkd" and own.get("standardized"):
        return "logit_standardisation"
    if name == "kd" and (own.get("ce_weight"), own.get("beta")) == (1.0, 1.0):
        return "unikd without fdp and aff"
    if name != "unikd":
        return name
    if own.get("alpha") == 0:
        return "unikd without fdp and aff"
    return "unikd without aff" if own.get("fusion") == "last" else "unikd"


def _row_on_coco(method: Any, distill: dict[str, Any]) -> str:
    """Return the paper's row; UniKD's loss of the logits may be DKD's, as in the public development code."""
    name, of_unikd = method_name(method), distill.get("unikd") or {}
    return "unikd" if name == "unikd+dkd" and of_unikd.get("beta") == 0 else name


def _dataset(config: dict[str, Any]) -> str | None:
    """Return cifar100, imagenet, coco, or None. Image folders with 1000 classes count as ImageNet."""
    data = config.get("data") or {}
    name = data.get("name")
    if name in _EPOCHS:
        return str(name)
    return "imagenet" if name in _IMAGE_FOLDERS and data.get("num_classes") == 1000 else None


def _remarks(group: RunGroup) -> list[str]:
    config = group.runs[0].config
    dataset = _dataset(config)
    assert dataset is not None
    data, train = config["data"], config.get("train") or {}
    remarks = []
    if data["name"] in _IMAGE_FOLDERS:
        remarks.append(f"assumed to be ImageNet: data.name = {data['name']} with 1000 classes")
    if group.is_teacher:
        return remarks
    if data.get("train_samples"):
        remarks.append(f"trained on {data['train_samples']:,} samples")
    if unlabelled := group.runs[0].result.get("unlabelled"):
        remarks.append(f"{unlabelled:,} of the training samples have no label")
    if train.get("total_epochs") != _EPOCHS[dataset]:
        remarks.append(f"trained for {train.get('total_epochs')} epochs; the usual recipe has {_EPOCHS[dataset]}")
    if dataset == "cifar100" and method_name(group.runs[0].result["method"]) in ("unikd", _DEVELOPMENT):
        remarks.append(_PRINTED_BY)
    if train.get("max_steps") not in (None, _COCO_STEPS if dataset == _COCO else None):
        remarks.append(f"stopped after {train['max_steps']:,} steps")
    if not group.runs[0].result["test_is_val"]:
        remarks.append("best epoch chosen on a validation split; the literature chooses on the test split")
    return remarks


def cost_section(groups: Sequence[RunGroup]) -> Section:
    """Build the table of what teacher and student cost, one row per network; without groups it is empty."""
    if not groups:
        return Section("cost", "Cost", ())
    found: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for group in groups:
        for run in group.runs:
            role = "teacher" if group.is_teacher else "student"
            measured = found.setdefault((role, str(run.result["model"])), [])
            if run.result.get("cost"):
                measured.append(run.result["cost"])
    rows = tuple((role, model, *_costs(measured)) for (role, model), measured in found.items() if measured)
    if not rows:
        text = "What the networks cost is missing: runs of at least 120 micro-batches measure it at their end."
        return Section("cost", "Cost", (Missing(text),))
    every = [cost for measured in found.values() for cost in measured]
    hardware = ", ".join(dict.fromkeys(str(cost["hardware"]) for cost in every))
    caption = (
        "What the networks cost in evaluation: multiply-adds of one image (convolutions, matrix products, attention), "
        "the weights as a file, and the median time of a batch of 1 and of 32 images, in fp32 and eager mode, measured "
        f"at the end of a run on {hardware}."
    )
    header = ("", "model", "image", "parameters", "multiply-adds", "file", "batch of 1", "batch of 32")
    return Section("cost", "Cost", (Table(caption, header, rows),))


def _costs(measured: Sequence[dict[str, Any]]) -> tuple[str, ...]:
    first = measured[0]
    return (
        f"{first['image_size']} px",
        f"{first['parameters'] / 1e6:.2f} M",
        f"{first['multiply_adds'] / 1e6:,.1f} M",
        f"{first['bytes'] / 2**20:.2f} MiB",
        *(f"{statistics.median(cost['latency_ms'][size] for cost in measured):.3g} ms" for size in ("1", "32")),
    )


_MINUS = "\u2212"
_METRICS: dict[Metric, str] = {
    "top1": "top-1 accuracy",
    "top5": "top-5 accuracy",
    "ap": "AP",
    "ap50": "AP50",
    "ap75": "AP75",
}


def accuracy_section(groups: Sequence[RunGroup], unfinished: Sequence[str]) -> Section:
    """Build the first section: the figures of every group."""
    parts: list[Part] = [_how_chosen([run for group in groups for run in group.runs])]
    remarks: dict[str, dict[str, None]] = {}
    for metric, title in _METRICS.items():
        rows = accuracy_rows(groups, metric)
        if not rows:
            continue
        parts.append(_table(rows, title))
        for row in rows:
            for remark in [*_notes(row.printed), *row.remarks]:
                remarks.setdefault(row.name, {})[remark] = None
        if metric in ("top1", "ap") and not any(row.printed for row in rows):
            parts.append(Missing(_nothing_printed(groups)))
    parts += _tables_by_class([group for group in groups if group.figures.by_class])
    if remarks:
        lines = tuple((name, "; ".join(found)) for name, found in remarks.items())
        parts.append(Table("Notes on the printed figures and the comparison", ("", "remarks"), lines, numbers=False))
    parts += [Missing(sentence) for sentence in unfinished]
    return Section("results", "Results", tuple(parts))


def _tables_by_class(groups: Sequence[RunGroup]) -> list[Part]:
    """Return a table of every figure, and one of the main figure of each class, where the task has such figures."""
    if not groups:
        return []
    columns = groups[0].figures.columns
    rows = tuple((group.name, *(_over_seeds(_last(group, key)) for key, _, _ in columns)) for group in groups)
    last = "on the test split at the last epoch (%), mean ± sample standard deviation over seeds"
    caption = (
        f"Every AP {last}: over IoU 0.5 to 0.95, at IoU 0.5 and at 0.75, and of small boxes (less than 32² pixels), "
        "medium ones (up to 96²) and large ones, where there are such boxes."
    )
    parts: list[Part] = [Table(caption, ("", *(heading for _, heading, _ in columns)), rows)]
    found = {group.name: _last(group, group.figures.by_class) for group in groups}
    names = list(dict.fromkeys(name for each in found.values() for one in each for name in one or ()))
    shown = [group for group, each in found.items() if all(each)]
    if names:
        by_class = tuple(
            (name, *(_over_seeds([one.get(name) for one in found[group]]) for group in shown)) for name in names
        )
        parts.append(Table(f"AP of each class {last}.", ("class", *shown), by_class))
    if lacking := [group for group in found if group not in shown]:
        text = f"The AP of each class is missing for {', '.join(lacking)}: a result.json has no ap_by_class"
        parts.append(Missing(f"{text}, which runs of this version write."))
    return parts


def _last(group: RunGroup, key: str) -> list[Any]:
    """Return the figure of each seed at the last epoch, None where there is none."""
    return [run.result["last"]["test"].get(key) for run in group.runs]


def _over_seeds(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return spread(known).text() if known else NONE


def single_runs_section(groups: Sequence[RunGroup]) -> Section:
    """Build the tables of every single run, one for each task."""
    tables = []
    for figures, (columns, caption) in _SINGLE.items():
        runs = [(group.name, run) for group in groups for run in group.runs if run.figures == figures]
        names = [heading.replace("top-", "top\u2011") for _, heading, _ in columns]  # a non-breaking hyphen
        header = ("run", "seed", "method", "model", "best epoch", names[0], "last epoch", *names)
        if runs:
            tables.append(Table(caption, header, tuple(_single(name, run, columns) for name, run in runs)))
    return Section("runs", "Single runs", tuple(tables))


_SINGLE = {
    CLASSIFICATION: (
        (("accuracy", "top-1", ".2f"), ("top5", "top-5", ".2f"), ("ce", "cross-entropy", ".4f")),
        "Every run on the test split: top-1 (%) at both epochs, top-5 (%) and cross-entropy (nats) at the last.",
    ),
    DETECTION: (
        DETECTION.columns,
        "Every run on the test split: AP (%) at both epochs, the other figures (%) at the last.",
    ),
}


def _table(rows: Sequence[AccuracyRow], metric: str) -> Table:
    compared = any(row.printed for row in rows)
    header: tuple[str, ...] = ("", "model", "seeds", "best epoch", "last epoch")
    if compared:
        header += ("printed", "best − printed", "last − printed")
    cells = []
    for row in rows:
        own: tuple[str, ...] = (row.name, row.model, str(row.best.seeds), row.best.text(), row.last.text())
        if compared:
            own += (
                _each(row.printed, lambda one: f"{one.value:.2f} ({_tables(one)})"),
                _each(row.printed, lambda one, mean=row.best.mean: signed(mean - one.value)),  # type: ignore[misc]
                _each(row.printed, lambda one, mean=row.last.mean: signed(mean - one.value)),  # type: ignore[misc]
            )
        cells.append(own)
    caption = f"Test {metric} (%), mean ± sample standard deviation over seeds"
    if compared:
        caption += "; printed: in the UniKD paper, T: its table; differences in percentage points"
    return Table(f"{caption}.", header, tuple(cells))


def _each(printed: Sequence[Printed], write: Callable[[Printed], str]) -> str:
    return "\n".join(map(write, printed)) or NONE


def _notes(printed: Sequence[Printed]) -> list[str]:
    """List each note with the figures it applies to."""
    about: dict[str, list[str]] = {}
    for one in printed:
        if one.note:
            about.setdefault(one.note, []).append(f"{one.value:.2f} ({_tables(one)})")
    return [f"{' and '.join(figures)}: {note}" for note, figures in about.items()]


def _tables(printed: Printed) -> str:
    return ", ".join(f"T{table}" for table in printed.tables)


def signed(value: float) -> str:
    """Return a difference with its sign.

    Example:
        >>> signed(0.25), signed(0.001)
        ('+0.25', '0.00')
    """
    shown = f"{abs(value):.2f}"
    return shown if float(shown) == 0 else f"{'+' if value > 0 else _MINUS}{shown}"


def _how_chosen(runs: Sequence[Run]) -> str:
    on_test = {bool(run.result["test_is_val"]) for run in runs}
    if on_test == {True}:
        return (
            "One split is for validation and the test: best epoch is the maximum on it, as the literature reports it; "
            "last epoch has no such choice."
        )
    chosen = "The best epoch was chosen on the validation split; the test split was used once, at the end."
    return chosen if on_test == {False} else f"{chosen} Runs with one split for both chose it on that."


def _nothing_printed(groups: Sequence[RunGroup]) -> str:
    found: dict[str, None] = {}
    for run in (run for group in groups for run in group.runs if not run.is_teacher):
        teacher = (run.config.get("teacher") or {}).get("model", "no teacher")
        found[f"{(run.config.get('data') or {}).get('name')} with {teacher} to {run.result['model']}"] = None
    return (
        f"The paper prints nothing for {'; '.join(found)}. Its figures appear for its own network pairs on "
        "cifar100, imagenet and coco."
    )


def _single(name: str, run: Run, columns: Sequence[tuple[str, str, str]]) -> tuple[str, ...]:
    result = run.result
    best, last = result["best"], result["last"]
    epochs = [NONE if part.get("epoch") is None else str(part["epoch"]) for part in (best, last)]
    figure, _, shown = columns[0]
    return (
        name,
        str(run.seed),
        method_name(result["method"]),
        str(result["model"]),
        epochs[0],
        format(best["test"][figure], shown),
        epochs[1],
        *figure_cells(last["test"], columns),
    )
