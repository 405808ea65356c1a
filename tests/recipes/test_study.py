"""The study of the defaults: its rows, its cells, and its figures by hand."""

import math
from itertools import product
from pathlib import Path

import pytest

from support.report_runs import ENVIRONMENT, write_json, write_result
from unikd_fast.config import parse_config
from unikd_fast.recipes.ledger import make_ledger
from unikd_fast.recipes.pairs import TEACHER
from unikd_fast.recipes.runs import plan_runs
from unikd_fast.recipes.settings import METHODS
from unikd_fast.recipes.study import (
    ALPHAS,
    CHANGES,
    CHOICES,
    GATES,
    HEADS,
    MIDDLE,
    SAME_LOGIT_LOSS,
    STUDY,
    STUDY_PAIR,
    WIDTHS,
    study_experiment,
)
from unikd_fast.recipes.study_results import (
    Accuracies,
    difference,
    effect,
    effects,
    interval,
    interval_text,
    parse_study,
    read_study,
    strongest_baseline,
    study_json,
    study_markdown,
)
from unikd_fast.recipes.tables import TABLES, Cell, student_cells, teacher_cells

TABLE = TABLES["defaults"]


def finish(out: Path, row: str, seed: int, accuracy: float) -> None:
    folder = Cell(row, STUDY_PAIR, seed).folder(out)
    write_result(folder, "student", seed=seed, best=accuracy + 1, last=accuracy)
    write_json(folder / "environment.json", ENVIRONMENT | {"gpus": [], "cpu": "a processor", "commit": "abc"})


def test_every_combination_is_a_row() -> None:
    combinations = set(product(HEADS, GATES, (64,), ALPHAS)) | set(product(HEADS, ("spatial",), WIDTHS, (4.0,)))
    assert set(CHOICES) == combinations
    assert len(CHOICES) == 16
    assert MIDDLE in CHOICES
    assert {choice.name for choice in CHOICES} <= STUDY.keys()
    assert len({setting.title for setting in STUDY.values()}) == len(STUDY)
    # A name means one thing in all tables.
    assert STUDY.keys() & METHODS.keys() == {"none"}


@pytest.mark.parametrize("row", [TEACHER, *STUDY])
def test_a_row_is_what_it_says(row: str) -> None:
    raw = study_experiment(row, STUDY_PAIR, 3)
    config = parse_config(raw, ["teacher.weights=random"] if "teacher" in raw else [], name="x", source="x")
    assert (config.data.name, config.data.seed, config.data.train_samples) == ("fine_grained", 3, 3000)
    assert (config.teacher is None) == (row in (TEACHER, "none"))
    assert config.student.model == ("cifar/resnet20" if row == TEACHER else "cifar/resnet8")
    distill = config.distill
    for choice in CHOICES:
        if choice.name == row:
            own = distill.unikd
            found = (own.teacher_head, own.gate, own.width, own.alpha)
            assert found == tuple(choice)
    if row.startswith("unikd"):
        assert distill.method == "unikd"
        assert distill.unikd.temperature == 4.0


def test_changes_are_one_each() -> None:
    for row, change in CHANGES.items():
        base, changed = (STUDY[each].distill(STUDY_PAIR) for each in (change.base, row))
        base, changed = base["unikd"], changed["unikd"]
        (key,) = (name for name in base.keys() | changed.keys() if base.get(name) != changed.get(name))
        assert change.keys == {key: changed[key]}
    assert STUDY["unikd_beta_4_alpha_10"].distill(STUDY_PAIR)["unikd"] == {
        **STUDY[MIDDLE.name].distill(STUDY_PAIR)["unikd"],
        "beta": 4.0,
        "alpha": 10.0,
    }
    assert STUDY["unikd_input_norm_beta_4"].title == "UniKD, batch norm before the expanders, beta = 4"


def test_rows_without_features_have_the_same_logit_loss() -> None:
    for row, without in SAME_LOGIT_LOSS.items():
        ours, theirs = (STUDY[each].distill(STUDY_PAIR) for each in (row, without))
        assert (ours["method"], theirs["method"], theirs["kd"]["ce_weight"]) == ("unikd", "kd", 1.0)
        assert ours["unikd"].get("beta", 1.0) == theirs["kd"]["beta"]
        assert ours["unikd"]["temperature"] == theirs["kd"]["temperature"]


def test_every_seed_has_images_and_a_teacher_of_its_own(tmp_path: Path) -> None:
    cells = student_cells(TABLE, range(2), ["none", "kd_1_1"])
    teachers = teacher_cells(cells)
    assert [cell.name for cell in teachers] == [f"fine_grained/teacher/resnet20/seed-{seed}" for seed in (0, 1)]
    runs = plan_runs([*teachers, *cells], tmp_path, teachers="trained")
    assert [run.config.data.seed for run in runs] == [0, 1, 0, 0, 1, 1]
    weights = [run.config.teacher.weights for run in runs if run.config.teacher is not None]
    assert weights == [f"${{UNIKD_TRAINED_TEACHERS}}/resnet20/seed-{seed}/student.safetensors" for seed in (0, 1)]


