"""The figures printed in the UniKD paper (Huang et al., ECCV 2024), as data, with what is doubtful about them.

Rows have our method names, pairs our model names, teacher first. Some cells of the paper are wrong, missing from the
text it was transcribed from, or inconsistent: these have a note, which the page shows next to the figure.
"""

from typing import Literal, NamedTuple

Pair = tuple[str, str]
"""The teacher's model and the student's."""
Metric = Literal["top1", "top5", "ap", "ap50", "ap75"]
FIGURES: dict[Metric, str] = {"top1": "accuracy", "top5": "top5", "ap": "ap", "ap50": "ap50", "ap75": "ap75"}
"""The figures of an evaluation that the metrics are, by name."""


class Printed(NamedTuple):
    """A figure printed in the paper, in percent.

    Args:
        value: value as printed.
        note: what is doubtful about it; empty if nothing is.
        tables: numbers of the paper's tables that print it.
    """

    value: float
    note: str
    tables: tuple[int, ...]


def _pairs(*names: tuple[str, str]) -> tuple[Pair, ...]:
    return tuple((f"cifar/{teacher}", f"cifar/{student}") for teacher, student in names)


_HOMOGENEOUS = _pairs(
    ("resnet56", "resnet20"),
    ("resnet110", "resnet32"),
    ("resnet32x4", "resnet8x4"),
    ("wrn_40_2", "wrn_16_2"),
    ("wrn_40_2", "wrn_40_1"),
    ("vgg13", "vgg8"),
)
_HETEROGENEOUS = _pairs(
    ("resnet32x4", "ShuffleV1"),
    ("wrn_40_2", "ShuffleV1"),
    ("vgg13", "MobileNetV2"),
    ("ResNet50", "MobileNetV2"),
    ("resnet32x4", "ShuffleV2"),
)
_ABLATED = (_HOMOGENEOUS[1], _HETEROGENEOUS[1])
_R34_R18 = ("torchvision/resnet34", "torchvision/resnet18")
_R50_MV1 = ("torchvision/resnet50", "timm/mobilenetv1_100")
_R101_R18, _R101_R50, _R50_MV2 = _COCO = tuple(
    (f"frcnn/torchvision/{teacher}", f"frcnn/torchvision/{student}")
    for teacher, student in (("resnet101", "resnet18"), ("resnet101", "resnet50"), ("resnet50", "mobilenet_v2"))
)
_WRN_40_1, _VGG8 = _HOMOGENEOUS[4], _HOMOGENEOUS[5]

MEAN: Pair = ("mean of six pairs", "mean of six pairs")
"""The pair of Table 7, whose figures are means over the pairs of Table 1."""

# The columns of each table.
_COLUMNS: dict[int, tuple[Pair, ...]] = {
    1: _HOMOGENEOUS,
    2: _HETEROGENEOUS,
    3: (_R34_R18, _R50_MV1),
    4: _COCO,
    5: _HOMOGENEOUS,
    6: _ABLATED,
    7: (MEAN,),
}

# By table and row; None for a figure that is missing from the text at hand and is known from nowhere else.
Cells = dict[int, dict[str, tuple[float | None, ...]]]

