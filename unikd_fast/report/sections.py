"""Further sections of the page: curves, what the test logits show, detections, step time and environment."""

import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from unikd_fast.report.accuracy import spread
from unikd_fast.report.figures import Bar, Dots, Matrix, Panel, draw_bars, draw_curves, draw_dots, draw_heatmaps
from unikd_fast.report.page import Missing, Part, Picture, Section, Table
from unikd_fast.report.run_data import (
    DIFFERENCES,
    GroupData,
    Line,
    LogitComparison,
    course,
    keys_with,
    line,
    line_over_seeds,
    loss_terms,
)
from unikd_fast.report.run_files import (
    PICTURE,
    STEP_TIME,
    TEST_LOGITS,
    StepTime,
    read_json,
    read_lines,
    read_picture,
)
from unikd_fast.report.runs import RunGroup

_EPOCH = "epoch"
_PROBE = "probe_kl"
_INDICATORS = {
    "head_mean_std": ("Spread of the means m_t", "standard deviation"),
    "head_variance": ("Variances v_t", "mean variance"),
    "head_accuracy": ("Accuracy of argmax m_t", "share of samples (0–1)"),
}


def convergence_section(groups: Sequence[GroupData]) -> Section:
    """Build Fig. 3 of the UniKD paper: cross-entropy or AP, the common probe, and the loss terms."""
    split, names = _split(groups), [group.name for group in groups]
    with_logits = [group for group in groups if group.figures.has_logits]
    parts: list[Part] = []
    held_out = dict.fromkeys(group.figures.course for group in groups)
    probe = Panel(
        f"Common probe, {split}", _EPOCH, "τ² KL, τ = 4 (nats per sample)", _lines(with_logits, "evaluation", _PROBE)
    )
    panels = [
        *(Panel(f"{title}, {split}", _EPOCH, unit, _lines(groups, "evaluation", key)) for key, title, unit in held_out),
        probe,
    ]
    terms = dict.fromkeys(term for group in groups for seed in group.seeds for term in loss_terms(seed.records))
    panels += [Panel(f"{term}, training", _EPOCH, "loss term", _term_lines(groups, term)) for term in terms]
    shown = tuple(panel for panel in panels if panel.lines)
    if shown:
        titles = [*(title for _, title, _ in held_out), *(["the common probe"] if with_logits else [])]
        measure = "; the probe is the same measure for all (Fig. 3 of the UniKD paper)" if with_logits else ""
        parts.append(
            Picture(
                "convergence",
                f"{' and '.join(titles)} on held-out data, then the loss terms in training, as each method logs them."
                f"{_band(groups)} Loss terms of different methods are not comparable{measure}.",
                _alt(shown),
                lambda theme: draw_curves(shown, theme, names),
            )
        )
    else:
        parts.append(
            Missing("The training curves appear once the run folders hold metrics.jsonl with evaluation records.")
        )
    probed = {line.name for line in probe.lines}
    first = {group.name: group.seeds[0].run for group in with_logits}
    taught = [name for name, run in first.items() if run.teacher is not None and run.result["method"] != "none"]
    lacking = [name for name in taught if name not in probed]
    if lacking:
        parts.append(
            Missing(
                f"The common probe is missing for {', '.join(lacking)}. It appears once the evaluation records of "
                f"metrics.jsonl hold {_PROBE}."
            )
        )
    return Section("convergence", "Convergence", tuple(parts))


def collapse_section(groups: Sequence[GroupData]) -> Section:
    """Build the head_* indicators over the epochs, and their final values."""
    keys = dict.fromkeys(
        key
        for group in groups
        for seed in group.seeds
        for key in keys_with(seed.records, "evaluation", lambda key: key.startswith("head_"))
    )
    found = {key: lines for key in keys if (lines := _lines(groups, "evaluation", key))}
    if not found:
        text = (
            "No run has indicators of a teacher head. Methods that have one (UniKD) write head_* at every evaluation."
        )
        return Section("collapse", "Collapse indicators", (Missing(text),))
    panels = tuple(_indicator_panel(key, lines) for key, lines in found.items())
    names = list(dict.fromkeys(line.name for lines in found.values() for line in lines))
    rows = tuple((name, *(_last_value(lines, name) for lines in found.values())) for name in names)
    header = ("", *(f"{panel.title}, {panel.y_label}" for panel in panels))
    return Section(
        "collapse",
        "Collapse indicators",
        (
            "Trained by the feature loss alone, UniKD's teacher projection can shrink to zero, and the loss "
            "with it. It shows as a standard deviation of the means that goes to 0 and an accuracy at chance level.",
            Picture(
                "collapse",
                f"The teacher head at every evaluation, on the {_split(groups)}.{_band(groups)}",
                _alt(panels),
                lambda theme: draw_curves(panels, theme, [group.name for group in groups]),
            ),
            Table("The same at the last evaluation, mean over seeds.", header, rows),
        ),
    )