def test_the_ledger_has_all_teachers(tmp_path: Path) -> None:
    for seed, accuracy in enumerate((80.0, 84.0)):
        finish(tmp_path, TEACHER, seed, accuracy)
    ledger = make_ledger(TABLE, tmp_path, seeds=range(3), teachers="trained")
    teacher = ledger.entries[0]
    assert teacher.figures.last is not None
    assert (teacher.method, teacher.figures.last.mean, *teacher.figures[3:]) == (TEACHER, 82.0, (0, 1), (2,))


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
    accuracies = {"kd_1_1": {0: 70.0, 1: 60.0, 2: 1.0}, "dkd_2": {0: 71.0, 1: 62.0}}
    found = difference(accuracies, "dkd_2", "kd_1_1")
    assert found is not None
    assert (found.mean, found.seeds) == (1.5, 2)
    assert found.half_width == pytest.approx(12.706 * math.sqrt(0.5 / 2), rel=1e-4)
    assert difference(accuracies, "dkd_2", "none") is None


def additive(seeds: int) -> Accuracies:
    """Accuracies in which every level has a worth of its own, the anchored head one more at alpha 10, and seeds a level
    of theirs."""
    worth: dict[object, float] = {"prefit": 0.5, "channel": -0.25, 128: 0.125, 1.0: -1.0, 10.0: 0.0}
    return {
        choice.name: {
            seed: 80.0 + seed + sum(worth.get(level, 0.0) for level in choice) + (choice[::3] == ("anchored", 10.0))
            for seed in range(seeds)
        }
        for choice in CHOICES
    }


def test_what_a_level_is_worth() -> None:
    accuracies = additive(3)

    def mean(factor: str, level: object, against: object, **among: object) -> float:
        found = effect(accuracies, factor, level, against, among)
        assert found is not None
        assert (found.interval.seeds, round(found.interval.half_width, 9)) == (3, 0.0)
        return found.interval.mean

    assert mean("gate", "channel", "spatial") == -0.25
    assert mean("width", 128, 64) == 0.125
    assert mean("alpha", 1.0, 4.0) == -1.0
    assert mean("head", "anchored", "prefit") == pytest.approx(-0.5 + 2 / 8)
    assert mean("head", "anchored", "prefit", alpha=10.0) == 0.5
    assert mean("alpha", 10.0, 4.0, head="prefit") == 0.0
    assert mean("alpha", 10.0, 4.0) == 0.5
    with pytest.raises(ValueError, match="no combinations differ by alpha 30"):
        effect(accuracies, "alpha", 30.0, 4.0)


def test_a_level_waits_for_all_its_combinations() -> None:
    accuracies = {name: dict(of_seeds) for name, of_seeds in additive(2).items()}
    del accuracies[MIDDLE.name][1]
    found = effect(accuracies, "gate", "channel", "spatial")
    assert found is not None
    assert found.interval.seeds == 1
    del accuracies[MIDDLE.name][0]
    assert effect(accuracies, "gate", "channel", "spatial") is None
    complete = {(each.factor, each.level, *each.among.values()) for each in effects(accuracies)}
    assert complete == {
        ("head", "anchored", 1.0),
        ("head", "anchored", 10.0),
        ("alpha", 1.0, "anchored"),
        ("alpha", 10.0, "anchored"),
    }


def test_the_page(tmp_path: Path) -> None:
    assert study_markdown(read_study(tmp_path, range(2))) == "Nothing has run yet.\n"
    for row, by_seed in additive(2).items():
        for seed, accuracy in by_seed.items():
            finish(tmp_path, row, seed, accuracy)
    further = {"none": (60.0, 61.0), "kd_1_1": (75.0, 76.5), "kd_1_4": (76.0, 77.0), "unikd_bilinear": (83.0, 83.0)}
    for row, figures in further.items():
        for seed, accuracy in enumerate(figures):
            finish(tmp_path, row, seed, accuracy)
    study = read_study(tmp_path, range(2))
    assert study.accuracies["none"] == {0: 60.0, 1: 61.0}  # of the last epoch
    assert parse_study(study_json(study)) == study
    assert strongest_baseline(study.accuracies) == "kd_1_4"
    page = study_markdown(study)
    assert "Seeds: 0, 1; " in page
    assert "40 runs" in page
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in page.splitlines() if line.startswith("| ")]
    found = {row[0]: row[1:] for row in reversed(rows)}  # of the first table
    assert rows[0][-1] == "over the best baseline, CE + 4 KD"
    assert found["teacher"] == ["missing", "", ""]
    assert found["CE + 4 KD"] == ["76.50 ± 0.71", "+0.75 ± 3.18", ""]
    assert found["student alone"][0] == "60.50 ± 0.71"
    assert found["UniKD, prefit head, spatial gate, D = 64, alpha = 4"] == [
        "81.00 ± 0.71",
        "+5.25 ± 3.18",
        "+4.50 ± 0.00",
    ]
    assert ["gate", "channel against spatial", "all combinations", "\u22120.25 ± 0.00", "yes"] in rows
    assert ["head", "anchored against prefit", "alpha 10", "+0.50 ± 0.00", "yes"] in rows
    added = [MIDDLE.title, "CE + KD (UniKD without FDP and AFF)", "+5.25 ± 3.18", "yes"]
    assert added in rows
    assert ["UniKD, bilinear upsampling", MIDDLE.title, "+2.00 ± 6.35", "no"] in rows
    assert sum(row[1] == "CE + 4 KD" for row in rows) == 0  # nothing has run that it would be compared with
    assert "a processor, by commit abc" in page


def test_the_docs_say_what_was_found() -> None:
    docs = Path(__file__).parents[2] / "docs"
    study = parse_study((docs / "defaults.json").read_text())
    assert study.accuracies.keys() == {TEACHER, *STUDY}
    assert study_markdown(study) in (docs / "defaults.md").read_text()
