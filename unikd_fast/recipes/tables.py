"""The tables of the papers as cells: a method, a pair of networks and a seed, each of which is one run.

A run's folder does not depend on the table, so that tables share their cells.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from unikd_fast.recipes.pairs import CIFAR_PAIRS, COCO_PAIRS, IMAGENET_PAIRS, TEACHER, Pair
from unikd_fast.recipes.settings import CLASSIFIERS, METHODS, Setting
from unikd_fast.recipes.study import STUDY, STUDY_PAIRS, TUNING
from unikd_fast.report.printed import Metric

# Methods whose row has another name in report.printed.
_PRINTED_ROWS = {
    "dkd_standardized": "logit_standardisation",
    "reviewkd": "kr",
    "kd_fitnet": "fitnet+kd",
    "kd_crd": "crd+kd",
    "dkd_reviewkd": "dkd+kr",
    "mlkd_reviewkd": "kr+mlkd",
    "unikd_dev_mlkd": "unikd",
    "unikd_without_aff": "unikd without aff",
    "unikd_without_fdp_and_aff": "unikd without fdp and aff",
}


class Table(NamedTuple):
    """A table to reproduce.

    Args:
        name: name on the command line.
        title: what it is about.
        number: number of the UniKD paper's table. If None, it is not of that paper.
        methods: rows, names in `METHODS`, `STUDY` or `TUNING`.
        pairs: columns.
        is_mean: whether its only column is the mean over the pairs.
        metrics: what it prints.
        left_out: rows that are printed and cannot run; their remarks say why.
    """

    name: str
    title: str
    number: int | None
    methods: tuple[str, ...]
    pairs: tuple[Pair, ...]
    is_mean: bool = False
    metrics: tuple[Metric, ...] = ("top1",)
    left_out: tuple[str, ...] = ()

    @property
    def data(self) -> str:
        """Return the data set of all its pairs."""
        return self.pairs[0].data

    @property
    def needs_files(self) -> bool:
        """Whether the user has to provide its data, which are neither generated nor installed with a package."""
        return self.data not in ("digits", "toy_scenes")

    @property
    def trains_teachers(self) -> bool:
        """Whether its teachers are always trained here."""
        return self.data in ("digits", "study", "toy_scenes")

    @property
    def heading(self) -> str:
        """Return the table's name and title.

        Example:
            >>> TABLES["table3"].heading
            'Table 3: ImageNet'
        """
        return f"{self.name.capitalize().replace('Table', 'Table ')}: {self.title}"


class Cell(NamedTuple):
    """One run.

    Args:
        method: a row, or TEACHER for a teacher that is trained here.
        pair: its networks; a student alone and a teacher belong to all pairs that have them.
        seed: seed of the run.
    """

    method: str
    pair: Pair
    seed: int

    @property
    def networks(self) -> str:
        """Return the networks of the run, as in its name; see `Pair.networks`."""
        return self.pair.networks(self.method)

    @property
    def name(self) -> str:
        """Return the cell's unique name, which is its run's folder below that of all runs.

        Example:
            >>> Cell("kd", CIFAR_PAIRS[0], 1).name
            'cifar100/kd/resnet56-resnet20/seed-1'
        """
        return f"{self.pair.data}/{self.method}/{self.networks}/seed-{self.seed}"

    @property
    def teacher(self) -> "Cell":
        """Return the run of its teacher, if that is trained here.

        As in the literature, one teacher serves all seeds of all students.
        """
        return Cell(TEACHER, self.pair, 0)

    def folder(self, out: Path) -> Path:
        """Return the folder of its run."""
        return out / self.name


_ALONE_AND_SINGLE = ("none", "fitnet", "crd", "at", "reviewkd", "kd", "dkd", "dkd_standardized", "unikd")
_SUMS = ("none", "kd_fitnet", "kd_crd", "dkd_reviewkd", "mlkd_reviewkd", "flg", "unikd")
_EVERY_METHOD = tuple(method for method in CLASSIFIERS if not method.startswith("unikd_"))
_SAME_FAMILY, _OTHER_FAMILY = CIFAR_PAIRS[:6], CIFAR_PAIRS[6:]

TABLES: dict[str, Table] = {
    table.name: table
    for table in (
        Table("table1", "CIFAR-100, pairs of one family", 1, _ALONE_AND_SINGLE, _SAME_FAMILY),
        Table("table2", "CIFAR-100, pairs of different families", 2, _ALONE_AND_SINGLE, _OTHER_FAMILY),
        Table(
            "table3",
            "ImageNet",
            3,
            ("none", "at", "ofd", "crd", "reviewkd", "kd", "dkd", "unikd"),
            IMAGENET_PAIRS,
            metrics=("top1", "top5"),
        ),
        Table(
            "table4",
            "COCO, Faster R-CNN with a feature pyramid",
            4,
            ("none", "fitnet", "fgfi", "reviewkd", "kd", "dkd", "kd_fitnet", "dkd_reviewkd", "unikd"),
            COCO_PAIRS,
            metrics=("ap", "ap50", "ap75"),
            left_out=("mlkd",),
        ),
        Table("table5", "CIFAR-100, sums of methods", 5, _SUMS, _SAME_FAMILY),
        Table(
            "table6",
            "CIFAR-100, what AFF and FDP are worth",
            6,
            ("unikd_without_fdp_and_aff", "unikd_without_aff", "unikd"),
            (CIFAR_PAIRS[1], CIFAR_PAIRS[7]),
        ),
        Table(
            "table7",
            "CIFAR-100, means over the pairs of Table 1",
            7,
            (*_ALONE_AND_SINGLE[1:-1], "dkd_reviewkd", "unikd"),
            _SAME_FAMILY,
            is_mean=True,
        ),
        Table(
            "blockwise",
            "CIFAR-100, block-wise logit distillation",
            None,
            ("none", "kd", "blockwise_light", "blockwise"),
            CIFAR_PAIRS,
        ),
        Table(
            "unikd_dev",
            "CIFAR-100, UniKD by the paper's text and by the public development code",
            None,
            ("none", "unikd", "unikd_dev_dkd", "unikd_dev_mlkd"),
            CIFAR_PAIRS,
        ),
        Table(
            "wkd",
            "ImageNet, Wasserstein distances in place of KL divergences",
            None,
            ("none", "kd", "dkd", "wkd"),
            IMAGENET_PAIRS,
            metrics=("top1", "top5"),
        ),
        Table("methods", "CIFAR-100, every method", None, _EVERY_METHOD, CIFAR_PAIRS),
        Table("tuning", "the search of every method's weights, on held-out images", None, tuple(TUNING), STUDY_PAIRS),
        Table("study", "every method as chosen, and UniKD's choices, on real images", None, tuple(STUDY), STUDY_PAIRS),
    )
}
"""By their names on the command line."""


def _on_digits(teacher: str, student: str) -> Pair:
    return Pair("digits", f"cifar/{teacher}", f"cifar/{student}", "", 0.05)


_SMALL_SAME = (_on_digits("resnet20", "resnet8"), _on_digits("wrn_16_2", "wrn_16_1"))
_SMALL_OTHER = (_on_digits("wrn_16_2", "resnet8"), _on_digits("resnet20", "wrn_16_1"))
# The columns of the stand-in of each table; of Table 6 a pair of one family and one of two, as there.
_SMALL_PAIRS = {
    "table1": _SMALL_SAME,
    "table2": _SMALL_OTHER,
    "table3": (_SMALL_SAME[0], _SMALL_OTHER[1]),
    "table4": (Pair("toy_scenes", "frcnn/timm/test_resnet", "frcnn/timm/test_efficientnet", "", 0.02),),
    "table5": _SMALL_SAME,
    "table6": (_SMALL_SAME[0], _SMALL_OTHER[0]),
    "table7": _SMALL_SAME,
    "blockwise": (*_SMALL_SAME, *_SMALL_OTHER),
    "unikd_dev": (*_SMALL_SAME, *_SMALL_OTHER),
    "wkd": (_SMALL_SAME[0], _SMALL_OTHER[1]),
    "methods": _SMALL_SAME[:1],
}


def stand_in(table: Table) -> Table:
    """Return the table with pairs of small networks, for which no figures are printed, on data that need no files."""
    pairs, metrics = _SMALL_PAIRS[table.name], tuple(metric for metric in table.metrics if metric != "top5")
    on = {"digits": "digits", "toy_scenes": "generated scenes"}[pairs[0].data]
    title = f"{table.title}; a stand-in on {on}"
    return table._replace(title=title, number=None, pairs=pairs, metrics=metrics, left_out=())


def printed_row(method: str) -> str:
    """Return the row of a method in `report.printed`; it is not there if the paper does not print it."""
    return _PRINTED_ROWS.get(method, method)


def setting(method: str) -> Setting:
    """Return the setting of a row, of the papers' tables or of the study."""
    return {**TUNING, **STUDY, **METHODS}[method]


