"""What ``unikd-cache build`` and ``unikd-cache plan`` call: the caches of a configuration's runs, without training."""

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from unikd_fast.config import Config
from unikd_fast.config.load import cache_dir, override
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.cache_plan import CachePlan, cache_sizes, plan_cache
from unikd_fast.engine.fill_cache import fill_cache
from unikd_fast.engine.out_of_memory import naming_part
from unikd_fast.engine.output_cache import codec_of, refuse_uncacheable
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.sources import refusing_misfits
from unikd_fast.engine.stop import StopSignal
from unikd_fast.engine.units import duration, size
from unikd_fast.errors import Interrupted


@naming_part("run")
def build_caches(runs: Sequence[tuple[str, Config]], processes: Processes) -> None:
    """Builds what the caches of these runs lack, on all processes, and prints a line for each cache.

    Runs that share a folder must agree about its content; the folder is built once.

    Args:
        runs: name and configuration of single runs with ``teacher.cache.mode = "read_write"``.

    Raises:
        ConfigError: a configuration does not fit the data or the models, or the teacher is not faithful to its weights.
        CacheError: a folder holds another cache, or its disk is full.
        Interrupted: SIGTERM or Ctrl-C; what is written stays.
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


def plan_caches(runs: Sequence[tuple[str, Config]], processes: Processes) -> Iterator[tuple[str, Config, CachePlan]]:
    """Yields the plan of each run's cache, as measured here, on the first process; no cache is made.

    A teacher that the run would train first is measured with random weights.

    Args:
        runs: label and configuration of single runs that have a teacher.

    Raises:
        ConfigError: a configuration does not fit the data or the models, or its method's targets cannot be cached.
    """
    for label, config in runs:
        assert config.teacher is not None
        trained = config.teacher.weights is None and config.teacher.training is not None
        shown = override(config, {"teacher.weights": "random"}, "unikd-cache plan") if trained else config
        plan = plan_experiment(config, build_experiment(without_cache(shown), processes), processes)
        if processes.is_first:
            yield label, config, plan


def without_cache(config: Config) -> Config:
    """The same run with its teacher online; no cache is opened or made."""
    return config if config.teacher is None else override(config, {"teacher.cache.mode": "off"}, "teacher.cache")


def plan_experiment(config: Config, experiment: Experiment, processes: Processes) -> CachePlan:
    """What the cache of a run would cost and save.

    Args:
        config: of the run, with the settings of its cache.
        experiment: the same with its teacher online.

    Raises:
        ConfigError: the method needs more of the teacher than its outputs.
    """
    assert config.teacher is not None
    method, splits, teacher, epochs = experiment.method, experiment.splits, experiment.teacher, experiment.epochs
    assert teacher is not None
    with refusing_misfits():
        refuse_uncacheable(method, teacher.network, splits)
        codec = codec_of(config, splits, method)
    sizes = cache_sizes(cache_dir(config), codec, len(splits.train), config.teacher.cache.views or epochs)
    return plan_cache(
        config, experiment.loader, experiment.side, method, teacher, processes, sizes=sizes, epochs=epochs
    )
