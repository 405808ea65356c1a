"""The teacher's outputs of a run on disk: opened, built where they are missing, and read ahead of the steps."""

import gc
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from unikd_fast.config import Config, ConfigError
from unikd_fast.config.load import cache_dir, single_teachers
from unikd_fast.config.schema import TeacherCache
from unikd_fast.data.augmentation import AUGMENTATION_VERSION, Augmentation
from unikd_fast.data.loader import Loader
from unikd_fast.data.splits import DataSplits, hash_split
from unikd_fast.data.views import Windows
from unikd_fast.engine.cache_plan import cache_sizes, plan_cache
from unikd_fast.engine.checked_teacher import make_teacher, start_teacher
from unikd_fast.engine.distributed import Processes, StopSignal
from unikd_fast.engine.folder import VALIDATION
from unikd_fast.engine.inputs import as_config_errors, network_size, teacher_affine, teacher_constants
from unikd_fast.engine.memory import oom_hint
from unikd_fast.engine.networks import TeacherNetwork, build_teacher_network
from unikd_fast.engine.teacher import measure_teacher, prepare_method, require_accuracy
from unikd_fast.errors import CacheError, Interrupted
from unikd_fast.methods import Method
from unikd_fast.models import LogitsOnly
from unikd_fast.teacher import Ensemble, OnlineTeacher, resolve_precision
from unikd_fast.teacher.cache import Attachment, CacheFolder, CacheKey, Codec, build_cache, hash_tensors
from unikd_fast.teacher.cache.files import default_records_per_shard, stored_bytes
from unikd_fast.teacher.cache.outputs import Recheck, check_outputs, output_differences, read_ahead
from unikd_fast.units import size
from unikd_fast.values import Batch, Gaussian, Target

if TYPE_CHECKING:
    from unikd_fast.engine.build import Experiment


def outputs_key(experiment: "Experiment", network: TeacherNetwork) -> dict[str, Any]:
    """Return what the outputs of this run's teacher are made from, for a CacheKey.

    The student, the batch size and the loss are not part of it, so all students of a teacher share a cache; but a
    student whose weights require another interpolation sees other views, and a fitted head depends on the batches it
    was fitted to. Mean and deviation are those of the teacher's images, however the student's are normalised. World
    size, workers and device change rounding at most.

    Args:
        experiment: run with a teacher; the head of its method is not fitted yet.
        network: teacher with its weights, as loaded.
    """
    config, splits = experiment.config, experiment.splits
    teacher = config.teacher
    assert teacher is not None
    mean, std = teacher_constants(config, splits)
    members = list(network.members) if isinstance(network, Ensemble) else [network]
    first, *others = (
        _network_key(single, each, splits) for single, each in zip(single_teachers(config), members, strict=True)
    )
    weights = getattr(network, "weights", ())
    further = [{**other, "weight": weight} for other, weight in zip(others, weights[1:], strict=True)]
    return {
        "teacher": {
            **{key: first[key] for key in first if key not in ("mean", "std")},
            **({"ensemble": further} if further else {}),
            "precision": _precision(config, experiment.processes.device),
            "fold_batch_norm": teacher.fold_batch_norm,
            "compile": teacher.compile,
        },
        "data": {
            "samples": hash_split(splits.train),
            "image_size": splits.image_size,
            "mean": list(mean),
            "std": list(std),
            **experiment.loader.pixels,
        },
        "views": {
            **_views(config.data.first_augmentation, splits),
            "version": AUGMENTATION_VERSION,
            "seed": config.run.seed,
        },
        "head": _head(config, network, experiment.method),
    }


def _network_key(config: Config, network: Any, splits: DataSplits) -> dict[str, Any]:
    """Return what the outputs of one network of a teacher are made from."""
    assert config.teacher is not None
    size = network_size(config, "teacher")
    mean, std = teacher_constants(config, splits)
    return {
        "model": config.teacher.model,
        **({"model_args": config.teacher.model_args} if config.teacher.model_args else {}),
        **({"image_size": size} if size != splits.image_size else {}),
        "weights": hash_tensors(network.plain.state_dict()),
        "mean": list(mean),
        "std": list(std),
    }


def _views(augmentation: Augmentation, splits: DataSplits) -> dict[str, Any]:
    """Return the settings that change a training view, without those of other kinds of crop."""
    views = asdict(augmentation)
    if augmentation.crop != "resized":
        del views["scale"], views["ratio"]
    if augmentation.crop != "pad":
        del views["padding"]
    del views["eval_resize"]
    if not any(augmentation.jitter):
        del views["jitter"]
    if augmentation.policy != "rand":
        del views["rand_ops"], views["rand_magnitude"]
    if augmentation.policy == "none":
        del views["policy"]
    if not augmentation.erase_probability:
        del views["erase_probability"], views["erase_scale"], views["erase_ratio"]
    if augmentation.crop != "resized" and splits.is_resized:
        # Cut from the view for evaluation.
        windows = Windows.of(splits, augmentation)
        views["short_side"] = windows.short_side
        if windows.squash:
            views["squash"] = True
    return views


