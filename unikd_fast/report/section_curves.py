"""What is drawn over the epochs: convergence (Fig 3) and the indicators of the teacher's head."""

from collections.abc import Callable, Sequence

import numpy as np

from unikd_fast.report.content import Missing, Part, Picture, Section, Table
from unikd_fast.report.curves import Line, course, keys_with, line_over_seeds, loss_terms
from unikd_fast.report.evidence import Material
from unikd_fast.report.figures import Panel, draw_curves

_EPOCH = "epoch"
_PROBE = "probe_kl"
_INDICATORS = {
    "head_mean_std": ("Spread of the means m_t", "standard deviation"),
    "head_variance": ("Variances v_t", "mean variance"),
    "head_accuracy": ("Accuracy of argmax m_t", "share of samples (0–1)"),
}


def convergence_section(materials: Sequence[Material]) -> Section:
    """Fig 3: cross-entropy, the common probe, and each method's own loss terms."""
    split, names = _split(materials), [material.name for material in materials]
    parts: list[Part] = []
    panels = [
        Panel(f"Cross-entropy, {split}", _EPOCH, "nats a sample", _lines(materials, "evaluation", "ce")),
        Panel(
            f"Common probe, {split}", _EPOCH, "τ² KL, τ = 4 (nats a sample)", _lines(materials, "evaluation", _PROBE)
        ),
    ]
    terms = dict.fromkeys(
        term for material in materials for seed in material.seeds for term in loss_terms(seed.records)
    )
    panels += [Panel(f"{term}, training", _EPOCH, "loss term", _term_lines(materials, term)) for term in terms]
    shown = tuple(panel for panel in panels if panel.lines)
    if shown:
        parts.append(
            Picture(
                "convergence",
                "Fig 3. Cross-entropy and the common probe on data that is not trained on, then each method's own loss "
                f"terms in training, as it logs them.{_band(materials)} Own terms of different methods do not "
                "compare; the probe is the same measure for all.",
                _alt(shown),
                lambda theme: draw_curves(shown, theme, names),
            )
        )
    else:
        parts.append(
            Missing("The course of training appears once the run folders hold metrics.jsonl with evaluation records.")
        )
    probed = {line.name for line in panels[1].lines}
    taught = [
        m for m in materials if m.group.runs[0].teacher is not None and m.group.runs[0].result["method"] != "none"
    ]
    lacking = [m.name for m in taught if m.name not in probed]
    if lacking:
        parts.append(
            Missing(
                f"The common probe is missing for {', '.join(lacking)}. It appears once the evaluation records of "
                f"metrics.jsonl hold {_PROBE}."
            )
        )
    return Section("convergence", "Convergence", tuple(parts))


def collapse_section(materials: Sequence[Material]) -> Section:
    """The head_* indicators over the epochs, and where they end."""
    keys = dict.fromkeys(
        key
        for material in materials
        for seed in material.seeds
        for key in keys_with(seed.records, "evaluation", lambda key: key.startswith("head_"))
    )
    found = {key: lines for key in keys if (lines := _lines(materials, "evaluation", key))}
    if not found:
        text = (
            "No run has indicators of a teacher's head. Methods that have one (UniKD) write head_* at every evaluation."
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
            "Trained through the feature loss alone, the teacher's side of UniKD can shrink to nothing, and the loss "
            "with it. That shows as a spread of the means that goes to 0 and an accuracy at chance.",
            Picture(
                "collapse",
                f"The teacher's head at every evaluation, on the {_split(materials)}.{_band(materials)}",
                _alt(panels),
                lambda theme: draw_curves(panels, theme, [material.name for material in materials]),
            ),
            Table("The same at the last evaluation, mean over seeds.", header, rows),
        ),
    )


def _term_lines(materials: Sequence[Material], term: str) -> tuple[Line, ...]:
    """Of the groups whose loss has the term; others may log zeros for it."""
    having = [m for m in materials if any(term in loss_terms(seed.records) for seed in m.seeds)]
    return _lines(having, "train", term)


def _lines(materials: Sequence[Material], kind: str, key: str) -> tuple[Line, ...]:
    lines = []
    for material in materials:
        courses = [found for seed in material.seeds if (found := course(seed.records, kind, key))]
        if (line := line_over_seeds(material.name, courses)) is not None:
            lines.append(line)
    return tuple(lines)


def _indicator_panel(key: str, lines: tuple[Line, ...]) -> Panel:
    """From zero, so that what looks like a fall is one; of an indicator that is not known, as its lines need."""
    if key not in _INDICATORS:
        return Panel(key, _EPOCH, "indicator", lines)
    highest = max((float(line.high.max()) for line in lines if np.isfinite(line.high).all()), default=1.0)
    top = 1.02 if key == "head_accuracy" else 1.08 * highest or 1.0
    title, y_label = _INDICATORS[key]
    return Panel(title, _EPOCH, y_label, lines, y_limits=(0.0, top))


def _last_value(lines: Sequence[Line], name: str) -> str:
    return next((f"{line.mean[-1]:.4g}" for line in lines if line.name == name), "–")


def _split(materials: Sequence[Material]) -> str:
    """What an evaluation during training is on: the test split where there is no other."""
    on_test = {bool(run.result["test_is_val"]) for material in materials for run in material.group.runs}
    return {frozenset({True}): "test split", frozenset({False}): "validation split"}.get(
        frozenset(on_test), "validation or test split"
    )


def _band(materials: Sequence[Material]) -> str:
    several = any(len(material.seeds) > 1 for material in materials)
    return " Lines are means over seeds, bands reach from the lowest seed to the highest." if several else ""


def _alt(panels: Sequence[Panel], last: Callable[[Line], str] = lambda line: f"{line.mean[-1]:.4g}") -> str:
    """Where each line ends, panel by panel."""
    ends = (f"{panel.title}: {', '.join(f'{line.name} {last(line)}' for line in panel.lines)}" for panel in panels)
    return f"Line charts. Last values: {'; '.join(ends)}."
