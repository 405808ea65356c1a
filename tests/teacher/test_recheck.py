"""Stored outputs against outputs computed again: what another teacher, sample or class changes is seen by its size."""

import pytest
import torch

from support.recheck_inputs import (
    CLASSES,
    CODECS,
    KEPT,
    PRECISIONS,
    ROWS,
    WITH_GAUSSIAN,
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
from unikd_fast.values import Gaussian


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "codec", [*CODECS, *WITH_GAUSSIAN], ids=lambda codec: codec.kind + "+gaussian" * codec.gaussian
)
def test_an_output_does_not_differ_from_its_stored_form(codec: Codec, dtype: torch.dtype) -> None:
    logits, gaussian = outputs()
    same = logits.to(dtype), gaussian
    found = differences(codec, same, same)
    assert found.dtype == torch.float64 and found.tolist() == [0.0] * ROWS
    assert check(found, "fp32")[:2] == (ROWS, 0.0)


@by_kind
def test_a_changed_logit_is_measured_by_its_size(codec: Codec) -> None:
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
        with pytest.raises(CacheError, match="1 of 6 recomputed outputs differ, sample 14 by"):
            check(found, precision)


@pytest.mark.parametrize(
    ("top_k", "changed", "by"), [(1, 0, -12.0), (5, 0, -2.0), (5, 3, -2.0), (5, 4, 4.0), (20, 3, -2.0)]
)
def test_a_changed_top_k_logit_is_measured_by_its_size(top_k: int, changed: int, by: float) -> None:
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
def test_a_changed_mean_is_measured_by_its_size(codec: Codec) -> None:
    logits, (mean, log_var) = outputs()
    changed = mean.clone()
    changed[3, 150] += 4.0
    found = differences(codec, (logits, Gaussian(mean, log_var)), (logits, Gaussian(changed, log_var)))
    assert float(found[3]) == pytest.approx(4.0 / float(changed[3].norm()), rel=1e-3)  # fp16 holds 11 bits
    assert found.count_nonzero() == 1


@by_kind_with_gaussian
def test_a_changed_log_variance_is_measured_by_its_rms(codec: Codec) -> None:
    logits, (mean, log_var) = outputs()
    changed = log_var.clone()
    changed[4, 0] += 3.0
    found = differences(codec, (logits, Gaussian(mean, log_var)), (logits, Gaussian(mean, changed)))
    assert float(found[4]) == pytest.approx(3.0 / CLASSES**0.5, rel=1e-3)  # fp16 holds 11 bits
    assert found.count_nonzero() == 1


@by_kind
@pytest.mark.parametrize("precision", PRECISIONS)
def test_another_samples_record_is_not_rounding(codec: Codec, precision: str) -> None:
    logits, gaussian = outputs()
    found = differences(codec, (logits.roll(1, 0), gaussian), (logits, gaussian))
    with pytest.raises(CacheError, match="6 of 6 recomputed outputs"):
        check(found, precision)


def test_another_samples_gaussian_is_not_rounding() -> None:
    """With the right logits beside it."""
    codec = WITH_GAUSSIAN[0]
    logits, (mean, log_var) = outputs()
    for other in (Gaussian(mean.roll(1, 0), log_var), Gaussian(mean, log_var.roll(1, 0))):
        found = differences(codec, (logits, other), (logits, Gaussian(mean, log_var)))
        with pytest.raises(CacheError, match="6 of 6 recomputed outputs"):
            check(found, "bf16")


def test_wrong_top_k_classes_are_detected() -> None:
    """The right numbers under the wrong classes."""
    codec = Codec("top_k", CLASSES, KEPT)
    logits, _ = outputs()
    found = output_differences(codec, codec.encode(logits.roll(1, 1)), logits)
    with pytest.raises(CacheError, match="6 of 6 recomputed outputs"):
        check(found, "bf16")


@by_kind
def test_a_shift_of_all_logits_is_ignored(codec: Codec) -> None:
    logits, gaussian = outputs()
    logits = (logits * 16).round() / 16  # so that 8 more is exact in fp16
    shifted = logits + torch.tensor([8.0, -8.0, 1.0, 0.5, -4.0, 2.0])[:, None]
    found = differences(codec, (logits, gaussian), (shifted, gaussian))
    assert float(found.max()) < 1e-6  # of fp32: the log-sum-exp, and scale and offset of uint8


def test_constant_rows_are_compared() -> None:
    codec = Codec("fp16", 4)
    records, flat = codec.encode(torch.full((2, 4), 3.0)), torch.full((2, 4), 5.0)
    assert output_differences(codec, records, flat).tolist() == [0.0, 0.0]
    other = torch.tensor([[3.0, 3.0, 3.0, 4.0], [5.0, 5.0, 5.0, 5.0]])
    found = output_differences(codec, codec.encode(other), flat)
    assert float(found[0]) > 1e100 and float(found[1]) == 0.0
