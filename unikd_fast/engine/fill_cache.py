"""Before training: a run's cache is built where it lacks outputs, held against the teacher, and the teacher let go."""

import gc
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from unikd_fast.engine.cache_plan import cache_sizes, plan_cache
from unikd_fast.engine.inputs import teacher_affine
from unikd_fast.engine.networks import build_teacher_network
from unikd_fast.engine.online_teacher import make_teacher, start_teacher
from unikd_fast.engine.out_of_memory import naming_part
from unikd_fast.engine.output_cache import OutputCache
from unikd_fast.engine.prepare_method import prepare_method
from unikd_fast.engine.sources import refusing_misfits
from unikd_fast.engine.stop import StopSignal
from unikd_fast.engine.teacher_accuracy import VALIDATION, judge_teacher, measure_teacher
from unikd_fast.errors import CacheError, Interrupted
from unikd_fast.models import FeatureExtractor, LogitsOnly
from unikd_fast.teacher import OnlineTeacher
from unikd_fast.teacher.cache import build_cache
from unikd_fast.teacher.cache.layout import stored_bytes
from unikd_fast.teacher.recheck import Recheck, check_outputs, output_differences
from unikd_fast.values import Gaussian

Outputs = tuple[Tensor, Gaussian | None]


def ready_cache(cache: OutputCache, side: nn.Module, stop: StopSignal, name: str, *, epochs: int) -> dict[str, Any]:
    """Everything before training: what is missing is built, a share is held against the teacher, the teacher goes.

    With ``teacher.cache.recheck = 0`` and a finished cache no teacher is made at all.

    Args:
        side: the StudentSide of the run, for the plan.
        name: of the run, before its lines.
        epochs: that it trains.

    Returns:
        What the run folder says about the teacher.

    Raises:
        CacheError: on all processes: outputs are missing and may not be built, or are not the teacher's.
        ConfigError: the teacher is not the network it was made of; an image cannot be read.
        Interrupted: SIGTERM or Ctrl-C while it was built.
    """
    with refusing_misfits():
        return _ready(cache, side, stop, name, epochs)


def _ready(cache: OutputCache, side: nn.Module, stop: StopSignal, name: str, epochs: int) -> dict[str, Any]:
    processes = cache.processes
    record: dict[str, Any] = {"cache": str(cache.folder.path), "views": cache.views, "built_shards": cache.missing}
    if cache.missing and cache.settings.mode == "read":
        raise CacheError(
            f"{cache}: {cache.missing} of {cache.folder.info().shards} shards are not built, and teacher.cache.mode = "
            "'read' builds none; run unikd-cache build with this configuration, or use --set "
            "teacher.cache.mode=read_write"
        )
    sizes = cache_sizes(cache.folder.path, cache.folder.codec, cache.folder.samples, cache.views)
    teacher = fill_cache(cache, stop, name) if cache.missing else None
    attachment = cache.attachment()
    assert attachment is not None
    cache.adopt_head(attachment)
    record["teacher"] = attachment.record

    def compare() -> dict[str, Any]:
        made = teacher or cached_teacher(cache)
        found = recheck(cache, made)
        plan = plan_cache(cache.config, cache.loader, side, cache.method, made, processes, sizes=sizes, epochs=epochs)
        tqdm.write(f"[{name}] teacher cache: {plan.line()}", file=sys.stderr)
        return found._asdict()

    if cache.settings.recheck > 0:
        record["recheck"] = processes.from_first(compare)
    cache.network = teacher = None
    gc.collect()
    if processes.device.type == "cuda":
        torch.cuda.empty_cache()
    return record


