"""The ledger: means, deviations and differences by hand, and the origin of each figure."""

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest

from support.forged_json import places
from support.report_runs import ENVIRONMENT, write_json, write_result
from unikd_fast.recipes.ledger import Entry, Ledger, ledger_json, ledger_markdown, make_ledger, overviews
from unikd_fast.recipes.pairs import Pair
from unikd_fast.recipes.tables import TABLES, Cell, stand_in
from unikd_fast.report.run_files import RunFileError

R110, WRN_SHUFFLE = TABLES["table6"].pairs


def finish(
    out: Path,
    method: str,
    pair: Pair,
    seed: int,
    best: float,
    last: float,
    seconds: tuple[float, ...] = (),
    **made: Any,
) -> Path:
    """A finished run with these accuracies, whose starts took so long."""
    folder = Cell(method, pair, seed).folder(out)
    write_result(folder, "student", seed=seed, best=best, last=last)
    write_json(folder / "environment.json", ENVIRONMENT | {"cpu": "a processor", "commit": "abc"} | made)
    lines = [json.dumps({"seconds": each, "exit_code": 0}) for each in seconds]
    folder.with_name(f"{folder.name}.timings.jsonl").write_text("\n".join(lines))
    return folder


def entry(ledger: Ledger, method: str, pair: Pair | None = None, metric: str = "top1") -> Entry:
    """The only one."""
    (found,) = (
        each
        for each in ledger.entries
        if (each.method, each.metric) == (method, metric) and (pair is None or each.pair == pair.name)
    )
    return found


def made(table: str, out: Path, seeds: int = 2, **options: Any) -> Ledger:
    return make_ledger(TABLES[table], out, seeds=range(seeds), **{"teachers": "published", **options})


def test_means_deviations_and_differences(tmp_path: Path) -> None:
    finish(tmp_path, "unikd", R110, 0, 75.0, 74.0, (100.0, 200.0))
    folder = finish(tmp_path, "unikd", R110, 1, 76.0, 75.5, (500.0,), gpus=["a GPU", "a GPU"], commit="def")
    finish(tmp_path, "unikd_without_aff", R110, 1, 74.92, 74.42)
    ledger = made("table6", tmp_path)
    assert len(ledger.entries) == 2 + 6  # teachers, then methods times pairs
    found = entry(ledger, "unikd", R110)
    assert found.figures.best is not None
    assert found.figures.last is not None
    assert found.differences is not None
    assert (found.figures.best.mean, found.figures.last.mean, found.figures.best.seeds) == (75.5, 74.75, 2)
    assert found.figures.best.deviation == pytest.approx(math.sqrt(0.5))  # of 75 and 76
    assert found.figures.last.deviation == pytest.approx(1.5 / math.sqrt(2))  # of 74 and 75.5
    assert found.differences == pytest.approx((75.5 - 75.36, 74.75 - 75.36))
    assert (found.figures.seeds, found.figures.missing, found.figures.epochs) == ((0, 1), (), (7, 7))
    assert found.origin.seconds == 400.0  # of 100 + 200 and 500
    assert (found.origin.hardware, found.origin.commits) == (("a processor", "a GPU"), ("abc", "def"))
    assert found.origin.folders[1] == str(folder)

    half = entry(ledger, "unikd_without_aff", R110)
    assert half.figures.best is not None
    assert (half.figures.seeds, half.figures.missing, half.origin.seconds) == ((1,), (0,), None)
    assert math.isnan(half.figures.best.deviation)
    assert half.differences == pytest.approx((0.5, 0.0))

    none = entry(ledger, "unikd", WRN_SHUFFLE)
    assert (none.figures.best, none.figures.last, none.differences, none.figures.missing) == (None, None, None, (0, 1))
    assert none.printed is not None
    assert none.printed.value == 78.10


