"""Runs over a folder with bad files: what was skipped is counted over all processes and said in the metrics."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from support.odd_images import encoded
from support.real_runs import ALONE, run, run_ranks, train_records, write_config
from unikd_fast.config import ConfigError, load_config
from unikd_fast.data.dali import dali_problem
from unikd_fast.data.sampler import EpochSampler
from unikd_fast.engine.classification import CLASSIFICATION
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.evaluate import evaluate
from unikd_fast.engine.folder import read_result
from unikd_fast.engine.inputs import build_data, build_data_loader
from unikd_fast.engine.metrics import bad_sample_record
from unikd_fast.engine.teacher import evaluate_teacher
from unikd_fast.values import Features

SAMPLES = {"train": 32, "val": 12}


class Constant(torch.nn.Module):
    """Says class 0 of everything."""

    def forward(self, images: torch.Tensor) -> Features:
        return Features((), torch.eye(3)[torch.zeros(len(images), dtype=torch.int64)])


def write_folder(root: Path) -> Path:
    """32 images to train on, one of them empty, and 12 to evaluate, of which the first, of class 0, is cut."""
    for part, count in SAMPLES.items():
        for i in range(count):
            folder = root / part / f"class_{i % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            bad = b"" if part == "train" else encoded("PNG")[:-100]
            (folder / f"{i:03}.png").write_bytes(bad if i == 0 else encoded("PNG"))
    return root


def data_section(root: Path, **changes: Any) -> dict[str, Any]:
    return {
        "name": "image_folder",
        "root": str(root),
        "num_classes": 3,
        "loader": "torchvision",
        "workers": 0,
        "bad_images": "skip",
        "max_bad_share": 0.1,
        **changes,
    }


@pytest.mark.slow
@pytest.mark.long
def test_two_ranks_sum_skipped_samples(tmp_path: Path) -> None:
    path = write_config(
        tmp_path,
        data=data_section(write_folder(tmp_path / "images")),
        student={"model": "cifar/resnet8"},
        train={"total_epochs": 2},
    )
    finished = run_ranks(path)
    assert finished.returncode == 0, finished.stderr
    records = [json.loads(line) for line in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    # 32 samples make two steps of 16: none is left out of an epoch.
    bad = tmp_path / "images" / "train" / "class_0" / "000.png"
    said = [record for record in records if record["kind"] == "bad_samples"]
    assert said == [
        {"kind": "bad_samples", "step": 2 * epoch, "epoch": epoch, "skipped": 1, "samples": 32, "files": [str(bad)]}
        for epoch in (1, 2)
    ]
    assert [record["samples"] for record in records if record["kind"] == "evaluation"] == [11, 11]
    assert f"training: skipped a sample: cannot decode {bad}: the file is empty" in finished.stderr


def test_bad_samples_do_not_count_in_accuracy(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, data=data_section(write_folder(tmp_path / "images"))))
    processes = Processes(0, 1, 0, torch.device("cpu"))
    loader = build_data_loader(config, build_data(config, processes), processes)
    result = evaluate(Constant(), loader.evaluate("val"), processes)
    assert result["samples"] == 11
    assert result["accuracy"] == pytest.approx(100 * 3 / 11)  # of the four of class 0, one is cut
    strict = load_config(write_config(tmp_path, data=data_section(tmp_path / "images", max_bad_share=0.05)))
    with pytest.raises(ValueError, match=r"val: 1 of 12 samples .* allows 0\.05"):
        list(build_data_loader(strict, build_data(strict, processes), processes).evaluate("val"))


def test_max_bad_share_applies_to_all_ranks(tmp_path: Path) -> None:
    class TwoProcesses(Processes):
        def gather(self, value: Any) -> list[Any]:
            return [value, [*value, "another.png"]]

    root = write_folder(tmp_path / "images")
    processes = TwoProcesses(0, 1, 0, torch.device("cpu"))

    def record(**changes: Any) -> dict[str, Any] | None:
        config = load_config(write_config(tmp_path, data=data_section(root, **changes)))
        loader = build_data_loader(config, build_data(config, processes), processes)
        if config.data.bad_images == "skip":
            list(loader.train(0))
        return bad_sample_record(config, loader, processes)

    found = record()
    assert found is not None
    assert (found["skipped"], found["samples"]) == (3, 32)
    assert found["files"] == sorted([str(root / "train" / "class_0" / "000.png"), "another.png"])
    with pytest.raises(ValueError, match=r"training: 3 of 32 samples .* share of 0\.0938, .* allows 0\.08"):
        record(max_bad_share=0.08)
    assert record(bad_images="error") is None


def test_a_mixing_loader_reports_bad_samples(tmp_path: Path) -> None:
    data = data_section(write_folder(tmp_path / "images"), mixing={"mixup_alpha": 0.2})
    config = load_config(write_config(tmp_path, data=data))
    processes = Processes(0, 1, 0, torch.device("cpu"))
    loader = build_data_loader(config, build_data(config, processes), processes)
    list(loader.train(0))
    assert len(loader.bad_samples) == 1


@pytest.mark.parametrize("how", ["removed", "dangling"])
def test_a_skipped_file_is_skipped_after_training_too(how: str, tmp_path: Path) -> None:
    """The teacher's accuracy is measured last, and by every resume that finds none."""
    root = write_folder(tmp_path / "images")
    data = data_section(root, image_size=16, max_bad_share=0.2)
    config = load_config(write_config(tmp_path, data=data, run={"test_logits": True}))
    splits = build_data(config, ALONE)
    bad = root / "val" / "class_1" / "001.png"
    bad.unlink()
    if how == "dangling":
        bad.symlink_to(root / "gone.png")
        splits = build_data(config, ALONE)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("unikd_fast.engine.classification.build_data", lambda *_: splits)  # listed when it was there
        result = evaluate_teacher(config, tmp_path / "teacher", ALONE, task=CLASSIFICATION, label="teacher")
    assert result["last"]["test"]["samples"] == 10
    assert read_result(tmp_path / "teacher") == result


