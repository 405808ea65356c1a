"""What ``unikd-cache build`` and ``unikd-cache plan`` call: the caches of a configuration's runs, without training."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from unikd_fast.config import Config
from unikd_fast.config.load import cache_dir, override
from unikd_fast.engine.build import build_experiment
from unikd_fast.engine.cache_plan import CachePlan, cache_sizes, plan_cache
from unikd_fast.engine.fill_cache import fill_cache
from unikd_fast.engine.output_cache import codec_of, refuse_uncacheable
from unikd_fast.engine.processes import Processes, start_processes
from unikd_fast.engine.sources import refusing_misfits
from unikd_fast.engine.stop import StopSignal
from unikd_fast.engine.units import duration, size
from unikd_fast.errors import Interrupted


def build_caches(runs: Sequence[tuple[str, Config]]) -> None:
    """Builds what the caches of these runs lack, on all processes, and prints a line for each cache.

    Runs that share a folder must agree about its content; the folder is built once.

    Args:
        runs: name and configuration of single runs with ``teacher.cache.mode = "read_write"``.

    Raises:
        ConfigError: a configuration does not fit the data or the models, or the teacher is not faithful to its weights.
        CacheError: a folder holds another cache, or its disk is full.
        Interrupted: SIGTERM or Ctrl-C; what is written stays.
    """
    processes = start_processes()
    built: set[Path] = set()
    with StopSignal(processes) as stop:
        for name, config in runs:
            line = _filled(name, config, processes, stop, known=cache_dir(config) in built)
            built.add(cache_dir(config))
            if line is not None and processes.is_first:
                print(line, flush=True)
            if stop.asked:
                raise Interrupted(stop.asked, f"[{name}] stopped after this cache; start it again for the others")
    processes.leave()


def _filled(name: str, config: Config, processes: Processes, stop: StopSignal, *, known: bool) -> str | None:
    """Builds what a run's cache lacks and says what it holds; one that is known is compared with the run, no more."""
    cache = build_experiment(config, processes).cache
    assert cache is not None
    if known:
        return None
    began, how = time.perf_counter(), "already complete"
    if cache.missing:
        with refusing_misfits():
            fill_cache(cache, stop, name)
        how = f"built in {duration(time.perf_counter() - began)}"
    else:
        cache.attachment()  # damaged or gone, the shards are of no use
    info = cache.folder.info()
    return f"{cache.folder.path}: {info.views} views x {info.samples:,} samples, {size(info.bytes_total)}, {how}"


def plan_caches(runs: Sequence[tuple[str, Config]]) -> Iterator[tuple[str, Config, CachePlan]]:
    """Yields the plan of each run's cache, as measured here, on the first process; no cache is made.

    A teacher that the run would train first is measured with random weights.

    Args:
        runs: label and configuration of single runs that have a teacher.

    Raises:
        ConfigError: a configuration does not fit the data or the models, or its method's targets cannot be cached.
    """
    processes = start_processes()
    for label, config in runs:
        with refusing_misfits():
            plan = _planned(config, processes)
        if processes.is_first:
            yield label, config, plan
    processes.leave()


def _planned(config: Config, processes: Processes) -> CachePlan:
    assert config.teacher is not None
    trained = config.teacher.weights is None and config.teacher.training is not None
    online = {"teacher.cache.mode": "off", **({"teacher.weights": "random"} if trained else {})}
    experiment = build_experiment(override(config, online, "unikd-cache plan"), processes)
    method, splits, teacher, epochs = experiment.method, experiment.splits, experiment.teacher, experiment.epochs
    assert teacher is not None
    refuse_uncacheable(method, teacher.network, splits)
    views = config.teacher.cache.views or epochs
    sizes = cache_sizes(cache_dir(config), codec_of(config, splits, method), len(splits.train), views)
    return plan_cache(
        config, experiment.loader, experiment.side, method, teacher, processes, sizes=sizes, epochs=epochs
    )
