"""Run folders as the engine writes them: the networks trained in them, and which ones are seeds of one experiment.

A single run has result.json beside config.json and its teacher in ``teacher/``. A comparison has
``seed-<n>/<label>/`` and ``seed-<n>/teacher/``, or ``teacher/`` if the teacher was given rather than trained.
"""

import copy
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from unikd_fast.report.run_files import RunFileError, read_config, read_result
from unikd_fast.report.table import TEACHER
from unikd_fast.tasks import Figures, figures_of

_CONFIG, _RESULT = "config.json", "result.json"


class Run(NamedTuple):
    """A trained network, or a teacher that was given.

    Args:
        folder: folder of its result.json.
        source: run folder it belongs to, with config.json.
        config: configuration of this run alone, overrides of the comparison applied; for a teacher, the experiment's.
        result: contents of result.json.
        teacher: folder of the teacher's outputs and metrics. If None, there is no teacher.
    """

    folder: Path
    source: Path
    config: dict[str, Any]
    result: dict[str, Any]
    teacher: Path | None

    @property
    def label(self) -> str:
        return str(self.result["label"])

    @property
    def seed(self) -> int:
        return int(self.result["seed"])

    @property
    def is_teacher(self) -> bool:
        return self.label == TEACHER

    @property
    def figures(self) -> Figures:
        """Return the figures of its task."""
        return figures_of(self.result["last"]["test"])


class RunGroup(NamedTuple):
    """The seeds of one experiment, in ascending order; ``name`` is unique within a report."""

    name: str
    runs: tuple[Run, ...]

    @property
    def is_teacher(self) -> bool:
        return self.runs[0].is_teacher

    @property
    def figures(self) -> Figures:
        return self.runs[0].figures


class Found(NamedTuple):
    """The finished runs found in the folders, and one sentence for each run that is not finished."""

    runs: tuple[Run, ...]
    unfinished: tuple[str, ...]


def find_runs(folders: Sequence[Path]) -> Found:
    """Return the runs in the given run folders, each once.

    Args:
        folders: run folders, or subfolders of them that have a result.json.

    Raises:
        RunFileError: a folder is not a run folder, holds no finished run, or has a damaged file.
    """
    runs: dict[Path, Run] = {}
    unfinished: dict[str, None] = {}
    for folder in folders:
        found = _find(folder)
        runs |= {run.folder.resolve(): run for run in found.runs}
        unfinished |= dict.fromkeys(found.unfinished)
    return Found(tuple(runs.values()), tuple(unfinished))


def group_runs(runs: Iterable[Run]) -> list[RunGroup]:
    """Group runs that have one label and differ only in the seed, teachers first.

    Groups with the same label are named by their model as well, or by their folder if that is the same too.
    """
    found: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        found.setdefault((run.label, _identity(run)), []).append(run)
    parts = [part for members in found.values() for part in _distinct_seeds(members)]
    parts.sort(key=lambda part: not part[0].is_teacher)
    labels = [part[0].label for part in parts]
    models = [f"{part[0].label} ({part[0].result['model']})" for part in parts]
    folders = [
        f"{label} ({folder})"
        for label, folder in zip(labels, _short_names([part[0].source for part in parts]), strict=True)
    ]
    groups = []
    for index, part in enumerate(parts):
        name = next((names[index] for names in (labels, models) if names.count(names[index]) == 1), folders[index])
        groups.append(RunGroup(name, tuple(sorted(part, key=lambda run: run.seed))))
    return groups


def _find(folder: Path) -> Found:
    if not folder.exists():
        raise RunFileError(f"{folder} does not exist; give a run folder (run.dir)")
    if (folder / _CONFIG).exists():
        return _find_whole(folder)
    if (folder / _RESULT).exists():
        for parent in (folder.parent, folder.parent.parent):
            if (parent / _CONFIG).exists():
                parts = [folder, folder.parent / TEACHER] if folder.name != TEACHER else [folder]
                return Found(_read_parts(parent, parts, read_config(parent / _CONFIG)), ())
    for parent in folder.resolve().parents[:2]:
        if (parent / _CONFIG).exists():
            raise RunFileError(f"{folder} is part of the run folder {parent} and has no result.json; give {parent}")
    raise RunFileError(f"{folder} is not a run folder, it has no {_CONFIG}; give the folder in run.dir")


def _find_whole(source: Path) -> Found:
    config = read_config(source / _CONFIG)
    seeds = sorted(source.glob("seed-*/"), key=lambda path: (len(path.name), path.name))
    parts = [source / TEACHER, source, *(part for seed in seeds for part in sorted(seed.glob("*/")))]
    runs = _read_parts(source, parts, config)
    if all(run.is_teacher for run in runs):
        raise RunFileError(
            f"{source} holds no finished run (no {_RESULT}); let it finish: unikd train ... --resume auto"
        )
    compare = config.get("compare") or {}
    places = {label: place for place, label in enumerate(compare.get("runs", ()))}
    runs = tuple(sorted(runs, key=lambda run: places.get(run.label, -1)))  # as the configuration lists them
    finished = {(run.label, run.seed) for run in runs}
    missing = [(label, seed) for seed in compare.get("seeds", ()) for label in compare.get("runs", ())]
    return Found(
        runs,
        tuple(
            f"{label}, seed {seed} of {source} is not finished (no {_RESULT}) and is left out."
            for label, seed in missing
            if (label, seed) not in finished
        ),
    )


def _read_parts(source: Path, parts: Iterable[Path], config: dict[str, Any]) -> tuple[Run, ...]:
    compare = config.get("compare") or {}
    runs = []
    for part in parts:
        path = part / _RESULT
        if not path.exists():
            continue
        result = read_result(path)
        settings = compare.get("runs", {}).get(result["label"], {})
        places = [part, source] if part == source else [part.parent, source]
        teachers = (place / TEACHER for place in places if part.name != TEACHER)
        teacher = next((folder for folder in teachers if (folder / _RESULT).exists()), None)
        runs.append(Run(part, source, apply_settings(config, settings), result, teacher))
    return tuple(runs)


def apply_settings(config: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Return a copy of a configuration with dotted keys, such as ``distill.method``, set to new values."""
    changed = copy.deepcopy(config)
    for key, value in settings.items():
        *path, last = key.split(".")
        section = changed
        for name in path:
            if not isinstance(section.get(name), dict):
                section[name] = {}
            section = section[name]
        section[last] = value
    return changed


def _identity(run: Run) -> str:
    """Return what two seeds of one experiment have in common in their configuration."""
    left_out = ("run", "compare", "$schema", *(("student", "distill") if run.is_teacher else ()))
    kept = {key: value for key, value in run.config.items() if key not in left_out}
    return json.dumps([kept, run.result["method"], run.result["model"]], sort_keys=True)


def _distinct_seeds(members: list[Run]) -> list[list[Run]]:
    """Split the runs by source if a seed was run more than once."""
    if len({run.seed for run in members}) == len(members):
        return [members]
    sources: dict[Path, list[Run]] = {}
    for run in members:
        sources.setdefault(run.source, []).append(run)
    return list(sources.values())


def _short_names(folders: Sequence[Path]) -> list[str]:
    """Return the last part of each path, or the whole path where two would have the same name."""
    resolved = [folder.resolve() for folder in folders]
    names: dict[str, set[Path]] = {}
    for path in resolved:
        names.setdefault(path.name, set()).add(path)
    return [path.name if len(names[path.name]) == 1 else str(path) for path in resolved]