def test_a_cache_excludes_skipping(tmp_path: Path) -> None:
    teacher = {"cache": {"mode": "read_write"}}
    path = write_config(tmp_path, data=data_section(tmp_path), teacher=teacher)
    with pytest.raises(ConfigError, match=r"cache\.mode = 'read_write' with data\.bad_images = 'skip': .*=error, or"):
        load_config(path)
    load_config(path, ["data.bad_images=error"])
    load_config(path, ["teacher.cache.mode=off"])
    load_config(path, ["distill.method=none"])


def test_a_run_that_a_bad_file_ended_continues_without_it(tmp_path: Path) -> None:
    """In the middle of an epoch, as one that skipped bad files from the start."""
    root = write_folder(tmp_path / "images")
    (root / "val" / "class_0" / "000.png").write_bytes(encoded("PNG"))
    # One whose second step has the bad sample.
    seed = next(seed for seed in range(32) if 0 in EpochSampler(32, 16, seed=seed).global_batch(0, 1))
    common: dict[str, Any] = {"student": {"model": "cifar/resnet8"}, "run": {"seed": seed}}
    sections = {name: data_section(root, bad_images=name, image_size=16) for name in ("error", "skip")}
    sections["error"]["max_bad_share"] = 0.001
    paths = {name: write_config(tmp_path, name=name, data=data, **common) for name, data in sections.items()}
    ended = run(paths["error"])
    assert ended.returncode == 5
    before = (tmp_path / "error" / "metrics.jsonl").read_text().count('"train"')
    options = ["data.bad_images=skip", "data.max_bad_share=0.1"]
    resumed = run(paths["error"], "--resume", "auto", *(part for each in options for part in ("--set", each)))
    assert resumed.returncode == 0, resumed.stderr
    assert run(paths["skip"]).returncode == 0
    records = [train_records(tmp_path / name) for name in ("error", "skip")]
    kept = [[record for record in each if record["kind"] != "bad_samples"] for each in records]  # type: ignore[comparison-overlap]
    assert kept[0] == kept[1] and before == 1


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["dali", "torchvision"])
def test_a_bad_file_ends_the_run_with_its_name(loader: str, tmp_path: Path) -> None:
    if loader == "dali" and dali_problem() is not None:
        pytest.skip(f"DALI does not work here: {dali_problem()}")
    root = write_folder(tmp_path / "images")
    path = write_config(tmp_path, data=data_section(root, loader=loader, workers=1, bad_images="error"))
    done = run(path)
    assert done.returncode == 5
    assert "Traceback" not in done.stderr
    bad = root / "train" / "class_0" / "000.png"
    assert f"unikd train: error: cannot decode {bad}: the file is empty; repair the file or remove it" in done.stderr