def test_as_json(tmp_path: Path) -> None:
    finish(tmp_path, "unikd", R110, 0, 75.0, 74.0, (100.0,))
    ledger = made("table6", tmp_path, overrides=["train.max_steps=3"])
    content = json.loads(json.dumps(ledger_json(ledger), allow_nan=False))
    (cell,) = (e for e in content["entries"] if e["method"] == "unikd" and e["pair"] == R110.name)
    assert cell["best"] == {"mean": 75.0, "std": None, "seeds": 1}
    assert cell["printed"] == {"value": 75.36, "note": "", "tables": [6]}
    assert (cell["best_minus_printed"], cell["last_minus_printed"]) == (-0.36, -1.36)
    assert (cell["wall_s"], cell["hardware"], cell["commits"]) == (100.0, ["a processor"], ["abc"])
    assert content["settings"] == ["train.max_steps=3"]
    assert {"method": "unikd", "pair": R110.name, "seeds": [1]} in content["missing"]
    assert len(content["missing"]) == 6  # a teacher that is given is not run


def test_figures_that_two_tables_print_are_both_there(tmp_path: Path) -> None:
    pair = TABLES["table1"].pairs[4]
    one, five = (entry(made(name, tmp_path), "unikd", pair) for name in ("table1", "table5"))
    assert one.printed is not None
    assert five.printed is not None
    assert (one.printed.value, [other.value for other in one.elsewhere]) == (75.35, [76.35])
    assert (five.printed.value, [other.value for other in five.elsewhere]) == (76.35, [75.35])
    text = ledger_markdown(made("table1", tmp_path))
    assert "75.35*; 76.35 in Table 5" in text
    assert "UniKD, wrn_40_2-wrn_40_1: \\* 75.35: Table 1 prints 75.35, Table 5 prints 76.35" in text


def test_a_student_alone_stands_in_every_column_that_has_it(tmp_path: Path) -> None:
    first, second = TABLES["table2"].pairs[:2]
    finish(tmp_path, "none", first, 0, 70.0, 69.5)
    ledger = made("table2", tmp_path, seeds=1)
    for pair in (first, second):
        found = entry(ledger, "none", pair)
        assert found.figures.best is not None
        assert (found.figures.best.mean, found.differences) == (70.0, pytest.approx((-0.5, -1.0)))


def test_table_3_has_both_accuracies(tmp_path: Path) -> None:
    pair = TABLES["table3"].pairs[0]
    finish(tmp_path, "kd", pair, 0, 70.0, 69.0)  # top-5 of 90 and 89
    ledger = made("table3", tmp_path, seeds=1)
    assert entry(ledger, "kd", pair).differences == pytest.approx((70.0 - 70.66, 69.0 - 70.66))
    assert entry(ledger, "kd", pair, "top5").differences == pytest.approx((90.0 - 89.88, 89.0 - 89.88))


def test_table_7_is_the_mean_over_seeds_that_all_pairs_have(tmp_path: Path) -> None:
    pairs = TABLES["table7"].pairs
    for number, pair in enumerate(pairs):
        finish(tmp_path, "kd", pair, 0, 70.0 + number, 69.0, (60.0,))  # mean 72.5
        finish(tmp_path, "kd", pair, 1, 71.0 + number, 69.6, (120.0,))  # mean 73.5
        if number:
            finish(tmp_path, "kd", pair, 2, 99.0, 99.0)
    ledger = made("table7", tmp_path, seeds=3)
    found = entry(ledger, "kd")
    assert found.figures.best is not None
    assert (found.figures.best.mean, found.figures.best.seeds, found.figures.missing) == (73.0, 2, (2,))
    assert found.figures.best.deviation == pytest.approx(math.sqrt(0.5))
    assert found.differences == pytest.approx((73.0 - 73.09, 69.3 - 73.09))
    assert (found.pair, found.origin.seconds, len(found.origin.folders)) == ("mean of 6 pairs", 90.0, 12)
    doubtful = entry(ledger, "crd")
    assert doubtful.printed is not None
    assert (doubtful.printed.value, doubtful.printed.note) == (71.73, "recomputed from Table 1: 73.95")


