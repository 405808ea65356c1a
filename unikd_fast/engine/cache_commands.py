"""What ``unikd cache`` does: build, plan, verify and describe the caches of a configuration, without training."""

import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from unikd_fast.config import Config
from unikd_fast.config.load import cache_dir, override
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.cache import codec_of, fill_cache, refuse_uncacheable
from unikd_fast.engine.cache_plan import CachePlan, cache_sizes, plan_cache
from unikd_fast.engine.distributed import Processes, StopSignal
from unikd_fast.engine.inputs import as_config_errors
from unikd_fast.engine.memory import oom_hint
from unikd_fast.errors import Interrupted
from unikd_fast.teacher.cache import CacheFolder
from unikd_fast.teacher.cache.shard import committed_path
from unikd_fast.units import duration, size


@oom_hint("run")
def build_caches(runs: Sequence[tuple[str, Config]], processes: Processes) -> None:
    """Build what the caches of some runs lack, on all processes, and print a line for each cache.

    Runs that share a folder must agree on its content; the folder is built once.

    Args:
        runs: names and configurations of single runs with ``teacher.cache.mode = "read_write"``.

    Raises:
        ConfigError: a configuration does not fit the data or the models, or the teacher does not match its weights.
        CacheError: a folder holds another cache, or its disk is full.
        Interrupted: SIGTERM or Ctrl-C; what is written is kept.
    """
    built: set[Path] = set()
    with StopSignal(processes) as stop:
        for name, config in runs:
            line = _filled(name, config, processes, stop, known=cache_dir(config) in built)
            built.add(cache_dir(config))
            if line is not None and processes.is_first:
                print(line, flush=True)
            if stop.asked:
                raise Interrupted(stop.asked, f"[{name}] stopped after this cache; start it again for the others")


def _filled(name: str, config: Config, processes: Processes, stop: StopSignal, *, known: bool) -> str | None:
    """Build what a run's cache lacks and return a line about it, or None for a cache that is built already."""
    experiment = build_experiment(config, processes)
    cache = experiment.cache
    assert cache is not None
    if known:
        return None
    began, how = time.perf_counter(), "already complete"
    if cache.missing:
        with as_config_errors():
            fill_cache(experiment, stop, name)
        how = f"built in {duration(time.perf_counter() - began)}"
    else:
        cache.attachment(processes)  # damaged or gone, the shards are of no use
    info = cache.folder.info()
    return f"{cache.folder.path}: {info.views} views x {info.samples:,} samples, {size(info.bytes_total)}, {how}"


def plan_caches(runs: Sequence[tuple[str, Config]], processes: Processes) -> Iterator[tuple[str, Config, CachePlan]]:
    """Yield the plan of each run's cache, as measured here, on the first process; no cache is made.

    A teacher that the run would train first is measured with random weights.

    Args:
        runs: labels and configurations of single runs that have a teacher.

    Raises:
        ConfigError: a configuration does not fit the data or the models, or its method's targets cannot be cached.
    """
    for label, config in runs:
        assert config.teacher is not None
        trained = config.teacher.is_trained
        shown = (
            override(config, {"teacher.weights": "random", "teacher.weights_key": None}, "unikd cache plan")
            if trained
            else config
        )
        plan = plan_experiment(config, build_experiment(without_cache(shown), processes))
        if processes.is_first:
            yield label, config, plan


def without_cache(config: Config) -> Config:
    """Return the configuration of the same run with its teacher online."""
    return config if config.teacher is None else override(config, {"teacher.cache.mode": "off"}, "teacher.cache")


