"""Cells as runs: configuration, folder, and how far they are."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from unikd_fast.config import Config, ConfigError, config_hash, parse_config
from unikd_fast.config.load import parse_override
from unikd_fast.io import make_folder, write_json
from unikd_fast.recipes import TEACHERS_ROOT, alone, experiment
from unikd_fast.reproduce.cells import TEACHER, Cell, short
from unikd_fast.reproduce.digits import digits_config
from unikd_fast.reproduce.fine_grained import fine_grained_config

TRAINED_TEACHERS = "UNIKD_TRAINED_TEACHERS"
"""Environment variable of the folder of the teachers that were trained here: configurations name their teacher by it,
so that they are the same wherever the runs lie."""

Teachers = Literal["published", "trained"]
State = Literal["done", "unfinished", "missing"]

# What the table decides, and by what to change it.
_DECIDED = {
    "run.dir": "--out",
    "run.seed": "--seeds",
    "data.name": "--data",
    "data.root": "--root",
    "teacher.weights": "--teachers",
    "teacher.model": "--pairs",
    "student.model": "--pairs",
    "distill.method": "--methods",
    "compare": "--methods",
}


class Run(NamedTuple):
    """A cell as a run.

    Args:
        cell: which.
        folder: absolute.
        config: what it is run with, every override put in.
        state: how far it is.
    """

    cell: Cell
    folder: Path
    config: Config
    state: State

    @property
    def name(self) -> str:
        return self.cell.name

    @property
    def config_file(self) -> Path:
        """Beside the folder, which the engine wants to make itself."""
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def write_config(self) -> Path:
        """Writes what was set, without the defaults."""
        make_folder(self.config_file.parent)
        write_json(self.config_file, self.config.model_dump(mode="json", by_alias=True, exclude_unset=True))
        return self.config_file


def plan_runs(
    cells: Iterable[Cell],
    out: Path,
    *,
    teachers: Teachers,
    root: Path | None = None,
    overrides: Sequence[str] = (),
) -> list[Run]:
    """The runs of these cells.

    Args:
        out: the folder of all runs, absolute.
        teachers: whether teachers are published files, or trained here.
        root: of the data set; None for the recipe's own, an environment variable.
        overrides: "section.key=value"; what is about teachers and distillation is left out of runs that have none.

    Raises:
        ConfigError: an override does not fit a cell, changes what the table decides, or a folder holds a run with
            another configuration.
    """
    for text in overrides:
        key, _ = parse_override(text)
        for decided, option in _DECIDED.items():
            if key == decided or key.startswith(f"{decided}."):
                raise ConfigError(f"--set {text}: the table decides {decided}; see {option}")
    return [_plan(cell, out, teachers, root, overrides) for cell in cells]


def _plan(cell: Cell, out: Path, teachers: Teachers, root: Path | None, overrides: Sequence[str]) -> Run:
    raw = _recipe(cell, teachers)
    folder = cell.folder(out)
    raw["run"] = {**raw["run"], "dir": str(folder), "seed": cell.seed}
    if root is not None:
        raw["data"] = {**raw["data"], "root": str(root)}
    own = [text for text in overrides if "teacher" in raw or not text.startswith(("teacher.", "distill."))]
    # By this name the teacher's outputs are cached, if they are: two methods of one name may fit different heads.
    name = f"{cell.pair.data}-{cell.method}-{cell.networks}"
    config = parse_config(raw, own, name=name, source=cell.name)
    return Run(cell, folder, config, _state(folder, config))


def _recipe(cell: Cell, teachers: Teachers) -> dict[str, Any]:
    if cell.pair.data == "digits":
        raw = digits_config(cell)
    elif cell.pair.data == "fine_grained":
        raw = fine_grained_config(cell)
    elif cell.method in (TEACHER, "none"):
        raw = alone(cell.pair, cell.pair.teacher if cell.method == TEACHER else cell.pair.student)
    else:
        raw = experiment(cell.method, cell.pair)
    raw.pop("$schema", None)  # a path within the repository
    if "teacher" in raw and teachers == "trained":
        weights = f"${{{TRAINED_TEACHERS}}}/{short(cell.pair.teacher)}/seed-{cell.teacher.seed}/student.safetensors"
        raw["teacher"] = {**raw["teacher"], "weights": weights}
    return raw


def teachers_environment(out: Path, data: str, published: Path | None) -> dict[str, str]:
    """The environment variables by which configurations name their teachers."""
    own = {TRAINED_TEACHERS: str(out / data / TEACHER)}
    return own if published is None else {**own, TEACHERS_ROOT: str(published)}


def _state(folder: Path, config: Config) -> State:
    """Of a run folder; one of another configuration is refused."""
    path = folder / "config.json"
    if not path.exists():
        return "missing"
    try:
        stored = Config.model_validate_json(path.read_text())
    except ValueError as error:
        said = str(error).partition("\n")[0]
        raise ConfigError(f"{path} is no configuration of this version ({said}); choose another --out") from None
    if config_hash(stored) != config_hash(config):
        differing = _differences(stored.model_dump(mode="json"), config.model_dump(mode="json"))
        raise ConfigError(
            f"{folder} was run with another configuration: {'; '.join(differing)}; choose another --out, or remove the "
            "folder to run it again"
        )
    return "done" if (folder / "result.json").exists() else "unfinished"


def _differences(stored: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(stored, dict) and isinstance(now, dict):
        keys = sorted(stored.keys() | now.keys())
        return [d for k in keys for d in _differences(stored.get(k), now.get(k), f"{path}.{k}" if path else k)]
    return [] if stored == now or path in ("run.dir", "data.root") else [f"{path} was {stored!r}, now {now!r}"]