def _term_lines(groups: Sequence[GroupData], term: str) -> tuple[Line, ...]:
    """Return the lines of the groups whose loss has the term; others may log zeros for it."""
    having = [m for m in groups if any(term in loss_terms(seed.records) for seed in m.seeds)]
    return _lines(having, "train", term)


def _lines(groups: Sequence[GroupData], kind: str, key: str) -> tuple[Line, ...]:
    lines = []
    for group in groups:
        courses = [found for seed in group.seeds if (found := course(seed.records, kind, key))]
        if (line := line_over_seeds(group.name, courses)) is not None:
            lines.append(line)
    return tuple(lines)


def _indicator_panel(key: str, lines: tuple[Line, ...]) -> Panel:
    """Start at zero, so that a decline looks like one; for an unknown indicator, scale to the lines."""
    if key not in _INDICATORS:
        return Panel(key, _EPOCH, "indicator", lines)
    highest = max((float(line.high.max()) for line in lines if np.isfinite(line.high).all()), default=1.0)
    top = 1.02 if key == "head_accuracy" else 1.08 * highest or 1.0
    title, y_label = _INDICATORS[key]
    return Panel(title, _EPOCH, y_label, lines, y_limits=(0.0, top))


def _last_value(lines: Sequence[Line], name: str) -> str:
    return next((f"{line.mean[-1]:.4g}" for line in lines if line.name == name), "–")


def _split(groups: Sequence[GroupData]) -> str:
    """Return the name of the split that training evaluates on: the test split if there is no validation split."""
    on_test = {bool(seed.run.result["test_is_val"]) for group in groups for seed in group.seeds}
    return {frozenset({True}): "test split", frozenset({False}): "validation split"}.get(
        frozenset(on_test), "validation or test split"
    )


def _band(groups: Sequence[GroupData]) -> str:
    several = any(len(group.seeds) > 1 for group in groups)
    return " Lines are means over seeds, bands reach from the lowest seed to the highest." if several else ""


def _alt(panels: Sequence[Panel], last: Callable[[Line], str] = lambda line: f"{line.mean[-1]:.4g}") -> str:
    """List where each line ends, panel by panel."""
    ends = (f"{panel.title}: {', '.join(f'{line.name} {last(line)}' for line in panel.lines)}" for panel in panels)
    return f"Line charts. Last values: {'; '.join(ends)}."


_ALMOST_ALL = 0.999
_ANCHORS = (("differences", "Logit differences"), ("classes", "Class structure"), ("agreement", "Agreement"))
# Title, digits, and the value in a comparison.
_MEASURES: tuple[tuple[str, int, Callable[[LogitComparison], float]], ...] = (
    ("agreement (%)", 2, lambda one: one.agreement),
    ("agreement where the teacher is right (%)", 2, lambda one: one.agreement_where_right),
    ("student top-1 (%)", 2, lambda one: one.student_accuracy),
    ("teacher top-1 (%)", 2, lambda one: one.teacher_accuracy),
    ("τ² KL, τ = 4 (nats)", 4, lambda one: one.probe_kl),
)