@naming_part("teacher")
def fill_cache(cache: OutputCache, stop: StopSignal, name: str) -> OnlineTeacher:
    """Builds what is missing, on all processes of this run and beside any other run that does the same.

    Args:
        name: of the run, before its lines.

    Returns:
        The teacher that did it.

    Raises:
        CacheError: the disk is full, or an output cannot be stored.
        ValueError: the teacher is not the network it was made of, see `start_teacher`, or knows too little.
        Interrupted: SIGTERM or Ctrl-C; what is written stays.
    """
    processes, batch_size = cache.processes, cache.settings.batch_size
    processes.from_first(lambda: cache.folder.require_room(cache.views))
    known = cache.attachment()
    precision = None if known is None else known.record["precision"]
    teacher, record = start_teacher(
        cache.config,
        _network(cache),
        cache.loader,
        processes,
        renormalise=teacher_affine(cache.config, cache.splits),
        precision=precision,
        batch_size=batch_size,
    )
    if known is None:
        record[VALIDATION] = measure_teacher(cache.config, teacher, cache.loader, processes)
    asked = record if known is None else known.record
    if asked.get(VALIDATION) is not None:  # before a long pass over all views
        judge_teacher(cache.config, asked[VALIDATION], cache.splits.num_classes, processes, name)
    if known is None:
        prepare_method(cache.method, cache.loader, teacher, processes, stop, name)
        head = cache.method.fitted_head
        processes.from_first(lambda: bool(cache.folder.attach({} if head is None else head.state_dict(), record)))
        known = cache.folder.attachment()
        assert known is not None
    cache.adopt_head(known)  # another run's, if that was faster

    def outputs(requests: Iterable[Any]) -> Iterator[Outputs]:
        return _one_ahead(_outputs(cache, teacher, batch.images) for batch in cache.loader.views(requests))

    with _progress(cache, name) as bar:

        def advance(count: int) -> None:
            bar.update(count)
            if stop.asked:
                raise Interrupted(
                    stop.asked,
                    f"[{name}] stopped while {cache} was built; what is written is kept, start it again (a run with "
                    "--resume auto)",
                )

        build_cache(cache.folder, outputs, batch_size=batch_size, views=cache.views, progress=advance)
    processes.barrier()
    cache.missing = 0
    return teacher


def cached_teacher(cache: OutputCache) -> OnlineTeacher:
    """The teacher that the cache was built with, run eagerly, on this process alone."""
    known = cache.folder.attachment()
    assert known is not None  # of a cache that is built
    return make_teacher(
        cache.config,
        _network(cache),
        cache.processes.device,
        precision=known.record["precision"],
        renormalise=teacher_affine(cache.config, cache.splits),
        batch_size=cache.settings.batch_size,
    )


def recheck(cache: OutputCache, teacher: OnlineTeacher) -> Recheck:
    """Computes a random share of the outputs again and compares; on this process alone.

    Raises:
        CacheError: an output is missing, damaged, or not what the teacher says.
    """
    samples, size = cache.folder.samples, cache.settings.batch_size
    available = cache.views * samples
    count = min(available, max(size, round(cache.settings.recheck * available)))
    drawn = np.sort(np.random.default_rng().choice(available, count, replace=False))
    of_views = np.split(drawn, np.flatnonzero(np.diff(drawn // samples)) + 1)
    parts = [records[start : start + size] for records in of_views for start in range(0, len(records), size)]
    requests = ((records % samples, int(records[0]) // samples) for records in parts)
    differences: list[Tensor] = []
    for records, batch in zip(parts, cache.loader.views(requests), strict=True):
        logits, gaussian = _outputs(cache, teacher, batch.images)
        differences.append(output_differences(cache.folder.codec, cache.folder.read(records), logits, gaussian))
    views, positions = np.divmod(drawn, samples)
    ids = cache.folder.sample_ids[positions].tolist()
    return check_outputs(
        torch.cat(differences),
        precision=teacher.precision,
        device=cache.processes.device,
        names=[f"sample {sample} in view {view}" for sample, view in zip(ids, views.tolist(), strict=True)],
        cache=str(cache),
    )


def _progress(cache: OutputCache, name: str) -> Any:
    """A bar on the first process's terminal; with several processes it shows this one's share."""
    record_bytes = stored_bytes(cache.folder.codec.record_bytes)
    share = cache.folder.missing_bytes(cache.views) // record_bytes // cache.processes.world_size
    hidden = not cache.processes.is_first or not sys.stderr.isatty()
    return tqdm(total=share, desc=f"[{name}] teacher's outputs", unit="view", disable=hidden, leave=False)


def _network(cache: OutputCache) -> FeatureExtractor | LogitsOnly:
    network, cache.network = cache.network, None  # whoever makes a teacher of it changes it
    if network is None:
        network = build_teacher_network(cache.config, cache.splits, needs=cache.method.needs)
    return network


@torch.no_grad()
def _outputs(cache: OutputCache, teacher: OnlineTeacher, images: Tensor) -> Outputs:
    target = cache.method.target(teacher(images))
    assert isinstance(target.logits, Tensor)
    return target.logits, target.gaussian


def _one_ahead(outputs: Iterable[Outputs]) -> Iterator[Outputs]:
    """Asks for the next outputs before it hands out the last: a GPU computes them while the host packs and writes."""
    last = None
    for current in outputs:
        if last is not None:
            yield last
        last = current
    if last is not None:
        yield last
