"""What a table needs before anything runs: data and teachers; and what to put where if it is not there."""

import os
from collections.abc import Sequence
from pathlib import Path

from unikd_fast.data.roots import check_root
from unikd_fast.recipes import TEACHERS_ROOT, Pair
from unikd_fast.reproduce.plan import Run, Teachers

_CIFAR_DATA = """CIFAR-100: unpack https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz in a folder, and name that
by --root FOLDER or `export CIFAR100_ROOT=FOLDER`:
  FOLDER/cifar-100-python/{train,test,meta}"""
_IMAGENET_DATA = """ImageNet: images sorted by class in a folder, and name that by --root FOLDER or
`export IMAGENET_ROOT=FOLDER`:
  FOLDER/train/<class>/<image>
  FOLDER/val/<class>/<image>
The README says how torchvision sorts the three published archives so."""
_CIFAR_TEACHERS = f"""The published teachers are RepDistiller's, which all of this literature uses: unpack
cifar_teachers.tar of https://github.com/megvii-research/mdistiller/releases/tag/checkpoints (or run RepDistiller's
scripts/fetch_pretrained_teachers.sh, if its server answers), and name the folder by --teachers FOLDER or
`export {TEACHERS_ROOT}=FOLDER`. Or train them here: --teachers train, once each, by the recipe of a student alone."""
_NO_DATA_AT_ALL = "Without data: --data digits runs a stand-in of the table on scikit-learn's digits."

_DATA_IN_WORDS = {"cifar100": _CIFAR_DATA, "imagenet": _IMAGENET_DATA}


def missing_requirements(runs: Sequence[Run], teachers: Teachers, published: Path | None) -> list[str]:
    """What these runs lack, in paragraphs that say what to put where; empty if they lack nothing.

    Args:
        runs: not those that are done.
        teachers: published files, or trained here.
        published: the folder of the published ones; None for the environment variable's.
    """
    if not runs:
        return []
    said: list[str] = []
    name, root = runs[0].config.data.name, runs[0].config.data.root
    try:
        check_root(name, root)
    except (ValueError, FileNotFoundError) as error:
        said.append(f"{_without_function(error)}\n\n{_DATA_IN_WORDS[name]}")
    if teachers == "published" and name == "cifar100":
        needed = dict.fromkeys(run.cell.pair for run in runs if run.config.teacher is not None)
        problem = _missing_teachers(list(needed), published)
        if problem is not None:
            said.append(f"{problem}\n\n{_CIFAR_TEACHERS}")
    return [*said, _NO_DATA_AT_ALL] if said else []


def _missing_teachers(pairs: Sequence[Pair], published: Path | None) -> str | None:
    """What is wrong about the files of these pairs' teachers."""
    files = list(dict.fromkeys(pair.teacher_weights for pair in pairs))
    if not files:
        return None
    if published is None:
        folder = os.environ.get(TEACHERS_ROOT)
        if not folder:
            listed = "\n".join(f"  FOLDER/{file}" for file in files)
            return f"no folder of teachers is given, and {TEACHERS_ROOT} is not set; it must hold\n{listed}"
        published = Path(folder)
    absent = [str(published / file) for file in files if not (published / file).is_file()]
    if not absent:
        return None
    listed = "\n".join(f"  {file}" for file in absent)
    return f"{len(absent)} of {len(files)} teachers are missing in {published}:\n{listed}"


def _without_function(error: Exception) -> str:
    return str(error).removeprefix("check_root: ").replace("--set data.root=", "--root ")