_TOP1: Cells = {
    1: {
        "teacher": (72.34, 74.31, 79.42, 75.61, 75.61, 74.64),
        "none": (69.06, 71.14, 72.50, 73.26, 72.98, 70.36),
        "fitnet": (69.21, 71.06, 73.50, 73.58, 72.24, 71.02),
        "crd": (71.16, 73.48, 75.51, 75.48, 74.14, 73.94),
        "at": (70.55, 72.31, 73.44, 74.08, 72.77, 71.43),
        "kr": (71.89, 73.89, 75.63, 76.12, 75.09, 74.84),
        "kd": (70.66, 73.08, 73.33, 74.92, 73.54, 71.98),
        "dkd": (71.97, 74.11, 76.32, 76.24, 74.81, 74.68),
        "logit_standardisation": (72.32, 74.29, 77.01, 76.39, 74.89, 74.81),
        "unikd": (73.01, 75.36, 78.18, 77.49, 75.35, 75.76),
    },
    2: {
        "teacher": (79.42, 75.61, 74.64, 79.34, 79.42),
        "none": (70.50, 70.50, 64.60, 64.60, 71.82),
        "fitnet": (73.54, 73.73, 64.14, 63.16, 73.54),
        "crd": (75.11, 72.21, 69.73, 69.11, 75.65),
        "at": (71.73, 73.32, 69.40, 68.58, 73.40),
        "kr": (77.45, 77.14, 70.37, 69.89, 77.78),
        "kd": (74.07, 74.83, 67.37, 67.35, 74.45),
        "dkd": (76.45, 76.70, 69.71, 70.35, 77.07),
        "logit_standardisation": (77.11, 77.12, 69.98, 70.45, 77.37),
        "unikd": (77.89, 78.10, 71.02, 72.10, 79.20),
    },
    3: {
        "teacher": (73.31, 76.16),
        "none": (69.75, 68.87),
        "at": (70.69, 69.56),
        "ofd": (70.81, 71.25),
        "crd": (71.17, 72.56),
        "kr": (71.61, 72.56),
        "kd": (70.66, 68.58),
        "dkd": (71.70, 72.05),
        "unikd": (72.83, 73.25),
    },
    5: {
        "teacher": (72.34, 74.31, 79.42, 75.61, 75.61, 74.64),
        "none": (69.06, 71.14, 72.50, 73.26, 71.98, 70.36),
        "fitnet+kd": (70.09, 73.08, 75.19, 74.32, 72.68, 72.61),
        "crd+kd": (71.63, 73.75, 75.46, 75.64, 74.38, 74.29),
        "dkd+kr": (71.98, 74.23, 76.45, 76.19, 75.52, 75.33),
        "kr+mlkd": (72.83, 74.52, 78.01, 77.54, 76.21, 75.69),
        "flg": (71.55, 73.48, 76.66, 75.74, 74.29, 74.28),
        "unikd": (73.01, 75.36, 78.18, 77.49, 76.35, 75.76),
    },
    6: {"unikd without fdp and aff": (73.08, 75.21), "unikd without aff": (74.42, 77.10), "unikd": (75.36, 78.10)},
    7: {
        "fitnet": (71.77,),
        "crd": (71.73,),
        "at": (72.43,),
        "kr": (74.58,),
        "kd": (73.09,),
        "dkd": (74.69,),
        "logit_standardisation": (75.09,),
        "dkd+kr": (74.95,),
        "unikd": (75.89,),
    },
}
_TOP5: Cells = {
    3: {
        "teacher": (91.42, 92.86),
        "none": (89.07, 88.76),
        "at": (90.01, 89.33),
        "ofd": (89.98, 90.34),
        "crd": (90.51, 91.00),
        "kr": (90.51, 91.00),
        "kd": (89.88, 88.98),
        "dkd": (90.41, 91.05),
        "unikd": (91.38, 91.72),
    }
}
_AP: Cells = {
    4: {
        "teacher": (42.04, 42.04, 40.22),
        "none": (33.26, 37.93, 29.47),
        "fitnet": (34.13, 38.76, 30.20),
        "fgfi": (35.44, 39.44, 31.16),
        "kr": (36.75, 40.36, 33.71),
        "kd": (33.97, 38.35, 30.13),
        "dkd": (35.05, 39.25, 32.34),
        "mlkd": (None, 40.15, 33.83),
        "fitnet+kd": (None, 39.03, 30.18),
        "dkd+kr": (37.01, 40.65, 34.35),
        "unikd": (37.24, 40.76, 34.62),
    }
}
_AP50: Cells = {
    4: {
        "teacher": (62.48, 62.48, 61.02),
        "none": (53.61, 58.84, 48.87),
        "fitnet": (54.16, 59.62, 49.80),
        "fgfi": (55.51, 60.27, 50.68),
        "kr": (56.72, 60.97, 53.15),
        "kd": (54.66, 59.41, 50.28),
        "dkd": (56.60, 60.90, 53.77),
        "mlkd": (None, None, None),
        "fitnet+kd": (54.52, 59.97, 50.27),
        "dkd+kr": (57.53, 61.51, 54.89),
        "unikd": (57.86, 61.72, 55.14),
    }
}
_AP75: Cells = {
    4: {
        "teacher": (45.88, 45.88, 43.81),
        "none": (35.26, 41.05, 30.90),
        "fitnet": (36.71, 41.80, 31.69),
        "fgfi": (38.17, 43.04, 32.92),
        "kr": (34.00, 44.08, 36.13),
        "kd": (36.62, 41.71, 31.35),
        "dkd": (37.54, 42.73, 34.01),
        "mlkd": (38.51, 44.57, 35.22),
        "fitnet+kd": (37.01, 42.23, 31.59),
        "dkd+kr": (39.85, 44.44, 36.61),
        "unikd": (39.79, 44.61, 36.59),
    }
}
_CELLS: dict[Metric, Cells] = {"top1": _TOP1, "top5": _TOP5, "ap": _AP, "ap50": _AP50, "ap75": _AP75}

