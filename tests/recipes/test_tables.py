"""The tables as cells, against the paper's tables typed a second time."""

import itertools
from pathlib import Path

import pytest

from unikd_fast.config import parse_config
from unikd_fast.recipes.experiments import experiment
from unikd_fast.recipes.settings import METHODS
from unikd_fast.recipes.tables import TABLES, Cell, left_out, printed_row, stand_in, student_cells, teacher_cells
from unikd_fast.report.printed import MEAN, pairs, printed, rows

# Rows and columns as the paper has them, beside the teacher's row.
ROWS = {
    "table1": ["Student", "FitNet", "CRD", "AT", "KR", "KD", "DKD", "NKD*", "UniKD"],
    "table2": ["Student", "FitNet", "CRD", "AT", "KR", "KD", "DKD", "NKD*", "UniKD"],
    "table3": ["Student", "AT", "OFD", "CRD", "KR", "KD", "DKD", "UniKD"],
    "table4": ["Student", "FitNet", "FGFI", "KR", "KD", "DKD", "KD+FitNet", "DKD+KR", "UniKD"],
    "table5": ["Student", "KD+FitNet", "KD+CRD", "DKD+KR", "MLKD+KR", "FLG", "UniKD"],
    "table6": ["none", "FDP", "FDP + AFF"],
    "table7": ["FitNet", "CRD", "AT", "KR", "KD", "DKD", "NKD*", "DKD+KR", "UniKD"],
}
OURS = {
    "Student": "none",
    "FitNet": "fitnet",
    "CRD": "crd",
    "AT": "at",
    "OFD": "ofd",
    "FGFI": "fgfi",
    "KR": "reviewkd",
    "KD": "kd",
    "DKD": "dkd",
    "NKD*": "dkd_standardized",
    "KD+FitNet": "kd_fitnet",
    "KD+CRD": "kd_crd",
    "DKD+KR": "dkd_reviewkd",
    "MLKD+KR": "mlkd_reviewkd",
    "FLG": "flg",
    "UniKD": "unikd",
    "none": "unikd_without_fdp_and_aff",
    "FDP": "unikd_without_aff",
    "FDP + AFF": "unikd",
}
COLUMNS = {
    "table1": "R56/R20 R110/R32 32x4/8x4 WRN-40-2/16-2 WRN-40-2/40-1 VGG13/8",
    "table2": "32x4/SNv1 WRN-40-2/SNv1 VGG13/MV2 R50/MV2 32x4/SNv2",
    "table3": "R34/R18 R50/MV1",
    "table6": "R110/R32 WRN-40-2/SNv1",
}
COLUMNS["table4"] = "R101/R18 R101/R50 COCO/MV2"
COLUMNS["table5"] = COLUMNS["table7"] = COLUMNS["table1"]
PAIR_NAMES = {
    "R56/R20": "resnet56-resnet20",
    "R110/R32": "resnet110-resnet32",
    "32x4/8x4": "resnet32x4-resnet8x4",
    "WRN-40-2/16-2": "wrn_40_2-wrn_16_2",
    "WRN-40-2/40-1": "wrn_40_2-wrn_40_1",
    "VGG13/8": "vgg13-vgg8",
    "32x4/SNv1": "resnet32x4-ShuffleV1",
    "WRN-40-2/SNv1": "wrn_40_2-ShuffleV1",
    "VGG13/MV2": "vgg13-MobileNetV2",
    "R50/MV2": "ResNet50-MobileNetV2",
    "32x4/SNv2": "resnet32x4-ShuffleV2",
    "R34/R18": "resnet34-resnet18",
    "R50/MV1": "resnet50-mobilenetv1",
    "R101/R18": "resnet101-resnet18",
    "R101/R50": "resnet101-resnet50",
    "COCO/MV2": "resnet50-mobilenet_v2",
}


@pytest.mark.parametrize("name", ROWS)
def test_a_table_has_the_papers_rows_and_columns(name: str) -> None:
    table = TABLES[name]
    assert list(table.methods) == [OURS[row] for row in ROWS[name]]
    assert [pair.name for pair in table.pairs] == [PAIR_NAMES[column] for column in COLUMNS[name].split()]


@pytest.mark.parametrize("name", ROWS)
def test_every_cell_finds_its_printed_figure(name: str) -> None:
    table = TABLES[name]
    assert table.number is not None
    known = set(rows(table.number)) - {"teacher"}
    assert {printed_row(method) for method in (*table.methods, *table.left_out)} == known
    columns = [MEAN] if table.is_mean else [(pair.teacher, pair.student) for pair in table.pairs]
    assert tuple(columns) == pairs(table.number)
    least = {"ap": 29, "ap50": 48, "ap75": 30}
    for method, column, metric in itertools.product(table.methods, columns, table.metrics):
        if (method, metric, column[1]) != ("kd_fitnet", "ap", "frcnn/torchvision/resnet18"):  # missing from the text
            assert printed(table.number, printed_row(method), column, metric).value > least.get(metric, 60)


