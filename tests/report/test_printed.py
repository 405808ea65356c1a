"""The printed figures: sums of every row, single cells typed a second time, and notes on the doubtful ones."""

import pytest

from unikd_fast.report.printed import MEAN, Metric, is_known, pairs, printed, printed_anywhere, row_name, rows

R56_R20 = ("cifar/resnet56", "cifar/resnet20")
WRN_40_1 = ("cifar/wrn_40_2", "cifar/wrn_40_1")
R34_R18 = ("torchvision/resnet34", "torchvision/resnet18")
R101_R18, R101_R50, R50_MV2 = COCO = (
    ("frcnn/torchvision/resnet101", "frcnn/torchvision/resnet18"),
    ("frcnn/torchvision/resnet101", "frcnn/torchvision/resnet50"),
    ("frcnn/torchvision/resnet50", "frcnn/torchvision/mobilenet_v2"),
)
R50_MV1 = ("torchvision/resnet50", "timm/mobilenetv1_100")

# Added up over the columns of the paper's tables by a program of its own. Tables 1 and 5 share the first two rows and
# the last, in which one column differs.
SUMS = {
    1: {
        "teacher": 451.93,
        "none": 429.30,
        "fitnet": 430.61,
        "crd": 443.71,
        "at": 434.58,
        "kr": 447.46,
        "kd": 437.51,
        "dkd": 448.13,
        "logit_standardisation": 449.71,
        "unikd": 455.15,
    },
    2: {
        "teacher": 388.43,
        "none": 342.02,
        "fitnet": 348.11,
        "crd": 361.81,
        "at": 356.43,
        "kr": 372.63,
        "kd": 358.07,
        "dkd": 370.28,
        "logit_standardisation": 372.03,
        "unikd": 378.31,
    },
    5: {
        "teacher": 451.93,
        "none": 429.30 - 72.98 + 71.98,
        "fitnet+kd": 437.97,
        "crd+kd": 445.15,
        "dkd+kr": 449.70,
        "kr+mlkd": 454.80,
        "flg": 446.00,
        "unikd": 455.15 + 1.0,
    },
}


@pytest.mark.parametrize("table", SUMS)
def test_row_sums_of_the_tables(table: int) -> None:
    found = {row: sum(printed(table, row, pair).value for pair in pairs(table)) for row in rows(table)}
    assert found == pytest.approx(SUMS[table], abs=1e-9)


def test_column_sums_of_the_other_tables() -> None:
    by_column = {
        (3, "top1", R34_R18): 642.53,
        (3, "top5", R34_R18): 813.17,
        (3, "top1", R50_MV1): 644.84,
        (3, "top5", R50_MV1): 815.04,
        (6, "top1", ("cifar/resnet110", "cifar/resnet32")): 222.86,
        (6, "top1", ("cifar/wrn_40_2", "cifar/ShuffleV1")): 230.41,
        (7, "top1", MEAN): 664.22,
    }
    for (table, metric, pair), expected in by_column.items():
        total = sum(printed(table, row, pair, metric).value for row in rows(table))  # type: ignore[arg-type]
        assert total == pytest.approx(expected, abs=1e-9), (table, metric, pair)


@pytest.mark.parametrize(
    ("table", "method", "pair", "value"),
    [
        (1, "unikd", R56_R20, 73.01),
        (1, "dkd", ("cifar/resnet32x4", "cifar/resnet8x4"), 76.32),
        (1, "kr", ("cifar/vgg13", "cifar/vgg8"), 74.84),
        (2, "unikd", ("cifar/resnet32x4", "cifar/ShuffleV2"), 79.20),
        (2, "kd", ("cifar/ResNet50", "cifar/MobileNetV2"), 67.35),
        (2, "kr", ("cifar/wrn_40_2", "cifar/ShuffleV1"), 77.14),
        (3, "unikd", R34_R18, 72.83),
        (3, "ofd", R50_MV1, 71.25),
        (5, "mlkd+kr", ("cifar/resnet32x4", "cifar/resnet8x4"), 78.01),
        (5, "flg", ("cifar/wrn_40_2", "cifar/wrn_16_2"), 75.74),
        (6, "unikd without aff", ("cifar/wrn_40_2", "cifar/ShuffleV1"), 77.10),
        (7, "dkd+kr", MEAN, 74.95),
    ],
)
def test_cells(table: int, method: str, pair: tuple[str, str], value: float) -> None:
    assert printed(table, method, pair).value == value


