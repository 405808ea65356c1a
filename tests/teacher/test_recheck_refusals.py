"""What a recheck refuses, what it says then, and its bounds for many classes."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from support.cache_inputs import KEY
from support.recheck_inputs import (
    CLASSES,
    PRECISIONS,
    ROWS,
    WITH_GAUSSIAN,
    by_kind,
    check,
    differences,
    outputs,
)
from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import CacheFolder, Codec
from unikd_fast.teacher.cache.outputs import Recheck, check_outputs, output_differences
from unikd_fast.values import Gaussian, QuantizedLogits, TopKLogits

IMAGENET_21K = 21841


@by_kind
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_non_finite_teacher_is_refused(codec: Codec, bad: float) -> None:
    logits, gaussian = outputs()
    again = logits.clone()
    again[1, 1] = bad
    with pytest.raises(CacheError, match=r"logits are inf or NaN \(the first in row 1\)"):
        differences(codec, (logits, gaussian), (again, gaussian))


def test_a_non_finite_gaussian_is_refused() -> None:
    codec = WITH_GAUSSIAN[0]
    logits, gaussian = outputs()
    for name in Gaussian._fields:
        again = getattr(gaussian, name).clone()
        again[5, 0] = torch.nan
        with pytest.raises(CacheError, match=rf"{name} are inf or NaN \(the first in row 5\)"):
            differences(codec, (logits, gaussian), (logits, gaussian._replace(**{name: again})))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("part", range(3), ids=["logits", "mean", "log_var"])
def test_a_non_finite_record_is_refused(part: int, bad: float) -> None:
    codec = WITH_GAUSSIAN[0]
    logits, gaussian = outputs()
    records = codec.encode(logits, gaussian)
    halves: NDArray[Any] = records.view(np.float16)
    halves[4, part * CLASSES] = bad
    found = output_differences(codec, records, logits, gaussian)
    assert [bool(row) for row in found.isfinite()] == [True, True, True, True, False, True]
    with pytest.raises(CacheError, match=r"1 of 6 recomputed outputs differ, sample 28 by (nan|inf)"):
        check(found, "bf16")


def test_the_error_names_cache_view_values_and_remedy() -> None:
    found = torch.tensor([0.0, 0.01, 0.5, torch.nan])
    with pytest.raises(CacheError) as caught:
        check_outputs(
            found,
            precision="bf16",
            device="cpu",
            names=["sample 3 in view 0", "sample 5 in view 0", "sample 1 in view 2", "sample 2 in view 2"],
            cache="teacher.cache.dir = caches/a",
        )
    assert str(caught.value).startswith(
        "teacher.cache.dir = caches/a does not match the teacher: 2 of 4 recomputed outputs differ, "
        "sample 1 in view 2 by 0.5 of its size, and rounding explains at most 0.12; "
    )
    assert re.search(r"delete the folder and build .*--set teacher\.cache\.dir=", str(caught.value))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("precision", "device", "units"),
    [("fp32", "cpu", 2.0**-15), ("fp32", "cuda", 2.0**-11), ("bf16", "cuda", 2.0**-8), ("fp16", "cpu", 2.0**-11)],
)
def test_the_bound_depends_on_the_precision(precision: str, device: str, units: float) -> None:
    bound = 32 * units
    at_the_bound = torch.tensor([0.0, bound], dtype=torch.float64)
    assert check(at_the_bound, precision, device) == Recheck(2, bound, bound)
    with pytest.raises(CacheError, match="1 of 2 recomputed outputs differ, sample 7 by"):
        check(at_the_bound * (1 + 1e-12), precision, device)


@pytest.mark.parametrize("kind", ["fp16", "uint8", "top_k"])
def test_recheck_with_imagenet_21k_classes(tmp_path: Path, kind: str) -> None:
    codec = Codec(kind, IMAGENET_21K, 10 if kind == "top_k" else None, gaussian=True)
    logits, gaussian = outputs(IMAGENET_21K)
    logits[:, IMAGENET_21K - 1] = 17.0  # an index beyond int16
    folder = CacheFolder.create_or_open(tmp_path, KEY, codec, np.arange(ROWS), 1)
    with folder.claim(0) as writer:  # type: ignore[union-attr]
        writer.write(writer.todo, codec.encode(logits, gaussian))
        writer.commit()
    order = [3, 0, 5, 1, 4, 2]
    records = CacheFolder.open(tmp_path).read(folder.records(order, view=0))
    stored, _ = codec.decode(records)
    if isinstance(stored, TopKLogits):
        assert stored.indices[:, 1].tolist() == [IMAGENET_21K - 1] * ROWS
    taken = logits[order], Gaussian(*(value[order] for value in gaussian))
    assert check(output_differences(codec, records, *taken), "fp32")[:2] == (ROWS, 0.0)
    other = output_differences(codec, records, taken[0].roll(1, 0), taken[1])
    for precision in PRECISIONS:
        with pytest.raises(CacheError, match="6 of 6 recomputed outputs"):
            check(other, precision)


@pytest.mark.parametrize("top_k", [1, 10])
def test_a_few_of_many_logits_identify_another_sample(top_k: int) -> None:
    """Of 21,841, where the size of the whole row says nothing of those that are kept."""
    codec = Codec("top_k", IMAGENET_21K, top_k)
    logits, _ = outputs(IMAGENET_21K)
    assert check(output_differences(codec, codec.encode(logits), logits), "fp32").worst == 0.0
    found = output_differences(codec, codec.encode(logits.roll(1, 0)), logits)
    for precision in PRECISIONS:
        with pytest.raises(CacheError, match="6 of 6 recomputed outputs"):
            check(found, precision)


def test_logits_beyond_fp16_are_compared_as_uint8() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [70000.0, -3.0, 5.0]])
    for codec in (Codec("fp16", 3), Codec("top_k", 3, 2)):
        with pytest.raises(
            CacheError, match=r"logits reach 70000 \(the first in row 1\), fp16 ends at 65504; store them as uint8"
        ):
            codec.encode(logits)
    codec = Codec("uint8", 3)
    records = codec.encode(logits)
    stored, _ = codec.decode(records)
    assert isinstance(stored, QuantizedLogits)
    back = stored.values.float() * stored.scale[:, None] + stored.offset[:, None]
    assert torch.allclose(back, logits, rtol=0, atol=70003 / 510)  # half a level of 255
    assert check(output_differences(codec, records, logits), "fp32")[:2] == (2, 0.0)
