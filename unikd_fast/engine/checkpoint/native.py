"""DeepSpeed's own checkpoints, beside ours, for the tools that read them; pickled, so that no run goes on from one."""

import shutil
from pathlib import Path
from typing import Any

from unikd_fast.engine.checkpoint.store import FOLDER, checkpoint_name
from unikd_fast.engine.distributed import Processes
from unikd_fast.errors import CheckpointError

NATIVE = FOLDER / "deepspeed"


def write_native(engine: Any, run: Path, processes: Processes, *, step: int, keep: int) -> None:
    """Has DeepSpeed write its checkpoint of a step; all processes must call it, and wait for the disk.

    Args:
        engine: the DeepSpeed engine.
        run: folder of the run.
        keep: of the newest such checkpoints.

    Raises:
        CheckpointError: this process cannot write its part; the others then hear that it was lost.
    """
    folder = run / NATIVE
    try:
        engine.save_checkpoint(str(folder), tag=checkpoint_name(step))
    except (OSError, RuntimeError) as error:  # torch.save says the latter of a full disk
        said = str(error).partition("\n")[0]
        raise CheckpointError(
            f"cannot write DeepSpeed's checkpoint {folder / checkpoint_name(step)}: {said}; free the disk, or set "
            "run.deepspeed_checkpoints = false, and continue with --resume auto"
        ) from error
    processes.barrier()
    if processes.is_first:
        for old in sorted(path for path in folder.iterdir() if path.is_dir())[:-keep]:
            shutil.rmtree(old, ignore_errors=True)
