"""The checkpoints of a run: which is the newest complete one, how many are kept, and writing beside training."""

import logging
import re
import shutil
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from unikd_fast.engine.checkpoint.files import (
    UNFINISHED,
    DamagedCheckpoint,
    check_folder,
    remove_folder,
    write_folder,
    write_text,
)

FOLDER = Path("checkpoints")
LATEST = "latest"

_NAME = re.compile(r"step-(\d{9})")
_logger = logging.getLogger("unikd_fast")


def checkpoint_name(step: int) -> str:
    """Folder of the checkpoint after a step.

    Example:
        >>> checkpoint_name(1200)
        'step-000001200'
    """
    return f"step-{step:09}"


def complete_checkpoints(run: Path) -> list[Path]:
    """The checkpoints of a run folder, the newest first: that which `latest` names, then by step.

    A folder that was not finished has another name.
    """
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    found = sorted((path for path in folder.iterdir() if _NAME.fullmatch(path.name)), reverse=True)
    named = folder / _latest(folder)
    return [named, *(path for path in found if path != named)] if named in found else found


def find_newest(run: Path) -> Path | None:
    """The newest checkpoint that is whole; damaged ones are passed over with a warning. None: there is none at all.

    A run that goes on may write and remove checkpoints meanwhile: what is found, or missed, is of one moment.

    Raises:
        DamagedCheckpoint: there are some, and none is whole.
    """
    there = complete_checkpoints(run)
    while True:
        faults: list[str] = []
        for path in there:
            try:
                check_folder(path)
            except DamagedCheckpoint as error:
                if path.is_dir():
                    faults.append(str(error))
                continue
            for fault in faults:
                _logger.warning("passed over a checkpoint: %s; continuing from %s", fault, path)
            return path
        now = complete_checkpoints(run)
        if now == there:
            break
        there = now
    if faults:
        raise DamagedCheckpoint(
            f"no checkpoint in {run / FOLDER} is whole: {'; '.join(faults)}; restore one, or start a new run folder"
        )
    return None


class CheckpointWriter:
    """Writes the checkpoints of a run, one at a time, and keeps the last few.

    Args:
        run: folder of the run.
        keep: of the newest checkpoints.
        beside_training: write in a thread; an error then comes with the next `write` or `finish`.
    """

    def __init__(self, run: Path, *, keep: int, beside_training: bool) -> None:
        self._folder = run / FOLDER
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="unikd-checkpoint") if beside_training else None
        self._writing: Future[None] | None = None

    def write(self, step: int, parts: dict[str, Any]) -> None:
        """Writes a checkpoint, or starts to; waits for the one before.

        Args:
            step: it was taken after.
            parts: nested state by name, not to be changed by anyone until it is written.

        Raises:
            CheckpointError: this one, or the one before, could not be written.
        """
        self.finish()
        if self._thread is None:
            self._write(step, parts)
        else:
            self._writing = self._thread.submit(self._write, step, parts)

    def finish(self) -> None:
        """Waits until everything is written.

        Raises:
            CheckpointError: it could not be.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """As `finish`, and ends the thread."""
        try:
            self.finish()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    def _write(self, step: int, parts: dict[str, Any]) -> None:
        write_folder(self._folder / checkpoint_name(step), parts)
        write_text(self._folder / LATEST, checkpoint_name(step) + "\n")
        # Later steps are of a run that was resumed before them, because they were damaged.
        there = complete_checkpoints(self._folder.parent)
        past = [path for path in there if path.name > checkpoint_name(step)]
        for path in self._folder.glob(f"{UNFINISHED}*"):
            shutil.rmtree(path, ignore_errors=True)
        for path in [*past, *[path for path in there if path not in past][self._keep :]]:
            remove_folder(path)


def _latest(folder: Path) -> str:
    """The name in `latest`; a name that could lead elsewhere counts as none."""
    try:
        name = (folder / LATEST).read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
    return name if _NAME.fullmatch(name) else ""
