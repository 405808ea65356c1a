"""Loaders from keywords: settings of the data, and what the run adds."""

from dataclasses import fields, replace
from typing import Any

from unikd_fast.data import loader
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.loader import Loader
from unikd_fast.data.settings import DataSettings
from unikd_fast.data.splits import DataSplits

_OF_DATA = {field.name for field in fields(DataSettings)} - {"seed"}


def build_loader(
    splits: DataSplits,
    *,
    augmentation: Augmentation | None = None,
    second: Augmentation | None = None,
    kind: str = "auto",
    **options: Any,
) -> Loader:
    """Build a loader whose views are what the augmentations say, without a data set's usual recipe.

    Args:
        augmentation, second: the views; no second view if None.
        kind: `DataSettings.loader`.
        options: further settings of the data, and of the run.
    """
    data = {name: options.pop(name) for name in list(options) if name in _OF_DATA}
    settings: Any = {
        "name": "image_folder",
        "loader": kind,
        "augmentation": _literal(augmentation or Augmentation()),
        "second_view": None if second is None else _literal(second),
        **data,
    }
    return loader.build_loader(splits, DataSettings(**settings), second_view=second is not None, **options)


def _literal(given: Augmentation) -> Augmentation:
    return replace(
        given,
        crop=given.crop or "none",
        padding=given.padding or 0,
        flip_probability=given.flip_probability or 0.0,
    )
