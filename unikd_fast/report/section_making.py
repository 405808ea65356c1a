"""How fast the runs went, and on what and with what they were made."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from unikd_fast.report.content import Missing, Part, Picture, Section, Table
from unikd_fast.report.evidence import Material
from unikd_fast.report.figures import Bar, draw_bars
from unikd_fast.report.records import read_json, read_lines
from unikd_fast.report.run_files import STEP_TIME, StepTime

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


def step_time_section(materials: Sequence[Material]) -> Section:
    """Where a step's time goes, where that was measured, and the pace of all runs."""
    parts: list[Part] = []
    times = {material.name: [seed.step_time for seed in material.seeds if seed.step_time] for material in materials}
    measured = {name: found for name, found in times.items() if found}
    if measured:
        parts += _breakdown(measured)
    lacking = [material.name for material in materials if material.name not in measured]
    if lacking:
        text = f"The breakdown of a step is missing for {', '.join(lacking)}"
        how = f"it appears once the run's folder holds {STEP_TIME}, which a run of 20 steps writes"
        parts.append(Missing(f"{text}; {how}. Steps captured in a CUDA graph (train.cuda_graph) have no parts."))
    rows = tuple(row for material in materials if (row := _pace(material)) is not None)
    if rows:
        caption = "Pace in training: medians over the log lines of all seeds, without the first of each run."
        parts.append(Table(caption, ("", "images per second", "share of time spent waiting for data (%)"), rows))
    return Section("step-time", "Step time", tuple(parts))


def making_section(sources: Sequence[Path]) -> Section:
    """The environment of each run folder, and what was another at a later start.

    Those that differ in time and command alone stand together.
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
        caption = f"Environment of {source}{more}{', which differ in time and command alone' if others else ''}"
        rows = tuple((key, _plain(value)) for key, value in found.items())
        tables.append(Table(caption, ("", "value"), rows, numbers=False))
    return Section("environment", "How these were made", (*tables, *missing))


def _changes(first: dict[str, Any], start: dict[str, Any]) -> str:
    """What a later start had that the first had not; empty where nothing of it matters."""
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


def _pace(material: Material) -> tuple[str, str, str] | None:
    rates: list[float] = []
    waits: list[float] = []
    for seed in material.seeds:
        lines = [r for r in seed.records if r.get("kind") == "train" and "images_per_s" in r and "data_wait_share" in r]
        # The first has the start of the loader and the first call of every kernel.
        for record in lines[1:] or lines:
            rates.append(record["images_per_s"])
            waits.append(record["data_wait_share"])
    if not rates:
        return None
    return material.name, f"{statistics.median(rates):,.0f}", f"{100 * statistics.median(waits):.1f}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {_plain(one)}" for key, one in value.items() if one is not None)
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
