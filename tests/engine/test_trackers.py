"""Trackers: what they are told of a run, how a resumed run continues, and that a run outlives their failures."""

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import pytest

from support.real_runs import ALONE, run, write_config
from unikd_fast.engine import trackers
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.metrics import MetricsWriter

SHORT: dict[str, Any] = {
    "data": {"image_size": 16, "synthetic_samples": 32},
    "student": {"model": "cifar/resnet8"},
    "distill": {"method": "kd"},
    "train": {"total_epochs": 1, "accumulation_steps": 1, "ema_decay": None},
}


def config_of(folder: Path, *names: str, **sections: Any) -> Path:
    return write_config(folder, name="run", run={"trackers": list(names)}, **{**SHORT, **sections})


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


class Told:
    """A tracker that keeps what it is told."""

    def __init__(self, run: trackers.TrackedRun, known: str | None) -> None:
        self.id, self.run, self.known = "its id", run, known
        self.figures: dict[int, dict[str, float]] = {}
        self.finished: bool | None = None
        Told.all.append(self)

    all: ClassVar[list["Told"]] = []

    def log(self, step: int, figures: Mapping[str, float]) -> None:
        self.figures.setdefault(step, {}).update(figures)

    def close(self, *, finished: bool) -> None:
        self.finished = finished


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> list[Told]:
    monkeypatch.setitem(trackers.TRACKERS, "tensorboard", Told)
    monkeypatch.setattr(Told, "all", [])
    return Told.all


def test_a_tracker_has_every_figure_and_the_settings(tmp_path: Path, told: list[Told]) -> None:
    done = run(config_of(tmp_path, "tensorboard"))
    assert done.returncode == 0, done.stderr
    (one,) = told
    folder = tmp_path / "run"
    for kind in ("train", "evaluation"):
        for record in records(folder, kind):
            shown = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
            assert {f"{kind}/{key}": value for key, value in shown.items()}.items() <= one.figures[
                record["step"]
            ].items()
    result = json.loads((folder / "result.json").read_text())
    assert one.figures[2]["result/best.test.accuracy"] == result["best"]["test"]["accuracy"]
    assert one.run.settings["student"]["model"] == "cifar/resnet8"
    assert one.run.commit == json.loads((folder / "environment.json").read_text())["commit"]
    assert (one.run.group, one.run.name, one.run.step, one.finished) == ("run", "student, seed 0", 0, True)
    assert json.loads((folder / "trackers.json").read_text()) == {"tensorboard": "its id"}


@pytest.mark.long
def test_a_comparison_has_a_tracked_run_for_each_seed(tmp_path: Path, told: list[Told]) -> None:
    runs = {"alone": {"distill.method": "none"}, "KD": {"distill.method": "kd"}}
    done = run(config_of(tmp_path, "tensorboard", compare={"seeds": [3, 4], "runs": runs}))
    assert done.returncode == 0, done.stderr
    assert [one.run.name for one in told] == [f"{label}, seed {seed}" for seed in (3, 4) for label in runs]
    assert {one.run.group for one in told} == {"run"}
    assert [one.run.settings["run"]["seed"] for one in told] == [3, 3, 4, 4]


def test_a_resumed_run_continues_its_tracked_run(tmp_path: Path, told: list[Told]) -> None:
    config = config_of(tmp_path, "tensorboard")
    stopped = run(config, "--set", "train.nonfinite=stop", "--set", "train.learning_rate=1e30")
    assert stopped.returncode == 3, stopped.stderr
    assert told[0].finished is False
    assert run(config, "--resume", "auto", "--set", "train.learning_rate=1e30").returncode == 3
    assert told[1].known == told[0].id


@pytest.mark.parametrize("when", ["__init__", "log", "close"])
def test_a_run_outlives_its_tracker(
    tmp_path: Path, told: list[Told], monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route to the tracker\nand more")

    monkeypatch.setattr(Told, when, fail)
    done = run(config_of(tmp_path, "tensorboard"))
    assert done.returncode == 0, done.stderr
    said = "[student, seed 0] tracking with tensorboard ends here, and the run goes on: no route to the tracker\n"
    assert done.stderr.count(said) == done.stderr.count("no route") == 1
    assert "and more" not in done.stderr


def test_a_missing_package_is_refused_before_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    config = config_of(tmp_path, "tensorboard", "wandb")
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == "wandb" else object())
    done = run(config)
    assert done.returncode == 2
    assert done.stderr.strip().splitlines()[-1] == (
        "unikd train: error: run.trackers = ['tensorboard', 'wandb']: the package wandb is not installed; "
        "pip install 'unikd-fast[tracking]', or take it out of the list"
    )
    assert not (tmp_path / "run").exists()


