"""Configuration: overrides, hashes, comparisons, and an error message for every way to get it wrong."""

import json
from pathlib import Path

import pytest

from unikd_fast.config import Config, ConfigError, config_hash, load_config, run_configs
from unikd_fast.config.load import teacher_config
from unikd_fast.config.reference import reference

ROOT = Path(__file__).parents[1]
DIGITS = ROOT / "configs" / "digits.json"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.json")), ids=lambda p: p.stem)
def test_every_shipped_configuration_is_valid(path: Path) -> None:
    if path.stem == "schema":
        assert json.loads(path.read_text()) == Config.model_json_schema(by_alias=True), "run `make schema`"
    else:
        config = load_config(path)
        assert config.run.dir == f"runs/{path.stem}-{config_hash(config)}"


def test_the_reference_is_up_to_date() -> None:
    assert (ROOT / "docs" / "configuration.md").read_text() == reference(), "run `make schema`"


def test_overrides_reach_values_lists_nulls_and_new_sections() -> None:
    overrides = ["train.total_epochs=2", "data.root=/some where", "compare=null", "train.milestones=[1,2]"]
    config = load_config(DIGITS, [*overrides, "deepspeed.zero_optimization.stage=1"])
    assert (config.train.total_epochs, config.data.root, config.compare) == (2, "/some where", None)
    assert config.train.milestones == (1.0, 2.0)
    assert config.deepspeed["zero_optimization"]["stage"] == 1


def test_the_hash_names_the_experiment_and_not_its_place() -> None:
    same = [
        load_config(DIGITS),
        load_config(DIGITS, ["run.dir=elsewhere"]),
        load_config(DIGITS, ["run.tensorboard=false"]),
    ]
    other = [load_config(DIGITS, ["run.seed=1"]), load_config(DIGITS, ["distill.temperature=3"])]
    assert len({config_hash(c) for c in same}) == 1
    assert len({config_hash(c) for c in same + other}) == 3


def test_a_comparison_is_its_single_runs_per_seed() -> None:
    config = load_config(DIGITS, ["distill.temperature=7"])
    runs = list(run_configs(config))
    assert [(label, seed) for label, seed, _ in runs[:4]] == [
        ("student alone", 0),
        ("student + KD", 0),
        ("student + UniKD", 0),
        ("student alone", 1),
    ]
    assert [run.distill.method for *_, run in runs[:3]] == ["none", "kd", "unikd"]
    assert all(run.compare is None and run.run.seed == seed and run.distill.temperature == 7 for _, seed, run in runs)


def test_the_teacher_is_trained_like_a_student_alone() -> None:
    config = load_config(DIGITS, ["teacher.training.total_epochs=5", "train.total_epochs=9"])
    kd = next(run for *_, run in run_configs(config) if run.distill.ce_weight is not None)
    teacher = teacher_config(kd)
    assert teacher.student.model == config.teacher.model
    assert (teacher.distill.method, teacher.teacher, teacher.train.total_epochs) == ("none", None, 5)
    assert teacher.data.train_samples is None
    assert teacher.train.learning_rate == config.train.learning_rate


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.epochs=3", ["unknown key 'train.epochs'", "'train.total_epochs'"]),
        ("trian.total_epochs=3", ["unknown key 'trian'", "'train'"]),
        ("temperature=3", ["unknown key 'temperature'", "'distill.temperature'"]),
        ("distill.alpha=-1", ["distill.alpha = -1", "greater than or equal to 0"]),
        ("distill.temperature=0", ["distill.temperature = 0", "greater than 0"]),
        ("distill.alpha=NaN", ["distill.alpha", "finite"]),
        ("distill.method=dkd", ["distill.method = 'dkd'", "'unikd', 'kd' or 'none'"]),
        ("train.global_batch_size=7.5", ["train.global_batch_size = 7.5", "integer"]),
        ("train.global_batch_size=many", ["train.global_batch_size = 'many'", "integer"]),
        ("train.accumulation_steps=3", ["(50)", "divisible by train.accumulation_steps (3)"]),
        ("deepspeed.train_batch_size=8", ["deepspeed.train_batch_size = 8", "train.global_batch_size"]),
        ("deepspeed.bf16.enabled=true", ["deepspeed.bf16", "train.precision"]),
        ("distill.method=kd", ["compare.runs['student alone']", "--set compare=null"]),
        ("data.name.x=1", ["data.name is a value ('digits')"]),
        ("train.total_epochs", ["expected section.key=value"]),
        ('compare.runs={"a": {"distill.alhpa": 1}}', ["unknown key 'distill.alhpa'", "'distill.alpha'"]),
        ("distill.ce_weight=0.5", ["distill.ce_weight = 0.5", "'kd'", "'unikd'"]),
        ("teacher=null", ["needs a teacher", "teacher.model"]),
    ],
)
def test_bad_settings_name_the_path_the_value_and_what_is_allowed(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(DIGITS, [override])
    for part in parts:
        assert part in str(error.value)


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"run": }')
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_config(broken)
    broken.write_text('{"deepspeed": {"zero_optimization": {"stage": 0}, "zero_optimization": {"stage": 1}}}')
    with pytest.raises(ConfigError, match="'zero_optimization' is given twice"):
        load_config(broken)
    broken.write_text('{"data": {"name": "digits"}}')
    with pytest.raises(ConfigError, match="student is required"):
        load_config(broken)


def test_a_configuration_cannot_be_changed_after_loading() -> None:
    config = load_config(DIGITS)
    with pytest.raises(ValueError, match="frozen"):
        config.train.total_epochs = 3  # type: ignore[misc]
