"""Cells as runs: what they are started with, how far they are, and what is refused before anything runs."""

import json
from pathlib import Path
from typing import Any

import pytest

from support.report_runs import write_result
from unikd_fast.config import ConfigError, config_hash, load_config
from unikd_fast.recipes.experiments import read_experiment
from unikd_fast.recipes.runs import Run, plan_runs, teachers_environment, total_seconds
from unikd_fast.recipes.tables import TABLES, Cell, student_cells, teacher_cells

TABLE1 = TABLES["table1"]
KD = Cell("kd", TABLE1.pairs[0], 1)


def planned(cell: Cell, out: Path, **options: Any) -> Run:
    (run,) = plan_runs([cell], out, **{"teachers": "published", **options})
    return run


def start(run: Run) -> None:
    """What the engine does first: it makes the folder and keeps the whole configuration."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.json").write_text(run.config.model_dump_json(by_alias=True))


@pytest.mark.parametrize("name", ["table1", "table2", "table3", "table5", "table6"])
def test_runs_are_the_recipes(name: str, tmp_path: Path) -> None:
    for run in plan_runs(student_cells(TABLES[name], range(1)), tmp_path, teachers="published"):
        assert config_hash(run.config) == config_hash(read_experiment(None, run.name.removesuffix("/seed-0")))
        assert (run.config.run.dir, run.config.run.seed, run.state) == (str(run.folder), 0, "missing")


def test_the_written_configuration_is_the_planned_one(tmp_path: Path) -> None:
    run = planned(KD, tmp_path, overrides=["train.max_steps=7", "run.log_every_steps=3"], root=Path("/data"))
    run.write_config()
    assert run.config_file == tmp_path / "cifar100" / "kd" / "resnet56-resnet20" / "seed-1.json"
    assert load_config(run.config_file) == run.config
    assert (run.config.train.max_steps, run.config.data.root, run.config.run.seed) == (7, "/data", 1)
    assert "momentum" not in json.loads(run.config_file.read_text())["train"]  # a default


def test_variables_name_teachers_wherever_the_runs_lie(tmp_path: Path) -> None:
    published, trained = (planned(KD, tmp_path, teachers=kind).config.teacher for kind in ("published", "trained"))
    assert published is not None
    assert trained is not None
    assert published.weights == "${CIFAR100_TEACHERS}/resnet56_vanilla/ckpt_epoch_240.pth"
    assert trained.weights == "${UNIKD_TRAINED_TEACHERS}/resnet56/seed-0/student.safetensors"
    environment = teachers_environment(tmp_path, "cifar100", Path("/published"))
    (teacher,) = plan_runs(teacher_cells([KD]), tmp_path, teachers="trained")
    assert Path(environment["UNIKD_TRAINED_TEACHERS"]) / "resnet56" / "seed-0" == teacher.folder
    assert environment["CIFAR100_TEACHERS"] == "/published"


def test_a_teacher_is_trained_like_a_student_alone(tmp_path: Path) -> None:
    for pair, rate, epochs in ((TABLE1.pairs[0], 0.05, 240), (TABLES["table3"].pairs[0], 0.2, 100)):
        config = planned(Cell("teacher", pair, 0), tmp_path, teachers="trained").config
        assert (config.student.model, config.distill.method, config.teacher) == (pair.teacher, "none", None)
        assert (config.train.learning_rate, config.train.total_epochs) == (rate, epochs)


def test_runs_without_a_teacher_take_no_setting_of_one(tmp_path: Path) -> None:
    overrides = ["teacher.precision=fp32", "distill.kd.temperature=2", "train.max_steps=5"]
    alone = planned(Cell("none", TABLE1.pairs[0], 0), tmp_path, overrides=overrides).config
    assert (alone.teacher, alone.distill.kd, alone.train.max_steps) == (None, None, 5)
    taught = planned(KD, tmp_path, overrides=overrides).config
    assert taught.teacher is not None
    assert (taught.teacher.precision, taught.distill.kd.temperature) == ("fp32", 2.0)


@pytest.mark.parametrize(
    "key", ["run.dir", "run.seed", "data.root", "teacher.weights", "distill.method", "compare.seeds"]
)
def test_what_the_table_decides_cannot_be_set(key: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"--set {key}=1: the table decides .*; see --"):
        planned(KD, tmp_path, overrides=[f"{key}=1"])


def test_an_override_that_does_not_fit_names_the_cell(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cifar100/kd/resnet56-resnet20/seed-1: .*distill\.dkd"):
        planned(KD, tmp_path, overrides=["distill.dkd.beta=2"])


def test_how_far_a_run_is(tmp_path: Path) -> None:
    run = planned(KD, tmp_path)
    assert run.state == "missing"
    start(run)
    assert planned(KD, tmp_path).state == "unfinished"
    write_result(run.folder, "student")
    assert planned(KD, tmp_path).state == "done"
    assert planned(KD, tmp_path, root=Path("/elsewhere")).state == "done"  # the same data at another place


def test_a_run_with_other_settings_is_refused(tmp_path: Path) -> None:
    run = planned(KD, tmp_path, overrides=["train.max_steps=3"], root=Path("/a"))
    start(run)
    with pytest.raises(ConfigError) as refusal:
        planned(KD, tmp_path)
    message = str(refusal.value)
    assert f"{run.folder} was run with another configuration: train.max_steps was 3, now None; choose" in message
    with pytest.raises(ConfigError, match=r"teacher\.weights was '\$\{CIFAR100_TEACHERS\}"):
        planned(KD, tmp_path, overrides=["train.max_steps=3"], teachers="trained")
    (run.folder / "config.json").write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        planned(KD, tmp_path)


def test_the_time_of_a_run_adds_up_and_outlives_a_kill(tmp_path: Path) -> None:
    folder = tmp_path / "seed-0"
    assert total_seconds(folder) is None
    timings = tmp_path / "seed-0.timings.jsonl"
    timings.write_text('{"seconds": 10.5, "exit_code": 143}\n{"seconds": 1\n{"seconds": 4.5, "exit_code": 0}\n')
    assert total_seconds(folder) == 15.0
    with timings.open("ab") as file:  # what a power cut leaves
        file.write(b'\xff\n\0\0\n7\n[]\n{"seconds": null}\n')
    assert total_seconds(folder) == 15.0
