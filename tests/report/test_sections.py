"""What each section shows of runs whose files hold chosen figures, and what it says where they hold none."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.report_runs import config, evaluation, training, write_metrics, write_result, write_run_folder
from unikd_fast.report.accuracy import single_runs_section
from unikd_fast.report.figures import LIGHT
from unikd_fast.report.page import Missing, Picture, Section, Table
from unikd_fast.report.run_data import GroupData, compare_logits, gather
from unikd_fast.report.run_files import StepTime, write_step_time, write_test_logits
from unikd_fast.report.runs import find_runs, group_runs
from unikd_fast.report.sections import (
    collapse_section,
    convergence_section,
    environment_section,
    logit_sections,
    step_time_section,
)

LABELS = np.array([0, 1, 0, 1])
TEACHER = np.array([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0], [2.0, 0.0]])  # 75 %
STUDENTS = {
    0: np.array([[2.0, 0.0], [0.0, 2.0], [0.0, 2.0], [2.0, 0.0]]),  # 50 %; 75 % agreement, 2 of 3 where that is right
    1: np.array([[2.0, 0.0], [0.0, 2.5], [2.0, 0.0], [2.0, 0.0]]),  # 75 %; full agreement
}


def student_folder(root: Path, label: str, seed: int) -> Path:
    return root / f"seed-{seed}" / label


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Two seeds of "kd" and of "alone", with a teacher each; without any files of figures."""
    root = tmp_path / "c"
    runs = {"alone": {"distill.method": "none"}, "kd": {"distill.method": "kd"}}
    write_run_folder(root, config(compare={"seeds": [0, 1], "runs": runs}))
    for seed, accuracy in ((0, 50.0), (1, 75.0)):
        write_result(root / f"seed-{seed}" / "teacher", "teacher", seed=seed, model="cifar/resnet56")
        for label, method in (("alone", "none"), ("kd", "kd")):
            write_result(student_folder(root, label, seed), label, seed=seed, method=method, last=accuracy)
    return root


def group_data(root: Path) -> list[GroupData]:
    return gather([group for group in group_runs(find_runs([root]).runs) if not group.is_teacher])


def parts(section: Section, kind: type) -> list[Any]:
    return [part for part in section.parts if isinstance(part, kind)]


def write_logits(root: Path, label: str) -> None:
    for seed, logits in STUDENTS.items():
        write_test_logits(student_folder(root, label, seed), logits, LABELS)
        write_test_logits(root / f"seed-{seed}" / "teacher", TEACHER, LABELS)


def test_convergence_has_a_panel_per_loss_term(root: Path) -> None:
    for seed in (0, 1):
        records = [evaluation(1, ce=2.0 + seed, probe_kl=4.0), training(1.0, logit_kl=3.0 + seed, anchor=0.0)]
        write_metrics(student_folder(root, "kd", seed), [*records, evaluation(2, ce=1.0 + seed, probe_kl=2.0 + seed)])
        # As this method has no such term, its zeros are not drawn.
        write_metrics(student_folder(root, "alone", seed), [evaluation(1, ce=5.0), training(1.0, logit_kl=0.0)])
    section = convergence_section(group_data(root))
    (picture,) = parts(section, Picture)
    axes = picture.draw(LIGHT).axes
    assert [place.get_title(loc="left") for place in axes] == [
        "Cross-entropy, test split",
        "Common probe, test split",
        "logit_kl, training",
    ]
    assert [drawn.get_xydata().tolist() for drawn in axes[0].lines] == [[[1.0, 5.0]], [[1.0, 2.5], [2.0, 1.5]]]
    assert [drawn.get_xydata().tolist() for drawn in axes[1].lines] == [[[1.0, 4.0], [2.0, 2.5]]]
    assert [drawn.get_xydata().tolist() for drawn in axes[2].lines] == [[[1.0, 3.5]]]
    assert "Cross-entropy, test split: alone 5, kd 1.5; Common probe, test split: kd 2.5" in picture.alt
    assert not parts(section, Missing)  # a student alone has nobody to be compared with


def test_a_missing_probe_is_reported(root: Path) -> None:
    for label in ("kd", "alone"):
        write_metrics(student_folder(root, label, 0), [evaluation(1, ce=5.0)])
    (missing,) = parts(convergence_section(group_data(root)), Missing)
    assert missing.text.startswith("The common probe is missing for kd. ")
    assert "probe_kl" in missing.text


