"""The teacher's own accuracy, for the table, when it was not trained in this run."""

from pathlib import Path
from typing import Any

from unikd_fast.config import Config
from unikd_fast.engine.evaluate import evaluate
from unikd_fast.engine.networks import build_teacher_network
from unikd_fast.engine.online_teacher import make_teacher
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.run_folder import read_result, write_result
from unikd_fast.engine.sources import build_data, build_data_loader, refusing_misfits


def evaluate_teacher(config: Config, folder: Path, processes: Processes, *, label: str) -> dict[str, Any]:
    """Accuracy of the given teacher on the test split, in the form of a run's result; kept in ``folder``."""
    known: dict[str, Any] | None = processes.broadcast(read_result(folder))
    if known is not None:
        return known
    assert config.teacher is not None
    with refusing_misfits():
        splits = build_data(config)
        network = build_teacher_network(config, splits, levels=False)
        loader = build_data_loader(config, splits, processes)
    # With "auto" in fp32, which needs no check of its range. Not compiled: it runs once over the split.
    precision = "fp32" if config.teacher.precision == "auto" else config.teacher.precision
    teacher = make_teacher(config, network, processes.device, precision=precision)
    found = evaluate(teacher, loader.evaluate("val" if splits.test_is_val else "test"), processes)
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
    if processes.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        write_result(folder, result)
    return result
