"""Stored outputs against outputs computed again: what is rounding, and how much of it is explained."""

import numpy as np
import pytest
import torch
from torch import Tensor

from support.recheck_inputs import (
    CLASSES,
    KEPT,
    MANY,
    PRECISIONS,
    ROWS,
    by_kind,
    by_kind_with_gaussian,
    check,
    differences,
    noise,
    outputs,
    root_mean_square,
)
from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import Codec
from unikd_fast.teacher.cache.outputs import output_differences
from unikd_fast.values import Gaussian, TopKLogits


@by_kind_with_gaussian
def test_bf16_rounding_is_accepted_in_bf16_only(codec: Codec) -> None:
    """Every number as in bf16, half a unit off at random: 2^-8 of its size."""
    logits, (mean, log_var) = outputs()
    shaken = [value + 2.0**-8 * value * noise(*value.shape, seed=3 + i) for i, value in enumerate((logits, mean))]
    again = shaken[0], Gaussian(shaken[1], log_var + 2.0**-8 * noise(*log_var.shape, seed=5))
    found = differences(codec, (logits, Gaussian(mean, log_var)), again)
    # Of top_k, the error of the largest logit, 0.07 and more, is one of each log-probability that is kept: 0.03 of 2.4.
    assert 1e-3 < float(found.min()) < float(found.max()) < (0.06 if codec.kind == "top_k" else 0.02)
    assert check(found, "bf16").worst == float(found.max())
    if codec.kind != "uint8":  # whose own levels are as coarse
        with pytest.raises(CacheError, match="6 of 6 recomputed outputs"):
            check(found, "fp32")


@by_kind_with_gaussian
def test_fp32_noise_across_a_rounding_boundary_is_accepted(codec: Codec) -> None:
    """Numbers that all lie on the edge between two of fp16, or between two levels, and fall to either side."""
    below = torch.arange(ROWS * CLASSES).reshape(ROWS, CLASSES) % 37 * 0.25 + 1
    edges = below + torch.from_numpy(np.spacing(below.half().numpy())).float() / 2
    lower, upper = edges * (1 - 2.0**-20), edges * (1 + 2.0**-20)
    assert bool((lower.half() < upper.half()).all())
    stored, again = (codec.encode(rows, Gaussian(rows, rows)) for rows in (lower, upper))
    assert bool((stored != again).any(1).all())
    check(differences(codec, (lower, Gaussian(lower, lower)), (upper, Gaussian(upper, upper))), "fp32")


@by_kind
def test_the_largest_logit_may_cross_a_rounding_boundary(codec: Codec) -> None:
    """It moves every stored log-probability by a unit of its own, 2^-6 at 18; the other logits have finer ones."""
    logits, gaussian = outputs()
    lower, upper = logits.clone(), logits.clone()
    row = torch.arange(ROWS)
    lower[row, row], upper[row, row] = (18.0 + 2.0**-7) * (1 - 2.0**-20), (18.0 + 2.0**-7) * (1 + 2.0**-20)
    assert bool((upper.half() - lower.half() == 2.0**-6).any(1).all())
    for stored, again in ((lower, upper), (upper, lower)):
        found = differences(codec, (stored, gaussian), (again, gaussian))
        assert float(found.max()) < 1e-4
        check(found, "fp32")


@by_kind
@pytest.mark.parametrize("classes", [10, 100])
def test_a_sharp_fp32_teacher_is_accepted(codec: Codec, classes: int) -> None:
    """One logit far above the rest, and the noise of fp32, sixteen of its units: of so many rows some cross an edge."""
    codec = Codec(codec.kind, classes, codec.top_k)
    logits = 2 * noise(MANY, classes)
    logits[:, 0] += 18.0
    again = logits * (1 + 2.0**-20 * noise(MANY, classes, seed=1))
    stored, computed = codec.encode(logits), codec.encode(again)
    assert 10 < (stored != computed).any(1).sum() < MANY
    check(output_differences(codec, stored, again), "fp32")


