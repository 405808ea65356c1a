"""Outputs as of a trained teacher, stored and computed again."""

import pytest
import torch
from torch import Tensor

from unikd_fast.teacher.cache import Codec
from unikd_fast.teacher.cache.outputs import Recheck, check_outputs, output_differences
from unikd_fast.values import Gaussian

ROWS, CLASSES, KEPT = 6, 200, 5
MANY = 4096  # rows, that what happens to one in a thousand is met
CODECS = [Codec("fp16", CLASSES), Codec("uint8", CLASSES), Codec("top_k", CLASSES, KEPT)]
WITH_GAUSSIAN = [Codec(codec.kind, CLASSES, codec.top_k, gaussian=True) for codec in CODECS]
PRECISIONS = ["fp32", "bf16", "fp16"]
by_kind = pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.kind)
by_kind_with_gaussian = pytest.mark.parametrize("codec", WITH_GAUSSIAN, ids=lambda codec: codec.kind)


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def outputs(classes: int = CLASSES) -> tuple[Tensor, Gaussian]:
    """Logits as of a trained teacher, one class above the rest, and a Gaussian."""
    logits = 2 * noise(ROWS, classes) + 1
    logits[torch.arange(ROWS), torch.arange(ROWS)] = 18.0
    return logits, Gaussian(noise(ROWS, classes, seed=1), 0.5 * noise(ROWS, classes, seed=2))


def differences(codec: Codec, stored: tuple[Tensor, Gaussian], again: tuple[Tensor, Gaussian]) -> Tensor:
    given, found = ((logits, gaussian if codec.gaussian else None) for logits, gaussian in (stored, again))
    return output_differences(codec, codec.encode(*given), *found)


def root_mean_square(values: Tensor) -> Tensor:
    return values.square().mean(-1).sqrt()


def check(found: Tensor, precision: str, device: str = "cpu") -> Recheck:
    names = [f"sample {7 * row}" for row in range(len(found))]
    return check_outputs(found, precision=precision, device=device, names=names, cache="caches/a")
