"""The study: its rows, its cells, and its figures by hand."""

import math
from pathlib import Path

import pytest

from support.report_runs import ENVIRONMENT, write_json, write_result
from unikd_fast.config import Config, ConfigError, parse_config
from unikd_fast.recipes.pairs import TEACHER, Pair
from unikd_fast.recipes.runs import plan_runs
from unikd_fast.recipes.settings import METHODS
from unikd_fast.recipes.study import (
    CANDIDATES,
    CHANGES,
    CHOSEN,
    CIFAR10,
    IMAGES,
    STUDY,
    STUDY_PAIRS,
    TUNING,
    as_chosen,
    candidate_row,
    chosen_row,
    study_experiment,
)
from unikd_fast.recipes.study_results import (
    Study,
    best_candidate,
    cheapest_equal,
    choices,
    difference,
    interval,
    interval_text,
    load_study,
    merged,
    read_study,
    study_json,
    study_markdown,
)
from unikd_fast.recipes.tables import TABLES, Cell, student_cells, teacher_cells
from unikd_fast.report.run_files import RunFileError

ROOT = Path(__file__).parents[2]
RECORDS = ROOT / "docs" / "study.json"


def finish(out: Path, row: str, seed: int, accuracy: float) -> None:
    folder = Cell(row, CIFAR10, seed).folder(out)
    write_result(folder, "student", seed=seed, best=accuracy + 1, last=accuracy)
    write_json(folder / "environment.json", ENVIRONMENT | {"gpus": [], "cpu": "a processor", "commit": "abc"})


def test_every_method_has_the_same_number_of_candidates() -> None:
    assert {len(candidates) for _, candidates in CANDIDATES.values()} == {4}
    assert len(TUNING) == 4 * len(CANDIDATES)
    titles = [setting.title for setting in (*STUDY.values(), *TUNING.values())]
    assert len(set(titles)) == len(titles)
    # A name means one thing in all tables.
    assert STUDY.keys() & METHODS.keys() == {"none"}
    assert not TUNING.keys() & (METHODS.keys() | STUDY.keys())


@pytest.mark.parametrize("pair", STUDY_PAIRS)
@pytest.mark.parametrize("row", [TEACHER, *TUNING, *STUDY])
def test_a_row_is_what_it_says(row: str, pair: Pair) -> None:
    images = IMAGES[pair.name]
    config = as_config(row, 3, pair)
    is_search, is_teacher = row in TUNING, row == TEACHER
    assert (config.teacher is None) == (row in (TEACHER, "none"))
    assert config.student.model == (pair.teacher if is_teacher else pair.student)
    # Neither the teacher nor the search sees the images that decide: those held out, and those of the test.
    assert config.data.val_samples == (images.held_out if is_search or is_teacher else 0)
    assert config.data.root.endswith("/train") == (is_search or is_teacher)
    assert config.data.train_samples == (None if is_teacher else images.student_samples)
    assert config.train.total_epochs == (images.teacher_epochs if is_teacher else images.student_epochs)
    if not is_teacher:
        assert config.data.seed == (1003 if is_search else 3)


def as_config(row: str, seed: int = 0, pair: Pair = CIFAR10) -> Config:
    raw = study_experiment(row, pair, seed)
    return parse_config(raw, ["teacher.weights=random"] if "teacher" in raw else [], name="x", source="x")


def test_a_change_changes_one_thing() -> None:
    base = as_config(chosen_row("unikd")).model_dump(mode="json")
    for row, change in CHANGES.items():
        changed = as_config(row).model_dump(mode="json")
        kinds = {
            "keys": base["distill"]["unikd"] != changed["distill"]["unikd"],
            "distill": base["distill"] | {"unikd": 0} != changed["distill"] | {"unikd": 0},
            "cache": base["teacher"] != changed["teacher"],
        }
        assert [kind for kind, is_other in kinds.items() if is_other] == [
            kind for kind in kinds if getattr(change, kind)
        ], row
        own, other = base["distill"]["unikd"], changed["distill"]["unikd"]
        assert {key: other[key] for key in own if own[key] != other[key]} == change.keys
    assert as_chosen(CIFAR10, "alpha") == f"{base['distill']['unikd']['alpha']:g}"


def test_one_teacher_serves_all_seeds(tmp_path: Path) -> None:
    cells = student_cells(TABLES["study"], range(2), ["none", "tuned_kd"])
    assert len({cell.name for cell in cells}) == len(cells)  # students alone see the images of their pair
    of_both = teacher_cells(cells)
    assert [cell.name for cell in of_both] == ["study/teacher/resnet20/seed-0", "study/teacher/wrn_16_1/seed-0"]
    teachers, cells = of_both[:1], [cell for cell in cells if cell.pair == CIFAR10]
    runs = plan_runs([*teachers, *cells], tmp_path, teachers="trained", root=Path("/images"))
    assert [run.config.data.root for run in runs] == ["/images/cifar10/train", *["/images/cifar10"] * 4]
    assert [run.config.data.seed for run in runs] == [0, 0, 0, 1, 1]
    weights = {run.config.teacher.weights for run in runs if run.config.teacher is not None}
    assert weights == {"${UNIKD_TRAINED_TEACHERS}/resnet20/seed-0/student.safetensors"}


