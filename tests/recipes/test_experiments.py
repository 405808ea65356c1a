"""Recipes by name: complete, valid and as published; and how commands find them and the shipped configurations."""

import json
from pathlib import Path
from typing import Any

import pytest

from unikd_fast.cli import main
from unikd_fast.config import ConfigError, config_hash, load_config
from unikd_fast.config.effect import without_effect
from unikd_fast.recipes import recipe, recipe_names
from unikd_fast.recipes.experiments import find_config, read_experiment
from unikd_fast.recipes.pairs import CIFAR_PAIRS, COCO_PAIRS, IMAGENET_PAIRS
from unikd_fast.recipes.settings import CLASSIFIERS
from unikd_fast.recipes.tables import TABLES

ROOT = Path(__file__).parents[2]
NAMES = recipe_names()


def test_there_is_a_recipe_for_every_method_and_pair() -> None:
    assert len(CIFAR_PAIRS) == 11 and len(IMAGENET_PAIRS) == 2
    for method in set(CLASSIFIERS) - {"none"}:
        assert {f"cifar100/{method}/{pair.name}" for pair in CIFAR_PAIRS} <= set(NAMES)
    for data, pairs in (("cifar100", CIFAR_PAIRS), ("imagenet", IMAGENET_PAIRS), ("coco", COCO_PAIRS)):
        alone = {name.rpartition("/")[2] for name in NAMES if name.startswith(f"{data}/none/")}
        networks = {network for pair in pairs for network in (pair.teacher, pair.student)}
        assert alone == {network.rpartition("/")[2].removesuffix("_100") for network in networks}
    for method in ("at", "ofd", "crd", "reviewkd", "kd", "dkd", "unikd", "wkd"):  # and the columns of Table 3
        assert {f"imagenet/{method}/{pair.name}" for pair in IMAGENET_PAIRS} <= set(NAMES)
    assert {"cifar100/unikd/resnet32x4-resnet8x4", "imagenet/kd/resnet50-mobilenetv1"} <= set(NAMES)
    for method in set(TABLES["table4"].methods) - {"none"}:
        assert {f"coco/{method}/{pair.name}" for pair in COCO_PAIRS} <= set(NAMES)
    assert len(NAMES) == 23 * 11 + 15 + 9 * 2 + 4 + 8 * 3 + 4


def test_every_recipe_is_valid_and_sets_nothing_in_vain() -> None:
    for name in NAMES:
        config = read_experiment(None, name)
        assert config.run.dir == f"runs/{name}-{config_hash(config)}"
        assert (config.distill.method == "none") == (config.teacher is None), name
        assert without_effect(config) is None, name


def test_experiments_keep_their_names() -> None:
    """Those of the versions before: folders of their runs are found again."""
    known = {
        "cifar100/kd/vgg13-vgg8": "c0b22583",
        "cifar100/mlkd/vgg13-vgg8": "fab01403",
        "imagenet/unikd/resnet34-resnet18": "25c221c0",
    }
    assert {name: config_hash(read_experiment(None, name)) for name in known} == known
    steps = ["train.schedule=step", "train.milestones=[]", "train.milestone_steps=[9]"]
    assert config_hash(read_experiment(None, "cifar100/kd/vgg13-vgg8", steps)) != known["cifar100/kd/vgg13-vgg8"]


def test_a_recipe_is_a_copy() -> None:
    name = "cifar100/kd/vgg13-vgg8"
    recipe(name)["train"]["milestones"].clear()
    recipe(name)["data"]["root"] = "/x"
    assert recipe(name)["train"]["milestones"] == [150, 180, 210]
    assert recipe(name)["data"]["root"] == "${CIFAR100_ROOT}"


SHIPPED_RECIPES = {
    "cifar100": "cifar100/unikd/resnet32x4-resnet8x4",
    "imagenet_r34_r18": "imagenet/unikd/resnet34-resnet18",
    "imagenet_r50_mbv1": "imagenet/unikd/resnet50-mobilenetv1",
}


@pytest.mark.parametrize("shipped", SHIPPED_RECIPES)
def test_shipped_configurations_are_recipes(shipped: str) -> None:
    assert config_hash(read_experiment(shipped, None)) == config_hash(read_experiment(None, SHIPPED_RECIPES[shipped]))


def test_the_other_shipped_ones_are_those_of_the_dry_runs() -> None:
    shipped = {path.stem for path in (ROOT / "configs").glob("*.json")}
    assert shipped == {*SHIPPED_RECIPES, "digits", "digits_cached", "synthetic", "toy_scenes", "schema"}


def distill(method: str, pair: str) -> dict[str, Any]:
    section: dict[str, Any] = recipe(f"cifar100/{method}/{pair}")["distill"]
    return section