# Typed a second time, from the paper's cells as they lie: AP, AP50, AP75 of each pair; None where the text lacks it.
TABLE_4 = """
teacher     42.04 62.48 45.88   42.04 62.48 45.88   40.22 61.02 43.81
student     33.26 53.61 35.26   37.93 58.84 41.05   29.47 48.87 30.90
fitnet      34.13 54.16 36.71   38.76 59.62 41.80   30.20 49.80 31.69
fgfi        35.44 55.51 38.17   39.44 60.27 43.04   31.16 50.68 32.92
reviewkd    36.75 56.72 34.00   40.36 60.97 44.08   33.71 53.15 36.13
kd          33.97 54.66 36.62   38.35 59.41 41.71   30.13 50.28 31.35
dkd         35.05 56.60 37.54   39.25 60.90 42.73   32.34 53.77 34.01
mlkd        -     -     38.51   40.15 -     44.57   33.83 -     35.22
fitnet+kd   -     54.52 37.01   39.03 59.97 42.23   30.18 50.27 31.59
kr+dkd      37.01 57.53 39.85   40.65 61.51 44.44   34.35 54.89 36.61
unikd       37.24 57.86 39.79   40.76 61.72 44.61   34.62 55.14 36.59
"""
METRICS: tuple[Metric, ...] = ("ap", "ap50", "ap75")


def test_table_4_cell_by_cell() -> None:
    lines = [line.split() for line in TABLE_4.split("\n") if line]
    assert {row_name(name) for name, *_ in lines} == set(rows(4))
    columns = [(pair, metric) for pair in COCO for metric in METRICS]
    for name, *cells in lines:
        for (pair, metric), cell in zip(columns, cells, strict=True):
            assert is_known(4, name, pair, metric) == (cell != "-"), (name, pair, metric)
            found = [one.value for one in printed_anywhere(name, pair, metric)]
            assert found == ([] if cell == "-" else [float(cell)])
    assert not is_known(4, "unikd", R56_R20, "ap") and not is_known(1, "unikd", R56_R20, "ap")


def test_doubts_about_table_4() -> None:
    def of(row: str, pair: tuple[str, str], metric: Metric) -> float:
        return printed(4, row, pair, metric).value

    for pair in COCO:
        students = [row for row in rows(4) if row not in ("teacher", "none") and is_known(4, row, pair, "ap75")]
        below = [row for row in students if of(row, pair, "ap75") < of("none", pair, "ap75")]
        assert below == (["kr"] if pair == R101_R18 else [])
    assert of("kr", R101_R18, "ap") - of("none", R101_R18, "ap") > 3
    assert of("kr", R101_R18, "ap50") - of("none", R101_R18, "ap50") > 3
    assert printed(4, "kr", R101_R18, "ap75").note.startswith("below that of the student alone")
    ratios = {row: of(row, R101_R50, "ap75") / of(row, R101_R50, "ap") for row in rows(4)}
    high = ratios.pop("mlkd")
    note = printed(4, "mlkd", R101_R50, "ap75").note
    assert (
        f"{high:.3f} times its AP, and the others are {min(ratios.values()):.3f} to {max(ratios.values()):.3f}" in note
    )
    assert "unverified" in printed(4, "dkd", R101_R18, "ap").note
    assert printed(4, "unikd", R101_R18, "ap75").note == ""


