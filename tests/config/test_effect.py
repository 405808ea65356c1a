"""Keys that are set and that no run reads are named; those that come along set none."""

import json
from pathlib import Path
from typing import Any

import pytest

from unikd_fast.config import Config, load_config, parse_config
from unikd_fast.config.effect import unreached_steps, without_effect
from unikd_fast.recipes.experiments import read_experiment

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = CONFIGS / "digits.json"
ALL = [path for path in sorted(CONFIGS.glob("*.json")) if path.name != "schema.json"]


def of(method: Any, *overrides: str) -> str | None:
    return without_effect(load_config(DIGITS, ["compare=null", f"distill.method={json.dumps(method)}", *overrides]))


def test_shipped_configurations_set_nothing_without_effect() -> None:
    assert len(ALL) >= 6
    found = {path.name: without_effect(load_config(path)) for path in ALL}
    assert {name: said for name, said in found.items() if said} == {}


@pytest.mark.parametrize(
    ("method", "overrides", "said"),
    [
        ("dkd", ["distill.max_levels=4"], "distill.max_levels has no effect with method dkd"),  # the default, but set
        ("kd", ["distill.max_levels=2"], "distill.max_levels has no effect with method kd"),
        ("none", ["distill.max_levels=2"], "distill.max_levels has no effect with method none"),
        (["dkd", "kd"], ["distill.max_levels=2"], "distill.max_levels has no effect with method dkd+kd"),
        ("at", ["distill.max_levels=2"], None),
        ("ofd", ["distill.max_levels=2"], None),
        ("unikd", ["distill.max_levels=2", "distill.unikd.alpha=2"], None),
        (["dkd", "at"], ["distill.max_levels=2"], None),
        ("dkd", ["distill.dkd.alpha=2"], None),
        ("dkd", ['teacher.feature_nodes=["layer1"]'], "teacher.feature_nodes has no effect with method dkd"),
        ("dkd", ['student.feature_nodes=["layer1"]'], "student.feature_nodes has no effect with method dkd"),
        ("at", ['teacher.feature_nodes=["layer1"]', 'student.feature_nodes=["layer1"]'], None),
    ],
)
def test_a_key_that_no_method_reads_is_reported(method: Any, overrides: list[str], said: str | None) -> None:
    assert of(method, *overrides) == said


def test_in_a_comparison_one_run_that_reads_a_key_suffices() -> None:
    def compared(runs: dict[str, Any], *overrides: str) -> str | None:
        return without_effect(load_config(DIGITS, [f"compare.runs={json.dumps(runs)}", *overrides]))

    runs: dict[str, Any] = {"alone": {"distill.method": "none"}, "DKD": {"distill.method": "dkd"}}
    assert compared(runs, "distill.max_levels=2") == "distill.max_levels has no effect with method none"
    runs["AT"] = {"distill.method": "at"}
    assert compared(runs, "distill.max_levels=2") is None
    runs["DKD"]["distill.max_levels"] = 2  # which only this run could read
    del runs["AT"]
    assert compared(runs) == "compare.runs['DKD']: distill.max_levels has no effect with method dkd"


def test_a_resolved_configuration_reports_only_set_keys() -> None:
    def again(config: Config) -> str | None:
        return without_effect(parse_config(config.model_dump(mode="json", by_alias=True), name="again", source="again"))

    def dkd(*overrides: str) -> Config:
        return read_experiment(None, "cifar100/dkd/vgg13-vgg8", overrides)

    assert again(dkd()) is None
    assert again(dkd("distill.max_levels=1")) == "distill.max_levels has no effect with method dkd"


