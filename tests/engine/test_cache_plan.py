"""What a cache costs and saves: the arithmetic on numbers made by hand, and how it is told."""

import itertools
import re
from dataclasses import replace

import pytest

from support.cache_plans import GIB, MIB, SIZES
from unikd_fast.engine.cache_plan import CachePlan, StepTimes
from unikd_fast.units import duration, size

PLAN = CachePlan(
    SIZES, StepTimes(teacher=0.3, student=0.1), micro_batch_size=50, micro_batches=10, processes=2, epochs=4
)


def test_epoch_times_with_and_without_a_cache() -> None:
    assert PLAN.epoch_s == pytest.approx(4.0)
    assert PLAN.cached_epoch_s == pytest.approx(1.0)
    assert PLAN.speedup == pytest.approx(4.0)


def with_missing(views: float) -> CachePlan:
    return replace(PLAN, sizes=replace(SIZES, missing_bytes=round(views * SIZES.view_bytes)))


@pytest.mark.parametrize(
    ("missing_views", "build_s", "break_even"),
    [(4, 12.0, 4), (3, 9.0, 3), (1, 3.0, 1), (0.1, 0.3, 1), (0, 0.0, 0)],
    ids=["nothing is built", "one view is built", "one is left", "a tenth of one is left", "all is built"],
)
def test_building_costs_the_missing_views(missing_views: float, build_s: float, break_even: int) -> None:
    """1000 samples a view at 2 x 50 in 0.3 s: 3 s a view, which is what an epoch saves."""
    plan = with_missing(missing_views)
    assert plan.build_s == pytest.approx(build_s)
    assert plan.break_even_epoch == break_even


def test_break_even_ignores_rounding() -> None:
    """An epoch saves one view; of 0.01 s for each of 9 micro-batches, three views divide to 3.0000000000000004."""
    for teacher, micro_batches, views in itertools.product((0.01, 0.07, 0.1, 0.3), range(1, 100), range(1, 8)):
        sizes = replace(SIZES, samples=2 * 11 * micro_batches, missing_bytes=views * SIZES.view_bytes)
        plan = CachePlan(sizes, StepTimes(teacher, 0.1), 11, micro_batches, processes=2, epochs=4)
        assert plan.break_even_epoch == views


def test_dropped_samples_are_built_too() -> None:
    """1049 samples are dealt as 1000: four views take a little more than four epochs save."""
    plan = replace(PLAN, sizes=replace(SIZES, samples=1049))
    assert plan.build_s == pytest.approx(12.588)
    assert plan.break_even_epoch == 5


def test_the_summary_line() -> None:
    assert PLAN.line() == (
        "4 views x 1,000 samples, 2.34 GiB (5 GiB free); an epoch takes 1 s instead of 4 s (4.00x); "
        "building takes 12 s and pays from epoch 4 on"
    )
    assert with_missing(0).line().endswith("(4.00x); nothing to build")


def test_the_table() -> None:
    assert with_missing(3).table().splitlines() == [
        "stored      4 views x 1,000 samples",
        "size        600 MiB a view, 2.34 GiB in all",
        "disk        1.76 GiB to write, 5 GiB free",
        "teacher     300.0 ms a micro-batch of 50 (measured here)",
        "student     100.0 ms a micro-batch of 50 (measured here)",
        "epoch       4 s online, 1 s cached: 4.00x",
        "building    9 s on 2 processes",
        "break-even  after 3 epochs trained from the cache",
        "4 epochs    16 s online, 13 s with building, 4 s in every later run",
    ]
    assert "9 s on 1 process\n" in replace(with_missing(1.5), processes=1).table()


def test_a_cache_that_does_not_fit_is_warned_about() -> None:
    exactly, one_byte_less = (replace(PLAN, sizes=replace(SIZES, free_bytes=2400 * MIB - less)) for less in (0, 1))
    assert "warning" not in exactly.table()
    warning = "warning     it does not fit; store fewer views, or uint8 logits"
    assert one_byte_less.table().splitlines()[-1] == warning


@pytest.mark.parametrize(
    ("count", "text"),
    [
        *((0, "0 B"), (1, "1 B"), (999, "999 B"), (1024, "1 KiB"), (1536, "1.5 KiB"), (10 * 2**40, "10 TiB")),
        *((MIB, "1 MiB"), (GIB, "1 GiB"), (2.4 * GIB, "2.4 GiB"), (999 * MIB, "999 MiB"), (17.26 * GIB, "17.3 GiB")),
        *((1000, "1,000 B"), (1023, "1,023 B"), (1010 * MIB, "1,010 MiB"), (1023.9 * GIB, "1,024 GiB")),
        *((999.4, "999 B"), (999.6, "1,000 B"), (5000 * 2**40, "5,000 TiB"), (2.0**60, "1,048,576 TiB")),
    ],
)
def test_bytes(count: float, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        *((0, "0 ms"), (3e-5, "0.03 ms"), (9.9e-7, "0.001 ms"), (1e-9, "0.000 ms"), (0.0123, "12.3 ms")),
        *((0.0999, "99.9 ms"), (0.1, "0.1 s")),
        *((0.25, "0.25 s"), (119, "119 s"), (120, "2 min"), (600, "10 min"), (7199, "120 min")),
        *((7200, "2 h"), (36_000, "10 h"), (172_799, "48 h"), (172_800, "2 days"), (864_000, "10 days")),
        *((999 * 86_400, "999 days"), (999.6 * 86_400, "1,000 days"), (123_456 * 86_400, "123,456 days")),
    ],
)
def test_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_no_number_has_an_exponent() -> None:
    for power in range(-600, 1200):
        for text in (size(1.03 ** max(power, 0)), duration(1.03**power)):
            assert re.fullmatch(r"[\d,]+(\.\d+)? [A-Za-z]+", text), text