def test_convergence_without_records_states_what_is_missing(root: Path) -> None:
    section = convergence_section(group_data(root))
    assert not parts(section, Picture)
    assert "metrics.jsonl" in parts(section, Missing)[0].text


def test_evaluations_are_on_the_validation_split_if_there_is_one(root: Path) -> None:
    for label in ("kd", "alone"):
        for seed in (0, 1):
            folder = student_folder(root, label, seed)
            write_result(folder, label, seed=seed, method=label, test_is_val=False)
            write_metrics(folder, [evaluation(1, ce=2.0)])
    (picture,) = parts(convergence_section(group_data(root)), Picture)
    assert picture.draw(LIGHT).axes[0].get_title(loc="left") == "Cross-entropy, validation split"


def test_collapse_indicators_and_their_final_values(root: Path) -> None:
    for seed in (0, 1):
        records = [evaluation(epoch, head_accuracy=0.5 + 0.1 * epoch * seed, head_new=epoch) for epoch in (1, 2)]
        write_metrics(student_folder(root, "kd", seed), records)
    section = collapse_section(group_data(root))
    (picture,), (table,) = parts(section, Picture), parts(section, Table)
    accuracy, other = picture.draw(LIGHT).axes
    np.testing.assert_allclose(accuracy.lines[0].get_xydata(), [[1, 0.55], [2, 0.6]])
    assert accuracy.get_ylim() == (0.0, 1.02)
    assert other.get_title(loc="left") == "head_new"
    assert table.rows == (("kd", "0.6", "2"),)


def test_missing_indicators_are_explained(root: Path) -> None:
    section = collapse_section(group_data(root))
    assert "No run has indicators" in parts(section, Missing)[0].text
    assert len(section.parts) == 1


def test_logit_figures_show_the_statistics(root: Path) -> None:
    write_logits(root, "kd")
    differences, classes, agreement = logit_sections(group_data(root))
    expected = [compare_logits(student, TEACHER, LABELS) for student in STUDENTS.values()]
    (curve,) = parts(differences, Picture)
    (axes,) = curve.draw(LIGHT).axes
    np.testing.assert_array_equal(axes.lines[0].get_ydata(), (expected[0].cdf + expected[1].cdf) / 2)
    assert axes.get_xlim() == (0.0, 2.0)  # where the last of the seeds is at 1
    means, correlations = parts(classes, Picture)
    np.testing.assert_array_equal(means.draw(LIGHT).axes[0].images[0].get_array(), expected[0].class_difference)
    drawn = correlations.draw(LIGHT).axes[0].images[0].get_array()
    np.testing.assert_allclose(drawn, expected[0].correlation_difference)
    (table,) = parts(agreement, Table)
    assert table.rows[0][:5] == ("kd", "87.50 ± 17.68", "83.33 ± 23.57", "62.50 ± 17.68", "75.00 ± 0.00")
    (dots,) = parts(agreement, Picture)
    assert [list(line.get_xdata()) for line in dots.draw(LIGHT).axes[0].lines] == [[87.5], [pytest.approx(250 / 3)]]
    (missing,) = parts(differences, Missing)
    assert (
        "Left out: alone, seed 0; alone, seed 1: test_logits.safetensors is missing for the student. " in missing.text
    )


def test_logits_of_different_samples_are_not_compared(root: Path) -> None:
    write_logits(root, "kd")
    write_test_logits(student_folder(root, "kd", 0), STUDENTS[0], LABELS[::-1].copy())
    write_test_logits(student_folder(root, "kd", 1), STUDENTS[1][:2], LABELS[:2], split="val")
    (section,) = logit_sections(group_data(root))
    (missing,) = parts(section, Missing)
    assert "kd, seed 0: its logits are not for the same samples as its teacher's: (4, 2) on test" in missing.text
    assert "kd, seed 1: its logits are not for the same samples as its teacher's: (2, 2) on val" in missing.text
    assert "alone, seed 0; alone, seed 1: test_logits.safetensors is missing for the student." in missing.text


def test_non_finite_logits_are_left_out_with_the_reason(root: Path) -> None:
    write_logits(root, "kd")
    broken = STUDENTS[0].copy()
    broken[1, 1] = np.nan
    write_test_logits(student_folder(root, "kd", 0), broken, LABELS)
    section = logit_sections(group_data(root))[0]
    assert any(
        "kd, seed 0: compare_logits: the student's logits of 1 of 4" in one.text for one in parts(section, Missing)
    )