_ELSEWHERE = "missing from the text at hand; filled in from other papers' tables of the same row, unverified"
_UNRESOLVED = "Table 1 prints 75.35, Table 5 prints 76.35; which is right is unresolved"
_SWAPPED = "71.98 and 72.98 are swapped in Table 1: {} is {}"
_CITED = "the row cites logit standardisation with DKD and equals that paper's"
_BELOW = "below that of the student alone, where AP and AP50 are 3 points above; no correction is known"
_HIGH = "high: 1.110 times its AP, and the others are 1.078 to 1.094 times theirs"
_REPEATS_KR = "repeats the figure of KR"
# First for single cells, then for whole rows.
_NOTES: dict[tuple[int, str, Pair, Metric], str] = {
    (1, "none", _WRN_40_1, "top1"): _SWAPPED.format("this student", "71.98"),
    (1, "kd", _VGG8, "top1"): _SWAPPED.format("KD of VGG8", "72.98"),
    (1, "unikd", _WRN_40_1, "top1"): _UNRESOLVED,
    (5, "unikd", _WRN_40_1, "top1"): _UNRESOLVED,
    (2, "fitnet", _HETEROGENEOUS[0], "top1"): "repeats the figure of ResNet32x4 to ShuffleNet-V2",
    (2, "crd", _HETEROGENEOUS[1], "top1"): "76.05 elsewhere",
    (2, "at", _HETEROGENEOUS[2], "top1"): "should read 59.40",
    (2, "at", _HETEROGENEOUS[3], "top1"): "should read 58.58",
    (2, "at", _HETEROGENEOUS[4], "top1"): "doubtful; no correction is known",
    (3, "crd", _R34_R18, "top5"): _REPEATS_KR,
    (3, "crd", _R50_MV1, "top1"): _REPEATS_KR,
    (3, "crd", _R50_MV1, "top5"): _REPEATS_KR,
    **{(3, "teacher", pair, metric): _ELSEWHERE for pair in _COLUMNS[3] for metric in ("top1", "top5")},
    (4, "kr", _R101_R18, "ap75"): _BELOW,
    (4, "mlkd", _R101_R50, "ap75"): _HIGH,
    (4, "fitnet", _R101_R18, "ap50"): _ELSEWHERE,
    (4, "kr", _R101_R18, "ap50"): _ELSEWHERE,
    (4, "kd", _R101_R18, "ap"): _ELSEWHERE,
    (4, "kd", _R101_R18, "ap50"): _ELSEWHERE,
    (4, "kd", _R101_R50, "ap50"): _ELSEWHERE,
    (4, "kd", _R50_MV2, "ap50"): _ELSEWHERE,
    (4, "dkd", _R101_R18, "ap"): _ELSEWHERE,
    (4, "dkd", _R101_R18, "ap50"): _ELSEWHERE,
    (4, "dkd+kr", _R101_R18, "ap"): _ELSEWHERE,
    (7, "crd", MEAN, "top1"): "recomputed from Table 1: 73.95",
    (7, "logit_standardisation", MEAN, "top1"): f"recomputed from Table 1: 74.95; {_CITED}",
    (7, "unikd", MEAN, "top1"): "recomputed from Table 1: 75.86, or 76.03 with the 76.35 of Table 5",
}
_ROW_NOTES: dict[str, str] = {"logit_standardisation": _CITED}

# Other names of rows: the paper's, and common ones.
_SAME = {
    "student": "none",
    "nkd*": "logit_standardisation",
    "logit_standardization": "logit_standardisation",
    "reviewkd": "kr",
    "review_kd": "kr",
}