def left_out(table: Table) -> list[str]:
    """Return the rows that are printed and cannot run, each with its reason.

    Example:
        >>> left_out(TABLES["table4"])[0][:13]
        'MLKD: not run'
    """
    return [f"{title(method)}: {setting(method).remark_for(table.data)}" for method in table.left_out]


def title(method: str) -> str:
    """Return the name of a row in tables."""
    return "teacher" if method == TEACHER else setting(method).title


def student_cells(
    table: Table, seeds: Iterable[int], methods: Sequence[str] | None = None, pairs: Sequence[str] | None = None
) -> list[Cell]:
    """Return the runs of a table's students, each once; the first seed of all comes before the second of any.

    Args:
        methods: rows that are wanted. If None, all.
        pairs: names of the columns that are wanted. If None, all.
    """
    cells = (
        Cell(method, pair, seed)
        for seed in seeds
        for method in table.methods
        for pair in table.pairs
        if (methods is None or method in methods) and (pairs is None or pair.name in pairs)
    )
    return list({cell.name: cell for cell in cells}.values())


def teacher_cells(cells: Iterable[Cell]) -> list[Cell]:
    """Return the teachers of these cells, each once."""
    found = (cell.teacher for cell in cells if cell.method != "none")
    return list({cell.name: cell for cell in found}.values())
