"""The teacher's own accuracy, for the table, when it was not trained in this run."""

from functools import partial
from pathlib import Path
from typing import Any

from unikd_fast.config import Config
from unikd_fast.config.load import cache_dir
from unikd_fast.data.manifest import hash_split
from unikd_fast.data.splits import DataSplits, TensorImages
from unikd_fast.data.view_windows import Windows
from unikd_fast.engine.evaluate import evaluate
from unikd_fast.engine.inputs import teacher_affine
from unikd_fast.engine.networks import build_teacher_network
from unikd_fast.engine.online_teacher import make_teacher
from unikd_fast.engine.out_of_memory import naming_part
from unikd_fast.engine.outputs import Outputs, write_outputs
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.run_folder import read_result, write_result
from unikd_fast.engine.sources import augmentation_of, build_data, build_data_loader, refusing_misfits
from unikd_fast.errors import FileError
from unikd_fast.io import make_folder, read_json, write_json
from unikd_fast.methods import Needs
from unikd_fast.teacher.cache.disk import folder_lock

BESIDE_THE_CACHE = "teacher_result.json"


@naming_part("teacher")
def evaluate_teacher(config: Config, folder: Path, processes: Processes, *, label: str) -> dict[str, Any]:
    """Accuracy of the given teacher on the test split, in the form of a run's result; kept in ``folder``.

    Where the teacher's outputs are cached, the figures are kept beside them, and no later run loads it for them.
    """
    known = processes.from_first(lambda: read_result(folder))
    if known is not None:
        return known
    assert config.teacher is not None
    with refusing_misfits():
        splits = build_data(config, processes)
        # Only figures that are kept need it, and it wants every file, also those that were skipped.
        kept = _beside_the_cache(config) is not None
        test_split = processes.from_first(lambda: _test_images(config, splits)) if kept else ""
        found = processes.from_first(lambda: _read_figures(config, test_split))
        if found is None:
            outputs: list[Outputs] | None = [] if config.run.test_logits else None
            found = _evaluate(config, splits, processes, outputs)
            if outputs is not None:
                write_outputs(folder, outputs, processes, split="test")
            processes.from_first(partial(_keep_figures, config, test_split, found))
    figures = {"epoch": None, "test": found}
    result = {
        "label": label,
        "seed": config.run.seed,
        "method": "given",
        "model": config.teacher.model,
        "steps": 0,
        "test_is_val": splits.test_is_val,
        "best": figures,
        "last": figures,
        "weights": config.teacher.weights,
    }

    def write() -> None:
        make_folder(folder)
        write_result(folder, result)

    processes.from_first(write)
    return result


def _evaluate(config: Config, splits: DataSplits, processes: Processes, keep: list[Outputs] | None) -> dict[str, float]:
    assert config.teacher is not None
    network = build_teacher_network(config, splits, needs=Needs())
    loader = build_data_loader(config, splits, processes)
    # With "auto" in fp32, which needs no check of its range. Not compiled: it runs once over the split.
    precision = "fp32" if config.teacher.precision == "auto" else config.teacher.precision
    teacher = make_teacher(
        config, network, processes.device, precision=precision, renormalise=teacher_affine(config, splits)
    )
    return evaluate(teacher, loader.evaluate("val" if splits.test_is_val else "test"), processes, keep=keep)


def _test_images(config: Config, splits: DataSplits) -> str:
    """What the figures are of: the samples, and how they are brought to size, which a cache of training views leaves
    open."""
    samples = hash_split(splits.test)
    if isinstance(splits.test, TensorImages):
        return samples
    windows = Windows.of(splits, augmentation_of(config))
    return f"{samples}, {'both sides' if windows.squash else 'short side'} {windows.short_side}"


def _beside_the_cache(config: Config) -> Path | None:
    assert config.teacher is not None
    # Its key is compared before a run, so the folder of a finished run is that of this teacher.
    return None if config.teacher.cache.mode == "off" else cache_dir(config) / BESIDE_THE_CACHE


def _read_figures(config: Config, test_split: str) -> dict[str, float] | None:
    path = _beside_the_cache(config)
    try:
        kept = {} if path is None else read_json(path)
    except FileNotFoundError:
        return None
    except FileError as error:
        raise FileError(f"{error}; remove it, and the teacher is evaluated again") from error
    return kept.get("figures") if kept.get("test_split") == test_split else None


def _keep_figures(config: Config, test_split: str, figures: dict[str, float]) -> None:
    path = _beside_the_cache(config)
    assert config.teacher is not None
    if path is not None and config.teacher.cache.mode == "read_write":
        with folder_lock(path.parent):  # which another run may remove the leftovers of
            write_json(path, {"test_split": test_split, "figures": figures})
