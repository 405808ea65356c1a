"""The teacher's outputs of a run on disk, and the micro-batches that are trained on with them."""

from collections.abc import Iterator
from pathlib import Path

from torch import nn

from unikd_fast.config import Config, ConfigError
from unikd_fast.config.load import cache_dir
from unikd_fast.data.loader import Loader
from unikd_fast.data.splits import DataSplits
from unikd_fast.engine.cache_key import outputs_key
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.units import size
from unikd_fast.errors import CacheError
from unikd_fast.methods import Method
from unikd_fast.models import FeatureExtractor, LogitsOnly
from unikd_fast.teacher.cache import Attachment, CacheFolder, CacheKey, Codec
from unikd_fast.teacher.cache.layout import default_records_per_shard
from unikd_fast.teacher.cached import read_ahead
from unikd_fast.values import Batch, Target

_SHARDS_A_PROCESS = 4


class OutputCache:
    """The cache of one run, on one process; made by `open_output_cache`, filled by `unikd_fast.engine.fill_cache`.

    Args:
        config: of the run.
        splits, loader, method: of the run.
        folder: the files.
        views: of each sample that this run trains on; epoch e shows view e modulo their number.
        network: the teacher with its weights on the first process, None on the others.

    Attributes:
        missing: number of shards that this run needs and that were not built when it was opened or filled last.
    """

    def __init__(
        self,
        config: Config,
        splits: DataSplits,
        loader: Loader,
        method: Method,
        processes: Processes,
        *,
        folder: CacheFolder,
        views: int,
        network: FeatureExtractor | LogitsOnly | None,
    ) -> None:
        assert config.teacher is not None
        self.config, self.splits, self.loader, self.method, self.processes = config, splits, loader, method, processes
        self.settings = config.teacher.cache
        self.folder, self.views, self.network = folder, views, network
        self.missing: int = processes.broadcast(len(folder.missing_shards(views)))

    def micro_batches(self, epoch: int, start_step: int = 0) -> Iterator[tuple[Batch, Target]]:
        """This process's micro-batches of an epoch with their targets, read ahead.

        Raises:
            CacheError: a record is missing or damaged.
        """
        view = epoch % self.views
        order = self.loader.schedule.order(epoch, start_step)
        stored = read_ahead(self.folder, order, view, device=self.processes.device)
        batches = self.loader.train(epoch, start_step, view_epoch=view)
        return ((batch, Target(*outputs)) for batch, outputs in zip(batches, stored, strict=True))

    def attachment(self) -> Attachment | None:
        """What the builder left for all records, as the first process finds it: all must decide alike."""
        there = self.processes.from_first(lambda: self.folder.attachment() is not None)
        return self.folder.attachment() if there else None

    def adopt_head(self, attachment: Attachment) -> None:
        """Gives the method the head that the stored Gaussians come from."""
        if self.method.fitted_head is not None:
            self.method.adopt_head(
                {name: value.to(self.processes.device) for name, value in attachment.tensors.items()}
            )

    def __str__(self) -> str:
        return f"teacher.cache.dir = {self.folder.path}"


def open_output_cache(
    config: Config,
    splits: DataSplits,
    loader: Loader,
    network: FeatureExtractor | LogitsOnly,
    method: Method,
    processes: Processes,
    *,
    epochs: int,
) -> OutputCache:
    """Finds or makes the cache that ``config.teacher.cache`` describes, and compares what it was made from.

    Args:
        network: the teacher; with its weights on the first process, for its shapes alone on the others.
        method: before its head is fitted.
        epochs: that the run trains, complete or begun.

    Raises:
        ConfigError: the method needs more of the teacher than its outputs.
        CacheError: on all processes: the folder holds another cache (every difference is named), none where one is to
            be read, or a damaged one.
    """
    assert config.teacher is not None
    settings = config.teacher.cache
    refuse_uncacheable(method, network, splits)
    codec = codec_of(config, splits, method)
    views, path = settings.views or epochs, cache_dir(config)

    def open_first() -> None:
        key = CacheKey(outputs_key(config, splits, loader, network, method, processes.device))
        try:
            if settings.mode == "read":
                CacheFolder.open(path)  # never makes one
            count = _records_per_shard(codec, len(splits.train) * views, processes)
            CacheFolder.create_or_open(path, key, codec, splits.train.sample_ids, views, count)
        except (CacheError, OSError) as error:
            raise CacheError(_explained(error, path, settings.mode)) from error

    processes.from_first(open_first)
    return OutputCache(
        config,
        splits,
        loader,
        method,
        processes,
        folder=CacheFolder.open(path),
        views=views,
        network=network if processes.is_first else None,
    )


def codec_of(config: Config, splits: DataSplits, method: Method) -> Codec:
    """How the outputs that a method needs are packed.

    Raises:
        ValueError: more logits are to be kept than there are classes.
    """
    assert config.teacher is not None
    settings = config.teacher.cache
    return Codec(settings.logits, splits.num_classes, settings.top_k, gaussian=method.fitted_head is not None)


def _records_per_shard(codec: Codec, records: int, processes: Processes) -> int:
    """A shard is built by one process: a small cache is cut finer where several build it, so that all have work."""
    usual = default_records_per_shard(codec.record_bytes)
    return usual if processes.world_size == 1 else min(usual, -(-records // (_SHARDS_A_PROCESS * processes.world_size)))


def _explained(error: Exception, path: Path, mode: str) -> str:
    if mode == "read" and not path.exists():
        return (
            f"teacher.cache.dir = {path} does not exist, and teacher.cache.mode = 'read' builds none; run unikd-cache "
            "build with this configuration, or use --set teacher.cache.mode=read_write"
        )
    return f"teacher.cache.dir = {path}: {error}; choose another folder with --set teacher.cache.dir=..."


def refuse_uncacheable(method: Method, network: nn.Module, splits: DataSplits) -> None:
    """Raises ConfigError, with the size that storing its levels would take, if a method needs more than outputs."""
    if method.uncacheable is None:
        return
    amount = ""
    if isinstance(network, FeatureExtractor) and network.level_shapes:
        a_sample = 2 * sum(channels * height * width for channels, height, width in network.level_shapes)
        amount = f"; in half precision the levels are {size(a_sample * len(splits.train))} a view of all samples"
    raise ConfigError(
        f"the teacher's outputs cannot be cached: {method.uncacheable}{amount}; set teacher.cache.mode = 'off'"
    )
