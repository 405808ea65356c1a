"""Run folders whose JSON is intact and holds what no run writes: a named error or a page, never a raw error."""

import copy
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from support.forged_json import places
from support.report_runs import config, evaluation, some_logits, training, write_metrics, write_result, write_run_folder
from unikd_fast.report import command
from unikd_fast.report.run_files import RunFileError, StepTime, write_step_time, write_test_logits
from unikd_fast.report.runs import find_runs

ODD = (None, -1, 0.5, 2**70, "", "../x", [], {}, [1], True, float("nan"), {"a": 1})
KEPT = object()


@pytest.fixture
def comparison(tmp_path: Path) -> Path:
    runs = {"KD": {"distill.method": "kd"}, "UniKD": {"distill.method": "unikd"}}
    folder = write_run_folder(tmp_path / "runs", config(compare={"runs": runs, "seeds": [0, 1]}))
    for seed, label in itertools.product((0, 1), runs):
        run = write_result(folder / f"seed-{seed}" / label, label, seed=seed, method=label.lower())
        evaluations = [evaluation(epoch, accuracy=50.0, top5=60.0, ce=1.0) for epoch in (1, 2)]
        write_metrics(run, [training(1), *evaluations])
        write_test_logits(run, *some_logits(40, 10, noise=1.0, seed=seed))
        write_step_time(run, StepTime(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, "cpu"))
    return folder


def sections(folder: Path) -> None:
    """Everything of the page but the drawing."""
    found = find_runs([folder])
    command._title(found)
    command._sections(found)


def changed(content: Any, way: tuple[Any, ...], value: Any) -> Any:
    """A copy with another value at a place, or without it."""
    copied = inner = copy.deepcopy(content)
    for key in way[:-1]:
        inner = inner[key]
    if value is KEPT:
        del inner[way[-1]]
    else:
        inner[way[-1]] = value
    return copied


@pytest.mark.parametrize("share", [0.08, pytest.param(1.0, marks=pytest.mark.long)], ids=["some", "all"])
@pytest.mark.parametrize(
    "file", ["config.json", "environment.json", "seed-0/KD/result.json", "seed-0/KD/metrics.jsonl"]
)
def test_malformed_files_raise_errors_that_name_them(comparison: Path, file: str, share: float) -> None:
    path = comparison / file
    lines = path.suffix == ".jsonl"
    content = [json.loads(line) for line in path.read_text().splitlines()] if lines else json.loads(path.read_text())
    sections(comparison)
    every = list(itertools.product(places(content), (*ODD, KEPT)))
    refused = 0
    for way, odd in random.Random(0).sample(every, int(share * len(every))):
        forged = changed(content, way, odd)
        path.write_text("".join(json.dumps(line) + "\n" for line in forged) if lines else json.dumps(forged))
        try:
            sections(comparison)
        except RunFileError as error:
            assert str(comparison) in str(error)
            refused += 1
    if path.name == "result.json":  # much of the others is shown as it is
        assert refused > share * len(every) / 3


@pytest.mark.parametrize(
    ("file", "way", "value", "said"),
    [
        ("seed-0/KD/result.json", ("best", "test", "accuracy"), None, r"best\.test\.accuracy must be a finite number"),
        ("seed-0/KD/result.json", ("seed",), True, "seed must be a whole number, got True"),
        ("seed-0/KD/result.json", ("last",), [], r"last must be an object, got \[\]"),
        ("seed-0/KD/result.json", ("cost", "hardware"), KEPT, r"cost\.hardware must be a text, got None"),
        ("seed-0/KD/result.json", ("cost", "bytes"), -1, r"cost\.bytes must be a finite number that is not negative"),
        ("seed-0/KD/result.json", ("unlabelled",), "x", "unlabelled must be a whole number, got 'x'"),
        ("config.json", ("compare", "runs"), ["KD"], r"compare\.runs must be an object"),
        ("config.json", ("student", "model"), KEPT, r"student\.model must be a text, got None"),
        ("config.json", ("train",), "x", "train must be an object, got 'x'"),
    ],
)
def test_malformed_values_name_file_and_key(
    comparison: Path, file: str, way: tuple[Any, ...], value: Any, said: str
) -> None:
    path = comparison / file
    path.write_text(json.dumps(changed(json.loads(path.read_text()), way, value)))
    with pytest.raises(RunFileError, match=f"{path}: {said}"):
        sections(comparison)
