"""The printed figures: sums of every row, single cells typed a second time, and notes on the doubtful ones."""

import pytest

from unikd_fast.report.printed import MEAN, pairs, printed, printed_anywhere, row_name, rows

R56_R20 = ("cifar/resnet56", "cifar/resnet20")
WRN_40_1 = ("cifar/wrn_40_2", "cifar/wrn_40_1")
R34_R18 = ("torchvision/resnet34", "torchvision/resnet18")
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
    with pytest.raises(ValueError, match="no Table 4 here; there are 1, 2, 3, 5, 6, 7"):
        printed(4, "unikd", R56_R20)
    with pytest.raises(ValueError, match="Table 1 has no row 'flg'; it has teacher"):
        printed(1, "flg", R56_R20)
    with pytest.raises(ValueError, match="no pair cifar/resnet56 -> cifar/resnet20; it has cifar/resnet32x4"):
        printed(2, "unikd", R56_R20)
    with pytest.raises(ValueError, match="Table 1 has no top5"):
        printed(1, "unikd", R56_R20, "top5")
