"""What `unikd report` does: write the page about finished runs, with its figures."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from unikd_fast.errors import RunError
from unikd_fast.io import make_folder, write_file
from unikd_fast.report.runs import Found, group_runs

if TYPE_CHECKING:
    from unikd_fast.report.page import Picture, Section

_LISTED = 8


class ReportError(RunError, ValueError):
    """An invalid argument; the message says what to change."""

    exit_code = 2


def write_report(found: Found, target: Path, *, title: str | None = None, force: bool = False) -> str:
    """Write the page about these runs, and return a one-line summary of what was written.

    Args:
        found: finished and unfinished runs.
        target: HTML file; the figures are written next to it.
        title: title of the page. If None, the data sets and students are named.
        force: whether to replace an existing page and its figures.

    Raises:
        ReportError: the target is not an HTML file, or exists.
        RunFileError: a file of a run is damaged.
    """
    refuse_target(target, force=force)
    # Only now matplotlib and numpy.
    from unikd_fast.report.page import Picture, write_html

    sections = _sections(found)
    pictures = [part for section in sections for part in section.parts if isinstance(part, Picture)]
    page = write_html(title or _title(found), _sources(found), sections)
    images = _draw(target, pictures, force=force)
    make_folder(target.parent)
    for path, content in [*images.items(), (target, page.encode())]:
        write_file(path, content)
    return f"{target}: {len(found.runs)} runs, {len(pictures)} figures, {len(page.encode()) / 2**20:.1f} MiB"


def refuse_target(target: Path, *, force: bool) -> None:
    """Raise ReportError if the page must not be written."""
    if target.suffix not in (".html", ".htm"):
        raise ReportError(f"--to {target}: the page is HTML; give a name that ends in .html")
    if target.is_dir():
        raise ReportError(f"--to {target} is a folder; give the name of a file in it")
    _refuse_existing(target, force=force)


def _refuse_existing(target: Path, *, force: bool) -> None:
    if target.exists() and not force:
        raise ReportError(f"{target} exists; give another name with --to, or --force to replace it")


def _draw(target: Path, pictures: "Sequence[Picture]", *, force: bool) -> dict[Path, bytes]:
    """Draw the PNG files, before anything is written."""
    from unikd_fast.report.figures import LIGHT, render

    paths = {target.with_name(f"{target.stem}-{picture.name}.png"): picture for picture in pictures}
    for path in paths:
        _refuse_existing(path, force=force)
    return {
        path: picture.draw if isinstance(picture.draw, bytes) else render(picture.draw, LIGHT, "png")
        for path, picture in paths.items()
    }


def _sections(found: Found) -> "list[Section]":
    from unikd_fast.report.accuracy import accuracy_section, cost_section, single_runs_section
    from unikd_fast.report.run_data import gather
    from unikd_fast.report.sections import (
        collapse_section,
        convergence_section,
        detections_section,
        environment_section,
        logit_sections,
        step_time_section,
    )

    groups = group_runs(found.runs)
    students = gather([group for group in groups if not group.is_teacher])
    return [
        accuracy_section(groups, found.unfinished),
        detections_section([group for group in groups if group.figures.by_class]),
        cost_section([group for group in groups if group.figures.has_logits]),
        convergence_section(students),
        *logit_sections([group for group in students if group.figures.has_logits]),
        collapse_section(students),
        step_time_section(students),
        single_runs_section(groups),
        environment_section(list(dict.fromkeys(run.source for run in found.runs))),
    ]


def _sources(found: Found) -> str:
    """Return the run folders, or the folder that holds them if they are many."""
    folders = list(dict.fromkeys(str(run.source) for run in found.runs))
    if len(folders) > _LISTED:
        return f"{len(folders)} run folders in {os.path.commonpath(folders)}"
    return f"Run folders: {', '.join(folders)}"


def _title(found: Found) -> str:
    students = [run for run in found.runs if not run.is_teacher] or list(found.runs)
    named = dict.fromkeys(f"{(run.config.get('data') or {}).get('name')}: {run.result['model']}" for run in students)
    return ", ".join(named)
