"""Keys that are set and that no run reads are named; those that come along set none."""

import json
from pathlib import Path
from typing import Any

import pytest

from unikd_fast.config import Config, load_config, parse_config
from unikd_fast.config.effect import without_effect

CONFIGS = Path(__file__).parents[2] / "configs"
DIGITS = CONFIGS / "digits.json"
ALL = [path for path in sorted(CONFIGS.rglob("*.json")) if path.name != "schema.json"]


def of(method: Any, *overrides: str) -> str | None:
    return without_effect(load_config(DIGITS, ["compare=null", f"distill.method={json.dumps(method)}", *overrides]))


def test_what_comes_along_sets_nothing_in_vain() -> None:
    assert len(ALL) > 250
    found = {path.name: without_effect(load_config(path)) for path in ALL}
    assert {name: said for name, said in found.items() if said} == {}


@pytest.mark.parametrize(
    ("method", "overrides", "said"),
    [
        # digits.json itself sets the temperature.
        ("dkd", [], "distill.temperature has no effect with method dkd; see distill.dkd"),
        (
            "dkd",
            ["distill.alpha=4"],  # as by default, but set
            "distill.alpha, distill.temperature have no effect with method dkd; see distill.dkd",
        ),
        ("dkd", ['distill={"method": "dkd"}'], None),
        ("none", [], "distill.temperature has no effect with method none"),
        ("kd", ["distill.beta=2", "distill.ce_weight=1", "distill.scale_by_t2=false"], None),
        ("kd", ["distill.head_steps=2"], "distill.head_steps has no effect with method kd"),
        (
            "kd",
            ["distill.kd.standardized=true", "distill.max_levels=2"],
            "distill.max_levels has no effect with method kd",
        ),
        ("at", ["distill.max_levels=2"], "distill.temperature has no effect with method at; see distill.at"),
        ("unikd", ["distill.alpha=2", "distill.width=8", "distill.max_levels=2"], None),
        (["dkd", "kd"], ["distill.beta=2"], None),
        (
            ["crd", "dkd"],
            [],
            "distill.temperature has no effect with methods crd, dkd; see distill.crd, distill.dkd",
        ),
    ],
)
def test_a_key_that_no_method_reads(method: Any, overrides: list[str], said: str | None) -> None:
    assert of(method, *overrides) == said


def test_in_a_comparison_one_run_that_reads_it_will_do() -> None:
    def compared(runs: dict[str, Any], *overrides: str) -> str | None:
        return without_effect(load_config(DIGITS, [f"compare.runs={json.dumps(runs)}", *overrides]))

    runs: dict[str, Any] = {"alone": {"distill.method": "none"}, "DKD": {"distill.method": "dkd"}}
    assert compared(runs) == "distill.temperature has no effect with methods none, dkd; see distill.dkd"
    runs["KD"] = {"distill.method": "kd", "distill.beta": 2.0}
    assert compared(runs) is None
    runs["DKD"]["distill.beta"] = 2.0  # which only this run could read
    assert compared(runs, "distill.alpha=1") == (
        "distill.alpha has no effect with methods none, dkd, kd; see distill.dkd. "
        "compare.runs['DKD']: distill.beta has no effect with method dkd; see distill.dkd"
    )


def test_a_resolved_configuration_has_all_keys_and_set_only_some() -> None:
    def again(config: Config) -> str | None:
        return without_effect(parse_config(config.model_dump(mode="json", by_alias=True), name="again", source="again"))

    path = CONFIGS / "cifar100" / "dkd" / "vgg13-vgg8.json"
    assert again(load_config(path)) is None
    assert (
        again(load_config(path, ["distill.alpha=1"])) == "distill.alpha has no effect with method dkd; see distill.dkd"
    )


def test_a_compiled_teacher_has_eager_blocks() -> None:
    path = CONFIGS / "cifar100" / "blockwise" / "vgg13-vgg8.json"
    said = without_effect(load_config(path, ["teacher.compile=max-autotune"]))
    assert said is not None and "teacher.compile = 'max-autotune' compiles the teacher's own pass alone" in said
    assert without_effect(load_config(path, ["teacher.compile=null"])) is None
    assert (
        without_effect(load_config(CONFIGS / "cifar100" / "kd" / "vgg13-vgg8.json", ["teacher.compile=default"]))
        is None
    )
