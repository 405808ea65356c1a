"""Courses over the epochs, by hand."""

import numpy as np

from support.report_runs import evaluation, training
from unikd_fast.report.run_data import course, keys_with, line_over_seeds, loss_terms


def test_a_course_keeps_the_last_record_of_each_epoch() -> None:
    records = [
        evaluation(1, ce=3.0),
        training(1.0, ce=9.0),
        evaluation(2, ce=2.0),
        evaluation(2, ce=1.5),
        evaluation(3, other=1.0),
        evaluation(4, ce=None),
        evaluation(5, ce=True),
    ]
    assert course(records, "evaluation", "ce") == {1.0: 3.0, 2.0: 1.5}


def test_a_line_has_mean_and_range_over_shared_epochs() -> None:
    line = line_over_seeds("a", [{1.0: 4.0, 2.0: 1.0, 3.0: 0.5}, {2.0: 3.0, 1.0: 2.0}, {1.0: 9.0, 2.0: 2.0}])
    assert line is not None
    np.testing.assert_array_equal(line.x, [1.0, 2.0])
    np.testing.assert_array_equal(line.mean, [5.0, 2.0])
    np.testing.assert_array_equal(line.low, [2.0, 1.0])
    np.testing.assert_array_equal(line.high, [9.0, 3.0])
    assert line.seeds == 3


def test_seeds_without_a_shared_epoch_have_no_line() -> None:
    assert line_over_seeds("a", [{1.0: 4.0}, {2.0: 3.0}]) is None
    assert line_over_seeds("a", []) is None


def test_loss_terms_exclude_zeros_and_later_keys() -> None:
    records = [
        training(1.0, feature_kl=0.0, logit_kl=0.0, anchor=0.0),
        training(2.0, feature_kl=0.5, logit_kl=0.0, review=1.0),
        evaluation(2, ce=1.0, probe_kl=2.0),
    ]
    assert loss_terms(records) == ["feature_kl", "review"]


def test_keys_come_in_order_of_appearance() -> None:
    records = [evaluation(1, head_b=1.0, ce=2.0), evaluation(2, head_a=1.0, head_text="x"), training(2.0, head_c=1.0)]
    assert keys_with(records, "evaluation", lambda key: key.startswith("head_")) == ["head_b", "head_a"]
