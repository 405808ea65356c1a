"""The data set and the loader that the configuration describes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from unikd_fast.config import Config, ConfigError
from unikd_fast.config.schema import AugmentationConfig
from unikd_fast.data.augmentation import Augmentation, Crop
from unikd_fast.data.datasets import DataSplits, TensorImages, open_data
from unikd_fast.data.loader import Loader, build_loader
from unikd_fast.data.mixing import MixedLoader, Mixing
from unikd_fast.engine.inputs import follow, followed_preprocessing
from unikd_fast.engine.processes import Processes
from unikd_fast.errors import RunError

CROP: dict[str, Crop] = {
    "digits": "pad",
    "cifar100": "pad",
    "synthetic": "none",
    "fine_grained": "none",
    "image_folder": "resized",
    "imagenet": "resized",
    "packed": "resized",
    "webdataset": "resized",
}
PADDING = {"digits": 1, "cifar100": 4}
FLIP = {"digits": 0.0, "fine_grained": 0.0}  # a mirrored 2 is no digit


@contextmanager
def refusing_misfits() -> Iterator[None]:
    """Turns what the lower layers say about data, weights and models that do not fit into a ConfigError."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise error if isinstance(error, RunError) else ConfigError(str(error)) from error


def build_data(config: Config, processes: Processes) -> DataSplits:
    """Opens the data set; images of files are made as the networks' weights ask for. All processes must call it."""
    data = config.data
    splits = open_data(
        data.name,
        root=data.root,
        image_size=data.image_size,
        num_classes=data.num_classes,
        train_samples=data.train_samples,
        val_samples=data.val_samples,
        synthetic_samples=data.synthetic_samples,
        seed=data.seed,
    )
    if isinstance(splits.train, TensorImages):
        return splits
    # Of the first process: where outputs are cached, others may not have the teacher's file.
    return follow(splits, processes.from_first(lambda: followed_preprocessing(config)))


def augmentation_of(config: Config, section: AugmentationConfig | None = None) -> Augmentation:
    """The views to train on; what the configuration leaves open is the data set's usual recipe.

    Args:
        section: None for the first view's.
    """
    data, given = config.data, section or config.data.augmentation
    return Augmentation(
        crop=given.crop or CROP[data.name],
        padding=given.padding if given.padding is not None else PADDING.get(data.name, 0),
        scale=given.scale,
        ratio=given.ratio,
        flip_probability=given.flip_probability if given.flip_probability is not None else FLIP.get(data.name, 0.5),
        eval_resize=given.eval_resize,
        jitter=given.jitter,
        policy=given.policy,
        rand_ops=given.rand_ops,
        rand_magnitude=given.rand_magnitude,
        erase_probability=given.erase_probability,
        erase_scale=given.erase_scale,
        erase_ratio=given.erase_ratio,
    )


def second_augmentation_of(config: Config) -> Augmentation:
    """The second views of a method that compares two: the first's crop and flip, then RandAugment and cutout."""
    given = config.data.second_view
    if given is not None:
        return augmentation_of(config, given)
    return replace(
        augmentation_of(config),
        policy="rand",
        rand_ops=2,
        rand_magnitude=10,
        erase_probability=1.0,
        erase_scale=(0.25, 0.25),
        erase_ratio=(1.0, 1.0),
    )


def build_data_loader(config: Config, splits: DataSplits, processes: Processes, *, second_view: bool = False) -> Loader:
    """This process's loader; with ``second_view`` of two views of each training sample."""
    loader = build_loader(
        splits,
        augmentation=augmentation_of(config),
        second=second_augmentation_of(config) if second_view else None,
        kind=config.data.loader,
        seed=config.run.seed,
        global_batch_size=config.train.global_batch_size,
        accumulation_steps=config.train.accumulation_steps,
        rank=processes.rank,
        world_size=processes.world_size,
        device=processes.device,
        workers=config.data.workers,
        dali_threads=config.data.dali_threads,
        dali_prefetch=config.data.dali_prefetch,
        channels_last=config.train.channels_last,
        bad_images=config.data.bad_images,
        max_bad_share=config.data.max_bad_share,
    )
    mixing = Mixing(**config.data.mixing.model_dump())
    if not mixing.is_on:
        return loader
    return MixedLoader(
        loader,
        mixing,
        splits.num_classes,
        seed=config.run.seed,
        accumulation_steps=config.train.accumulation_steps,
        rank=processes.rank,
        world_size=processes.world_size,
    )