# Runs of one seed: methods times pairs, a student alone once for all the pairs that have it.
COUNTS = {
    "table1": 54,
    "table2": 43,
    "table3": 16,
    "table4": 27,
    "table5": 42,
    "table6": 6,
    "table7": 54,
    "blockwise": 42,
    "unikd_dev": 42,
    "wkd": 8,
    "methods": 218,
    "tuning": 80,
    "study": 48,
}
TEACHERS = {
    "table1": 5,
    "table2": 4,
    "table3": 2,
    "table4": 2,
    "table5": 5,
    "table6": 2,
    "table7": 5,
    "blockwise": 6,
    "unikd_dev": 6,
    "wkd": 2,
    "methods": 6,
    "tuning": 2,
    "study": 2,
}


@pytest.mark.parametrize("name", COUNTS)
def test_the_number_of_runs(name: str) -> None:
    one = student_cells(TABLES[name], range(1))
    three = student_cells(TABLES[name], range(3))
    assert (len(one), len(three)) == (COUNTS[name], 3 * COUNTS[name])
    assert [cell.seed for cell in three] == sorted(cell.seed for cell in three)  # a whole table early on
    assert len(teacher_cells(three)) == TEACHERS[name]


def test_tables_share_their_runs() -> None:
    names = {name: {cell.name for cell in student_cells(table, range(1))} for name, table in TABLES.items()}
    assert len(names["table7"] - names["table1"]) == 6  # DKD+KR, which is of Table 5
    assert names["table7"] <= names["table1"] | names["table5"]
    assert len(names["table5"] & names["table1"]) == 12  # the students alone, and UniKD
    assert "cifar100/unikd/resnet110-resnet32/seed-0" in names["table1"] & names["table5"] & names["table6"]


def test_folders_bear_what_decides_a_run(tmp_path: Path) -> None:
    shuffle, other = TABLES["table2"].pairs[:2]
    assert Cell("none", shuffle, 1).name == Cell("none", other, 1).name == "cifar100/none/ShuffleV1/seed-1"
    assert Cell("teacher", other, 0).folder(tmp_path) == tmp_path / "cifar100" / "teacher" / "wrn_40_2" / "seed-0"
    assert Cell("kd", other, 2).name == "cifar100/kd/wrn_40_2-ShuffleV1/seed-2"


def test_students_share_a_teacher_or_have_none() -> None:
    cells = student_cells(TABLES["table1"], range(2), ["none", "kd"], ["wrn_40_2-wrn_16_2", "wrn_40_2-wrn_40_1"])
    assert len(cells) == 8
    assert [cell.name for cell in teacher_cells(cells)] == ["cifar100/teacher/wrn_40_2/seed-0"]
    assert teacher_cells(student_cells(TABLES["table1"], range(2), ["none"])) == []


@pytest.mark.parametrize("name", [name for name in TABLES if TABLES[name].data != "study"])
def test_the_stand_in_has_the_same_rows_on_small_networks(name: str) -> None:
    table = stand_in(TABLES[name])
    data = "toy_scenes" if name == "table4" else "digits"
    assert (table.methods, table.number, table.data) == (TABLES[name].methods, None, data)
    cells = student_cells(table, range(1))
    for cell in (*cells, *teacher_cells(cells)):
        raw = experiment(cell.method, cell.pair)
        config = parse_config(raw, ["teacher.weights=random"] if "teacher" in raw else [], name="x", source="x")
        assert config.data.name == data
        if cell.method not in ("none", "teacher"):
            assert config.distill.method == parse_method(cell.method, cell)
            assert "ramp_epochs" not in str(raw)


def parse_method(method: str, cell: Cell) -> object:
    named = METHODS[method].distill(cell.pair)["method"]
    return tuple(named) if isinstance(named, list) else named


def test_what_cannot_run_is_left_out_with_its_reason() -> None:
    assert [line for table in TABLES.values() for line in left_out(table)] == [
        "MLKD: not run: it compares two views of an image by the logits of both, and a detector's two views have "
        "different regions; no public code has it on COCO"
    ]
    assert "mlkd" not in {cell.method for cell in student_cells(TABLES["table4"], range(1))}
    assert left_out(stand_in(TABLES["table4"])) == []


def test_the_stand_ins_students_have_fewer_samples() -> None:
    pair = stand_in(TABLES["table6"]).pairs[0]
    student, teacher = (experiment(method, pair) for method in ("unikd", "teacher"))
    assert student["data"]["train_samples"] == 100
    assert "train_samples" not in teacher["data"]
    assert (student["student"]["model"], teacher["student"]["model"]) == ("cifar/resnet8", "cifar/resnet20")
    assert (student["teacher"]["model"], "teacher" in teacher) == ("cifar/resnet20", False)
    slower = experiment("unikd_dev_mlkd", pair)["train"]
    assert (slower["learning_rate"], slower["total_epochs"]) == (0.025, student["train"]["total_epochs"])
    # What does not count epochs or samples is the recipe's.
    assert student["distill"]["unikd"]["alpha"] == METHODS["unikd"].distill(TABLES["table6"].pairs[0])["unikd"]["alpha"]