def test_only_the_first_process_tracks(tmp_path: Path) -> None:
    class Second(Processes):
        def broadcast(self, value: Any) -> Any:
            return None, None, None

    def track() -> trackers.Trackers:
        raise AssertionError("the second process tracks")

    writer = MetricsWriter(tmp_path, Second(1, 2, 1, ALONE.device), label="x", total_steps=9, start_step=0, track=track)
    writer.write("train", 1, {"total": 1.0})
    writer.finish(1, {})
    writer.close()


def test_tensorboard_shows_what_is_recorded(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    assert run(config_of(tmp_path, "tensorboard")).returncode == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    expected = {record["step"]: record["ce"] for record in records(tmp_path / "run", "evaluation")}
    # TensorBoard holds fp32.
    assert {one.step: one.value for one in events.Scalars("evaluation/ce")} == pytest.approx(expected, rel=2**-23)
    assert "cifar/resnet8" in events.Tensors("configuration/text_summary")[0].tensor_proto.string_val[0].decode()


# A new database takes MLflow ten seconds.
@pytest.mark.parametrize("store", [pytest.param("sqlite:///{}/runs.db", marks=pytest.mark.long), "file:{}/runs"])
def test_mlflow_holds_the_run_and_its_continuation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, store: str) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", store.format(tmp_path))
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracked = trackers.TrackedRun(tmp_path, "digits-1", "KD, seed 0", {"train": {"lr": 0.5}, "n": 1}, "abc-dirty", 0)
    first = trackers.Trackers(["mlflow"], tracked)
    first.log("train", 1, {"total": 2.0, "files": ["a"]})
    first.close(finished=False)
    client = MlflowClient()
    number = json.loads((tmp_path / "trackers.json").read_text())["mlflow"]
    assert client.get_run(number).info.status == "KILLED"
    again = trackers.Trackers(["mlflow"], tracked._replace(step=1))
    again.log("train", 2, {"total": 1.5})
    again.close(finished=True)
    experiment = client.get_experiment_by_name("digits-1")
    assert experiment is not None
    (found,) = client.search_runs([experiment.experiment_id])
    assert (found.info.run_id, found.info.status, found.info.run_name) == (number, "FINISHED", "KD, seed 0")
    assert found.data.params == {"train.lr": "0.5", "n": "1"}
    assert found.data.tags["mlflow.source.git.commit"] == "abc-dirty"
    assert [(one.step, one.value) for one in client.get_metric_history(number, "train/total")] == [(1, 2.0), (2, 1.5)]


def test_mlflow_takes_every_setting_of_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/runs")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    done = run(config_of(tmp_path, "mlflow"))
    assert done.returncode == 0 and "tracking with" not in done.stderr, done.stderr
    number = json.loads((tmp_path / "run" / "trackers.json").read_text())["mlflow"]
    found = MlflowClient().get_run(number)
    assert found.data.params["train.learning_rate"] == "0.05"
    (record,) = records(tmp_path / "run", "evaluation")
    assert found.data.metrics["evaluation/ce"] == record["ce"]


def test_a_server_that_is_gone_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    done = run(config_of(tmp_path, "mlflow"))
    assert done.returncode == 0, done.stderr
    assert (
        done.stderr.count("tracking with mlflow ends here, and the run goes on: API request to http://127.0.0.1:9") == 1
    )


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """It reads its environment once a process."""
    module = pytest.importorskip("wandb")
    module.teardown()
    monkeypatch.setenv("WANDB_SILENT", "true")
    yield module
    module.teardown()


def test_wandb_writes_an_offline_run_and_continues_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wandb: ModuleType
) -> None:
    started: list[Any] = []
    init = wandb.init
    monkeypatch.setattr(wandb, "init", lambda **options: started.append(init(**options)) or started[-1])
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracked = trackers.TrackedRun(tmp_path, "digits-1", "KD, seed 0", {"train": {"lr": 0.5}}, "abc", 0)
    for step in (1, 2):
        one = trackers.Trackers(["wandb"], tracked._replace(step=step - 1))
        one.log("train", step, {"total": 2.469 / step})
        one.close(finished=step == 2)
        wandb.teardown()  # its own process writes the last bytes after that
        number = json.loads((tmp_path / "trackers.json").read_text())["wandb"]
        *_, newest = sorted(tmp_path.glob(f"wandb/offline-run-*/run-{number}.wandb"))
        written = newest.read_bytes()
        assert b"train/total" in written and str(2.469 / step).encode() in written
    assert [run.id for run in started] == [number, number]
    assert (started[0].project, started[0].group, started[0].name) == ("unikd", "digits-1", "KD, seed 0")
    assert started[0].config["train"] == {"lr": 0.5} and started[0].config["commit"] == "abc"
    assert started[0].settings.finish_timeout == 300


@pytest.mark.usefixtures("wandb")
def test_wandb_without_a_login_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    done = run(config_of(tmp_path, "wandb"))
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "tracking with wandb ends here" in line]
    assert len(said) == 1 and "wandb login" in said[0], done.stderr