def logit_sections(groups: Sequence[GroupData]) -> list[Section]:
    """Build three sections, one that says what is missing if no run has test logits, or none without groups."""
    if not groups:
        return []
    usable = [group for group in groups if group.compared]
    reasons: dict[str, list[str]] = {}
    for group in groups:
        for seed in group.seeds:
            if seed.without:
                reasons.setdefault(seed.without, []).append(group.name_of(seed))
    left_out = ". ".join(f"{'; '.join(names)}: {reason}" for reason, names in reasons.items())
    missing = Missing(
        f"Left out: {left_out}. The logit figures appear for runs whose student folder and teacher "
        f"folder both hold {TEST_LOGITS}."
    )
    if not usable:
        return [Section("differences", "Logits", (missing,))]
    figures = (_differences(usable, [group.name for group in groups]), _classes(usable), _agreement(usable))
    doubts = [Missing(f"{m.name_of(seed)}: {seed.doubt}") for m in usable for seed in m.seeds if seed.doubt]
    first: list[Part] = [*figures[0], *([missing] if reasons else []), *doubts]
    parts = (tuple(first), figures[1], figures[2])
    return [Section(anchor, title, own) for (anchor, title), own in zip(_ANCHORS, parts, strict=True)]


def _differences(groups: Sequence[GroupData], names: Sequence[str]) -> tuple[Part, ...]:
    """Build Fig. 4 of the UniKD paper; ``names`` are those of all groups on the page."""
    lines = tuple(line(group.name, DIFFERENCES, np.stack([one.cdf for one in group.compared])) for group in groups)
    everywhere = np.min([one.low for one in lines], axis=0) >= _ALMOST_ALL
    end = float(DIFFERENCES[np.argmax(everywhere)]) if everywhere.any() else float(DIFFERENCES[-1])
    panel = Panel(
        "Distribution of logit differences",
        "|student logit − teacher logit|, logits",
        "share of entries (0–1)",
        lines,
        (0.0, max(end, float(DIFFERENCES[1]))),
        (0.0, 1.01),
    )
    medians = ", ".join(f"{one.name} {_median(one.mean)}" for one in lines)
    caption = (
        "Empirical distribution of |z_s − z_t| over all test samples and classes (Fig. 4 of the UniKD paper); the "
        "further left a curve rises, the closer the student is to its teacher. A shift that softmax cancels counts as "
        "well."
    )
    beyond = [f"{one.name} {100 * (1 - one.mean[-1]):.2g} %" for one in lines if one.mean[-1] < _ALMOST_ALL]
    if beyond:
        caption += f" Beyond {DIFFERENCES[-1]:g} logits lie: {', '.join(beyond)}."
    alt = f"Line chart of cumulative shares. Medians in logits: {medians}."
    return (Picture("differences", caption, alt, lambda theme: draw_curves((panel,), theme, names)),)


def _median(cdf: np.ndarray) -> str:
    return f"{DIFFERENCES[np.argmax(cdf >= 0.5)]:.2f}" if cdf[-1] >= 0.5 else f"above {DIFFERENCES[-1]:g}"


def _classes(groups: Sequence[GroupData]) -> tuple[Part, ...]:
    means = [Matrix(group.name, group.compared[0].class_difference) for group in groups]
    correlations = [Matrix(group.name, group.compared[0].correlation_difference) for group in groups]
    several = any(len(group.seeds) > 1 for group in groups)
    seed = " First seed only." if several else ""
    size = len(means[0].values)
    if any(len(matrix.values) != size for matrix in means):
        return (Missing("No class structure: the runs differ in their number of classes; report them separately."),)
    cells = " Each cell is the mean over a square of classes." if size > 256 else ""
    return (
        Picture(
            "class-means",
            "|M_s − M_t|: how far the student's mean logits for each true class are from the teacher's, with the "
            f"diagonal set to zero (Fig. 5 of the UniKD paper). All share one scale.{cells}{seed}",
            f"Heatmaps of {size} x {size} classes. Mean difference in logits: {_averages(means)}.",
            lambda theme: draw_heatmaps(
                means,
                theme,
                kind="sequential",
                color_label="|difference|, logits",
                x_label="class of the logit",
                y_label="true class",
            ),
        ),
        Picture(
            "correlations",
            "The same as correlations: the coefficients between the student's logits minus those between the "
            f"teacher's. All share one symmetric scale.{cells}{seed}",
            f"Heatmaps of {size} x {size} classes. Mean absolute difference: {_averages(correlations)}.",
            lambda theme: draw_heatmaps(
                correlations,
                theme,
                kind="diverging",
                color_label="student less teacher",
                x_label="class of the logit",
                y_label="class of the logit",
            ),
        ),
    )