@by_kind
@pytest.mark.parametrize("deviations", [10, 20])
def test_a_shared_offset_of_logits_is_accepted(codec: Codec, deviations: int) -> None:
    """It makes fp16 coarse against the logits' differences; another sample's record is seen none the less."""
    codec = Codec(codec.kind, 10, codec.top_k)
    logits = noise(MANY, 10) + deviations
    again = logits * (1 + 2.0**-23 * noise(MANY, 10, seed=1))
    stored, computed = codec.encode(logits), codec.encode(again)
    assert bool((stored != computed).any())
    check(output_differences(codec, stored, again), "fp32")
    for precision in PRECISIONS:
        with pytest.raises(CacheError, match=rf"{MANY} of {MANY} recomputed outputs"):
            check(output_differences(codec, stored, again.roll(1, 0)), precision)


def test_a_log_variance_may_cross_a_rounding_boundary() -> None:
    """The unit at 5 is 2^-8, more than fp32 explains of ten numbers."""
    codec = Codec("fp16", 10, gaussian=True)
    logits, mean, log_var = (noise(2, 10, seed=seed) for seed in range(3))
    lower, upper = log_var.clone(), log_var.clone()
    lower[:, 3], upper[:, 3] = 5.0 + 2.0**-9 - 2.0**-20, 5.0 + 2.0**-9 + 2.0**-20
    assert (upper.half() - lower.half())[:, 3].tolist() == [2.0**-8] * 2
    assert 2.0**-8 / 10**0.5 > 2.0**-10
    found = differences(codec, (logits, Gaussian(mean, lower)), (logits, Gaussian(mean, upper)))
    assert found.tolist() == [0.0, 0.0]
    check(found, "fp32")


@by_kind_with_gaussian
@pytest.mark.parametrize("part", ["logits", "mean", "log_var"])
def test_only_differences_beyond_one_unit_count(codec: Codec, part: str) -> None:
    """2^-6 at 16 in fp16, and a level of uint8; one number changes, against all or, of top_k, those that are kept."""
    logits, gaussian = outputs()
    values = {"logits": logits.clamp(-6, 12), **gaussian._asdict()}
    for value in values.values():
        value[:, :3] = torch.tensor([24.0, 16.0, -6.0])
    unit = 30 / 255 if (codec.kind, part) == ("uint8", "logits") else 2.0**-6

    def changed(units: float) -> Tensor:
        again = {name: value.clone() for name, value in values.items()}
        again[part][:, 1] += units * unit
        logits, *of_gaussian = values.values()
        new_logits, *new_gaussian = again.values()
        return differences(codec, (logits, Gaussian(*of_gaussian)), (new_logits, Gaussian(*new_gaussian)))

    exact = values[part].double()
    sizes = {"logits": exact.std(1, correction=0), "mean": root_mean_square(exact), "log_var": torch.ones(ROWS)}
    assert float(changed(1).max()) < 1e-4
    # Of a log-probability, a unit of the log-sum-exp may be free as well, which is that of the largest logit.
    units, numbers = (61, KEPT) if (codec.kind, part) == ("top_k", "logits") else (3, CLASSES)
    expected = (units - 1) * unit / numbers**0.5 / sizes[part].double()
    assert changed(units).tolist() == pytest.approx(expected.tolist(), rel=0.04)


def test_the_choice_among_equal_logits_does_not_matter() -> None:
    codec = Codec("top_k", CLASSES, KEPT)
    logits, gaussian = outputs()
    logits[:, 100 : 100 + KEPT - 2] = 12.0
    first, second = 150, 151
    logits[:, [first, second]] = 11.0
    again = logits.clone()
    logits[:, first] += 2.0**-7  # one unit of fp16
    again[:, second] += 2.0**-7
    stored, computed = (codec.decode(codec.encode(rows))[0] for rows in (logits, again))
    assert isinstance(stored, TopKLogits) and isinstance(computed, TopKLogits)
    assert stored.indices[:, -1].tolist() == [first] * ROWS and computed.indices[:, -1].tolist() == [second] * ROWS
    found = differences(codec, (logits, gaussian), (again, gaussian))
    assert found.tolist() == [0.0] * ROWS
    check(found, "fp32")