def test_settings_are_the_published_ones() -> None:
    """Retyped from the papers."""
    assert distill("dkd", "resnet56-resnet20")["dkd"]["beta"] == 2
    assert distill("dkd", "wrn_40_2-wrn_40_1")["dkd"]["beta"] == 6
    assert distill("dkd", "vgg13-MobileNetV2")["dkd"]["beta"] == 6
    assert distill("dkd", "resnet32x4-ShuffleV2")["dkd"]["beta"] == 8
    assert distill("reviewkd", "resnet56-resnet20")["reviewkd"]["weight"] == 0.6
    assert distill("reviewkd", "resnet110-resnet32")["reviewkd"]["weight"] == 1
    assert distill("reviewkd", "wrn_40_2-ShuffleV1")["reviewkd"]["weight"] == 5
    assert distill("reviewkd", "ResNet50-MobileNetV2")["reviewkd"]["weight"] == 8
    standardized = distill("dkd_standardized", "resnet110-resnet32")["dkd"]
    assert (standardized["temperature"], standardized["alpha"], standardized["beta"]) == (2, 15, 30)
    assert distill("ofd", "vgg13-vgg8")["ofd"]["weight"] == 1e-3
    assert [recipe(f"imagenet/ofd/{pair.name}")["distill"]["ofd"]["weight"] for pair in IMAGENET_PAIRS] == [1e-4, 1e-4]
    both = distill("kd_crd", "vgg13-vgg8")  # RepDistiller: -r 1 -a 1 -b 0.8
    assert both == {"method": ["kd", "crd"], "kd": {"beta": 1.0, "temperature": 4.0}, "crd": {"weight": 0.8}}
    assert distill("dkd_reviewkd", "vgg13-vgg8")["method"] == ["dkd", "reviewkd"]
    rates = {pair.name: pair.learning_rate for pair in CIFAR_PAIRS}
    assert {name for name, rate in rates.items() if rate == 0.01} == {
        name for name in rates if name.endswith(("MobileNetV2", "ShuffleV1", "ShuffleV2"))
    }
    section = recipe("cifar100/kd/resnet56-resnet20")["train"]
    assert (section["total_epochs"], section["global_batch_size"], section["milestones"]) == (240, 64, [150, 180, 210])


def test_settings_of_wkd_are_those_of_its_code() -> None:
    """Retyped from its files of both parts together: a, b, τ, ρ, κ, G."""
    keys = ("logit_weight", "feature_weight", "temperature", "mean_ratio", "sharpness", "grid", "decay_from")
    published = {
        "cifar100/wkd/resnet32x4-resnet8x4": (200, 0.08, 8, 8, 1, 1, 150 / 240),
        "cifar100/wkd/wrn_40_2-ShuffleV1": (60, 0.5, 4, 3, 1, 4, 150 / 240),
        "imagenet/wkd/resnet34-resnet18": (10, 1, 2, 2, 1, 4, 0),
        "imagenet/wkd/resnet50-mobilenetv1": (25, 0.005, 2, 2, 2, 4, 0),
    }
    for name, values in published.items():
        own = read_experiment(None, name).distill.settings["wkd"]
        assert tuple(getattr(own, key) for key in keys) == values
        assert (own.epsilon, own.iterations, own.ce_weight) == (0.05, 10, 1)
        assert own.projector == ("bottleneck" if name.startswith("imagenet") else "conv")


def test_the_development_codes_forms_have_its_schedules() -> None:
    """Retyped from its configurations for CIFAR-100."""
    for pair, epochs, rate in (
        ("resnet32x4-resnet8x4", 480, 0.025),
        ("wrn_40_2-ShuffleV1", 480, 0.01),
        ("vgg13-MobileNetV2", 480, 0.01),
        ("resnet32x4-ShuffleV2", 960, 0.01),
    ):
        train = recipe(f"cifar100/unikd_dev_mlkd/{pair}")["train"]
        assert (train["total_epochs"], train["learning_rate"], train["milestones"]) == (epochs, rate, [150, 180, 210])
    train = recipe("cifar100/unikd_dev_dkd/resnet32x4-resnet8x4")["train"]
    assert (train["total_epochs"], train["learning_rate"]) == (240, 0.05)
    for pair, beta in (("resnet110-resnet32", 2), ("resnet32x4-resnet8x4", 8), ("vgg13-vgg8", 6)):
        wanted = {"alpha": 1, "beta": beta, "temperature": 4, "ramp_epochs": 20}
        assert distill("unikd_dev_dkd", pair)["dkd"] == wanted