def _precision(config: Config, device: torch.device) -> str:
    assert config.teacher is not None
    asked = config.teacher.precision
    resolved = resolve_precision(asked, device)
    if asked != "auto" or resolved == "fp32":
        return resolved
    overflow = ", or bf16 where it overflows" if resolved == "fp16" else ""
    return f"{resolved}{overflow}, or fp32 where it is not faithful"


def _head(config: Config, network: TeacherNetwork, method: Method) -> dict[str, Any] | None:
    if method.fixed_head is None:
        return None
    assert not isinstance(network, LogitsOnly)
    return {
        "levels": list(network.level_names),
        "initial_weights": hash_tensors(method.fixed_head.module.state_dict()),
        "batch_size": config.train.global_batch_size // config.train.accumulation_steps,
        **method.fixed_head.settings,
    }


_SHARDS_A_PROCESS = 4


class OutputCache:
    """The cache of one run, on one process.

    Args:
        folder: files of the cache.
        views: number of views of each sample that this run trains on; epoch e shows view e modulo this.
        network: teacher with its weights, to compute what is not stored yet. If None, it is built when needed.
        missing: number of shards that this run needs and that are not built.

    Attributes:
        record: what the run folder says about the teacher. If None, the cache is not ready.
    """

    def __init__(self, folder: CacheFolder, views: int, network: TeacherNetwork | None, missing: int) -> None:
        self.folder, self.views, self.network, self.missing = folder, views, network, missing
        self.record: dict[str, Any] | None = None

    def micro_batches(
        self, loader: Loader, device: torch.device, epoch: int, start_step: int = 0
    ) -> Iterator[tuple[Batch, Target]]:
        """Return a process's micro-batches of an epoch with their targets, read ahead.

        Raises:
            CacheError: a record is missing or damaged.
        """
        view = epoch % self.views
        stored = read_ahead(self.folder, loader.schedule.order(epoch, start_step), view, device=device)
        batches = loader.train(epoch, start_step, view_epoch=view)
        return ((batch, Target(*outputs)) for batch, outputs in zip(batches, stored, strict=True))

    def attachment(self, processes: Processes) -> Attachment | None:
        """Return what the builder stored for all records; all processes decide by what the first one finds."""
        there = processes.from_first(lambda: self.folder.attachment() is not None)
        return self.folder.attachment() if there else None

    def __str__(self) -> str:
        return f"teacher.cache.dir = {self.folder.path}"


def open_output_cache(experiment: "Experiment", network: TeacherNetwork) -> OutputCache:
    """Find or make the cache that ``config.teacher.cache`` describes, and compare what it was made from.

    Args:
        experiment: run; the head of its method is not fitted yet.
        network: teacher; with its weights on the first process, for its shapes alone on the others.

    Raises:
        ConfigError: the method needs more of the teacher than its outputs.
        CacheError: on all processes: the folder holds another cache (every difference is named), no cache in mode
            "read", or a damaged one.
    """
    config, processes, splits, method = experiment.config, experiment.processes, experiment.splits, experiment.method
    settings = _settings(config)
    refuse_uncacheable(method, network, splits)
    codec = codec_of(config, splits, method)
    views, path = settings.views or experiment.epochs, cache_dir(config)

    def open_first() -> None:
        key = CacheKey(outputs_key(experiment, network))
        try:
            if settings.mode == "read":
                CacheFolder.open(path)  # never makes one
            count = _records_per_shard(codec, len(splits.train) * views, processes)
            CacheFolder.create_or_open(path, key, codec, splits.train.sample_ids, views, count)
        except (CacheError, OSError) as error:
            raise CacheError(_explained(error, path, settings.mode)) from error

    processes.from_first(open_first)
    folder = CacheFolder.open(path)
    missing = processes.broadcast(len(folder.missing_shards(views)))
    return OutputCache(folder, views, network if processes.is_first else None, missing)


def _settings(config: Config) -> TeacherCache:
    assert config.teacher is not None
    return config.teacher.cache


def _cache(experiment: "Experiment") -> OutputCache:
    assert experiment.cache is not None
    return experiment.cache


def codec_of(config: Config, splits: DataSplits, method: Method) -> Codec:
    """Return how the outputs that a method needs are packed.

    Raises:
        ValueError: more logits are to be kept than there are classes.
    """
    assert config.teacher is not None
    settings = config.teacher.cache
    return Codec(settings.logits, splits.num_classes, settings.top_k, gaussian=method.fixed_head is not None)


