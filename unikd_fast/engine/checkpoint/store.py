"""The checkpoints of a run: which is the newest complete one, how many are kept, and writing beside training."""

import logging
import re
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from unikd_fast.engine.checkpoint.files import DamagedCheckpoint, check_folder, write_folder
from unikd_fast.io import remove_folder, remove_leftovers

FOLDER = Path("checkpoints")

_NAME = re.compile(r"step-\d{9}")
_ASIDE = re.compile(r"\.(step-\d{9})\.replaced")
_logger = logging.getLogger("unikd_fast")


def checkpoint_name(step: int) -> str:
    """Return the name of the checkpoint after a step.

    Example:
        >>> checkpoint_name(1200)
        'step-000001200'
    """
    return f"step-{step:09}"


def complete_checkpoints(run: Path) -> list[Path]:
    """Return the checkpoints of a run folder, the newest first.

    Unfinished folders have other names. A checkpoint that was set aside when the process was killed counts.
    """
    folder = run / FOLDER
    if not folder.is_dir():
        return []
    found = [path for path in folder.iterdir() if _NAME.fullmatch(path.name)]
    aside = [path for path in folder.iterdir() if _ASIDE.fullmatch(path.name)]
    return sorted([*found, *aside], key=lambda path: (_step(path), path in found), reverse=True)


def find_newest(run: Path, accept: Callable[[Path], object] = lambda path: None) -> Path | None:
    """Return the newest intact checkpoint, or None if there are no checkpoints.

    Damaged checkpoints are skipped with a warning. A running process may write and remove checkpoints meanwhile.

    Args:
        accept: function that raises DamagedCheckpoint for a checkpoint that is intact but cannot be used.

    Raises:
        DamagedCheckpoint: there are checkpoints, and none is intact.
    """
    there = complete_checkpoints(run)
    while True:
        faults: list[str] = []
        for path in there:
            try:
                check_folder(path)
                accept(path)
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
    """Write the checkpoints of a run, one at a time, and keep the latest ones.

    Args:
        run: run folder.
        keep: number of latest checkpoints to keep.
        beside_training: whether to write in a thread; an error is then raised by the next `write` or `finish`.
    """

    def __init__(self, run: Path, *, keep: int, beside_training: bool) -> None:
        self._folder = run / FOLDER
        self._keep = keep
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="unikd-checkpoint") if beside_training else None
        self._writing: Future[None] | None = None

    def write(self, step: int, parts: dict[str, Any]) -> None:
        """Write a checkpoint, or start to, after the previous one is finished.

        Args:
            step: number of steps that were done.
            parts: nested state by name, not to be changed until it is written.

        Raises:
            CheckpointError: this checkpoint, or the previous one, could not be written.
        """
        self.finish()
        if self._thread is None:
            self._write(step, parts)
        else:
            self._writing = self._thread.submit(self._write, step, parts)

    def finish(self) -> None:
        """Wait until everything is written.

        Raises:
            CheckpointError: a checkpoint could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def close(self) -> None:
        """Wait as `finish` does, and end the thread."""
        try:
            self.finish()
        finally:
            if self._thread is not None:
                self._thread.shutdown()

    def _write(self, step: int, parts: dict[str, Any]) -> None:
        folder = self._folder
        for path in folder.glob(".*"):  # set aside when the process was killed
            if (name := _ASIDE.fullmatch(path.name)) and not (folder / name[1]).exists():
                path.rename(folder / name[1])
        write_folder(folder / checkpoint_name(step), parts)
        there = complete_checkpoints(folder.parent)
        # Later steps are damaged: the run was resumed from an earlier one.
        past = [path for path in there if _step(path) > step]
        for path in [*past, *[path for path in there if path not in past][self._keep :]]:
            remove_folder(path)
        remove_leftovers(folder, "step-")


def _step(path: Path) -> int:
    return int(path.name.strip(".").split(".")[0].removeprefix("step-"))
