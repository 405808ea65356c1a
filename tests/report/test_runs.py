"""What is found in run folders, and which runs are seeds of one another."""

from pathlib import Path
from typing import Any

import pytest

from support.report_runs import config, write_result, write_run_folder
from unikd_fast.report.run_files import RunFileError
from unikd_fast.report.runs import apply_settings, find_runs, group_runs

COMPARED: dict[str, Any] = {
    "seeds": [0, 10],
    "runs": {"student + UniKD": {"distill.method": "unikd"}, "a KD": {"distill.method": "kd", "teacher.model": "t"}},
}


def comparison(folder: Path, *, leave_out: tuple[str, int] | None = None) -> Path:
    write_run_folder(folder, config(compare=COMPARED))
    for seed in (0, 10):
        write_result(folder / f"seed-{seed}" / "teacher", "teacher", seed=seed, method="none", model="cifar/resnet56")
        for label, settings in COMPARED["runs"].items():
            if (label, seed) != leave_out:
                home = folder / f"seed-{seed}" / label.replace(" ", "-")
                write_result(home, label, seed=seed, method=settings["distill.method"])
    return folder


def single(folder: Path, *, seed: int = 0, **changes: Any) -> Path:
    write_run_folder(folder, config(run={"dir": str(folder), "seed": seed}, **changes))
    write_result(folder, "student", seed=seed)
    write_result(folder / "teacher", "teacher", seed=seed, method="given", model="cifar/resnet56")
    return folder


def test_runs_of_a_comparison_are_in_configuration_order(tmp_path: Path) -> None:
    found = find_runs([comparison(tmp_path / "c")])
    groups = group_runs(found.runs)
    assert [(group.name, [run.seed for run in group.runs]) for group in groups] == [
        ("teacher", [0, 10]),
        ("student + UniKD", [0, 10]),
        ("a KD", [0, 10]),
    ]
    assert groups[0].is_teacher
    assert not groups[1].is_teacher
    assert found.unfinished == ()
    for group in groups[1:]:
        for run in group.runs:
            assert run.teacher == tmp_path / "c" / f"seed-{run.seed}" / "teacher"
            assert run.source == tmp_path / "c"


def test_each_run_has_its_own_configuration(tmp_path: Path) -> None:
    unikd, kd = group_runs(find_runs([comparison(tmp_path / "c")]).runs)[1:]
    assert (unikd.runs[0].config["distill"]["method"], unikd.runs[0].config["teacher"]["model"]) == (
        "unikd",
        "cifar/resnet56",
    )
    assert (kd.runs[0].config["distill"]["method"], kd.runs[0].config["teacher"]["model"]) == ("kd", "t")


