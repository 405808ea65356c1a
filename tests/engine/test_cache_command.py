"""What unikd cache says as users type it: of a cache, of a plan and of errors, with its exit codes."""

import json
import re
from pathlib import Path

import pytest

from support.cache_commands import (
    ALONE,
    SAMPLES,
    SHARDS,
    VIEWS,
    cached_config,
    command,
)
from unikd_fast.config import load_config
from unikd_fast.engine.build import build_experiment
from unikd_fast.teacher.cache import CacheFolder

pytestmark = pytest.mark.slow


def test_info_as_text_and_json(copied: Path) -> None:
    folder = copied.parent / "cache"
    (folder / "shard-00003.bin").unlink()
    text = command("info", folder)
    assert text.returncode == 0
    lines = text.stdout.splitlines()
    assert lines[:5] == [
        f"folder      {folder}",
        "stored      3 views x 96 samples",
        "shards      3 of 4 are built",
        "size        18.8 KiB of 22.5 KiB (23,040 bytes)",
        "codec       fp16 logits of 10 classes and Gaussians, 64 bytes a view",
    ]
    for line in ("teacher.model: cifar/resnet8", "views.padding: 2", 'head.levels: ["layer1", "layer2", "layer3"]'):
        assert line in lines
    assert "builder.precision: fp32" in lines
    assert any(line.startswith("builder.fidelity_skipped: teacher.weights=random") for line in lines)
    assert command("info", "--config", copied).stdout == text.stdout

    found = json.loads(command("info", folder, "--json").stdout)
    assert (found["shards_done"], found["shards"], found["bytes_total"]) == (3, SHARDS, VIEWS * SAMPLES * 80)
    assert (found["views"], found["samples"], found["records"]) == (VIEWS, SAMPLES, VIEWS * SAMPLES)
    assert found["codec"] == {"kind": "fp16", "num_classes": 10, "top_k": None, "gaussian": True, "record_bytes": 64}
    assert found["key"]["teacher"]["model"] == "cifar/resnet8"
    assert found["builder"]["precision"] == "fp32"


def test_info_of_an_empty_cache(tmp_path: Path) -> None:
    config = cached_config(tmp_path, distill={"method": "kd"}, logits="top_k", top_k=3)
    arguments = ("--config", config, "--set", "distill.kd.temperature=1")
    read = load_config(config, ["teacher.cache.mode=read_write", "distill.kd.temperature=1"])
    build_experiment(read, ALONE)
    said = command("info", *arguments)
    assert said.returncode == 0
    for line in ("shards      0 of 1 are built", "codec       the 3 largest logits of 10 classes, 24 bytes a view"):
        assert line in said.stdout
    assert said.stdout.endswith("builder: nobody yet\n")
    assert json.loads(command("info", tmp_path / "cache", "--json").stdout)["builder"] is None
    assert command("verify", *arguments).stdout.splitlines()[0] == "shard-00000.bin: not built"


def test_plan_measures_and_writes_nothing(tmp_path: Path) -> None:
    config = cached_config(tmp_path, views=7)
    said = command("plan", "--config", config)
    assert said.returncode == 0, said.stderr
    assert said.stdout.startswith(f"folder      {tmp_path}/cache\nstored      7 views x 96 samples\n")
    for pattern in (
        r"size +7.5 KiB a view, 52.5 KiB in all",
        r"[\d.]+ ms a micro-batch of 8",
        r"break-even +after \d+",
    ):
        assert re.search(pattern, said.stdout), said.stdout
    found = json.loads(command("plan", "--config", config, "--json").stdout)
    assert (found["run"], found["epochs"], found["micro_batches"]) == ("student", 3, 12)
    assert found["sizes"]["missing_bytes"] == 7 * found["sizes"]["view_bytes"] == 7 * SAMPLES * 80
    assert found["epoch_s"] > found["cached_epoch_s"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


def test_plan_lists_distinct_runs(tmp_path: Path) -> None:
    kd = {"distill.method": "kd"}
    runs = {"alone": {"distill.method": "none"}, "KD": kd, "KD again": kd, "UniKD": {"distill.unikd.alpha": 2.0}}
    config = cached_config(tmp_path, dir=str(tmp_path / "{method}-{seed}"))
    trained = ("--set", "teacher.weights=null", "--set", "teacher.training.total_epochs=1")
    compare = f"compare={json.dumps({'seeds': [4, 5, 6], 'runs': runs})}"
    said = command("plan", "--config", config, *trained, "--set", compare)
    assert said.returncode == 0, said.stderr
    lines = said.stdout.splitlines()
    assert [line for line in lines if "(and 2 more: a cache each)" in line] == [
        "KD, seed 4 (and 2 more: a cache each)",
        "UniKD, seed 4 (and 2 more: a cache each)",
    ]
    folders = [line.split()[1] for line in lines if line.startswith("folder")]
    assert folders == [f"{tmp_path}/kd-4", f"{tmp_path}/unikd-4"]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]
    refused = command("plan", "--config", config, "--set", "distill.unikd.teacher_head=anchored")
    assert refused.returncode == 2
    assert "5.25 MiB a view of all samples" in refused.stderr
    refused = command("build", "--config", config, *trained)
    assert refused.returncode == 2
    assert "the run trains its teacher itself" in refused.stderr
    assert "give teacher.weights" in refused.stderr


def test_errors_are_one_line_with_their_exit_code(tmp_path: Path) -> None:
    config = cached_config(tmp_path)
    for arguments, code, part in [
        (("verify", tmp_path / "nowhere"), 4, "nowhere is not a cache"),
        (("info", tmp_path / "nowhere"), 4, "nowhere is not a cache"),
        (("info", "--config", config), 4, "cache is not a cache, manifest.json is missing; build the cache first"),
        (("info", tmp_path, "--set", "run.seed=1"), 2, "--set changes a configuration"),
        (("build", "--config", tmp_path / "absent.json"), 2, "no such file"),
        (("build", "--config", config, "--set", "teacher.cache.veiws=1"), 2, "'teacher.cache.views'"),
        (("build", "--config", config, "--set", "distill.method=none"), 2, "no run has a teacher"),
        (("build", "--config", config, "--set", "teacher.weights=null"), 2, "teacher.weights is not set"),
        (("build", "--config", config, "--set", "train.global_batch_size=98"), 2, "96 samples do not fill"),
        (("plan", "--config", config, "--set", "data.name=imagenet", "--set", "data.root=/no/such"), 2, "/no/such"),
        (("plan", "--config", config, "--set", 'teacher.cache={"logits":"top_k","top_k":2}'), 2, "temperature = 1"),
    ]:
        said = command(*arguments)
        assert (said.returncode, said.stdout) == (code, ""), (arguments, said)
        assert said.stderr.startswith(f"unikd cache {arguments[0]}: error: ")
        assert part in said.stderr
    assert command("verify").returncode == 2
    assert command("verify", tmp_path, "--config", config).returncode == 2


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError(5, "Input/output error", "shard-00001.bin"), 1)]
)
def test_ctrl_c_and_a_broken_disk_give_no_traceback(
    built: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(CacheFolder, "verify", fail)
    said = command("verify", built.parent / "cache")
    assert (said.returncode, said.stdout) == (code, "")
    assert said.stderr.startswith("unikd cache verify: error: ")
    assert said.stderr.count("\n") == 1
