"""The tables of the papers as cells: a method, a pair of networks and a seed, each of which is one run.

A run's folder does not depend on the table, so that tables share their cells.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from unikd_fast.recipes import CIFAR_PAIRS, IMAGENET_PAIRS, METHODS, STUDY, STUDY_PAIR, Pair, Setting
from unikd_fast.report.printed import Metric

TEACHER = "teacher"
"""Stands for a method in the folders of teachers that are trained here."""

# Methods whose row has another name in report.printed.
_PRINTED_ROWS = {
    "dkd_standardized": "logit_standardisation",
    "reviewkd": "kr",
    "kd_fitnet": "fitnet+kd",
    "kd_crd": "crd+kd",
    "dkd_reviewkd": "dkd+kr",
    "mlkd_reviewkd": "kr+mlkd",
    "unikd_without_aff": "unikd without aff",
    "unikd_without_fdp_and_aff": "unikd without fdp and aff",
}


class Table(NamedTuple):
    """A table to reproduce.

    Args:
        name: on the command line.
        title: what it is about.
        number: of the UniKD paper's table; None if it is not of that paper.
        methods: its rows, names of ``recipes.METHODS`` or ``recipes.STUDY``.
        pairs: its columns.
        is_mean: whether it has the mean over the pairs as its only column.
        metrics: what it prints.
    """

    name: str
    title: str
    number: int | None
    methods: tuple[str, ...]
    pairs: tuple[Pair, ...]
    is_mean: bool = False
    metrics: tuple[Metric, ...] = ("top1",)

    @property
    def data(self) -> str:
        """The data set of all its pairs."""
        return self.pairs[0].data

    @property
    def needs_files(self) -> bool:
        """Whether its data are files that somebody must have put somewhere, and not made or installed here."""
        return self.data not in ("digits", "fine_grained")

    @property
    def heading(self) -> str:
        """What it is called and is about.

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
        seed: of the run.
    """

    method: str
    pair: Pair
    seed: int

    @property
    def networks(self) -> str:
        """The networks in names: of the pair, or the only one.

        Example:
            >>> Cell("kd", CIFAR_PAIRS[0], 0).networks, Cell("none", CIFAR_PAIRS[0], 0).networks
            ('resnet56-resnet20', 'resnet20')
        """
        if self.method == TEACHER:
            return short(self.pair.teacher)
        return short(self.pair.student) if self.method == "none" else self.pair.name

    @property
    def name(self) -> str:
        """The cell among all: the folder of its run, below that of all runs."""
        return f"{self.pair.data}/{self.method}/{self.networks}/seed-{self.seed}"

    @property
    def teacher(self) -> "Cell":
        """The run of its teacher, if that is trained here.

        As in the literature one teacher serves all seeds of all students, but where every seed has data of its own.
        """
        return Cell(TEACHER, self.pair, self.seed if self.pair.data == STUDY_PAIR.data else 0)

    def folder(self, out: Path) -> Path:
        """The folder of its run."""
        return out / self.name


def short(network: str) -> str:
    """A network's name without where it is from."""
    return network.rpartition("/")[2]


_ALONE_AND_SINGLE = ("none", "fitnet", "crd", "at", "reviewkd", "kd", "dkd", "dkd_standardized", "unikd")
_SUMS = ("none", "kd_fitnet", "kd_crd", "dkd_reviewkd", "mlkd_reviewkd", "flg", "unikd")
_EVERY_METHOD = tuple(method for method in METHODS if not method.startswith("unikd_"))
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
        Table("methods", "CIFAR-100, every method", None, _EVERY_METHOD, CIFAR_PAIRS),
        Table("defaults", "what the paper leaves open, on generated classes", None, tuple(STUDY), (STUDY_PAIR,)),
    )
}
"""By their names on the command line."""


def printed_row(method: str) -> str:
    """The row of a method in ``report.printed``; of one that is not printed, a name that is not there."""
    return _PRINTED_ROWS.get(method, method)


def setting(method: str) -> Setting:
    """What a row is, of the papers' tables or of the study."""
    return METHODS[method] if method in METHODS else STUDY[method]


def title(method: str) -> str:
    """The name of a row in tables."""
    return "teacher" if method == TEACHER else setting(method).title


def student_cells(
    table: Table, seeds: Iterable[int], methods: Sequence[str] | None = None, pairs: Sequence[str] | None = None
) -> list[Cell]:
    """The runs of a table's students, each once; the first seed of all comes before the second of any.

    Args:
        methods: only these of its rows; None for all.
        pairs: only these of its columns, by name; None for all.
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
    """The teachers of these cells, each once."""
    found = (cell.teacher for cell in cells if cell.method != "none")
    return list({cell.name: cell for cell in found}.values())