def test_a_published_teachers_figures_are_its_students(tmp_path: Path) -> None:
    folder = finish(tmp_path, "unikd", R110, 1, 75.0, 74.0, (9.0,))
    assert entry(made("table6", tmp_path), "teacher", R110).figures.best is None
    write_result(folder / "teacher", "teacher", method="given", best=74.5, last=74.5)
    found = entry(made("table6", tmp_path), "teacher", R110)
    assert found.figures.best is not None
    assert (found.figures.best.mean, found.origin.seconds, found.figures.missing) == (74.5, None, ())
    assert (found.printed, [other.value for other in found.elsewhere]) == (None, [74.31])  # Table 6 has no teachers
    again = entry(made("table1", tmp_path), "teacher", R110)  # the same run of UniKD
    assert again.differences == pytest.approx((74.5 - 74.31, 74.5 - 74.31))


def test_a_trained_teacher_has_a_run_of_its_own(tmp_path: Path) -> None:
    folder = finish(tmp_path, "unikd", R110, 0, 75.0, 74.0)
    write_result(folder / "teacher", "teacher", method="given", best=50.0, last=50.0)
    assert entry(made("table6", tmp_path, teachers="trained"), "teacher", R110).figures.missing == (0,)
    finish(tmp_path, "teacher", R110, 0, 74.0, 73.5, (33.0,))
    found = entry(made("table6", tmp_path, teachers="trained"), "teacher", R110)
    assert found.figures.best is not None
    assert found.figures.last is not None
    assert (found.figures.best.mean, found.figures.last.mean, found.origin.seconds, found.figures.epochs) == (
        74.0,
        73.5,
        33.0,
        (7,),
    )
    assert "trained here" in found.remark


def test_batch_and_rate_that_differ_on_imagenet_are_said(tmp_path: Path) -> None:
    """Of the published configurations, retyped."""
    published = {"crd": "256 and a learning rate of 0.1;", "reviewkd": "256 and a learning rate of 0.1;"}
    published["ofd"] = "128 and a learning rate of 0.05, and its authors with 256 and 0.1;"
    notes = ledger_markdown(made("table3", tmp_path)).partition("## Notes")[2].partition("##")[0]
    for method, said in published.items():
        pair = TABLES["table3"].pairs[0]
        remark = entry(made("table3", tmp_path), method, pair).remark
        assert remark == f"on ImageNet mdistiller trains it with a batch of {said} here all methods have 512 and 0.2"
        assert f": {remark}." in notes
        assert entry(made("table3", tmp_path), "at", pair).remark == ""
        assert entry(made("methods", tmp_path), method, TABLES["methods"].pairs[0]).remark == ""


def test_the_stand_in_is_compared_with_nothing(tmp_path: Path) -> None:
    table = stand_in(TABLES["table6"])
    finish(tmp_path, "unikd", table.pairs[0], 0, 97.0, 96.0)
    ledger = make_ledger(table, tmp_path, seeds=(0,), teachers="trained")
    assert all((each.printed, each.elsewhere, each.differences) == (None, (), None) for each in ledger.entries)
    text = ledger_markdown(ledger)
    assert text.startswith("# Table 6: ")
    assert "stand-in on digits" in text
    assert "says nothing about the paper's" in text


