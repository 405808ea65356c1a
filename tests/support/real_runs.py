"""Tiny runs: in this process, in several without a launcher, and by the launchers as a user starts them."""

import io
import json
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from support.alone import alone
from support.build_method import for_method
from support.free_ports import free_port
from support.ranks import Done, Ranks
from unikd_fast.cli import main
from unikd_fast.config import Config, load_config
from unikd_fast.data.loader import _log_once
from unikd_fast.data.sets import open_data
from unikd_fast.data.settings import DataSettings
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.checkpoint import find_newest, read_folder
from unikd_fast.engine.distributed import Processes, StopSignal
from unikd_fast.engine.trainer import Trainer
from unikd_fast.models import build_model

ROOT = Path(__file__).parents[2]
LAUNCHERS = {
    "python": [sys.executable],
    "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"],
    "deepspeed": [str(Path(sys.executable).parent / "deepspeed"), "--num_accelerators"],
}

# Small, but with everything that has state: dropout, BatchNorm, momentum, a ramp, a head with its own optimiser,
# augmentation, several epochs.
TINY: dict[str, Any] = {
    "run": {"log_every_steps": 1, "checkpoint_every_steps": 1, "trackers": []},
    "data": {
        "name": "synthetic",
        "image_size": 32,
        "num_classes": 10,
        "synthetic_samples": 96,
        "augmentation": {"crop": "pad", "padding": 2, "flip_probability": 0.5},
    },
    # In fp32 on every processor. Random weights know nothing, also those of a file.
    "teacher": {"model": "cifar/resnet8", "weights": "random", "precision": "fp32", "min_accuracy": 0},
    "student": {"model": "torchvision/mobilenet_v3_small"},
    "distill": {"method": "unikd", "teacher_head": "anchored", "alpha_ramp_epochs": 1.0},
    "train": {
        "total_epochs": 3,
        "global_batch_size": 16,
        "accumulation_steps": 2,
        "learning_rate": 0.05,
        "weight_decay": 0.0005,
        "clip_grad_norm": 5.0,
        "ema_decay": 0.9,
    },
}


def write_config(folder: Path, *, name: str = "tiny", **sections: dict[str, Any]) -> Path:
    """TINY with the given keys changed, writing to ``folder / name``."""
    config = json.loads(json.dumps(TINY))
    config["run"]["dir"] = str(folder / name)
    for section, values in sections.items():
        config.setdefault(section, {}).update(values)
    config["distill"] = for_method(config["distill"])
    runs = (config.get("compare") or {}).get("runs", {})
    used = {"method", "max_levels", *(str(run.get("distill.method", "unikd")) for run in runs.values())}
    if runs:
        config["distill"] = {key: value for key, value in config["distill"].items() if key in used}
    path = folder / f"{name}.json"
    path.write_text(json.dumps(config))
    return path


def merged(base: dict[str, Any], sections: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Both, section by section; what ``sections`` says holds."""
    return {key: {**base.get(key, {}), **sections.get(key, {})} for key in base.keys() | sections.keys()}


def in_this_process(body: Callable[[], int]) -> Done:
    """Run what a process would, in this one, which is afterwards as it was before."""
    said = io.StringIO(), io.StringIO()
    with as_in_a_process(), redirect_stdout(said[0]), redirect_stderr(said[1]):
        try:
            code = body()
        except SystemExit as ended:  # of argparse
            code = int(ended.code or 0)
    return Done(code, *(text.getvalue() for text in said))


def call(*arguments: object) -> Done:
    """Run a `unikd` command to its end in this process."""
    return in_this_process(partial(main, list(map(str, arguments))))


def run(config: Path, *arguments: str) -> Done:
    """Run `unikd train` to its end in this process."""
    return call("train", "--config", config, *arguments)


@contextmanager
def as_in_a_process() -> Iterator[None]:
    """Let a command believe that the process is its own: it finds no log, and what it changes is put back."""
    logger, threads = logging.getLogger("unikd_fast"), torch.get_num_threads()
    handlers, level = logger.handlers, logger.level
    logger.handlers = []
    _log_once.cache_clear()
    try:
        with alone(), torch.random.fork_rng(devices=[]):
            yield
    finally:
        logger.handlers, logger.level = handlers, level
        torch.set_num_threads(threads)


def start(config: Path, *arguments: str, processes: int = 1) -> Ranks:
    """Start `unikd train` in processes that can be killed, without a launcher."""
    return Ranks(partial(main, ["train", "--config", str(config), *arguments]), config.parent, processes=processes)


def run_ranks(config: Path, *arguments: str, processes: int = 2) -> Done:
    """Run `unikd train` to its end in several processes, without a launcher."""
    return start(config, *arguments, processes=processes).done()


def command(config: Path, *arguments: str, launcher: str = "python", processes: int = 1) -> list[str]:
    """Return the command line of a launcher as users type it."""
    start = LAUNCHERS[launcher] + ([] if launcher == "python" else [str(processes)])
    if launcher == "deepspeed":
        start += ["--master_port", str(free_port())]
    return [*start, str(ROOT / "launch_distill.py"), "--config", str(config), *arguments]


def launch(config: Path, *arguments: str, launcher: str = "python", processes: int = 1) -> Done:
    """Run launch_distill.py to its end by a launcher, as a user would."""
    done = subprocess.run(
        command(config, *arguments, launcher=launcher, processes=processes),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    return Done(done.returncode, done.stdout, done.stderr)


def start_launcher(config: Path, *arguments: str, launcher: str, processes: int) -> "subprocess.Popen[str]":
    """Start launch_distill.py by a launcher in a process group of its own, so that the whole of it can be killed."""
    return subprocess.Popen(
        command(config, *arguments, launcher=launcher, processes=processes),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def wait_for_step(folder: Path, step: int, process: "Ranks | subprocess.Popen[str]", timeout_s: float = 120.0) -> None:
    """Wait until metrics.jsonl shows the step."""
    deadline = time.monotonic() + timeout_s
    path = folder / "metrics.jsonl"
    while time.monotonic() < deadline:
        if path.exists() and any(f'"step": {n}' in path.read_text() for n in range(step, step + 3)):
            return
        assert process.poll() is None, f"ended with {process.returncode}:\n{_said(process)}"
        time.sleep(0.02)
    process.kill()
    raise AssertionError(f"step {step} not reached in {timeout_s} s:\n{_said(process)}")


def _said(process: "Ranks | subprocess.Popen[str]") -> str:
    return process.said() if isinstance(process, Ranks) else process.communicate()[0]


def newest_checkpoint(folder: Path) -> dict[str, Any]:
    """What a run would be resumed from."""
    newest = find_newest(folder)
    assert newest is not None, f"no checkpoint in {folder}"
    return read_folder(newest)


def train_records(folder: Path) -> list[dict[str, float]]:
    """The loss terms and accuracies of every record, without what depends on the clock."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    clock = {"images_per_s", "data_wait_share", "memory_gib"}
    return [{k: v for k, v in line.items() if k not in clock} for line in lines]


ALONE = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))