def plan_experiment(config: Config, experiment: Experiment) -> CachePlan:
    """Return what the cache of a run would cost and save.

    Args:
        config: configuration of the run, with the settings of its cache.
        experiment: the same run with its teacher online.

    Raises:
        ConfigError: the method needs more of the teacher than its outputs.
    """
    assert config.teacher is not None
    method, splits, teacher, epochs = experiment.method, experiment.splits, experiment.teacher, experiment.epochs
    assert teacher is not None
    with as_config_errors():
        refuse_uncacheable(method, teacher.network, splits)
        codec = codec_of(config, splits, method)
    sizes = cache_sizes(cache_dir(config), codec, len(splits.train), config.teacher.cache.views or epochs)
    return plan_cache(experiment, teacher, sizes)


def verify_folder(folder: CacheFolder, *, repair: bool) -> bool:
    """Read a whole cache, with a progress bar on a terminal, and print what is wrong with it.

    Args:
        folder: the cache.
        repair: whether to discard bad shards, so that the next build replaces them.

    Returns:
        Whether every shard is ok. With `repair`, always True: no bad shard is left, though some may not be built.

    Raises:
        CacheError: what belongs to all records is damaged, or a bad shard is being built by another process.
    """
    folder.attachment()  # raises where it is damaged: no shard is of use without it
    count, hidden = folder.info().shards, not sys.stderr.isatty()
    with tqdm(total=count, desc=str(folder.path), unit="shard", disable=hidden, leave=False) as bar:
        check = folder.verify(lambda done, _: bar.update(1))
    bad = 0
    for shard, status, records in check.faulty:
        found = "not built" if status == "missing" else status
        if status != "missing":
            bad += 1
            if repair:
                folder.discard(shard)
                found += ", discarded"
        if records:
            found += f": {len(records):,}, the first is {records[0]}"
        print(f"{committed_path(folder.path, shard).name}: {found}")
    missing = len(check.faulty) - bad
    said = f"{folder.path}: {count - len(check.faulty)} of {count} shards are ok"
    said += f", {missing} not built" if missing else ""
    said += f", {bad} {'discarded' if repair else 'bad'}" if bad else ""
    if not check.ok:
        discard = "unikd cache verify --repair discards what is bad, then " if bad and not repair else ""
        said += f"; {discard}unikd cache build makes what is not there"
    print(said, flush=True)
    return check.ok or repair


def folder_facts(folder: CacheFolder) -> dict[str, Any]:
    """Return sizes, codec, key and builder of a cache, as JSON can hold them.

    Raises:
        CacheError: what belongs to all records is damaged.
    """
    info, attachment = folder.info()._asdict(), folder.attachment()
    key = info.pop("key_fields")
    return {
        "folder": str(folder.path),
        **info,
        "codec": {**folder.codec.settings, "record_bytes": folder.codec.record_bytes},
        "key": key,
        "builder": None if attachment is None else attachment.record,
    }


def describe_facts(facts: dict[str, Any]) -> str:
    """Return the result of `folder_facts` as text: a table, a line for each field of the key, and the builder."""
    codec = facts["codec"]
    logits = codec["kind"] if codec["top_k"] is None else f"the {codec['top_k']} largest"
    gaussians = " and Gaussians" if codec["gaussian"] else ""
    rows = [
        ("folder", facts["folder"]),
        ("stored", f"{facts['views']} views x {facts['samples']:,} samples"),
        ("shards", f"{facts['shards_done']} of {facts['shards']} are built"),
        ("size", f"{size(facts['bytes_done'])} of {size(facts['bytes_total'])} ({facts['bytes_total']:,} bytes)"),
        (
            "codec",
            f"{logits} logits of {codec['num_classes']} classes{gaussians}, {codec['record_bytes']} bytes a view",
        ),
    ]
    lines = [f"{name:<12}{text}" for name, text in rows]
    return "\n".join([*lines, *_leaves(facts["key"]), *_leaves(facts["builder"] or "nobody yet", "builder")])


def _leaves(value: Any, name: str = "") -> Iterator[str]:
    """Yield a line for each leaf of nested names."""
    if isinstance(value, dict) and value:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield f"{name}: {value if isinstance(value, str) else json.dumps(value)}"
