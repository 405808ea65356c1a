"""The data set and the loader that the configuration describes."""

from collections.abc import Iterator
from contextlib import contextmanager

from unikd_fast.config import Config, ConfigError
from unikd_fast.data.augmentation import Augmentation, Crop
from unikd_fast.data.datasets import DataSplits, open_data
from unikd_fast.data.loader import Loader, build_loader
from unikd_fast.engine.processes import Processes

CROP: dict[str, Crop] = {
    "digits": "pad",
    "cifar100": "pad",
    "synthetic": "none",
    "image_folder": "resized",
    "imagenet": "resized",
}
PADDING = {"digits": 1, "cifar100": 4}
FLIP = {"digits": 0.0}  # a mirrored 2 is no digit


@contextmanager
def refusing_misfits() -> Iterator[None]:
    """Turns what the lower layers say about data, weights and models that do not fit into a ConfigError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise error if isinstance(error, ConfigError) else ConfigError(str(error)) from error


def build_data(config: Config) -> DataSplits:
    """Opens the data set."""
    data = config.data
    return open_data(
        data.name,
        root=data.root,
        image_size=data.image_size,
        num_classes=data.num_classes,
        train_samples=data.train_samples,
        val_samples=data.val_samples,
        synthetic_samples=data.synthetic_samples,
        seed=data.seed,
    )


def augmentation_of(config: Config) -> Augmentation:
    """The views to train on; what the configuration leaves open is the data set's usual recipe."""
    data, given = config.data, config.data.augmentation
    return Augmentation(
        crop=given.crop or CROP[data.name],
        padding=given.padding if given.padding is not None else PADDING.get(data.name, 0),
        scale=given.scale,
        ratio=given.ratio,
        flip_probability=given.flip_probability if given.flip_probability is not None else FLIP.get(data.name, 0.5),
        eval_resize=given.eval_resize,
    )


def build_data_loader(config: Config, splits: DataSplits, processes: Processes) -> Loader:
    """This process's loader."""
    return build_loader(
        splits,
        augmentation=augmentation_of(config),
        kind=config.data.loader,
        seed=config.run.seed,
        global_batch_size=config.train.global_batch_size,
        accumulation_steps=config.train.accumulation_steps,
        rank=processes.rank,
        world_size=processes.world_size,
        device=processes.device,
        workers=config.data.workers,
        channels_last=config.train.channels_last,
    )