def test_an_interval_by_hand() -> None:
    found = interval([1.0, 2.0, 4.0, 3.0, 5.0])
    # Student's t of 4 degrees of freedom at 97.5 % is 2.776; the sample variance is 2.5.
    assert (found.mean, found.seeds) == (3.0, 5)
    assert found.half_width == pytest.approx(2.7764 * math.sqrt(2.5 / 5), rel=1e-4)
    assert found.excludes_zero
    assert not interval([-1.0, 1.5]).excludes_zero
    assert not interval([1.0]).excludes_zero  # nothing is known of its spread
    assert interval_text(interval([1.0])) == "+1.00"


def test_differences_are_taken_within_a_seed() -> None:
    accuracies = {"tuned_kd": {0: 70.0, 1: 60.0, 2: 1.0}, "tuned_dkd": {0: 71.0, 1: 62.0}}
    found = difference(accuracies, "tuned_dkd", "tuned_kd")
    assert found is not None
    assert (found.mean, found.seeds) == (1.5, 2)
    assert found.half_width == pytest.approx(12.706 * math.sqrt(0.5 / 2), rel=1e-4)
    assert difference(accuracies, "tuned_dkd", "none") is None


def test_the_best_candidate_waits_for_all() -> None:
    accuracies = {"kd_1": {0: 60.0}, "kd_2": {0: 62.0, 1: 60.0}, "kd_3": {0: 61.0}, "kd_4": {0: 59.0}}
    assert best_candidate(accuracies, "kd") == 1  # the first of two that are equal
    assert best_candidate({**accuracies, "kd_3": {0: 61.5}}, "kd") == 2
    del accuracies["kd_1"]
    assert best_candidate(accuracies, "kd") is None


def test_the_default_is_the_cheapest_of_the_best() -> None:
    accuracies = {"a": {0: 70.0, 1: 71.0, 2: 72.0}, "b": {0: 70.2, 1: 70.7, 2: 72.0}, "c": {0: 65.0, 1: 66.1, 2: 66.9}}
    costs = {"a": (2.0, 2.1, 2.2), "b": (1.5, 1.6, 1.7), "c": (1.0, 1.0, 1.0)}
    assert cheapest_equal("abc", accuracies, costs) == "b"
    assert cheapest_equal("ac", accuracies, costs) == "a"
    assert cheapest_equal("abc", accuracies, {"a": costs["a"]}) is None  # nothing to choose from
    assert cheapest_equal("abc", {}, costs) is None
    assert cheapest_equal("abc", {**accuracies, "b": {0: 70.2}}, costs) == "a"  # one seed alone says nothing
    assert cheapest_equal("ab", {"a": {0: 70.0}, "b": {0: 71.0}}, costs) is None


def test_the_page(tmp_path: Path) -> None:
    assert study_markdown(read_study(tmp_path, range(2))) == "Nothing has run yet.\n"
    figures = {
        "none": (60.0, 61.0),
        "tuned_kd": (63.0, 65.0),
        "tuned_unikd": (66.0, 67.0),
        "unikd_last_level": (64.0, 67.0),
    }
    for row, by_seed in figures.items():
        for seed, accuracy in enumerate(by_seed):
            finish(tmp_path, row, seed, accuracy)
    for number, accuracy in enumerate((50.0, 52.0, 51.0, 49.0)):
        finish(tmp_path, candidate_row("kd", number), 0, accuracy)
    finish(tmp_path, TEACHER, 0, 80.0)
    study = read_study(tmp_path, range(2))
    assert study.accuracies[CIFAR10.name]["none"] == {0: 60.0, 1: 61.0}  # of the last epoch
    costs = {CIFAR10.name: {"tuned_unikd": [2.0, 2.25, 2.5], "unikd_last_level": [1.5, 1.75, 2.0]}}
    study = study._replace(costs=costs)
    records = tmp_path / "study.json"
    records.write_text(study_json(study))
    assert load_study(records) == study
    page = study_markdown(study)
    assert "13 runs on a processor, by commit abc" in page
    assert "the teacher gets 80.00" in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    assert ["student alone", "60.50 ± 0.71", "\u22123.50 ± 6.35", "\u22126.00 ± 0.00, told apart", ""] in rows
    assert ["UniKD, tuned", "66.50 ± 0.71", "+2.50 ± 6.35", "", "2.25 (2.00 to 2.50)"] in rows
    of_last = ["levels", "the deepest alone", "65.50 ± 2.12", "\u22121.00 ± 12.71", "1.75 (1.50 to 2.00)", "x"]
    assert of_last in rows
    assert ["levels", "all", "66.50 ± 0.71", "", "2.25 (2.00 to 2.50)", ""] in rows
    fewer = {**study.accuracies[CIFAR10.name], "tuned_kd": {0: 63.0}}
    assert "| KD, tuned     | 63.00, 1 of 2 seeds |" in study_markdown(study._replace(accuracies={CIFAR10.name: fewer}))
    assert not any(row[:1] == ["DKD, tuned"] for row in rows)
    assert "Not run: DKD, tuned; logit standardisation, tuned; " in page
    assert "Not run: levels: without the finest; " in page
    (of_kd,) = (row for row in rows if row[0] == "KD")
    assert [cell.rpartition(": ")[2].strip("*") for cell in of_kd[1:]] == ["50.00", "52.00", "51.00", "49.00"]


