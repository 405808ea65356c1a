"""How the losses are measured on a GPU: whatever of it needs none."""

import loss_cases
import pytest
import torch
from gpu_timing import copies_beyond_cache, gigabytes_per_second, is_launch_bound, percentile, spread
from measurement import add_ratios, as_line, bandwidth, forward_and_gradients
from roofs import Roofs, moved_bytes
from speed_targets import Target, TargetMissed, judge_all, raise_if_missed

ROOFS = Roofs("bfloat16", 8192, 32768, copy_gb_s=4000.0, read_gb_s=4200.0, two_reads_one_write_gb_s=4100.0)


def test_spread_of_a_measurement() -> None:
    assert percentile([3.0, 1.0, 2.0], 50) == 2.0
    assert percentile([0.0, 10.0], 20) == 2.0
    assert percentile([7.0], 80) == 7.0
    times = spread([float(i) for i in range(11)])
    assert (times.median_ms, times.p20_ms, times.p80_ms) == (5.0, 2.0, 8.0)


def test_bytes_and_rates() -> None:
    assert moved_bytes(2, 1, 8192, 32768, torch.bfloat16) == 1_610_612_736
    assert gigabytes_per_second(4_000_000_000, 1.0) == 4000.0
    assert is_launch_bound(moved_bytes(2, 1, 512, 1000, torch.bfloat16), 4000.0)
    assert not is_launch_bound(moved_bytes(2, 1, 65536, 1000, torch.bfloat16), 4000.0)
    found = bandwidth(1_610_612_736, 0.4, ROOFS, launch_bound=False)
    assert found["gb_s"] == 4026.5
    assert found["percent_of_copy_roof"] == 100.7
    assert bandwidth(1, 0.4, ROOFS, launch_bound=True)["percent_of_copy_roof"] is None


def test_inputs_exceed_the_cache() -> None:
    assert copies_beyond_cache(4_000_000, 60_000_000) == 45
    assert copies_beyond_cache(1_000_000_000, 60_000_000) == 2
    assert copies_beyond_cache(1, 60_000_000) == 64


def test_unmeasured_targets_are_not_reached() -> None:
    targets = (Target("launches", "at_most", 2), Target("ratio_eager", "at_least", 4.0), Target("gb_s", "at_least", 1))
    judged = judge_all(targets, {"launches": 2, "ratio_eager": 3.9, "gb_s": None})
    assert [target["reached"] for target in judged] == [True, False, False]
    with pytest.raises(TargetMissed, match=r"^a case: ratio_eager at least 4, measured 3.9; gb_s at least 1"):
        raise_if_missed("a case", judged)
    raise_if_missed("a case", judged[:1])


def test_ratios_omit_a_failed_peer() -> None:
    rows = [
        {"variant": "ours", "median_ms": 0.4, "call_us": 410.0},
        {"variant": "eager", "median_ms": 2.0, "call_us": 820.0},
        {"variant": "liger", "missing": "not installed"},
    ]
    add_ratios(rows)
    assert (rows[0]["ratio_eager"], rows[0]["call_ratio_eager"]) == (5.0, 2.0)
    assert "ratio_liger" not in rows[0]
    assert as_line({"case": "c", "variant": "liger", "missing": "has no such loss"}).endswith("has no such loss")


@pytest.mark.parametrize("loss", loss_cases.LOSSES)
def test_peers_agree_and_errors_combine_over_parts(loss: str) -> None:
    case = loss_cases.Case(loss, 7, 12, dtype=torch.float32)
    inputs = loss_cases.make_inputs(case, device="cpu")
    results = {}
    for name in ("ours", "eager"):
        value = getattr(loss_cases.LOSSES[loss], name)(*inputs)
        results[name] = forward_and_gradients(getattr(loss_cases.LOSSES[loss], name), inputs, torch.ones_like(value))
    whole = loss_cases.errors_against_float64(case, inputs, results)
    parts = loss_cases.errors_against_float64(case, inputs, results, chunk_elements=30)  # 2 rows at a time
    for name, errors in whole.items():
        assert all(error < 1e-5 for error in errors.values()), (name, errors)  # fp32, sums of 84 terms
        assert parts[name] == pytest.approx(errors, rel=1e-6, abs=1e-12)
    doubled = {"ours": (results["ours"][0], *(2 * g for g in results["ours"][1:]))}
    wrong = loss_cases.errors_against_float64(case, inputs, doubled)["ours"]
    assert wrong["gradient_error"] == pytest.approx(1.0, rel=1e-5)
    with pytest.raises(AssertionError, match="gradient_error"):
        loss_cases.assert_no_worse_than_eager(case, results["ours"], wrong, whole["eager"])
    nan = {"ours": (results["ours"][0], *(g * float("nan") for g in results["ours"][1:]))}
    with pytest.raises(AssertionError, match="gradient_error nan"):
        found = loss_cases.errors_against_float64(case, inputs, nan)["ours"]
        loss_cases.assert_no_worse_than_eager(case, results["ours"], found, whole["eager"])


def test_bytes_of_the_cases() -> None:
    least = {case.loss: case.least_bytes // (case.rows * case.classes * 2) for case in loss_cases.CASES}
    assert least == {"softmax_kl": 3, "gaussian_kl": 6, "dkd": 3, "jsd": 3, "unikd": 9}