def test_table_7_is_the_mean_of_table_1_except_three_noted_rows() -> None:
    means = {
        row: sum(printed(1, row, pair).value for pair in pairs(1)) / 6
        for row in ("fitnet", "crd", "at", "kr", "dkd", "logit_standardisation", "unikd")
    }
    # KD with the cell that Table 1 has swapped, and the hybrid of Table 5.
    means["kd"] = (sum(printed(1, "kd", pair).value for pair in pairs(1)) - 71.98 + 72.98) / 6
    means["dkd+kr"] = sum(printed(5, "dkd+kr", pair).value for pair in pairs(5)) / 6
    wrong = {row for row, mean in means.items() if abs(mean - printed(7, row, MEAN).value) > 0.006}
    assert wrong == {"crd", "logit_standardisation", "unikd"}
    for row in wrong:
        assert f"{means[row]:.2f}" in printed(7, row, MEAN).note
    assert f"{means['crd']:.2f}, {means['logit_standardisation']:.2f}, {means['unikd']:.2f}" == "73.95, 74.95, 75.86"
    with_table_5 = sum(printed(5, "unikd", pair).value for pair in pairs(5)) / 6
    assert f"{with_table_5:.3f}" == "76.025"
    assert "76.03" in printed(7, "unikd", MEAN).note


def test_only_doubtful_cells_have_notes() -> None:
    assert "swapped" in printed(1, "none", WRN_40_1).note
    assert "swapped" in printed(1, "kd", ("cifar/vgg13", "cifar/vgg8")).note
    assert "59.40" in printed(2, "at", ("cifar/vgg13", "cifar/MobileNetV2")).note
    assert "58.58" in printed(2, "at", ("cifar/ResNet50", "cifar/MobileNetV2")).note
    assert "76.05" in printed(2, "crd", ("cifar/wrn_40_2", "cifar/ShuffleV1")).note
    assert "unverified" in printed(3, "teacher", R34_R18, "top5").note
    assert "repeats" in printed(3, "crd", R50_MV1).note
    assert "logit standardisation" in printed(2, "nkd*", ("cifar/vgg13", "cifar/MobileNetV2")).note
    for sound in (printed(1, "unikd", R56_R20), printed(5, "none", WRN_40_1), printed(3, "crd", R34_R18)):
        assert sound.note == ""


def test_disagreeing_tables_give_both_figures() -> None:
    found = printed_anywhere("unikd", WRN_40_1)
    assert [(one.value, one.tables) for one in found] == [(75.35, (1,)), (76.35, (5,))]
    assert all("unresolved" in one.note for one in found)


def test_agreeing_tables_give_one_figure() -> None:
    found = printed_anywhere("unikd", ("cifar/resnet110", "cifar/resnet32"))
    assert found == [(75.36, "", (1, 5, 6))]
    assert printed_anywhere("unikd", ("cifar/resnet8", "cifar/resnet8")) == []
    assert printed_anywhere("unheard-of", R56_R20) == []
    assert [one.value for one in printed_anywhere("unikd", R50_MV1, "top5")] == [91.72]


@pytest.mark.parametrize(
    ("given", "row"),
    [("ReviewKD", "kr"), ("kr + DKD", "dkd+kr"), ("reviewkd+mlkd", "kr+mlkd"), ("NKD*", "logit_standardisation")],
)
def test_other_names_of_rows(given: str, row: str) -> None:
    assert row_name(given) == row


def test_the_nkd_of_the_tables_is_not_nkd_proper() -> None:
    assert printed_anywhere("nkd", R56_R20) == []


def test_missing_cells_are_refused_with_the_available_ones() -> None:
    with pytest.raises(ValueError, match="no Table 8 here; there are 1, 2, 3, 4, 5, 6, 7"):
        printed(8, "unikd", R56_R20)
    with pytest.raises(ValueError, match="Table 1 has no row 'flg'; it has teacher"):
        printed(1, "flg", R56_R20)
    with pytest.raises(ValueError, match="no pair cifar/resnet56 -> cifar/resnet20; it has cifar/resnet32x4"):
        printed(2, "unikd", R56_R20)
    with pytest.raises(ValueError, match="Table 1 has no top5; it has top1"):
        printed(1, "unikd", R56_R20, "top5")
    with pytest.raises(ValueError, match="Table 4 has no top1; it has ap, ap50, ap75"):
        printed(4, "unikd", R101_R18)
    with pytest.raises(ValueError, match=r"the ap of 'mlkd' with .*resnet18 in Table 4 is missing from the text"):
        printed(4, "mlkd", R101_R18, "ap")
