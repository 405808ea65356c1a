"""Trackers: programs that show the course of runs beside metrics.jsonl. Only the first process has them.

A tracker is an observer: whatever fails in it is said once, and training goes on without it.
"""

import importlib.util
import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from unikd_fast.errors import ConfigError
from unikd_fast.io import read_json, write_json

_logger = logging.getLogger("unikd_fast")

_IDS = "trackers.json"  # in the run folder: the runs that a resumed run continues


class TrackedRun(NamedTuple):
    """What trackers show of a run besides its figures.

    Args:
        folder: run folder, or that of one run of a comparison.
        group: name of the experiment, which a comparison's runs have in common.
        name: name of the run within it.
        settings: its whole configuration, in sections.
        commit: commit of this package's source tree.
        step: number of steps that were made before this start.
    """

    folder: Path
    group: str
    name: str
    settings: Mapping[str, Any]
    commit: str
    step: int


class Tracker(Protocol):
    """The run as one tracker shows it. ``known`` is what `id` was at an earlier start of the run, or None."""

    id: str | None

    def __init__(self, run: TrackedRun, known: str | None) -> None: ...

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        """Add figures by name, such as "train/total"."""

    def close(self, *, finished: bool) -> None:
        """End the tracked run, which is finished or may be continued."""


class _TensorBoard:
    def __init__(self, run: TrackedRun, known: str | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        threading.excepthook = _without_tensorboard
        self.id: str | None = None
        self._writer = SummaryWriter(run.folder / "tensorboard", purge_step=run.step + 1)
        settings = json.dumps({**run.settings, "commit": run.commit}, indent=2)
        self._writer.add_text("configuration", f"```json\n{settings}\n```", run.step)

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)

    def close(self, *, finished: bool) -> None:
        self._writer.close()


def _without_tensorboard(failure: threading.ExceptHookArgs) -> None:
    """Print no traceback of TensorBoard's thread, whose errors its next call raises."""
    if not (isinstance(failure.exc_value, OSError) and type(failure.thread).__module__.startswith("tensorboard.")):
        threading.__excepthook__(failure)


class _Wandb:
    def __init__(self, run: TrackedRun, known: str | None) -> None:
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", "300")  # seconds; by default it waits for a lost network forever
        import wandb

        self.id: str | None = known or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "unikd"),
            group=run.group,
            name=run.name,
            dir=run.folder,
            id=self.id,
            resume="allow",
            config={**run.settings, "commit": run.commit},
            reinit="create_new",  # a run of the caller's own stays as it is
            settings=wandb.Settings(console="off"),
        )

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self, *, finished: bool) -> None:
        self._run.finish(exit_code=0 if finished else 1)


_MOST_PARAMETERS = 100  # in one request to MLflow


class _MLflow:
    def __init__(self, run: TrackedRun, known: str | None) -> None:
        # By default a server that is gone holds up a request for four minutes.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self._client = MlflowClient()
        if known is not None:
            self.id: str | None = known
            self._client.update_run(known, status="RUNNING")
            return
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", run.group)
        experiment = self._client.get_experiment_by_name(name)
        number = self._client.create_experiment(name) if experiment is None else experiment.experiment_id
        tags = {"mlflow.source.git.commit": run.commit, "group": run.group}
        self.id = self._client.create_run(number, run_name=run.name, tags=tags).info.run_id
        parameters = [Param(key, str(value)) for key, value in _flat(run.settings)]
        for first in range(0, len(parameters), _MOST_PARAMETERS):
            self._client.log_batch(self.id, params=parameters[first : first + _MOST_PARAMETERS])

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        from mlflow.entities import Metric

        now = int(1000 * time.time())
        self._client.log_batch(self.id, metrics=[Metric(name, value, now, step) for name, value in figures.items()])

    def close(self, *, finished: bool) -> None:
        self._client.set_terminated(self.id, "FINISHED" if finished else "KILLED")


TRACKERS: dict[str, type[Tracker]] = {"tensorboard": _TensorBoard, "wandb": _Wandb, "mlflow": _MLflow}
_EXTRAS = {"tensorboard": "train", "wandb": "tracking", "mlflow": "tracking"}


def require_trackers(names: Sequence[str]) -> None:
    """Check that the packages of trackers are installed.

    Raises:
        ConfigError: one is not; names the extra that brings it.
    """
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"run.trackers = {list(names)}: the package {name} is not installed; "
                f"pip install 'unikd-fast[{_EXTRAS[name]}]', or take it out of the list"
            )


class Trackers:
    """The trackers of a run, as far as they work. Nothing is raised: a tracker that fails is left out with a warning.

    Args:
        names: trackers by name.
        run: what they show.
    """

    def __init__(self, names: Sequence[str], run: TrackedRun) -> None:
        self._label = run.name
        self._running: dict[str, Tracker] = {}
        for name in names:
            self._try(name, lambda name=name: self._start(name, run))  # type: ignore[misc]

    def _start(self, name: str, run: TrackedRun) -> None:
        path = run.folder / _IDS
        ids = read_json(path) if path.exists() else {}
        tracker = TRACKERS[name](run, ids.get(name))
        self._running[name] = tracker
        if tracker.id not in (None, ids.get(name)):
            write_json(path, {**ids, name: tracker.id})

    def log(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Show the numbers among some values, which may be nested, under ``kind``."""
        figures = {f"{kind}/{key}": value for key, value in _flat(values) if isinstance(value, int | float)}
        for name, tracker in list(self._running.items()):
            self._try(name, lambda tracker=tracker: tracker.log(step, figures))  # type: ignore[misc]

    def close(self, *, finished: bool) -> None:
        for name, tracker in list(self._running.items()):
            self._try(name, lambda tracker=tracker: tracker.close(finished=finished))  # type: ignore[misc]
        self._running.clear()

    def _try(self, name: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # of any library, the network or the disk
            self._running.pop(name, None)
            said = str(error).strip().partition("\n")[0] or type(error).__name__
            _logger.warning(f"[{self._label}] tracking with {name} ends here, and the run goes on: {said}")


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dictionaries with their dotted keys."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