def test_compile_with_blockwise_reports_eager_blocks() -> None:
    def effect(method: str, compile_mode: str) -> str | None:
        recipe = f"cifar100/{method}/vgg13-vgg8"
        return without_effect(read_experiment(None, recipe, [f"teacher.compile={compile_mode}"]))

    said = effect("blockwise", "max-autotune")
    assert said is not None and "teacher.compile = 'max-autotune' compiles the teacher's own pass alone" in said
    assert effect("blockwise", "null") is None
    assert effect("kd", "default") is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.milestones=[2,4]"], "train.milestones has no effect with train.schedule = 'cosine'"),
        (["train.gamma=0.1"], "train.gamma has no effect with train.schedule = 'cosine'"),
        (
            ["train.schedule=constant", "train.gamma=0.5", "train.milestones=[2]"],
            "train.milestones, train.gamma have no effect with train.schedule = 'constant'",
        ),
        (["train.milestones=[]"], None),
        (["train.schedule=step", "train.milestones=[2,4]"], None),
        (
            ["train.schedule=step"],
            "train.schedule = 'step' without train.milestones: the learning rate stays constant; set the epochs of its "
            "drops, or the steps as train.milestone_steps",
        ),
        (["train.schedule=step", "train.milestone_steps=[2,4]"], None),
        (["train.milestone_steps=[2]"], "train.milestone_steps has no effect with train.schedule = 'cosine'"),
        (
            ["train.schedule=step", "train.milestones=[2,5,9]", "train.total_epochs=5"],
            "train.milestones = 5, 9 are not reached: the run ends after epoch 5 (train.total_epochs)",
        ),
        (
            ["train.warmup_epochs=5", "train.total_epochs=5"],
            "train.warmup_epochs = 5 is not shorter than train.total_epochs = 5: the learning rate only rises, and the "
            "schedule never begins",
        ),
        (["train.warmup_epochs=4.5", "train.total_epochs=5"], None),
        (
            ["train.optimizer=adamw", "train.momentum=0.9", "train.nesterov=true"],
            "train.momentum, train.nesterov have no effect with train.optimizer = 'adamw'",
        ),
        (["data.synthetic_samples=64"], "data.synthetic_samples has no effect with data.name = 'digits'"),
        (
            ["data.workers=4", "data.bad_images=skip"],
            "data.workers, data.bad_images have no effect with data.name = 'digits'",
        ),
        (["data.name=synthetic", "data.num_classes=10", "data.synthetic_samples=64"], None),
        (["data.detection.long_side=500"], "data.detection.long_side has no effect with data.name = 'digits'"),
        (
            ["data.name=toy_scenes", "data.image_size=64", "data.synthetic_samples=64", "data.detection.long_side=99"],
            "data.image_size has no effect with data.name = 'toy_scenes'",
        ),
        (["data.root=/data"], "data.root has no effect with data.name = 'digits'"),
        (["data.val_samples=10"], "data.val_samples has no effect with data.name = 'digits'"),
        (
            ["data.mixing.switch_probability=0.1", "data.mixing.mixup_alpha=0.2"],
            "data.mixing.switch_probability has no effect: one of mixup_alpha and cutmix_alpha is 0",
        ),
        (
            ["data.augmentation.rand_ops=3", "data.augmentation.erase_scale=[0.1,0.2]"],
            "data.augmentation.rand_ops has no effect with policy = 'none'. data.augmentation.erase_scale has no "
            "effect with erase_probability = 0.0",
        ),
        (["data.augmentation.padding=2"], None),
        (["data.augmentation.scale=[0.2,1]"], "data.augmentation.scale has no effect with crop = 'pad'"),
        (
            ["data.augmentation.crop=resized", "data.augmentation.padding=2", "data.augmentation.ratio=[1,1]"],
            "data.augmentation.padding has no effect with crop = 'resized'",
        ),
        (
            ["data.name=toy_scenes", "data.synthetic_samples=64", "data.augmentation.padding=2"],
            "data.image_size has no effect with data.name = 'toy_scenes'. data.augmentation.padding has no effect with "
            "crop = 'none'",
        ),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_key_that_another_makes_useless_is_reported(overrides: list[str], said: str | None) -> None:
    assert of("unikd", *overrides) == said
    resolved = load_config(DIGITS, ["compare=null", "distill.method=unikd", *overrides])
    again = parse_config(resolved.model_dump(mode="json", by_alias=True), name="digits", source="digits")
    if said is None:
        assert without_effect(again) is None


def test_a_setting_that_one_run_of_many_reads_has_effect() -> None:
    runs = {"step": {"train.schedule": "step"}, "cosine": {"train.schedule": "cosine"}}
    given = ["train.milestones=[2]", "distill.method=unikd", f"compare.runs={json.dumps(runs)}"]
    assert without_effect(load_config(DIGITS, given)) is None


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.warmup_steps=399"], []),
        (
            ["train.warmup_steps=400"],
            ["train.warmup_steps = 400 is not shorter than the run's 400 steps: the schedule never begins"],
        ),
        (["train.schedule=step", "train.milestone_steps=[20,399]"], []),
        (
            ["train.schedule=step", "train.milestone_steps=[20,400,120000]"],
            ["train.milestone_steps = 400, 120000 are not reached: the run has 400 steps"],
        ),
        (["train.milestone_steps=[400]"], []),
        (["train.warmup_steps=1000", "train.max_steps=400"], []),  # a trial run
    ],
)
def test_steps_that_a_run_does_not_reach(overrides: list[str], said: list[str]) -> None:
    assert unreached_steps(load_config(DIGITS, overrides).train, 400) == said
