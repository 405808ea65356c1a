"""The accuracy table: means over seeds by hand, and when a printed figure stands beside them."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from support.report_runs import COST, config, write_json, write_result, write_run_folder
from unikd_fast.report.accuracy import accuracy_rows, accuracy_section, cost_section, single_runs_section, spread
from unikd_fast.report.page import Missing, Table
from unikd_fast.report.run_files import RunFileError
from unikd_fast.report.runs import RunGroup, find_runs, group_runs


def groups_of(
    folder: Path, content: dict[str, Any], *, method: Any = "unikd", model: str = "cifar/resnet20", **result: Any
) -> list[RunGroup]:
    """Two seeds of one student, whose best epochs score 70 and 72 and last ones 69 and 70."""
    content["compare"] = {"seeds": [0, 1], "runs": {"it": {}}}
    write_run_folder(folder, content)
    for seed, best, last in ((0, 70.0, 69.0), (1, 72.0, 70.0)):
        home = folder / f"seed-{seed}" / "it"
        write_result(home, "it", seed=seed, method=method, model=model, best=best, last=last, **result)
    return group_runs(find_runs([folder]).runs)


def test_spread_is_mean_and_sample_standard_deviation() -> None:
    found = spread([70.0, 72.0, 77.0])
    assert found.mean == 73.0
    assert found.deviation == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert found.text() == "73.00 ± 3.61"
    assert spread([70.0]).text() == "70.00"


def test_a_row_has_both_epochs_and_the_printed_figures(tmp_path: Path) -> None:
    (row,) = accuracy_rows(groups_of(tmp_path / "r", config()))
    assert (row.best.text(), row.last.text(), row.best.seeds) == ("71.00 ± 1.41", "69.50 ± 0.71", 2)
    assert [(one.value, one.tables) for one in row.printed] == [(73.01, (1, 5))]
    (remark,) = row.remarks
    assert "is by all signs of 480 epochs" in remark


@pytest.mark.parametrize(
    ("method", "distill", "value"),
    [
        ("kd", {}, 73.08),
        ("none", {}, 71.14),
        (["kr", "dkd"], {}, 74.23),
        ("unikd", {"unikd": {"fusion": "last"}}, 74.42),
        ("unikd", {"unikd": {"alpha": 0}}, 73.08),
        (["unikd_dev", "mlkd"], {}, 75.36),
        (["unikd_dev", "dkd"], {}, None),
        ("kd", {"kd": {"ce_weight": 0.1, "beta": 0.9}}, 73.08),
        ("dkd", {"dkd": {"standardized": True}}, 74.29),
        ("dkd", {"dkd": {"standardized": False}}, 74.11),
        ("something new", {}, None),
    ],
)
def test_the_row_of_a_method_and_of_the_ablations(
    tmp_path: Path, method: Any, distill: dict[str, Any], value: float | None
) -> None:
    content = config(teacher={"model": "cifar/resnet110"}, distill=distill)
    (row,) = accuracy_rows(groups_of(tmp_path / "r", content, method=method, model="cifar/resnet32"))
    assert [one.value for one in row.printed] == ([] if value is None else [value])


def test_ce_and_kd_at_equal_weights_are_an_ablation(tmp_path: Path) -> None:
    teacher = {"model": "cifar/wrn_40_2"}
    content = config(teacher=teacher, distill={"kd": {"ce_weight": 1.0, "beta": 1.0}})
    (row,) = accuracy_rows(groups_of(tmp_path / "r", content, method="kd", model="cifar/ShuffleV1"))
    assert [(one.value, one.tables) for one in row.printed] == [(75.21, (6,))]


def test_a_student_without_a_teacher_matches_all_its_pairs(tmp_path: Path) -> None:
    def printed(model: str, method: str) -> list[tuple[float, tuple[int, ...]]]:
        content = config(teacher=None, student={"model": model})
        groups = groups_of(tmp_path / model.replace("/", "-") / method, content, method=method, model=model)
        return [(one.value, one.tables) for one in accuracy_rows(groups)[0].printed]

    assert printed("cifar/ShuffleV1", "none") == [(70.50, (2,))]
    assert printed("cifar/resnet20", "none") == [(69.06, (1, 5))]
    assert printed("cifar/wrn_40_1", "none") == [(72.98, (1,)), (71.98, (5,))]
    assert printed("cifar/resnet14", "none") == []


def test_a_teacher_gets_the_printed_teacher_figure(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    write_run_folder(folder)
    write_result(folder, "student")
    write_result(folder / "teacher", "teacher", method="given", model="cifar/resnet56")
    teacher, student = accuracy_rows(group_runs(find_runs([folder]).runs))
    assert ([one.value for one in teacher.printed], teacher.model) == ([72.34], "cifar/resnet56")
    assert [one.value for one in student.printed] == [73.01]


@pytest.mark.parametrize(
    ("data", "printed"),
    [
        ({"name": "digits"}, False),
        ({"name": "arrow", "num_classes": 10}, False),
        ({"name": "arrow", "num_classes": 1000}, True),
        ({"name": "imagenet"}, True),
    ],
)
def test_only_data_sets_of_the_paper_have_printed_figures(tmp_path: Path, data: dict[str, Any], printed: bool) -> None:
    content = config(data=data, teacher={"model": "torchvision/resnet34"}, train={"total_epochs": 100})
    groups = groups_of(tmp_path / "r", content, model="torchvision/resnet18")
    top1, top5 = accuracy_rows(groups), accuracy_rows(groups, "top5")
    assert [one.value for one in top1[0].printed] == ([72.83] if printed else [])
    assert [(one.best.mean, one.printed[0].value) for one in top5] == ([(91.0, 91.38)] if printed else [])
    assert bool(top1[0].remarks) == (data["name"] == "arrow" and printed)


R101_R18 = ("frcnn/torchvision/resnet101", "frcnn/torchvision/resnet18")


def with_boxes(folder: Path, method: Any, classes: int = 80, steps: int = 180_000, **distill: Any) -> list[RunGroup]:
    teacher, student = R101_R18
    train = {"total_epochs": 13, "max_steps": steps}
    content = config(data={"name": "coco"}, teacher={"model": teacher}, distill=distill, train=train)
    return groups_of(folder, content, method=method, model=student, classes_with_boxes=classes)


@pytest.mark.parametrize(
    ("method", "distill", "values"),
    [
        ("kd", {"kd": {"ce_weight": 1.0, "beta": 1.0}}, [33.97, 54.66, 36.62]),
        (["unikd", "dkd"], {"unikd": {"beta": 0.0}}, [37.24, 57.86, 39.79]),
        (["unikd", "dkd"], {"unikd": {"beta": 1.0}}, []),
        (["kd", "fitnet"], {}, [54.52, 37.01]),
        (["dkd", "reviewkd"], {}, [37.01, 57.53, 39.85]),
    ],
)
def test_the_rows_of_detectors(tmp_path: Path, method: Any, distill: dict[str, Any], values: list[float]) -> None:
    groups = with_boxes(tmp_path / "r", method, **distill)
    rows = [row for metric in ("ap", "ap50", "ap75") for row in accuracy_rows(groups, metric)]
    assert [row.last.mean for row in rows] == ([69.5, 89.5, 67.5] if values else [69.5])
    assert [one.value for row in rows for one in row.printed] == values
    assert all(row.remarks == () for row in rows)
    assert accuracy_rows(groups) == accuracy_rows(groups, "top5") == []


def test_other_sets_and_shorter_runs_of_detectors(tmp_path: Path) -> None:
    (other,) = accuracy_rows(with_boxes(tmp_path / "other", "kd", classes=3), "ap")
    assert other.printed == ()
    (short,) = accuracy_rows(with_boxes(tmp_path / "short", "kd", steps=90), "ap")
    assert [one.value for one in short.printed] == [33.97]
    assert short.remarks == ("stopped after 90 steps",)


def test_the_sections_of_detectors(tmp_path: Path) -> None:
    groups = with_boxes(tmp_path / "r", "kd")
    captions = [part.caption for part in accuracy_section(groups, ()).parts if isinstance(part, Table)]
    assert [caption.partition(" (%)")[0] for caption in captions[:3]] == ["Test AP", "Test AP50", "Test AP75"]
    (table,) = single_runs_section(groups).parts
    assert isinstance(table, Table)
    assert table.header[-6:] == ("AP", "AP50", "AP75", "AP small", "AP medium", "AP large")
    assert table.rows[0][-8:] == ("70.00", "9", "69.00", "89.00", "67.00", "39.00", "72.00", "–")


def forget(folder: Path, *ways: tuple[str, ...]) -> None:
    """Remove figures of the last test from a result.json."""
    content = json.loads((folder / "result.json").read_text())
    for *path, name in ways:
        figures = content["last"]["test"]
        for key in path:
            figures = figures[key]
        del figures[name]
    write_json(folder / "result.json", content)


def test_every_ap_and_that_of_each_class_over_seeds(tmp_path: Path) -> None:
    groups = with_boxes(tmp_path / "r", "kd", classes=2)
    _, main, nothing, every, by_class = accuracy_section(groups, ()).parts
    assert isinstance(main, Table) and isinstance(nothing, Missing)
    assert isinstance(every, Table) and isinstance(by_class, Table)
    assert every.header == ("", "AP", "AP50", "AP75", "AP small", "AP medium", "AP large")
    spreads = tuple(f"{mean} ± 0.71" for mean in ("69.50", "89.50", "67.50", "39.50", "72.50"))
    assert every.rows == (("it", *spreads, "–"),)
    assert by_class.header == ("class", "it")
    assert by_class.rows == (("class 0", "69.50 ± 0.71"), ("class 1", "69.50 ± 0.71"))


def test_classes_that_some_runs_do_not_have(tmp_path: Path) -> None:
    """A class without an AP in one seed, another run that lacks the figures, and one seed alone."""
    first, second = tmp_path / "one", tmp_path / "two"
    groups = with_boxes(first, "kd", classes=2) + with_boxes(second, "dkd", classes=1)
    forget(first / "seed-1" / "it", ("ap_by_class", "class 1"), ("ap_small",))
    forget(second / "seed-0" / "it", ("ap_by_class",))
    groups = group_runs(find_runs([first, second]).runs)
    *_, every, by_class, lacking = accuracy_section(groups, ()).parts
    assert isinstance(every, Table) and isinstance(by_class, Table) and isinstance(lacking, Missing)
    assert [row[4] for row in every.rows] == ["39.00", "39.50 ± 0.71"]
    assert by_class.header == ("class", "it (one)")
    assert by_class.rows == (("class 0", "69.50 ± 0.71"), ("class 1", "69.00"))
    assert lacking.text.startswith("The AP of each class is missing for it (two): a result.json has no ap_by_class")
    forget(first / "seed-0" / "it", ("ap_by_class",))
    *_, every, lacking = accuracy_section(group_runs(find_runs([first, second]).runs), ()).parts
    assert isinstance(every, Table) and isinstance(lacking, Missing)
    assert "missing for it (one), it (two): " in lacking.text


def test_malformed_figures_of_classes_are_refused(tmp_path: Path) -> None:
    with_boxes(tmp_path / "r", "kd", classes=2)
    path = tmp_path / "r" / "seed-0" / "it" / "result.json"
    content = json.loads(path.read_text())
    for odd, said in ((None, r"class 1 must be a finite number, got None"), ({}, r"must be a finite number, got \{\}")):
        content["best"]["test"]["ap_by_class"]["class 1"] = odd
        write_json(path, content)
        with pytest.raises(RunFileError, match=rf"best\.test\.ap_by_class.*{said}"):
            find_runs([tmp_path / "r"])
    content["best"]["test"]["ap_by_class"] = [1.0]
    write_json(path, content)
    with pytest.raises(RunFileError, match=r"best\.test\.ap_by_class must be an object, got \[1\.0\]"):
        find_runs([tmp_path / "r"])


def test_cifar_100_pairs_have_no_figure_on_other_data(tmp_path: Path) -> None:
    (row,) = accuracy_rows(groups_of(tmp_path / "r", config(data={"name": "synthetic"})))
    assert row.printed == ()


def test_deviations_from_the_recipe_are_remarked(tmp_path: Path) -> None:
    content = config(data={"name": "cifar100", "train_samples": 5000}, train={"total_epochs": 24, "max_steps": 1000})
    (row,) = accuracy_rows(groups_of(tmp_path / "r", content, test_is_val=False))
    text = "; ".join(row.remarks)
    for expected in ("5,000 samples", "24 epochs; the usual recipe has 240", "1,000 steps", "on a validation split"):
        assert expected in text


def test_the_section_shows_printed_figures_and_differences(tmp_path: Path) -> None:
    content = config(teacher={"model": "cifar/wrn_40_2"})
    groups = groups_of(tmp_path / "r", content, model="cifar/wrn_40_1")
    section = accuracy_section(groups, ["x is not finished."])
    table, remarks = (part for part in section.parts if hasattr(part, "rows"))
    assert table.rows == (
        (
            "it",
            "cifar/wrn_40_1",
            "2",
            "71.00 ± 1.41",
            "69.50 ± 0.71",
            "75.35 (T1)\n76.35 (T5)",
            "−4.35\n−5.35",
            "−5.85\n−6.85",
        ),
    )
    assert remarks.rows[0][0] == "it"
    assert remarks.rows[0][1].startswith("75.35 (T1) and 76.35 (T5): Table 1 prints 75.35")
    assert section.parts[-1] == ("x is not finished.",)
    assert "best epoch is the maximum on it" in section.parts[0]


def test_the_section_names_what_has_no_printed_figure(tmp_path: Path) -> None:
    section = accuracy_section(groups_of(tmp_path / "r", config(data={"name": "digits"})), [])
    table = section.parts[1]
    assert table.header == ("", "model", "seeds", "best epoch", "last epoch")
    assert "prints nothing for digits with cifar/resnet56 to cifar/resnet20" in section.parts[2].text


def test_every_single_run_has_a_row(tmp_path: Path) -> None:
    (table,) = single_runs_section(groups_of(tmp_path / "r", config(), method=["kd", "at"])).parts
    assert [row[:3] for row in table.rows] == [("it", "0", "kd+at"), ("it", "1", "kd+at")]
    assert table.rows[1][4:] == ("7", "72.00", "9", "70.00", "90.00", "1.2500")


def test_the_cost_of_teacher_and_student_is_a_table(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "r", config())
    write_result(folder, "a", model="s")
    path = write_result(folder / "teacher", "teacher", model="t") / "result.json"
    teacher = {**COST, "parameters": 312_168, "multiply_adds": 50_006_528, "latency_ms": {"1": 2.0, "32": 32.0}}
    write_json(path, {**json.loads(path.read_text()), "cost": teacher})
    (table,) = cost_section(group_runs(find_runs([folder]).runs)).parts
    assert isinstance(table, Table)
    assert table.rows == (
        ("teacher", "t", "32 px", "0.31 M", "50.0 M", "1.00 MiB", "2 ms", "32 ms"),
        ("student", "s", "32 px", "0.08 M", "12.5 M", "1.00 MiB", "0.5 ms", "8 ms"),
    )
    assert "on a processor" in table.caption
    written = json.loads(path.read_text())
    write_json(path, {**written, "cost": {**teacher, "latency_ms": {"1": "fast"}}})
    said = r"cost\.latency_ms\.1 must be a finite number that is not negative, got 'fast'"
    with pytest.raises(RunFileError, match=said):
        find_runs([folder])
    del written["cost"]
    for place in (path, folder / "result.json"):
        write_json(place, {**written, "label": "a"})
    (missing,) = cost_section(group_runs(find_runs([folder]).runs)).parts
    assert isinstance(missing, Missing) and "120 micro-batches" in missing.text