def _records_per_shard(codec: Codec, records: int, processes: Processes) -> int:
    """Return the size of a shard, which one process builds: small caches are cut finer, so that all have work."""
    usual = default_records_per_shard(codec.record_bytes)
    return usual if processes.world_size == 1 else min(usual, -(-records // (_SHARDS_A_PROCESS * processes.world_size)))


def _explained(error: Exception, path: Path, mode: str) -> str:
    if mode == "read" and not path.exists():
        return (
            f"teacher.cache.dir = {path} does not exist, and teacher.cache.mode = 'read' builds none; run unikd cache "
            "build with this configuration, or use --set teacher.cache.mode=read_write"
        )
    return f"teacher.cache.dir = {path}: {error}; choose another folder with --set teacher.cache.dir=..."


def refuse_uncacheable(method: Method, network: nn.Module, splits: DataSplits) -> None:
    """Refuse a method that needs more of the teacher than its outputs.

    Raises:
        ConfigError: it does; names the size that storing the levels would take.
    """
    if method.uncacheable is None:
        return
    amount = ""
    if shapes := getattr(network, "level_shapes", ()):
        a_sample = 2 * sum(channels * height * width for channels, height, width in shapes)
        amount = f"; in half precision the levels are {size(a_sample * len(splits.train))} a view of all samples"
    raise ConfigError(
        f"the teacher's outputs cannot be cached: {method.uncacheable}{amount}; set teacher.cache.mode = 'off'"
    )


TeacherOutputs = tuple[Tensor, Gaussian | None]


def ready_cache(experiment: "Experiment", stop: StopSignal, name: str) -> None:
    """Build what is missing, compare a share of it with the teacher, and free the teacher.

    If the cache is finished and ``teacher.cache.recheck = 0``, no teacher is made.

    Args:
        experiment: run with a cache, whose `record` is set.
        name: label used in log messages.

    Raises:
        CacheError: on all processes: outputs are missing and may not be built, or differ from the teacher's.
        ConfigError: the teacher does not match the network it was made from, or an image cannot be read.
        Interrupted: SIGTERM or Ctrl-C while it was being built.
    """
    with as_config_errors():
        _ready(experiment, stop, name)


def _ready(experiment: "Experiment", stop: StopSignal, name: str) -> None:
    cache, processes, settings = _cache(experiment), experiment.processes, _settings(experiment.config)
    record: dict[str, Any] = {"cache": str(cache.folder.path), "views": cache.views, "built_shards": cache.missing}
    if cache.missing and settings.mode == "read":
        raise CacheError(
            f"{cache}: {cache.missing} of {cache.folder.info().shards} shards are not built, and teacher.cache.mode = "
            "'read' builds none; run unikd cache build with this configuration, or use --set "
            "teacher.cache.mode=read_write"
        )
    sizes = cache_sizes(cache.folder.path, cache.folder.codec, cache.folder.samples, cache.views)
    teacher = fill_cache(experiment, stop, name) if cache.missing else None
    attachment = cache.attachment(processes)
    assert attachment is not None
    _adopt_head(experiment, attachment)
    record["teacher"] = attachment.record

    def compare() -> dict[str, Any]:
        made = teacher or cached_teacher(experiment)
        found = recheck(experiment, made)
        plan = plan_cache(experiment, made, sizes)
        tqdm.write(f"[{name}] teacher cache: {plan.line()}", file=sys.stderr)
        return found._asdict()

    if settings.recheck > 0:
        record["recheck"] = processes.from_first(compare)
    cache.record = record
    cache.network = teacher = None
    gc.collect()
    if processes.device.type == "cuda":
        torch.cuda.empty_cache()


@oom_hint("teacher")
def fill_cache(experiment: "Experiment", stop: StopSignal, name: str) -> OnlineTeacher:
    """Build what is missing, on all processes of this run; other runs may build the same cache at the same time.

    Args:
        name: label used in log messages.

    Returns:
        The teacher that computed it.

    Raises:
        CacheError: the disk is full, or an output cannot be stored.
        ValueError: the teacher does not match the network it was made from (see `start_teacher`), or its accuracy is
            too low.
        Interrupted: SIGTERM or Ctrl-C; what is written is kept.
    """
    cache, config, processes = _cache(experiment), experiment.config, experiment.processes
    loader, method, batch_size = experiment.loader, experiment.method, _settings(config).batch_size
    processes.from_first(lambda: cache.folder.require_room(cache.views))
    known = cache.attachment(processes)
    teacher = start_teacher(
        config,
        _network(experiment),
        loader,
        processes,
        renormalise=teacher_affine(config, experiment.splits),
        precision=None if known is None else known.record["precision"],
        batch_size=batch_size,
    )
    if known is None:
        teacher.record[VALIDATION] = measure_teacher(experiment, teacher)
    asked = teacher.record if known is None else known.record
    if asked.get(VALIDATION) is not None:  # before the long pass over all views
        require_accuracy(config, asked[VALIDATION], experiment.splits.num_classes, processes, name)
    if known is None:
        prepare_method(method, loader, teacher, processes, stop, name)
        head = {} if method.fixed_head is None else method.fixed_head.module.state_dict()
        processes.from_first(lambda: bool(cache.folder.attach(head, teacher.record)))
        known = cache.folder.attachment()
        assert known is not None
        if known.record["precision"] != teacher.precision:
            raise CacheError(
                f"{cache}: teacher.precision = auto came to {teacher.precision} here, and to "
                f"{known.record['precision']} in another run that began this cache meanwhile; start this run again, "
                "which takes that one's"
            )
    _adopt_head(experiment, known)  # of another run, if that was faster

    def outputs(requests: Iterable[Any]) -> Iterator[TeacherOutputs]:
        return _one_ahead(_outputs(method, teacher, batch.images) for batch in loader.views(requests))

    with _progress(cache, processes, name) as bar:

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


def cached_teacher(experiment: "Experiment") -> OnlineTeacher:
    """Return the teacher that the cache was built with, run eagerly, on this process alone."""
    known = _cache(experiment).folder.attachment()
    assert known is not None  # the cache is built
    return make_teacher(
        experiment.config,
        _network(experiment),
        experiment.processes.device,
        precision=known.record["precision"],
        renormalise=teacher_affine(experiment.config, experiment.splits),
        batch_size=_settings(experiment.config).batch_size,
    )


def recheck(experiment: "Experiment", teacher: OnlineTeacher) -> Recheck:
    """Recompute a random share of the outputs and compare them, on this process alone.

    Raises:
        CacheError: an output is missing, damaged, or differs from the teacher's.
    """
    cache, settings = _cache(experiment), _settings(experiment.config)
    samples, size = cache.folder.samples, settings.batch_size
    available = cache.views * samples
    count = min(available, max(size, round(settings.recheck * available)))
    drawn = np.sort(np.random.default_rng().choice(available, count, replace=False))
    of_views = np.split(drawn, np.flatnonzero(np.diff(drawn // samples)) + 1)
    parts = [records[start : start + size] for records in of_views for start in range(0, len(records), size)]
    requests = ((records % samples, int(records[0]) // samples) for records in parts)
    differences: list[Tensor] = []
    for records, batch in zip(parts, experiment.loader.views(requests), strict=True):
        logits, gaussian = _outputs(experiment.method, teacher, batch.images)
        differences.append(output_differences(cache.folder.codec, cache.folder.read(records), logits, gaussian))
    views, positions = np.divmod(drawn, samples)
    ids = cache.folder.sample_ids[positions].tolist()
    return check_outputs(
        torch.cat(differences),
        precision=teacher.precision,
        device=experiment.processes.device,
        names=[f"sample {sample} in view {view}" for sample, view in zip(ids, views.tolist(), strict=True)],
        cache=str(cache),
    )


def _adopt_head(experiment: "Experiment", attachment: Attachment) -> None:
    """Give the method the head that the stored Gaussians come from."""
    if (head := experiment.method.fixed_head) is not None:
        device = experiment.processes.device
        head.adopt({name: value.to(device) for name, value in attachment.tensors.items()})


def _progress(cache: OutputCache, processes: Processes, name: str) -> Any:
    """Return a progress bar on the first process's terminal, which counts this process's share."""
    record_bytes = stored_bytes(cache.folder.codec.record_bytes)
    share = cache.folder.missing_bytes(cache.views) // record_bytes // processes.world_size
    hidden = not processes.is_first or not sys.stderr.isatty()
    return tqdm(total=share, desc=f"[{name}] teacher's outputs", unit="view", disable=hidden, leave=False)


def _network(experiment: "Experiment") -> TeacherNetwork:
    cache = _cache(experiment)
    network, cache.network = cache.network, None  # making a teacher changes it
    if network is None:
        network = build_teacher_network(experiment.config, experiment.splits, needs=experiment.method.needs)
    return network


@torch.no_grad()
def _outputs(method: Method, teacher: OnlineTeacher, images: Tensor) -> TeacherOutputs:
    target = method.target(teacher(images))
    assert isinstance(target.logits, Tensor)
    return target.logits, target.gaussian


def _one_ahead(outputs: Iterable[TeacherOutputs]) -> Iterator[TeacherOutputs]:
    """Request the next outputs before yielding the last: a GPU computes them while the host packs and writes."""
    last = None
    for current in outputs:
        if last is not None:
            yield last
        last = current
    if last is not None:
        yield last
