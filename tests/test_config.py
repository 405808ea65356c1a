"""Configuration: overrides, hashes, comparisons, and an error message for every way to get it wrong."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from pydantic import create_model

from unikd_fast.config import Config, ConfigError, config_hash, load, load_config, run_configs, schema
from unikd_fast.config.explain import reference
from unikd_fast.config.load import cache_dir, teacher_config
from unikd_fast.methods.dkd import DKDSettings
from unikd_fast.methods.kd import KDSettings

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


def test_the_hash_depends_on_the_experiment_not_its_folder() -> None:
    same = [
        load_config(DIGITS),
        load_config(DIGITS, ["run.dir=elsewhere"]),
        load_config(DIGITS, ["run.trackers=[]"]),
    ]
    other = [load_config(DIGITS, ["run.seed=1"]), load_config(DIGITS, ["distill.max_levels=3"])]
    assert len({config_hash(c) for c in same}) == 1
    assert len({config_hash(c) for c in same + other}) == 3


def test_a_comparison_is_its_single_runs_per_seed() -> None:
    config = load_config(DIGITS, ["distill.max_levels=7"])
    runs = list(run_configs(config))
    assert [(label, seed) for label, seed, _ in runs[:4]] == [
        ("student alone", 0),
        ("student + KD", 0),
        ("student + UniKD", 0),
        ("student alone", 1),
    ]
    assert [run.distill.method for *_, run in runs[:3]] == ["none", "kd", "unikd"]
    assert all(run.compare is None and run.run.seed == seed and run.distill.max_levels == 7 for _, seed, run in runs)


def test_the_teacher_is_trained_like_a_student_alone() -> None:
    short = ["teacher.training.total_epochs=5", "train.total_epochs=9", "train.max_steps=3"]
    config = load_config(DIGITS, [*short, "student.weights=a.pth", "student.weights_key=model"])
    kd = next(run for *_, run in run_configs(config) if run.distill.method == "kd")
    teacher = teacher_config(kd)
    assert teacher.student.model == config.teacher.model
    assert (teacher.distill.method, teacher.teacher, teacher.train.total_epochs) == ("none", None, 5)
    assert (teacher.student.weights, teacher.student.weights_key) == (None, None)
    assert (config.train.max_steps, teacher.train.max_steps) == (3, None)  # which would leave it knowing nothing
    assert teacher.data.train_samples is None
    assert teacher.train.learning_rate == config.train.learning_rate


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.epochs=3", ["unknown key 'train.epochs'", "'train.total_epochs'"]),
        ("train.lr=0.1", ["unknown key 'train.lr'", "the nearest valid key is 'train.learning_rate'"]),
        ("lr=0.1", ["'train.learning_rate'"]),
        ("train.wd=0.1", ["'train.weight_decay'"]),
        ("train.batch_size=8", ["'train.global_batch_size'"]),
        ("train.ema=0.9", ["'train.ema_decay'"]),
        ("train.clip=1", ["'train.clip_grad_norm'"]),
        ("train.seed=1", ["'run.seed'"]),
        ("data.num_workers=1", ["'data.workers'"]),
        ("data.batch_size=1", ["'train.global_batch_size'"]),
        ("distill.kd.tau=4", ["'distill.kd.temperature'"]),
        ("student.pretrained=a.pt", ["'student.weights'"]),
        ("teacher.arch=resnet50", ["'teacher.model'"]),
        ("trian.total_epochs=3", ["unknown key 'trian'", "'train'"]),
        ("temperature=3", ["unknown key 'temperature'", "'distill.unikd.temperature'"]),
        ("distill.unikd.alpha=-1", ["distill.unikd.alpha = -1", "greater than or equal to 0"]),
        ("distill.unikd.temperature=0", ["distill.unikd.temperature = 0", "greater than 0"]),
        ("distill.unikd.alpha=NaN", ["distill.unikd.alpha", "finite"]),
        ("distill.method=nothing", ["distill.method = 'nothing'", "allowed: 'unikd', 'kd'", "or 'none'"]),
        ('distill.method=["kd", "nothing"]', ["distill.method.1 = 'nothing'", "allowed: 'unikd', 'kd'", "or 'none'"]),
        ("distill.method=3", ["distill.method = 3", "allowed: 'unikd', 'kd'", "or 'none'"]),
        ('distill.method=["kd"]', ["distill.method = ['kd']", "at least two methods", "given by its name"]),
        ('distill.method=["kd", "kd"]', ["distill.method = ['kd', 'kd']", "each once"]),
        ('distill.method=["kd", "none"]', ["distill.method = ['kd', 'none']", "each once and not 'none'"]),
        ("train.global_batch_size=7.5", ["train.global_batch_size = 7.5", "integer"]),
        ("train.global_batch_size=many", ["train.global_batch_size = 'many'", "integer"]),
        ("train.accumulation_steps=3", ["(50)", "divisible by train.accumulation_steps (3)"]),
        ("train.warmup_steps=0.5", ["train.warmup_steps = 0.5", "integer"]),
        ("train.milestone_steps=[0]", ["train.milestone_steps.0 = 0", "greater than or equal to 1"]),
        ("deepspeed.train_batch_size=8", ["deepspeed.train_batch_size = 8", "train.global_batch_size"]),
        ("deepspeed.bf16.enabled=true", ["deepspeed.bf16", "train.precision"]),
        ("distill.method=kd", ["compare.runs['student alone']", "--set compare=null"]),
        ("data.name.x=1", ["data.name is a value ('digits')"]),
        ("train.total_epochs", ["expected section.key=value"]),
        (
            'compare.runs={"a": {"distill.unikd.alhpa": 1}}',
            ["unknown key 'distill.unikd.alhpa'", "'distill.unikd.alpha'"],
        ),
        (
            'compare.runs={"a b": {}, "A-b": {}}',
            ["compare.runs['A-b']", "'a-b', which is also that of compare.runs['a b']"],
        ),
        ('compare.runs={"Teacher": {}}', ["'teacher', which is also that of the teacher's training"]),
        ('compare.runs={"../.": {}}', ["compare.runs['../.']", "would be empty"]),
        ("compare.seeds=[1,2,1]", ["compare.seeds = [1, 2, 1] names a seed twice"]),
        ("distill.ce_weight=0.5", ["unknown key 'distill.ce_weight'", "'distill.kd.ce_weight'"]),
        ('distill.method=[["kd"]]', ["distill.method.0 = ['kd'] is not valid"]),
        ('compare.runs={"a": {"distill.method": [["kd"]]}}', ["a: distill.method.0 = ['kd'] is not valid"]),
        ('compare.runs={"a": {"run.seed": 7}}', ["compare.runs['a'] sets run.seed to 7, which compare.seeds decides"]),
        ('compare.runs={"a": {"run.dir": "x"}}', ["sets run.dir to 'x', which the run.dir of the comparison decides"]),
        (f"data.image_size={'[' * 100_000}", ["data.image_size = '[[", "valid integer"]),
        (f"data.image_size={'9' * 5_000}", ["data.image_size = '999", "exceeded maximum size"]),
        ("distill.unikd=3", ["distill.unikd = 3 is not a section"]),
        ("teacher=null", ["needs a teacher", "teacher.model"]),
        ("teacher.cache.mode=write", ["teacher.cache.mode = 'write'", "'off', 'read' or 'read_write'"]),
        ("teacher.cache.views=0", ["teacher.cache.views = 0", "greater than or equal to 1"]),
        ("teacher.cache.recheck=2", ["teacher.cache.recheck = 2", "less than or equal to 1"]),
        ("teacher.cache.logits=int8", ["teacher.cache.logits = 'int8'", "'fp16', 'uint8' or 'top_k'"]),
        ("teacher.cache.logits=top_k", ["logits = 'top_k' with teacher.cache.top_k = None", "set both or neither"]),
        ("teacher.cache.top_k=5", ["logits = 'fp16' with teacher.cache.top_k = 5", "set both or neither"]),
        ("teacher.weights_key=x", ["teacher.weights_key = 'x' with teacher.weights = None", "or remove the key"]),
        ("student.weights_key=x", ["student.weights_key = 'x' with student.weights = None", "or remove the key"]),
        ("teacher.cache.directory=x", ["unknown key 'teacher.cache.directory'", "'teacher.cache.dir'"]),
    ],
)
def test_invalid_settings_name_path_value_and_allowed_values(override: str, parts: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(DIGITS, [override])
    for part in parts:
        assert part in str(error.value)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train.warmup_epochs=1", "train.warmup_steps=9"], "train.warmup_epochs = 1.0 with train.warmup_steps = 9"),
        (
            ["train.milestones=[1]", "train.milestone_steps=[9,12]"],
            "train.milestones = [1.0] with train.milestone_steps = [9, 12]",
        ),
    ],
)
def test_a_schedule_counts_in_epochs_or_in_steps(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(DIGITS, overrides)
    assert f"{said}: they say the same in epochs and in steps; remove one of them" in str(error.value)
    for override in overrides:
        load_config(DIGITS, [override])


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param("{}".encode("utf-16"), "is encoded in UTF-16, not in UTF-8; save it as UTF-8", id="UTF-16"),
        pytest.param("{ }".encode("utf-16-be"), "is encoded in UTF-16, not in UTF-8", id="UTF-16-BE"),
        pytest.param("{}".encode("utf-32"), "is encoded in UTF-32, not in UTF-8", id="UTF-32"),
        pytest.param(
            '{\n"é": 1}'.encode("latin-1"), "is not UTF-8: byte 0xe9 in line 2; save it as UTF-8", id="Latin-1"
        ),
        pytest.param(b"", "not valid JSON", id="empty"),
    ],
)
def test_a_file_in_another_encoding_is_named(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "run.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(str(path))
    assert said in str(error.value)


def test_a_byte_order_mark_is_ignored(tmp_path: Path) -> None:
    path = tmp_path / "digits.json"
    path.write_text(DIGITS.read_text(), encoding="utf-8-sig")
    assert load_config(path) == load_config(DIGITS)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="File name too long") as error:
        load_config(tmp_path / ("a" * 300))
    assert str(error.value).startswith(f"--config {tmp_path}/aaa")


@pytest.mark.parametrize("key", ["data.augmentation.mixup_alpha", "data.augmentation.cutmix", "train.mixup.alpha"])
def test_misplaced_mixing_keys_name_their_section(key: str) -> None:
    with pytest.raises(ConfigError, match="unknown key") as error:
        load_config(DIGITS, [f"{key}=0.2"])
    for part in ("valid key", "Mixup and CutMix are set in data.mixing", "key a mixed view by its sample"):
        assert part in str(error.value)
    with pytest.raises(ConfigError) as other:
        load_config(DIGITS, ["data.augmentation.mix=0.2"])
    assert "Mixup" not in str(other.value)


def test_an_error_about_the_method_is_one_line() -> None:
    for method in ("nothing", '["kd", "nothing"]', '["kd"]', "3"):
        with pytest.raises(ConfigError) as error:
            load_config(DIGITS, [f"distill.method={method}", "compare=null"])
        assert len(str(error.value).splitlines()) == 1


def test_a_list_of_methods_is_their_sum() -> None:
    config = load_config(DIGITS, ['distill.method=["kd", "unikd"]', "compare=null"])
    assert (config.distill.methods, config.distill.label) == (("kd", "unikd"), "kd+unikd")
    assert cache_dir(config).name == "digits-kd+unikd-seed0"
    one = load_config(DIGITS, ["distill.method=kd", "compare=null"])
    assert (one.distill.methods, one.distill.label) == (("kd",), "kd")
    assert config_hash(one) != config_hash(config)
    with pytest.raises(ConfigError, match="needs a teacher"):
        load_config(DIGITS, ['distill.method=["kd", "unikd"]', "compare=null", "teacher=null"])


def test_each_method_has_its_own_section() -> None:
    alone = ["compare=null", "distill.method=kd"]
    config = load_config(DIGITS, [*alone, "distill.kd.beta=3"])
    assert config.distill.kd == KDSettings(beta=3.0)
    assert config.distill.settings == {"kd": KDSettings(beta=3.0)}
    assert config.distill.unikd is None
    with pytest.raises(ConfigError, match=r"unknown key 'distill\.kd\.bate'.*'distill\.kd\.beta'"):
        load_config(DIGITS, [*alone, "distill.kd.bate=3"])
    for method in ("kd", "none"):
        with pytest.raises(ConfigError, match=rf"distill\.dkd holds settings of .* 'dkd', got '{method}'"):
            load_config(DIGITS, ["compare=null", f"distill.method={method}", "distill.dkd.beta=3"])
    both = load_config(DIGITS, ["compare=null", 'distill.method=["kd","dkd"]', "distill.kd={}", "distill.dkd={}"])
    assert both.distill.settings == {"kd": KDSettings(), "dkd": DKDSettings()}


def test_choosing_another_method_drops_the_files_sections() -> None:
    path = ROOT / "configs" / "imagenet_r50_mbv1.json"
    assert load_config(path).distill.unikd.temperature == 1.0
    other = load_config(path, ["distill.method=kd", "distill.kd.beta=2"])
    assert other.distill.unikd is None and other.distill.kd == KDSettings(beta=2.0)
    with pytest.raises(ConfigError, match=r"distill\.dkd holds settings"):
        load_config(path, ["distill.method=kd", "distill.dkd.beta=2"])


def test_runs_of_a_comparison_share_and_add_sections() -> None:
    config = load_config(DIGITS, ["distill.kd.temperature=3"])
    found = {label: single.distill.kd for label, _, single in run_configs(config)}
    kd = KDSettings(ce_weight=1.0, beta=2.0, temperature=3.0)
    assert found == {"student alone": None, "student + KD": kd, "student + UniKD": None}
    single = next(single for label, _, single in run_configs(config) if label == "student + KD")
    assert teacher_config(single).distill.kd is None
    runs = {"alone": {"distill.method": "none"}}
    with pytest.raises(ConfigError, match=r"distill\.kd holds settings"):
        load_config(DIGITS, [f"compare.runs={json.dumps(runs)}", "distill.kd.beta=3"])
    wrong = {"KD": {"distill.method": "kd", "distill.unikd.beta": 1}}
    with pytest.raises(ConfigError, match=r"KD: distill\.unikd holds settings"):
        load_config(DIGITS, [f"compare.runs={json.dumps(wrong)}"])


def test_the_hash_is_stable_when_methods_are_added(monkeypatch: pytest.MonkeyPatch) -> None:
    before = config_hash(load_config(DIGITS))
    more = create_model("More", __base__=schema.DistillConfig, other=(KDSettings | None, None))
    monkeypatch.setattr(load, "Config", create_model("WithMore", __base__=Config, distill=(more, more())))
    assert config_hash(load_config(DIGITS)) == before
    assert config_hash(load_config(DIGITS, ["distill.kd.temperature=2"])) != before
    assert config_hash(load_config(DIGITS, ["data.second_view.policy=rand"])) != before
    assert config_hash(load_config(DIGITS, ["data.detection.long_side=500"])) != before


TOP_K = ["teacher.cache.mode=read_write", "teacher.cache.logits=top_k", "teacher.cache.top_k=5"]


@pytest.mark.parametrize("mode", ["read", "read_write"])
def test_top_k_logits_need_temperature_one(mode: str) -> None:
    alone = [*TOP_K, "compare=null", f"teacher.cache.mode={mode}"]
    for method in ("kd", "unikd"):
        with pytest.raises(ConfigError) as error:
            load_config(DIGITS, [*alone, f"distill.method={method}", f"distill.{method}.temperature=4"])
        for part in (
            f"teacher.cache.logits = 'top_k' needs distill.{method}.temperature = 1, got 4.0",
            "logits=uint8 or fp16",
        ):
            assert part in str(error.value)
        load_config(DIGITS, [*alone, f"distill.method={method}", f"distill.{method}.temperature=1"])
    for unused in ("distill.method=none", "teacher.cache.mode=off"):
        load_config(DIGITS, [*alone, unused])


def test_the_temperature_of_every_run_of_a_comparison_counts() -> None:
    runs = {"alone": {"distill.method": "none"}, "kd": {"distill.method": "kd", "distill.kd.temperature": 1}}
    load_config(DIGITS, [*TOP_K, f"compare.runs={json.dumps(runs)}"])
    runs["unikd"] = {"distill.method": "unikd"}
    with pytest.raises(ConfigError, match=r"unikd: teacher\.cache\.logits = 'top_k' needs .* got 4\.0"):
        load_config(DIGITS, [*TOP_K, f"compare.runs={json.dumps(runs)}"])


def test_a_cache_has_a_folder_for_each_method_and_seed(tmp_path: Path) -> None:
    mine = tmp_path / "mine.json"
    mine.write_text(DIGITS.read_text())
    assert load_config(mine).teacher.cache.dir == "caches/mine-{method}-seed{seed}"  # type: ignore[union-attr]
    folders = [
        (label, str(cache_dir(single)))
        for label, _, single in run_configs(load_config(mine, ["compare.seeds=[0,7]"]))
        if single.distill.method != "none"
    ]
    assert folders == [
        ("student + KD", "caches/mine-kd-seed0"),
        ("student + UniKD", "caches/mine-unikd-seed0"),
        ("student + KD", "caches/mine-kd-seed7"),
        ("student + UniKD", "caches/mine-unikd-seed7"),
    ]
    given = load_config(mine, ["compare=null", "run.seed=3", "teacher.cache.dir=/x/{seed}/{name}/{method}/{name}"])
    assert cache_dir(given) == Path("/x/3/mine/unikd/mine")
    plain = load_config(mine, ["teacher.cache.dir=/x/{views}"])
    assert {cache_dir(single) for *_, single in run_configs(plain)} == {Path("/x/{views}")}


def test_the_hash_depends_on_caching_but_not_on_the_folder() -> None:
    def name(*overrides: str) -> str:
        return config_hash(load_config(DIGITS, overrides))

    assert name() == name("teacher.cache.dir=/elsewhere")
    cached = "teacher.cache.mode=read_write"
    assert name(cached) == name(cached, "teacher.cache.dir=/elsewhere")
    assert name() == name("teacher.min_accuracy=0.5")
    of_file = ["student.weights=a.pth", "student.weights_key=null"]
    assert name(*of_file[:1]) == name(*of_file) != name(of_file[0], "student.weights_key=model")
    others = [name(), name(cached), name(cached, "teacher.cache.views=2"), name(cached, "teacher.cache.logits=uint8")]
    assert len(set(others)) == 4
    assert config_hash(load_config(DIGITS, ["teacher=null", "compare=null", "distill.method=none"])) not in others


def _strings(section: dict[str, Any], known: dict[str, Any], prefix: str = "") -> list[str]:
    """Every key of a schema whose value may be a string of any content."""
    found: list[str] = []
    for name, field in section["properties"].items():
        for option in (field, *field.get("anyOf", ())):
            if option.get("type") == "string" and not {"enum", "const"} & option.keys():
                found.append(prefix + name)
            if "$ref" in option:
                found += _strings(known[option["$ref"].rpartition("/")[2]], known, f"{prefix}{name}.")
    return found


SCHEMA = Config.model_json_schema()
STRINGS = [key for key in _strings(SCHEMA, SCHEMA["$defs"]) if key != "json_schema"]


def test_every_string_is_seen_by_the_next_test() -> None:
    keys = {"run.dir", "data.root", "teacher.weights", "teacher.model", "teacher.cache.dir", "student.weights"}
    assert keys <= set(STRINGS)


@pytest.mark.parametrize("key", STRINGS)
@pytest.mark.parametrize("value", ["", " "])
def test_an_empty_string_is_refused(key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"{key} = {value!r} is empty")):
        load_config(DIGITS, [f"{key}={value}"])


def test_an_empty_name_in_a_list_is_refused() -> None:
    with pytest.raises(ConfigError, match=re.escape("student.feature_nodes.1 = '' is empty")):
        load_config(DIGITS, ['student.feature_nodes=["layer1", ""]'])


def test_invalid_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        load_config(tmp_path / "absent.json")
    broken = tmp_path / "broken.json"
    broken.write_text('{"run": }')
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_config(broken)
    broken.write_text('{"deepspeed": {"zero_optimization": {"stage": 0}, "zero_optimization": {"stage": 1}}}')
    with pytest.raises(ConfigError, match=r"broken\.json: key 'zero_optimization' is given twice"):
        load_config(broken)
    for nested in ("[" * 100_000, f'{{"run": {{"seed": {"9" * 5_000}}}}}'):
        broken.write_text(nested)
        with pytest.raises(ConfigError, match=r"broken\.json: not valid JSON: .*(depth|digits)"):
            load_config(broken)
    broken.write_text('{"data": {"name": "digits"}}')
    with pytest.raises(ConfigError, match="student is required"):
        load_config(broken)


def test_a_configuration_cannot_be_changed_after_loading() -> None:
    config = load_config(DIGITS)
    with pytest.raises(ValueError, match="frozen"):
        config.train.total_epochs = 3  # type: ignore[misc]


@pytest.mark.parametrize(
    "key", ["train.learning_rate", "run.timeout_minutes", "distill.unikd.alpha", "train.weight_decay"]
)
def test_absurd_numbers_are_refused_by_their_key(key: str) -> None:
    with pytest.raises(ConfigError, match=rf"{key} = 1e\+300 is not valid; (allowed: )?less than"):
        load_config(DIGITS, [f"{key}=1e300"])
