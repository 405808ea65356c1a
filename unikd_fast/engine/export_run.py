"""The run in a folder: its configuration, also where it is one of several in the folder of a comparison."""

import os
from collections.abc import Mapping
from pathlib import Path

from unikd_fast.config import Config, ConfigError, run_configs
from unikd_fast.config.load import read_stored, run_path, teacher_config

CONFIG = "config.json"
_DEPTH = 2  # a comparison keeps its runs in seed-<seed>/<label>


def read_run(folder: Path) -> Config:
    """The configuration of the single run whose checkpoints are in a folder.

    Args:
        folder: of a run, of one run of a comparison (``runs/x/seed-0/unikd``), or of a teacher that was trained first
            (``runs/x/teacher``).

    Raises:
        ConfigError: it is no folder of a run, or of several; names those there are.

    Example:
        >>> read_run(Path("runs/digits-5cb1dd29/seed-0/unikd")).distill.method
        'unikd'
    """
    if not folder.is_dir():
        raise ConfigError(f"no folder {folder}; give that of a run, which run.dir names")
    here = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would leave a linked folder for another one
    for root in (here, *here.parents[:_DEPTH]):
        if (root / CONFIG).is_file():
            runs = _runs(read_stored(root / CONFIG))
            name = here.relative_to(root).as_posix()
            if name in runs:
                return runs[name]
            raise ConfigError(_which(folder, root, runs))
    raise ConfigError(f"{folder} is no run folder: it has no {CONFIG}; give that of a run, which run.dir names")


def _runs(config: Config) -> dict[str, Config]:
    """The single runs of a configuration by their folders below that of the configuration."""
    runs: dict[str, Config] = {}
    for label, seed, single in run_configs(config):
        home = f"seed-{seed}/" if config.compare else ""
        teacher = single.teacher
        if single.distill.method != "none" and teacher is not None and teacher.weights is None and teacher.training:
            runs.setdefault(f"{home}teacher", teacher_config(single))
        runs[run_path(config, label, seed)] = single
    return runs


def _which(folder: Path, root: Path, runs: Mapping[str, Config]) -> str:
    started = [str(root / name) for name in runs if (root / name).is_dir()]
    if root == Path(os.path.abspath(folder)):  # noqa: PTH100
        what = f"{folder} holds a comparison of {len(runs)} runs"
    else:
        what = f"{folder} is no run folder, but lies in {root}, which is one"
    return f"{what}; name one of these: {', '.join(started)}" if started else f"{what}, and none has started"