def test_logits_that_contradict_the_result_are_doubted(root: Path) -> None:
    write_logits(root, "kd")
    assert not any("other weights" in one.text for one in parts(logit_sections(group_data(root))[0], Missing))
    write_result(student_folder(root, "kd", 0), "kd", method="kd", best=81.0, last=80.0)
    doubts = [one.text for one in parts(logit_sections(group_data(root))[0], Missing) if "other weights" in one.text]
    assert len(doubts) == 1
    assert doubts[0].startswith("kd, seed 0: its test_logits.safetensors give")
    assert "give 50.00 % top-1 on test, result.json says 81.00 % and 80.00 %" in doubts[0]


def test_runs_with_different_class_counts_share_no_heatmap(tmp_path: Path) -> None:
    folders = []
    for classes in (2, 3):
        folder = write_run_folder(tmp_path / str(classes), config(data={"name": str(classes)}))
        write_result(folder, "student", last=100.0)
        write_result(folder / "teacher", "teacher", model="cifar/resnet56")
        for place in (folder, folder / "teacher"):
            write_test_logits(place, np.eye(classes), np.arange(classes))
        folders.append(folder)
    groups = [group for group in group_runs(find_runs(folders).runs) if not group.is_teacher]
    differences, classes_section, agreement = logit_sections(gather(groups))
    assert [part.text for part in classes_section.parts] == [
        "No class structure: the runs differ in their number of classes; report them separately."
    ]
    assert len(differences.parts[0].draw(LIGHT).axes[0].lines) == 2
    assert [row[0] for row in parts(agreement, Table)[0].rows] == ["student (2)", "student (3)"]


def test_step_times_are_stacked_means_over_seeds(root: Path) -> None:
    for seed in (0, 1):
        times = StepTime(1.0, 2.0 + seed, 3.0, 0.5, 4.0, 0.25, "GPU" if seed else "CPU")
        write_step_time(student_folder(root, "kd", seed), times)
        records = [training(0.0), training(1.0), training(3.0)]
        write_metrics(student_folder(root, "kd", seed), records)
    section = step_time_section(group_data(root))
    (picture,), (parts_table, pace) = parts(section, Picture), parts(section, Table)
    widths = [patch.get_width() for patch in picture.draw(LIGHT).axes[0].patches]
    assert widths == [1.0, 2.5, 3.0, 0.5, 4.0, 0.25]
    assert parts_table.rows == (("kd", "1.00", "2.50", "3.00", "0.50", "4.00", "0.25", "11.25", "CPU, GPU"),)
    assert pace.rows == (("kd", "1,002", "25.0"),)  # without the first line of each run
    (missing,) = parts(section, Missing)
    assert missing.text == (
        "The breakdown of a step is missing for alone; it appears once the run folder holds step_time.json, which a "
        "run of at least 20 steps writes. Steps captured in a CUDA graph (train.cuda_graph) have no breakdown."
    )


def test_changes_at_a_later_start_are_listed(root: Path) -> None:
    first = json.loads((root / "environment.json").read_text())
    starts = [{"time": time, **first, "command": ["again"]} for time in ("2026-01-02", "2026-01-03")]
    starts[1] |= {"commit": "beef", "versions": {**first["versions"], "torch": "9.0"}, "world_size": 8}
    (root / "starts.jsonl").write_text("".join(json.dumps(start) + "\n" for start in starts))
    (table,) = environment_section([root]).parts
    assert isinstance(table, Table)
    assert [row for row in table.rows if row[0].startswith("from ")] == [
        ("from 2026-01-03 on", "versions torch 9.0, world_size 8, commit beef")
    ]


def test_the_environment_of_each_folder(root: Path, tmp_path: Path) -> None:
    (table, missing) = environment_section([root, tmp_path]).parts
    assert isinstance(table, Table)
    assert ("versions", "torch 2.15.0") in table.rows
    assert ("gpus", "none") in table.rows
    assert isinstance(missing, Missing)
    assert "no environment.json" in missing.text


def test_a_run_on_five_classes_has_no_top5(tmp_path: Path) -> None:
    folder = write_result(write_run_folder(tmp_path / "few", config()), "student")
    result = json.loads((folder / "result.json").read_text())
    for which in ("best", "last"):
        for split in ("val", "test"):
            result[which][split] = {"accuracy": 60.0, "ce": 1.0}
    (folder / "result.json").write_text(json.dumps(result))
    section = single_runs_section(group_runs(find_runs([folder]).runs))
    (table,) = (part for part in section.parts if isinstance(part, Table))
    assert table.rows[0][-3:] == ("60.00", "\u2013", "1.0000")