def test_a_given_teacher_lies_next_to_the_seed_folders(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c")
    for seed in (0, 10):
        (folder / f"seed-{seed}" / "teacher" / "result.json").unlink()
    write_result(folder / "teacher", "teacher", method="given", model="cifar/resnet56")
    runs = find_runs([folder]).runs
    assert {run.teacher for run in runs if not run.is_teacher} == {folder / "teacher"}
    assert [run.teacher for run in runs if run.is_teacher] == [None]


def test_a_single_run_and_its_teacher(tmp_path: Path) -> None:
    folder = single(tmp_path / "one")
    teacher, student = find_runs([folder]).runs
    assert (teacher.label, teacher.folder, student.folder, student.teacher) == (
        "teacher",
        folder / "teacher",
        folder,
        folder / "teacher",
    )


def test_a_run_ignores_teachers_outside_its_folder(tmp_path: Path) -> None:
    folder = single(tmp_path / "one")
    (folder / "teacher" / "result.json").unlink()
    write_result(tmp_path / "teacher", "teacher")
    assert [run.teacher for run in find_runs([folder]).runs] == [None]


def test_a_subfolder_of_a_comparison_includes_its_teacher(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c")
    found = find_runs([folder / "seed-10" / "a-KD"])
    assert [(run.label, run.seed) for run in found.runs] == [("a KD", 10), ("teacher", 10)]
    assert found.runs[0].config["distill"]["method"] == "kd"
    assert found.runs[0].source == folder


def test_a_folder_given_twice_counts_once(tmp_path: Path) -> None:
    folder = single(tmp_path / "one")
    assert len(find_runs([folder, folder / ".", folder]).runs) == 2


def test_runs_that_differ_only_in_the_seed_are_one_group(tmp_path: Path) -> None:
    folders = [single(tmp_path / f"s{seed}", seed=seed) for seed in (3, 1)]
    groups = group_runs(find_runs(folders).runs)
    assert [(group.name, [run.seed for run in group.runs]) for group in groups] == [
        ("teacher", [1, 3]),
        ("student", [1, 3]),
    ]


def test_groups_with_one_label_are_named_by_folder(tmp_path: Path) -> None:
    folders = [
        single(tmp_path / "a"),
        single(tmp_path / "b", distill={"method": "unikd", "unikd": {"alpha": 8.0}}),
    ]
    groups = group_runs(find_runs(folders).runs)
    assert [group.name for group in groups] == ["teacher (a)", "teacher (b)", "student (a)", "student (b)"]


def test_groups_of_different_models_are_named_by_model(tmp_path: Path) -> None:
    folders = [single(tmp_path / "a"), single(tmp_path / "b", teacher={"model": "cifar/resnet110", "weights": None})]
    write_result(folders[1] / "teacher", "teacher", method="given", model="cifar/resnet110")
    groups = group_runs(find_runs(folders).runs)
    assert [group.name for group in groups] == [
        "teacher (cifar/resnet56)",
        "teacher (cifar/resnet110)",
        "student (a)",
        "student (b)",
    ]


def test_one_seed_run_twice_is_not_averaged(tmp_path: Path) -> None:
    folders = [single(tmp_path / "x" / "again"), single(tmp_path / "y" / "again")]
    groups = [group for group in group_runs(find_runs(folders).runs) if not group.is_teacher]
    assert [group.name for group in groups] == [f"student ({tmp_path}/{part}/again)" for part in "xy"]


def test_unfinished_runs_are_named_and_left_out(tmp_path: Path) -> None:
    folder = comparison(tmp_path / "c", leave_out=("a KD", 10))
    found = find_runs([folder])
    assert found.unfinished == (f"a KD, seed 10 of {folder} is not finished (no result.json) and is left out.",)
    assert [run.seed for run in found.runs if run.label == "a KD"] == [0]


def test_folders_that_are_not_run_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunFileError, match="does not exist; give a run folder"):
        find_runs([tmp_path / "nowhere"])
    with pytest.raises(RunFileError, match=r"is not a run folder, it has no config\.json"):
        find_runs([tmp_path])
    folder = comparison(tmp_path / "c")
    with pytest.raises(RunFileError, match=f"seed-0 is part of the run folder {folder} .*; give {folder}"):
        find_runs([folder / "seed-0"])
    with pytest.raises(RunFileError, match=r"holds no finished run \(no result\.json\); let it finish"):
        find_runs([write_run_folder(tmp_path / "empty")])


def test_an_incomplete_result_is_refused(tmp_path: Path) -> None:
    folder = write_run_folder(tmp_path / "one")
    (folder / "result.json").write_text('{"label": "student", "seed": 0, "model": "m", "method": "kd"}')
    with pytest.raises(RunFileError, match="lacks test_is_val, best, last"):
        find_runs([folder])


def test_applied_settings_leave_the_original_unchanged(tmp_path: Path) -> None:
    original = config(teacher=None)
    changed = apply_settings(original, {"distill.unikd.alpha": 2.0, "teacher.model": "x", "compare": None})
    assert changed["distill"] == {"method": "unikd", "unikd": {"alpha": 2.0, "fusion": "aff"}}
    assert changed["teacher"] == {"model": "x"}
    assert (original["distill"]["unikd"]["alpha"], original["teacher"]) == (4.0, None)