def test_a_run_of_another_candidate_is_refused(tmp_path: Path) -> None:
    """A row of the study is the candidate that is chosen now: another's accuracy must not stand for it."""
    finish(tmp_path, chosen_row("kd"), 0, 60.0)
    (run,) = plan_runs([Cell(chosen_row("kd"), CIFAR10, 0)], tmp_path, teachers="trained")
    write_json(run.folder / "config.json", run.config.model_dump(mode="json", by_alias=True))
    assert read_study(tmp_path, range(1)).accuracies
    other = CHOSEN[CIFAR10.name] | {"kd": (CHOSEN[CIFAR10.name]["kd"] + 1) % 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(CHOSEN, CIFAR10.name, other)
        with pytest.raises(ConfigError, match=r"tuned_kd/\S+ was run with another configuration: distill.kd"):
            read_study(tmp_path, range(1))
    with pytest.raises(ConfigError, match="another configuration"):
        read_study(tmp_path, range(1), ["train.max_steps=3"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "is empty"),
        ('{"accuracies"', "is damaged"),
        ("[]", "is damaged"),
        ("{}", "there is no 'accuracies'"),
        ('{"accuracies": {"a": {"kd_1": {"first": 60.0}}}, "costs": {}}', "'first'"),
        ('{"accuracies": {"a": {"kd_1": {"0": NaN}}}, "costs": {}}', "must be finite numbers, got nan"),
        ('{"accuracies": {"a": {"kd_1": {"0": "60"}}}, "costs": {}}', "must be finite numbers, got '60'"),
        ('{"accuracies": {"a": {"kd_1": [60.0]}}, "costs": {}}', "'list'"),
        ('{"accuracies": {}, "costs": {"a": {"none": [1.0, 2.0]}}}', "expected 3"),
        ('{"accuracies": {}, "costs": {}, "hardware": null, "commits": []}', "NoneType"),
    ],
)
def test_damaged_records_are_named(text: str, said: str, tmp_path: Path) -> None:
    path = tmp_path / "study.json"
    path.write_text(text)
    with pytest.raises(RunFileError, match=f"study.json does not hold the records of a study: .*{said}.*; restore it"):
        load_study(path)


def test_nothing_to_add_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import study_table

    before = RECORDS.read_text()
    assert study_table.main(["--runs", str(tmp_path)]) == 2
    assert f"--runs {tmp_path}: no run of the study is finished there" in capsys.readouterr().err
    assert RECORDS.read_text() == before


def test_records_are_added_to() -> None:
    pair = CIFAR10.name
    first = Study({pair: {"none": {0: 1.0, 1: 2.0}}}, {pair: {"none": [1.0, 1.0, 1.0]}}, ("one",), ("a",))
    second = Study({pair: {"none": {1: 3.0}, "tuned_kd": {0: 4.0}}}, {}, ("one",), ("b",))
    both = merged(first, second)
    assert both.accuracies == {pair: {"none": {0: 1.0, 1: 3.0}, "tuned_kd": {0: 4.0}}}
    assert both[1:] == ({pair: {"none": [1.0, 1.0, 1.0]}}, ("one",), ("a", "b"))


def test_the_docs_say_what_was_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import study_table

    page = (ROOT / "docs" / "defaults.md").read_text()
    assert study_table.rewritten(page, load_study(RECORDS)) == page, "run `python benchmarks/study_table.py`"


@pytest.mark.parametrize("pair", STUDY_PAIRS)
def test_the_best_of_the_search_is_chosen(pair: Pair) -> None:
    accuracies = load_study(RECORDS).accuracies.get(pair.name, {})
    found = {method: best_candidate(accuracies, method) for method in CANDIDATES}
    assert CHOSEN[pair.name].keys() == CANDIDATES.keys()
    assert {method: CHOSEN[pair.name][method] for method in found if found[method] is not None} == {
        method: number for method, number in found.items() if number is not None
    }


def test_choices_begin_with_what_is_chosen() -> None:
    assert {rows[0] for rows in choices().values()} == {"tuned_unikd"}
    assert sorted(row for rows in choices().values() for row in rows[1:]) == sorted(CHANGES)