# Real images and a teacher with an opinion; a run takes a second. The rate is low, so that training does not make much
# of a difference of the last bit.
CACHED: dict[str, Any] = {
    "run": {"checkpoint_every_steps": None, "evaluate_every_epochs": 9},
    "data": {"name": "digits", "image_size": 16, "train_samples": 96},
    "student": {"model": "cifar/resnet8"},
    "distill": {"teacher_head": "prefit", "head_steps": 4},
    "train": {"accumulation_steps": 1, "learning_rate": 0.002, "ema_decay": None},
}


def opened(config: Path, processes: Processes = ALONE) -> Experiment:
    """The objects of a run in this process; its cache is opened, and not built."""
    return build_experiment(load_config(config), processes)


def cached_config(
    folder: Path,
    weights: Path,
    *,
    name: str = "cached",
    cache: dict[str, Any] | None = None,
    **sections: dict[str, Any],
) -> Path:
    """A run on digits whose teacher's outputs are cached in ``folder / "outputs"`` unless ``cache`` says otherwise.

    Nothing is computed again and nothing planned, which would take longer than the training.
    """
    changed = merged(CACHED, sections)
    changed["teacher"] = {
        "weights": str(weights),
        "fidelity": {"min_agreement": 0.0},
        "cache": {"mode": "read_write", "dir": str(folder / "outputs"), "recheck": 0.0, **(cache or {})},
        **sections.get("teacher", {}),
    }
    return write_config(folder, name=name, **changed)


def config_of(folder: Path, weights: Path, name: str, **sections: Any) -> Path:
    """A run as `cached_config`'s whose teacher's outputs are not cached unless ``cache`` says otherwise."""
    cache = sections.pop("cache", {"mode": "off"})
    return cached_config(folder, weights, name=name, cache=cache, **sections)


def save_teacher(path: Path, model: str = "cifar/resnet8", seed: int = 0, sharpness: float = 16.0) -> Path:
    """Random weights with the statistics of the digits and logits of some size, so that their rounding shows."""
    torch.manual_seed(seed)
    network = build_model(model, num_classes=10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # averages over all batches
    splits = open_data(DataSettings(name="digits", image_size=16))
    mean, std = (torch.tensor(values)[:, None, None] for values in (splits.mean, splits.std))
    with torch.no_grad():
        network.train()((splits.train.images[:256] / 255 - mean) / std)
    *_, last = (module for module in network.modules() if isinstance(module, nn.Linear))
    last.weight.data.mul_(sharpness)
    torch.save(network.state_dict(), path)
    return path


def train_here(config: Config, *, resume: bool = False) -> Path:
    """Train a single run in this process and return its folder."""
    folder = Path(config.run.dir)
    with alone(), StopSignal(ALONE) as stop:
        Trainer(build_experiment(config, ALONE), folder, stop, label="student", resume=resume).run()
    return folder
