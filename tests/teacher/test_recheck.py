"""Stored outputs against outputs computed again: what is rounding, and what is another teacher."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_inputs import KEY
from numpy.typing import NDArray
from torch import Tensor

from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import CacheFolder, Codec
from unikd_fast.teacher.recheck import Recheck, check_outputs, output_differences
from unikd_fast.values import Gaussian, QuantizedLogits, TopKLogits

ROWS, CLASSES, KEPT = 6, 200, 5
MANY = 4096  # rows, that what happens to one in a thousand is met
CODECS = [Codec("fp16", CLASSES), Codec("uint8", CLASSES), Codec("top_k", CLASSES, KEPT)]
WITH_GAUSSIAN = [Codec(codec.kind, CLASSES, codec.top_k, gaussian=True) for codec in CODECS]
PRECISIONS = ["fp32", "bf16", "fp16"]
IMAGENET_21K = 21841

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "codec", [*CODECS, *WITH_GAUSSIAN], ids=lambda codec: codec.kind + "+gaussian" * codec.gaussian
)
def test_what_is_stored_of_an_output_does_not_differ_from_it(codec: Codec, dtype: torch.dtype) -> None:
    logits, gaussian = outputs()
    same = logits.to(dtype), gaussian
    found = differences(codec, same, same)
    assert found.dtype == torch.float64 and found.tolist() == [0.0] * ROWS
    assert check(found, "fp32")[:2] == (ROWS, 0.0)


@by_kind
def test_a_changed_logit_is_seen_by_its_size(codec: Codec) -> None:
    logits, gaussian = outputs()
    changed = logits.clone()
    changed[2, 2] -= 7.0  # the largest, which every codec keeps
    found = differences(codec, (logits, gaussian), (changed, gaussian))
    old, new = logits[2].double(), changed[2].double()
    if codec.kind == "top_k":
        # Of five log-probabilities one stays at nearly 0, the others change by nearly 7; each counts as one of five.
        kept = old.half().topk(KEPT).indices
        change = (old.log_softmax(0) - new.log_softmax(0))[kept]
    else:
        change = (old - old.mean()) - (new - new.mean())
    # Of uint8, the change moves the row's range: half a level of both, 0.03 and 0.05, in every class of 200.
    expected = float(root_mean_square(change) / root_mean_square(new - new.mean()))
    assert float(found[2]) == pytest.approx(expected, rel=0.02)
    assert found[torch.arange(ROWS) != 2].tolist() == [0.0] * (ROWS - 1)
    for precision in PRECISIONS:
        with pytest.raises(CacheError, match="1 of 6 outputs computed again differ, sample 14 by"):
            check(found, precision)


@pytest.mark.parametrize(
    ("top_k", "changed", "by"), [(1, 0, -12.0), (5, 0, -2.0), (5, 3, -2.0), (5, 4, 4.0), (20, 3, -2.0)]
)
def test_of_top_k_a_changed_logit_counts_as_one_of_those_kept(top_k: int, changed: int, by: float) -> None:
    """Not as one of all 200 classes, whose size it is measured against."""
    codec = Codec("top_k", CLASSES, top_k)
    logits = noise(ROWS, CLASSES)
    logits[:, :20] = 9.0 + torch.arange(20) / 8
    logits[:, 40] = 20.0
    classes = [40, *range(19, 0, -1)][:top_k]
    again = logits.clone()
    again[2, classes[changed]] += by
    found = output_differences(codec, codec.encode(logits), again)
    exact = again[2].double()
    change = (logits[2].double().log_softmax(0) - exact.log_softmax(0))[classes]
    if changed:  # the largest keeps nearly all probability
        assert float(root_mean_square(change)) == pytest.approx(abs(by) / top_k**0.5, rel=0.01)
    expected = float(root_mean_square(change) / exact.std(correction=0))
    assert float(found[2]) == pytest.approx(expected, rel=0.02)  # less units of 2^-6 at 20 and 2^-7 at 11
    assert found.count_nonzero() == 1


@by_kind_with_gaussian
def test_a_changed_mean_is_seen_by_its_size(codec: Codec) -> None:
    logits, (mean, log_var) = outputs()
    changed = mean.clone()
    changed[3, 150] += 4.0
    found = differences(codec, (logits, Gaussian(mean, log_var)), (logits, Gaussian(changed, log_var)))
    assert float(found[3]) == pytest.approx(4.0 / float(changed[3].norm()), rel=1e-3)  # fp16 holds 11 bits
    assert found.count_nonzero() == 1


@by_kind_with_gaussian
def test_a_changed_log_variance_is_seen_by_its_root_mean_square(codec: Codec) -> None:
    logits, (mean, log_var) = outputs()
    changed = log_var.clone()
    changed[4, 0] += 3.0
    found = differences(codec, (logits, Gaussian(mean, log_var)), (logits, Gaussian(mean, changed)))
    assert float(found[4]) == pytest.approx(3.0 / CLASSES**0.5, rel=1e-3)  # fp16 holds 11 bits
    assert found.count_nonzero() == 1


@by_kind
@pytest.mark.parametrize("precision", PRECISIONS)
def test_another_samples_record_is_no_rounding(codec: Codec, precision: str) -> None:
    logits, gaussian = outputs()
    found = differences(codec, (logits.roll(1, 0), gaussian), (logits, gaussian))
    with pytest.raises(CacheError, match="6 of 6 outputs"):
        check(found, precision)


def test_another_samples_gaussian_is_no_rounding() -> None:
    """With the right logits beside it."""
    codec = WITH_GAUSSIAN[0]
    logits, (mean, log_var) = outputs()
    for other in (Gaussian(mean.roll(1, 0), log_var), Gaussian(mean, log_var.roll(1, 0))):
        found = differences(codec, (logits, other), (logits, Gaussian(mean, log_var)))
        with pytest.raises(CacheError, match="6 of 6 outputs"):
            check(found, "bf16")


@by_kind_with_gaussian
def test_the_rounding_of_bf16_is_explained_in_bf16_alone(codec: Codec) -> None:
    """Every number as in bf16, half a unit off at random: 2^-8 of its size."""
    logits, (mean, log_var) = outputs()
    shaken = [value + 2.0**-8 * value * noise(*value.shape, seed=3 + i) for i, value in enumerate((logits, mean))]
    again = shaken[0], Gaussian(shaken[1], log_var + 2.0**-8 * noise(*log_var.shape, seed=5))
    found = differences(codec, (logits, Gaussian(mean, log_var)), again)
    # Of top_k, the error of the largest logit, 0.07 and more, is one of each log-probability that is kept: 0.03 of 2.4.
    assert 1e-3 < float(found.min()) < float(found.max()) < (0.06 if codec.kind == "top_k" else 0.02)
    assert check(found, "bf16").worst == float(found.max())
    if codec.kind != "uint8":  # whose own levels are as coarse
        with pytest.raises(CacheError, match="6 of 6 outputs"):
            check(found, "fp32")


@by_kind_with_gaussian
def test_the_last_bits_of_fp32_are_explained_where_they_cross_a_rounding(codec: Codec) -> None:
    """Numbers that all lie on the edge between two of fp16, or between two levels, and fall to either side."""
    below = torch.arange(ROWS * CLASSES).reshape(ROWS, CLASSES) % 37 * 0.25 + 1
    edges = below + torch.from_numpy(np.spacing(below.half().numpy())).float() / 2
    lower, upper = edges * (1 - 2.0**-20), edges * (1 + 2.0**-20)
    assert bool((lower.half() < upper.half()).all())
    stored, again = (codec.encode(rows, Gaussian(rows, rows)) for rows in (lower, upper))
    assert bool((stored != again).any(1).all())
    check(differences(codec, (lower, Gaussian(lower, lower)), (upper, Gaussian(upper, upper))), "fp32")


@by_kind
def test_the_largest_logit_may_cross_a_rounding_alone(codec: Codec) -> None:
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
def test_a_sharp_teacher_in_fp32_is_not_refused(codec: Codec, classes: int) -> None:
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
def test_an_offset_that_all_logits_share_is_no_reason_to_refuse(codec: Codec, deviations: int) -> None:
    """It makes fp16 coarse against the logits' differences; another sample's record is seen none the less."""
    codec = Codec(codec.kind, 10, codec.top_k)
    logits = noise(MANY, 10) + deviations
    again = logits * (1 + 2.0**-23 * noise(MANY, 10, seed=1))
    stored, computed = codec.encode(logits), codec.encode(again)
    assert bool((stored != computed).any())
    check(output_differences(codec, stored, again), "fp32")
    for precision in PRECISIONS:
        with pytest.raises(CacheError, match=rf"{MANY} of {MANY} outputs"):
            check(output_differences(codec, stored, again.roll(1, 0)), precision)


def test_a_log_variance_may_cross_a_rounding() -> None:
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
def test_a_unit_of_a_number_is_free_and_what_is_beyond_counts(codec: Codec, part: str) -> None:
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


def test_which_of_two_equal_logits_is_kept_does_not_matter() -> None:
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


def test_classes_that_are_not_the_largest_do_matter() -> None:
    """The right numbers under the wrong classes."""
    codec = Codec("top_k", CLASSES, KEPT)
    logits, _ = outputs()
    found = output_differences(codec, codec.encode(logits.roll(1, 1)), logits)
    with pytest.raises(CacheError, match="6 of 6 outputs"):
        check(found, "bf16")


@by_kind
def test_a_constant_on_all_logits_of_a_row_does_not_count(codec: Codec) -> None:
    logits, gaussian = outputs()
    logits = (logits * 16).round() / 16  # so that 8 more is exact in fp16
    shifted = logits + torch.tensor([8.0, -8.0, 1.0, 0.5, -4.0, 2.0])[:, None]
    found = differences(codec, (logits, gaussian), (shifted, gaussian))
    assert float(found.max()) < 1e-6  # of fp32: the log-sum-exp, and scale and offset of uint8


def test_rows_without_a_size_are_equal_or_not() -> None:
    codec = Codec("fp16", 4)
    records, flat = codec.encode(torch.full((2, 4), 3.0)), torch.full((2, 4), 5.0)
    assert output_differences(codec, records, flat).tolist() == [0.0, 0.0]
    other = torch.tensor([[3.0, 3.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0]])
    found = output_differences(codec, codec.encode(other), flat)
    assert float(found[0]) > 1e100 and float(found[1]) == 0.0


@by_kind
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_a_teacher_that_is_not_finite_now_is_refused(codec: Codec, bad: float) -> None:
    logits, gaussian = outputs()
    again = logits.clone()
    again[1, 1] = bad
    with pytest.raises(CacheError, match=r"logits are inf or NaN \(the first in row 1\)"):
        differences(codec, (logits, gaussian), (again, gaussian))


def test_a_gaussian_that_is_not_finite_now_is_refused() -> None:
    codec = WITH_GAUSSIAN[0]
    logits, gaussian = outputs()
    for name in Gaussian._fields:
        again = getattr(gaussian, name).clone()
        again[5, 0] = torch.nan
        with pytest.raises(CacheError, match=rf"{name} are inf or NaN \(the first in row 5\)"):
            differences(codec, (logits, gaussian), (logits, gaussian._replace(**{name: again})))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("part", range(3), ids=["logits", "mean", "log_var"])
def test_a_record_that_is_not_finite_is_refused(part: int, bad: float) -> None:
    codec = WITH_GAUSSIAN[0]
    logits, gaussian = outputs()
    records = codec.encode(logits, gaussian)
    halves: NDArray[Any] = records.view(np.float16)
    halves[4, part * CLASSES] = bad
    found = output_differences(codec, records, logits, gaussian)
    assert [bool(row) for row in found.isfinite()] == [True, True, True, True, False, True]
    with pytest.raises(CacheError, match=r"1 of 6 outputs computed again differ, sample 28 by (nan|inf)"):
        check(found, "bf16")


def test_the_message_names_cache_view_both_values_and_the_remedy() -> None:
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
        "teacher.cache.dir = caches/a does not hold what the teacher says: 2 of 4 outputs computed again differ, "
        "sample 1 in view 2 by 0.5 of its size, and rounding explains at most 0.12; "
    )
    assert re.search(r"delete the folder and build .*--set teacher\.cache\.dir=", str(caught.value))
    assert caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("precision", "device", "units"),
    [("fp32", "cpu", 2.0**-15), ("fp32", "cuda", 2.0**-11), ("bf16", "cuda", 2.0**-8), ("fp16", "cpu", 2.0**-11)],
)
def test_the_bound_is_of_the_precision(precision: str, device: str, units: float) -> None:
    bound = 32 * units
    at_the_bound = torch.tensor([0.0, bound], dtype=torch.float64)
    assert check(at_the_bound, precision, device) == Recheck(2, bound, bound)
    with pytest.raises(CacheError, match="1 of 2 outputs computed again differ, sample 7 by"):
        check(at_the_bound * (1 + 1e-12), precision, device)


@pytest.mark.parametrize("kind", ["fp16", "uint8", "top_k"])
def test_a_cache_of_imagenet_21k(tmp_path: Path, kind: str) -> None:
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
        with pytest.raises(CacheError, match="6 of 6 outputs"):
            check(other, precision)


@pytest.mark.parametrize("top_k", [1, 10])
def test_a_few_of_many_logits_are_enough_to_see_another_samples_record(top_k: int) -> None:
    """Of 21,841, where the size of the whole row says nothing of those that are kept."""
    codec = Codec("top_k", IMAGENET_21K, top_k)
    logits, _ = outputs(IMAGENET_21K)
    assert check(output_differences(codec, codec.encode(logits), logits), "fp32").worst == 0.0
    found = output_differences(codec, codec.encode(logits.roll(1, 0)), logits)
    for precision in PRECISIONS:
        with pytest.raises(CacheError, match="6 of 6 outputs"):
            check(found, precision)


def test_logits_beyond_fp16_are_for_uint8() -> None:
    logits = torch.tensor([[1.0, 2.0, 3.0], [70000.0, -3.0, 5.0]])
    for codec in (Codec("fp16", 3), Codec("top_k", 3, 2)):
        with pytest.raises(
            CacheError, match=r"logits reach 70000 \(the first in row 1\) and fp16 ends at 65504; store them as uint8"
        ):
            codec.encode(logits)
    codec = Codec("uint8", 3)
    records = codec.encode(logits)
    stored, _ = codec.decode(records)
    assert isinstance(stored, QuantizedLogits)
    back = stored.values.float() * stored.scale[:, None] + stored.offset[:, None]
    assert torch.allclose(back, logits, rtol=0, atol=70003 / 510)  # half a level of 255
    assert check(output_differences(codec, records, logits), "fp32")[:2] == (2, 0.0)
