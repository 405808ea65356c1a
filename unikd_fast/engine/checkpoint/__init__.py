"""Checkpoints of a run: state.py says what they hold, files.py how one lies on disk, store.py which one counts."""

from unikd_fast.engine.checkpoint.files import DamagedCheckpoint, read_folder, read_header
from unikd_fast.engine.checkpoint.state import (
    collect_state,
    require_same_head,
    require_usable,
    restore_average,
    restore_random_state,
    restore_weights,
    restoring,
)
from unikd_fast.engine.checkpoint.store import (
    FOLDER,
    CheckpointWriter,
    checkpoint_name,
    complete_checkpoints,
    find_newest,
)

__all__ = [
    "FOLDER",
    "CheckpointWriter",
    "DamagedCheckpoint",
    "checkpoint_name",
    "collect_state",
    "complete_checkpoints",
    "find_newest",
    "read_folder",
    "read_header",
    "require_same_head",
    "require_usable",
    "restore_average",
    "restore_random_state",
    "restore_weights",
    "restoring",
]
