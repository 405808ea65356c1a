"""What an experiment, its runs and its caches are called, and so where they write."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from unikd_fast.config.methods import section_names
from unikd_fast.config.schema import Config

_MAY_CHANGE: Any = {
    "json_schema": True,
    "run": {
        "dir",
        "nodes",
        "timeout_minutes",
        "tensorboard",
        "log_every_steps",
        "checkpoint_every_steps",
        "keep_checkpoints",
        "async_checkpoints",
        "deepspeed_checkpoints",
        "test_logits",
        "probe",
        "show_head",
    },
    "data": {"root", "workers", "dali_threads", "dali_prefetch"},
    "teacher": {"cache": {"dir"}, "min_accuracy": True},
    "train": {"accumulation_steps"},
    "deepspeed": True,
}


def config_hash(config: Config) -> str:
    """Eight hex digits that identify the experiment: everything that its result depends on but for rounding.

    A run may be resumed with all the rest changed: where and how often it writes, who reads its data and how far ahead,
    and how many micro-batches and shards its steps are cut into.
    """
    content = config.model_dump(mode="json", exclude=_MAY_CHANGE)
    # Sections and keys that came later: an experiment that does not have them keeps its name.
    for section, keys in (
        ("distill", section_names(type(config.distill))),
        ("data", ["second_view"]),
        ("teacher", ["weights_key"]),
        ("student", ["weights_key"]),
    ):
        for key in keys:
            if content[section] is not None and content[section][key] is None:
                del content[section][key]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def run_path(config: Config, label: str, seed: int) -> str:
    """Where one of the runs of :func:`run_configs` writes, below the folder of the experiment.

    Example:
        >>> run_path(comparison, "UniKD, FDP only", 0)
        'seed-0/unikd-fdp-only'
    """
    if config.compare is None:
        return "."
    return f"seed-{seed}/{re.sub(r'[^a-z0-9]+', '-', label.lower()).strip('-')}"


def cache_dir(config: Config) -> Path:
    """The folder of the teacher's outputs of a single run.

    Example:
        >>> cache_dir(load_config("configs/digits_cached.json"))
        PosixPath('caches/digits_cached-unikd-seed0')
    """
    assert config.teacher is not None
    named = {"{method}": config.distill.label, "{seed}": str(config.run.seed)}
    folder = config.teacher.cache.dir
    for name, value in named.items():
        folder = folder.replace(name, value)
    return Path(folder)