def _averages(matrices: Sequence[Matrix]) -> str:
    """List the mean absolute value of each matrix off the diagonal."""
    shown = []
    for matrix in matrices:
        off = np.abs(matrix.values[~np.eye(len(matrix.values), dtype=bool)])
        off = off[np.isfinite(off)]
        shown.append(f"{matrix.name} {off.mean():.3g}" if off.size else f"{matrix.name} undefined")
    return ", ".join(shown)


def _agreement(groups: Sequence[GroupData]) -> tuple[Part, ...]:
    rows = []
    dots = []
    for group in groups:
        values = [[of(one) for one in group.compared] for _, _, of in _MEASURES]
        texts = (spread(value).text(digits) for value, (_, digits, _) in zip(values, _MEASURES, strict=True))
        rows.append((group.name, *("–" if text.startswith("nan") else text for text in texts)))
        shown = {"all samples": values[0], "samples the teacher gets right": values[1]}
        if not any(math.isnan(one) for value in shown.values() for one in value):
            measures = {name: (sum(value) / len(value), min(value), max(value)) for name, value in shown.items()}
            dots.append(Dots(group.name, measures))
    table = Table(
        "Student and teacher on the test split, mean ± sample standard deviation over seeds; τ² KL is the common probe "
        "on the stored logits.",
        ("", *(title for title, _, _ in _MEASURES)),
        tuple(rows),
    )
    if not dots:
        return (table,)
    ends = ", ".join(f"{one.name} {one.measures['all samples'][0]:.2f} %" for one in dots)
    picture = Picture(
        "agreement",
        "How often the student predicts the same class as its teacher. Marks are means over seeds, lines span the "
        "lowest to the highest seed.",
        f"Dot plot of agreement on all test samples: {ends}.",
        lambda theme: draw_dots(dots, theme, x_label="samples with the same top-1 class (%)"),
    )
    return (picture, table)


def detections_section(groups: Sequence[RunGroup]) -> Section:
    """Build a picture for each group, that of its first seed: images as annotated and as detected."""
    if not groups:
        return Section("detections", "Detections", ())
    parts: list[Part] = []
    lacking = []
    for number, group in enumerate(groups, 1):
        run = group.runs[0]
        picture = read_picture(run.folder)
        if picture is None:
            lacking.append(group.name)
            continue
        seed = f", seed {run.seed}" if len(group.runs) > 1 else ""
        caption = (
            f"{group.name}{seed}: images of the test split as annotated and, below, as detected (score 0.5 or more)."
        )
        ap = run.result["last"]["test"][group.figures.main]
        alt = f"Images with boxes. The {group.figures.title} on the whole split is {ap:.2f} %."
        parts.append(Picture(f"detections-{number}", caption, alt, picture))
    if lacking:
        text = f"Pictures are missing for {', '.join(lacking)}; they appear once the run folder holds {PICTURE}"
        parts.append(Missing(f"{text}, which a run writes at its end (run.test_logits)."))
    parts.append(
        "Logits are not compared here, because each detector proposes regions of its own; the costs of detectors are "
        "not measured."
    )
    return Section("detections", "Detections", tuple(parts))


_STARTS = "starts.jsonl"
_OWN = ("time", "command")
_NAMES = {
    "data_ms": "data",
    "teacher_ms": "teacher",
    "student_forward_ms": "student forward",
    "loss_ms": "loss",
    "backward_ms": "backward",
    "optimiser_ms": "optimiser",
}