def test_a_table_of_detectors(tmp_path: Path) -> None:
    pair = TABLES["table4"].pairs[0]
    folder = Cell("kd", pair, 0).folder(tmp_path)
    write_result(folder, "student", best=34.0, last=33.5, classes_with_boxes=80)
    ledger = made("table4", tmp_path, seeds=1)
    found = {metric: entry(ledger, "kd", pair, metric) for metric in ("ap", "ap50", "ap75")}
    assert [each.figures.best and each.figures.best.mean for each in found.values()] == [34.0, 54.0, 32.0]
    assert [each.differences and round(each.differences[0], 2) for each in found.values()] == [0.03, -0.66, -4.62]
    text, content = ledger_markdown(ledger), ledger_json(ledger)
    assert "## Test AP50 (%), best epoch" in text
    assert "highest AP on the validation split" in text
    assert "- KR (ReviewKD), resnet101-resnet18: \\* 34.00: below that of the student alone" in text
    assert "- MLKD: not run: it compares two views" in text
    assert "- resnet101-resnet50: the ResNet-50 of the published student begins as MSRA's" in text
    # A row that cannot run is there with what is printed, and no run of it is missed.
    mlkd = entry(ledger, "mlkd", TABLES["table4"].pairs[1], "ap75")
    assert mlkd.printed is not None
    assert (mlkd.printed.value, mlkd.figures.best, mlkd.figures.missing) == (44.57, None, ())
    assert entry(ledger, "mlkd", pair, "ap50").printed is None
    row = next(line for line in overviews(ledger).splitlines() if line.startswith("| MLKD"))
    assert row.count("not run") == 3
    assert {each["method"] for each in content["missing"]} == {*TABLES["table4"].methods}
    assert content["left_out"]["mlkd"].startswith("not run: ")
    assert list(content["remarks"]) == ["resnet101-resnet50"]


def test_as_markdown(tmp_path: Path) -> None:
    finish(tmp_path, "unikd", R110, 0, 75.0, 74.0, (3661.0,))
    finish(tmp_path, "unikd", R110, 1, 76.0, 75.0, (3661.0,))
    finish(tmp_path, "unikd_without_aff", R110, 0, 74.0, 74.0)
    ledger = made("table6", tmp_path)
    overview = {
        row.split("|")[1].strip(): [c.strip() for c in row.split("|")[2:-1]]
        for row in overviews(ledger).split("\n")[4:]
    }
    assert overview == {
        "teacher": ["missing", "missing"],
        "UniKD without FDP and AFF": ["missing", "missing"],
        "UniKD, FDP only": ["74.00 [\u22120.42] (1 of 2 seeds)", "missing"],
        "UniKD": ["75.50 ± 0.71 [+0.14]", "missing"],
    }
    text = ledger_markdown(ledger)
    row = next(line for line in text.splitlines() if line.startswith("| UniKD ") and "2 of 2" in line)
    cells = [cell.strip() for cell in row.split("|")[1:-1]]
    assert cells == [
        "UniKD",
        "resnet110-resnet32",
        "2 of 2",
        "75.50 ± 0.71",
        "74.50 ± 0.71",
        "75.36",
        "+0.14",
        "\u22120.86",
        "61 min",
    ]
    assert "- UniKD, FDP only, resnet110-resnet32: seed 1\n" in text
    assert "- UniKD, wrn_40_2-ShuffleV1: seeds 0, 1\n" in text
    assert "- Hardware: a processor.\n- Commit: abc.\n" in text


def test_malformed_files_of_a_run_are_named(tmp_path: Path) -> None:
    """Whatever a run's files hold: a ledger, or an error with the file's name."""
    folder = finish(tmp_path, "unikd", R110, 0, 71.0, 70.0, gpus=["a GPU"])
    refused = 0
    for path in (folder / "result.json", folder / "environment.json"):
        content = json.loads(path.read_text())
        for way, odd in itertools.product(places(content), (None, -1, 0.5, "", [], {}, [1], [[]], True, math.nan)):
            forged = inner = copy.deepcopy(content)
            for key in way[:-1]:
                inner = inner[key]
            inner[way[-1]] = odd
            path.write_text(json.dumps(forged))
            try:
                ledger_markdown(made("table6", tmp_path, seeds=1))
            except RunFileError as error:
                assert str(path) in str(error)
                refused += 1
        path.write_text(json.dumps(content))
    assert refused > 100