def row_name(method: str) -> str:
    """Return the name of a method's row: ``review_kd`` is ``kr``, and the parts of a hybrid are sorted."""
    parts = [part.strip() for part in method.lower().split("+")]
    return "+".join(sorted(_SAME.get(part, part) for part in parts))


def rows(table: int) -> tuple[str, ...]:
    """Return the rows of a table: methods, "teacher", and "none" for the student alone."""
    known = _known(table)
    return next(tuple(cells[known]) for cells in _CELLS.values() if known in cells)


def pairs(table: int) -> tuple[Pair, ...]:
    """Return the columns of a table; the only one of Table 7 is MEAN."""
    return _COLUMNS[_known(table)]


def printed(table: int, method: str, pair: Pair, metric: Metric = "top1") -> Printed:
    """Return the figure printed in a table.

    Args:
        table: number of the table, 1 to 7.
        method: one of ``rows(table)``, or another name of it.
        pair: one of ``pairs(table)``.
        metric: "top1"; Table 3 has "top5" as well, and Table 4 has "ap", "ap50" and "ap75" instead.

    Raises:
        ValueError: the table has no such cell; the message names those it has. Or the figure is not known.

    Example:
        >>> printed(1, "unikd", ("cifar/resnet56", "cifar/resnet20"))
        Printed(value=73.01, note='', tables=(1,))
    """
    cells = _CELLS[metric].get(_known(table))
    if cells is None:
        known = ", ".join(each for each, of in _CELLS.items() if table in of)
        raise ValueError(f"printed: Table {table} has no {metric}; it has {known}")
    row = row_name(method)
    if row not in cells:
        raise ValueError(f"printed: Table {table} has no row {method!r}; it has {', '.join(cells)}")
    if pair not in _COLUMNS[table]:
        known = ", ".join(" -> ".join(each) for each in _COLUMNS[table])
        raise ValueError(f"printed: Table {table} has no pair {' -> '.join(pair)}; it has {known}")
    value = cells[row][_COLUMNS[table].index(pair)]
    if value is None:
        raise ValueError(
            f"printed: the {metric} of {method!r} with {' -> '.join(pair)} in Table {table} is missing from the text "
            "at hand; ask `is_known` first"
        )
    note = _NOTES.get((table, row, pair, metric), _ROW_NOTES.get(row, ""))
    return Printed(value, note, (table,))


def is_known(table: int, method: str, pair: Pair, metric: Metric = "top1") -> bool:
    """Return whether `printed` has a figure: the table has the cell, and the text at hand or another paper tells it."""
    values = _CELLS[metric].get(_known(table), {}).get(row_name(method))
    return values is not None and pair in _COLUMNS[table] and values[_COLUMNS[table].index(pair)] is not None


def printed_anywhere(method: str, pair: Pair, metric: Metric = "top1") -> list[Printed]:
    """Return every distinct figure the paper prints for a method and a pair, in the order of its tables.

    There are several if the tables disagree, and none if the paper prints nothing.
    """
    found: dict[float, Printed] = {}
    row = row_name(method)
    for table in _CELLS[metric]:
        if is_known(table, row, pair, metric):
            new = printed(table, row, pair, metric)
            old = found.get(new.value, Printed(new.value, "", ()))
            found[new.value] = Printed(new.value, old.note or new.note, old.tables + new.tables)
    return list(found.values())


def printed_alone(student: str, metric: Metric = "top1") -> list[Printed]:
    """Return every distinct figure the paper prints for a student without a teacher, in whatever pair."""
    found: dict[float, Printed] = {}
    for pair in dict.fromkeys(pair for pairs in _COLUMNS.values() for pair in pairs):
        if pair[1] == student:
            for one in printed_anywhere("none", pair, metric):
                old = found.get(one.value, Printed(one.value, "", ()))
                tables = tuple(sorted({*old.tables, *one.tables}))
                found[one.value] = Printed(one.value, old.note or one.note, tables)
    return list(found.values())


def _known(table: int) -> int:
    if table not in _COLUMNS:
        raise ValueError(f"printed: no Table {table} here; there are {', '.join(map(str, _COLUMNS))}")
    return table