def step_time_section(groups: Sequence[GroupData]) -> Section:
    """Build the breakdown of a step where it was measured, and the throughput of all runs."""
    parts: list[Part] = []
    times = {group.name: [seed.step_time for seed in group.seeds if seed.step_time] for group in groups}
    measured = {name: found for name, found in times.items() if found}
    if measured:
        parts += _breakdown(measured)
    lacking = [group.name for group in groups if group.name not in measured]
    if lacking:
        text = f"The breakdown of a step is missing for {', '.join(lacking)}"
        how = f"it appears once the run folder holds {STEP_TIME}, which a run of at least 20 steps writes"
        parts.append(Missing(f"{text}; {how}. Steps captured in a CUDA graph (train.cuda_graph) have no breakdown."))
    rows = tuple(row for group in groups if (row := _pace(group)) is not None)
    if rows:
        caption = "Training throughput: medians over the log lines of all seeds, without the first of each run."
        parts.append(Table(caption, ("", "images per second", "share of time spent waiting for data (%)"), rows))
    return Section("step-time", "Step time", tuple(parts))


def environment_section(sources: Sequence[Path]) -> Section:
    """Build the environment of each run folder, and what changed at a later start.

    Run folders that differ only in time and command share a table.
    """
    tables: list[Part] = []
    missing: list[Part] = []
    alike: dict[str, list[tuple[Path, dict[str, Any]]]] = {}
    for source in sources:
        path = source / "environment.json"
        if not path.exists():
            missing.append(Missing(f"{source} has no environment.json."))
            continue
        found = read_json(path)
        for start in read_lines(source / _STARTS):
            if text := _changes(found, start):
                found[f"from {start.get('time')} on"] = text
        compared = json.dumps({key: value for key, value in found.items() if key not in _OWN}, sort_keys=True)
        alike.setdefault(compared, []).append((source, found))
    for (source, found), *others in alike.values():
        more = f" and {len(others)} others" if len(others) > 1 else " and another" if others else ""
        caption = f"Environment of {source}{more}{', which differ only in time and command' if others else ''}"
        rows = tuple((key, _plain(value)) for key, value in found.items())
        tables.append(Table(caption, ("", "value"), rows, numbers=False))
    return Section("environment", "Environment", (*tables, *missing))


def _changes(first: dict[str, Any], start: dict[str, Any]) -> str:
    """List what a later start changed; empty if nothing relevant did."""
    changed = {key: value for key, value in start.items() if key not in _OWN and value != first.get(key)}
    versions, before = changed.get("versions"), first.get("versions")
    if isinstance(versions, dict) and isinstance(before, dict):
        changed["versions"] = {name: one for name, one in versions.items() if one != before.get(name)}
    return ", ".join(f"{key} {_plain(value)}" for key, value in changed.items())


def _breakdown(measured: dict[str, list[StepTime]]) -> list[Part]:
    bars = [
        Bar(
            name,
            {shown: statistics.mean(float(getattr(time, key)) for time in times) for key, shown in _NAMES.items()},
        )
        for name, times in measured.items()
    ]
    hardware = {name: ", ".join(dict.fromkeys(time.hardware for time in times)) for name, times in measured.items()}
    rows = tuple(
        (
            bar.name,
            *(f"{ms:.2f}" for ms in (*bar.parts.values(), sum(bar.parts.values()))),
            hardware[bar.name],
        )
        for bar in bars
    )
    sums = ", ".join(f"{bar.name} {sum(bar.parts.values()):.3g} ms" for bar in bars)
    differs = " The hardware differs between them." if len(set(hardware.values())) > 1 else ""
    return [
        Picture(
            "step-time",
            f"Where the time of a training step goes, mean over seeds.{differs}",
            f"Stacked bars of milliseconds a step: {sums}.",
            lambda theme: draw_bars(bars, theme, x_label="time of a step (ms)"),
        ),
        Table(
            f"Milliseconds a step, mean over seeds.{differs}",
            ("", *_NAMES.values(), "sum", "hardware"),
            rows,
        ),
    ]


def _pace(group: GroupData) -> tuple[str, str, str] | None:
    rates: list[float] = []
    waits: list[float] = []
    for seed in group.seeds:
        lines = [r for r in seed.records if r.get("kind") == "train" and "images_per_s" in r and "data_wait_share" in r]
        # The first line includes starting the loader and the first call of every kernel.
        for record in lines[1:] or lines:
            rates.append(record["images_per_s"])
            waits.append(record["data_wait_share"])
    if not rates:
        return None
    return group.name, f"{statistics.median(rates):,.0f}", f"{100 * statistics.median(waits):.1f}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items() if one is not None)
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
