"""Files that come back as they were written, and what is said about damaged ones."""

import json
from pathlib import Path

import numpy as np
import pytest

from support.report_runs import evaluation, write_metrics
from unikd_fast.report.run_files import (
    STEP_TIME,
    TEST_LOGITS,
    RunFileError,
    StepTime,
    read_json,
    read_records,
    read_step_time,
    read_test_logits,
    write_step_time,
    write_test_logits,
)

LOGITS = np.array([[1.5, -2.25], [0.1, 65504.0], [0.0, 3.0]], dtype=np.float32)
LABELS = np.array([1, 0, 1], dtype=np.int32)


def test_logits_round_trip_in_fp16_with_labels_and_split(tmp_path: Path) -> None:
    path = write_test_logits(tmp_path, LOGITS, LABELS, split="val")
    assert path == tmp_path / TEST_LOGITS
    found = read_test_logits(tmp_path)
    assert found is not None
    assert (found.logits.dtype, found.labels.dtype, found.split) == (np.float16, np.int64, "val")
    np.testing.assert_array_equal(found.logits, LOGITS.astype(np.float16))
    np.testing.assert_array_equal(found.labels, LABELS)
    assert [entry.name for entry in tmp_path.iterdir()] == [TEST_LOGITS]


def test_logits_beyond_fp16_are_kept_in_fp32(tmp_path: Path) -> None:
    wide = LOGITS.copy()
    wide[0, 0] = -65600.0
    write_test_logits(tmp_path, wide, LABELS)
    found = read_test_logits(tmp_path)
    assert found is not None
    np.testing.assert_array_equal(found.logits, wide)
    assert found.logits.dtype == np.float32


def test_logits_of_a_diverged_network_are_written_unchanged(tmp_path: Path) -> None:
    broken = LOGITS.copy()
    broken[1] = np.nan, np.inf
    write_test_logits(tmp_path, broken, LABELS)
    found = read_test_logits(tmp_path)
    assert found is not None
    np.testing.assert_array_equal(found.logits, broken.astype(np.float16))


def test_mismatched_logits_and_labels_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"\(N, K\) and labels \(N,\), got \(3, 2\) and \(2,\)"):
        write_test_logits(tmp_path, LOGITS, LABELS[:2])
    with pytest.raises(ValueError, match="integers, got float64"):
        write_test_logits(tmp_path, LOGITS, np.zeros(3))
    assert not any(tmp_path.iterdir())


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = write_test_logits(tmp_path, LOGITS, LABELS)
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(RunFileError, match=f"{TEST_LOGITS} cannot be read"):
        read_test_logits(tmp_path)


def test_labels_out_of_range_are_refused(tmp_path: Path) -> None:
    write_test_logits(tmp_path, LOGITS, np.array([0, 1, 2]))
    with pytest.raises(RunFileError, match="from 0 to 1, got 0 to 2"):
        read_test_logits(tmp_path)


def test_step_times_round_trip(tmp_path: Path) -> None:
    times = StepTime(1.0, 2.5, 3.0, 0.25, 6.0, 0.5, "one GPU")
    write_step_time(tmp_path, times)
    assert read_step_time(tmp_path) == times
    assert [entry.name for entry in tmp_path.iterdir()] == [STEP_TIME]


@pytest.mark.parametrize("value", [None, "3", -1.0, float("nan"), True])
def test_an_invalid_step_time_is_refused(tmp_path: Path, value: object) -> None:
    content = StepTime(1.0, 2.5, 3.0, 0.25, 6.0, 0.5, "one GPU")._asdict() | {"loss_ms": value}
    (tmp_path / STEP_TIME).write_text(json.dumps(content))
    with pytest.raises(RunFileError, match="loss_ms must be a number of milliseconds, got"):
        read_step_time(tmp_path)


def test_missing_files_are_read_as_none(tmp_path: Path) -> None:
    assert read_test_logits(tmp_path) is None
    assert read_step_time(tmp_path) is None
    assert read_records(tmp_path) == []


def test_a_truncated_last_record_is_dropped(tmp_path: Path) -> None:
    records = [evaluation(1, ce=2.0), evaluation(2, ce=1.0)]
    write_metrics(tmp_path, records)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "evalu')
    assert read_records(tmp_path) == records


def test_a_broken_record_before_the_last_is_refused(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train"}\n{"ki\n{"kind": "train"}\n')
    with pytest.raises(RunFileError, match="line 2 is not JSON"):
        read_records(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(RunFileError, match=r"line 1 is not a record, got \[1\]"):
        read_records(tmp_path)


def test_json_that_is_not_an_object_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text("[]")
    with pytest.raises(RunFileError, match="it holds list where an object belongs; restore it"):
        read_json(path)
    path.write_text("{")
    with pytest.raises(RunFileError, match=r"config\.json is damaged: .*; restore it"):
        read_json(path)