def test_settings_on_coco_are_the_published_ones() -> None:
    """Retyped from mdistiller's detection/configs and Detectron2's defaults."""

    def section(method: str, pair: str) -> dict[str, Any]:
        found: dict[str, Any] = recipe(f"coco/{method}/{pair}")["distill"]
        return found

    dkd = {"alpha": 1.0, "beta": 0.25, "temperature": 1.0, "ramp_epochs": 0.0}
    weights = {"resnet101-resnet18": 1.2, "resnet101-resnet50": 1.0, "resnet50-mobilenet_v2": 2.0}
    for pair, weight in weights.items():
        review = {"weight": weight, "ramp_epochs": 0.0}
        assert section("reviewkd", pair) == {"method": "reviewkd", "reviewkd": review}
        assert section("dkd_reviewkd", pair) == {"method": ["dkd", "reviewkd"], "dkd": dkd, "reviewkd": review}
        assert section("dkd", pair) == {"method": "dkd", "dkd": dkd}
        assert section("fgfi", pair)["fgfi"] == {"weight": 0.01}
        assert section("unikd", pair)["dkd"] == dkd
    assert section("kd", "resnet101-resnet18")["kd"]["ce_weight"] == 1.0
    config = recipe("coco/dkd/resnet50-mobilenet_v2")
    train = config["train"]
    assert (train["global_batch_size"], train["learning_rate"], train["weight_decay"]) == (8, 0.01, 1e-4)
    assert (train["max_steps"], train["milestone_steps"], train["warmup_steps"]) == (180_000, [120_000, 160_000], 1000)
    assert train["total_epochs"] * (117_266 // 8) > train["max_steps"]
    assert config["teacher"]["model_args"] == {"conventions": "detectron2", "stride_in_1x1": True}
    assert config["student"]["model_args"] == {"conventions": "detectron2", "frozen_stages": 0}
    for student in ("resnet101-resnet18", "resnet101-resnet50"):
        own = recipe(f"coco/dkd/{student}")["student"]
        assert (own["model_args"], own["weights"]) == ({"conventions": "detectron2"}, "IMAGENET1K_V1")


def test_a_teacher_alone_has_the_rate_of_its_data_set() -> None:
    for name, network, rate in (
        ("cifar100/none/vgg13", "cifar/vgg13", 0.05),
        ("cifar100/none/MobileNetV2", "cifar/MobileNetV2", 0.01),
        ("imagenet/none/resnet34", "torchvision/resnet34", 0.2),
        ("imagenet/none/resnet18", "torchvision/resnet18", 0.2),
        ("coco/none/resnet101", "frcnn/torchvision/resnet101", 0.01),
    ):
        config = recipe(name)
        assert config["student"]["model"] == network
        assert (config["distill"], "teacher" in config) == ({"method": "none"}, False)
        assert config["train"]["learning_rate"] == rate


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("cifar100/kd/resnet56-resnet2", "did you mean cifar100/kd/resnet56-resnet20 or "),
        ("imagenet/kd/resnet50-mobilenetv1_100", "did you mean imagenet/kd/resnet50-mobilenetv1 or "),
        ("?", "there is no recipe '?'; `unikd reproduce --list` lists all 318"),
    ],
)
def test_an_unknown_recipe_names_the_similar_ones(name: str, said: str) -> None:
    with pytest.raises(ConfigError) as refusal:
        recipe(name)
    message = str(refusal.value)
    assert said in message
    assert message.endswith("`unikd reproduce --list` lists all 318")
    assert "\n" not in message


def test_shipped_configurations_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = read_experiment("digits", None, ["train.max_steps=3"])
    assert shipped == load_config(ROOT / "configs" / "digits.json", ["train.max_steps=3"])
    with pytest.raises(
        ConfigError, match=r"--config digit: no such file, nor one of .* toy_scenes; did you mean digits"
    ):
        read_experiment("digit", None)
    with pytest.raises(ConfigError, match=r"--config digits\.json: no such file"):
        read_experiment("digits.json", None)
    (tmp_path / "digits").write_text("{}")  # a file comes first
    assert find_config("digits") == Path("digits")


def test_overrides_of_a_recipe_and_what_errors_name() -> None:
    config = read_experiment(None, "cifar100/dkd/vgg13-vgg8", ["distill.dkd.beta=2", "teacher.cache.mode=read_write"])
    assert config.distill.dkd is not None and config.teacher is not None
    assert config.distill.dkd.beta == 2
    assert config.teacher.cache.dir.startswith("caches/cifar100-dkd-vgg13-vgg8-")
    with pytest.raises(ConfigError, match=r"--recipe cifar100/dkd/vgg13-vgg8: .*train\.nonsense"):
        read_experiment(None, "cifar100/dkd/vgg13-vgg8", ["train.nonsense=1"])


@pytest.mark.parametrize("which", [("--config", "digits"), ("--recipe", "cifar100/unikd/resnet56-resnet20")])
def test_print_config_is_the_whole_configuration(
    which: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["train", *which, "--set", "train.max_steps=7", "--print-config"]) == 0
    printed = capsys.readouterr().out
    content = json.loads(printed)
    assert (content["train"]["max_steps"], content["train"]["momentum"]) == (7, 0.9)  # what was set, and a default
    (tmp_path / "printed.json").write_text(printed)
    again = load_config(tmp_path / "printed.json")
    assert again.model_dump() == read_experiment(*_options(*which), ["train.max_steps=7"]).model_dump()


def _options(option: str, value: str) -> tuple[str | None, str | None]:
    return (value, None) if option == "--config" else (None, value)


def test_a_command_takes_one_of_config_and_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["--config", "digits", "--recipe", NAMES[0]]):
        with pytest.raises(SystemExit) as end:
            main(["train", *arguments])
        assert end.value.code == 2
        assert "--config" in capsys.readouterr().err
    assert main(["train", "--recipe", "cifar100/kd/resnet56-resnet2"]) == 2
    assert "error: there is no recipe 'cifar100/kd/resnet56-resnet2'" in capsys.readouterr().err
