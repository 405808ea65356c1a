"""Statistics of logits against arrays worked out by hand, and against numpy's own functions on whole arrays."""

import math

import numpy as np
import pytest

from support.report_runs import some_logits
from unikd_fast.report import run_data as module
from unikd_fast.report.run_data import (
    DIFFERENCES,
    accuracy,
    class_difference,
    class_means,
    compare_logits,
    correlation,
    difference_cdf,
    probe_kl,
)

# Four samples of three classes. The student says 0 1 1 2, the teacher 0 1 2 2, and the classes are 0 1 2 0.
STUDENT = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 1.0], [0.0, 2.0, 1.0], [0.0, 1.0, 4.0]])
TEACHER = np.array([[3.0, 0.0, 1.0], [0.0, 3.0, 1.5], [0.0, 1.0, 3.0], [1.0, 1.0, 2.0]])
LABELS = np.array([0, 1, 2, 0])


@pytest.fixture(params=[2**22, 7], ids=["one block", "many blocks"])
def _block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The results must not depend on how the rows are cut: 7 entries are two rows of three classes."""
    monkeypatch.setattr(module, "_BLOCK", request.param)


pytestmark = pytest.mark.usefixtures("_block")


def test_accuracy_and_agreement_by_hand() -> None:
    found = compare_logits(STUDENT, TEACHER, LABELS)
    assert (found.student_accuracy, found.teacher_accuracy) == (50.0, 75.0)
    assert found.agreement == 75.0  # all but the third
    assert found.agreement_where_right == pytest.approx(200 / 3)  # the teacher is right in the first three
    assert accuracy(TEACHER, LABELS) == 75.0
    # With these classes the teacher is right in the first two alone, in which they agree.
    assert compare_logits(STUDENT, TEACHER, np.array([0, 1, 0, 0])).agreement_where_right == 100.0


def test_agreement_is_undefined_if_the_teacher_is_never_right() -> None:
    found = compare_logits(STUDENT, TEACHER, np.array([1, 0, 0, 1]))
    assert math.isnan(found.agreement_where_right)
    assert found.agreement == 75.0


def test_difference_cdf_by_hand() -> None:
    # |z_s - z_t|: 1 0 0 | 0 0 0.5 | 0 1 2 | 1 0 2: six zeros, one 0.5, three ones, two twos.
    grid = np.array([0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0])
    expected = np.array([6, 6, 7, 10, 10, 12, 12]) / 12
    np.testing.assert_array_equal(difference_cdf(STUDENT, TEACHER, grid), expected)
    np.testing.assert_array_equal(
        difference_cdf(STUDENT, TEACHER, grid[:4]), expected[:4]
    )  # what lies beyond is left out
    found = compare_logits(STUDENT, TEACHER, LABELS).cdf
    assert len(found) == len(DIFFERENCES) == 401
    assert (found[0], found[9], found[10], found[20], found[40]) == (6 / 12, 6 / 12, 7 / 12, 10 / 12, 1.0)


def test_class_means_by_hand() -> None:
    means = class_means(STUDENT, LABELS)
    np.testing.assert_array_equal(means, [[1.0, 0.5, 2.5], [0.0, 3.0, 1.0], [0.0, 2.0, 1.0]])
    # The teacher's are [[2, .5, 1.5], [0, 3, 1.5], [0, 1, 3]]; the diagonal 1, 0, 2 is left out.
    difference = class_difference(means, class_means(TEACHER, LABELS))
    np.testing.assert_array_equal(difference, [[0.0, 0.0, 1.0], [0.0, 0.0, 0.5], [0.0, 1.0, 0.0]])
    np.testing.assert_array_equal(compare_logits(STUDENT, TEACHER, LABELS).class_difference, difference)


def test_a_class_without_samples_has_no_mean() -> None:
    means = class_means(STUDENT, np.array([0, 0, 2, 2]))
    assert np.isnan(means[1]).all()
    assert np.isfinite(means[[0, 2]]).all()


def test_probe_kl_by_hand() -> None:
    # Two classes at τ = 4: logits (4 ln 3, 0) are odds of 3 to 1, (0, 0) are even ones.
    teacher, student = np.array([[4 * math.log(3.0), 0.0]]), np.zeros((1, 2))
    expected = 16 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert probe_kl(student, teacher) == pytest.approx(expected, rel=1e-12)
    assert probe_kl(teacher, student) == pytest.approx(16 * 0.5 * math.log(0.25 / 0.1875), rel=1e-12)  # no symmetry
    assert probe_kl(np.repeat(student, 5, 0), np.repeat(teacher, 5, 0)) == pytest.approx(expected)  # a mean
    assert probe_kl(teacher + 7.0, teacher) == pytest.approx(0.0, abs=1e-12)


def test_probe_kl_is_finite_for_large_logits() -> None:
    teacher, student = np.array([[6e4, 0.0, -6e4]]), np.array([[0.0, 6e4, 0.0]])
    assert probe_kl(student, teacher) == pytest.approx(16 * 6e4 / 4)


def test_correlations_match_numpy() -> None:
    logits, _ = some_logits(200, 6, noise=1.0, seed=0)
    kept = logits.astype(np.float16)
    np.testing.assert_allclose(correlation(kept), np.corrcoef(kept.astype(np.float64).T), rtol=0, atol=1e-12)


def test_correlations_by_hand() -> None:
    # The second logit follows the first, the third goes against it, the fourth never changes.
    logits = np.array([[0.0, 1.0, 3.0, 0.1], [1.0, 3.0, 2.0, 0.1], [2.0, 5.0, 1.0, 0.1]])
    expected = np.array([[1.0, 1.0, -1.0], [1.0, 1.0, -1.0], [-1.0, -1.0, 1.0]])
    found = correlation(logits)
    np.testing.assert_allclose(found[:3, :3], expected, atol=1e-12)
    assert np.isnan(found[3]).all()
    assert np.isnan(found[:, 3]).all()


def test_correlation_difference_is_student_minus_teacher() -> None:
    found = compare_logits(STUDENT, TEACHER, LABELS).correlation_difference
    np.testing.assert_allclose(found, np.corrcoef(STUDENT.T) - np.corrcoef(TEACHER.T), atol=1e-12)
    assert abs(found[0, 2]) > 0.1


def test_compare_logits_leaves_its_inputs_unchanged() -> None:
    student, teacher = STUDENT.copy(), TEACHER.copy()
    compare_logits(student, teacher, LABELS)
    np.testing.assert_array_equal(student, STUDENT)
    np.testing.assert_array_equal(teacher, TEACHER)


def test_mismatched_inputs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"the same shape, got \(4, 3\) and \(4, 2\)"):
        compare_logits(STUDENT, TEACHER[:, :2], LABELS)
    with pytest.raises(ValueError, match=r"labels must be \(4,\), got \(3,\)"):
        compare_logits(STUDENT, TEACHER, LABELS[:3])
    broken = TEACHER.copy()
    broken[2, 1] = np.inf
    with pytest.raises(ValueError, match="teacher's logits of 1 of 4 samples are not finite"):
        compare_logits(STUDENT, broken, LABELS)
