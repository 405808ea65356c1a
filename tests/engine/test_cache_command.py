"""`unikd cache`: what it builds, repairs, plans and prints, and its exit codes."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from support.cache_commands import (
    ALONE,
    PER_SHARD,
    SAMPLES,
    SHARDS,
    VIEWS,
    cached_config,
    command,
    files,
    make_folder,
    start,
)
from support.real_runs import run
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


def test_a_second_build_finds_the_cache_complete(tmp_path: Path) -> None:
    config = cached_config(tmp_path)
    first = command("build", "--config", config)
    assert first.returncode == 0, first.stderr
    line = rf"{tmp_path}/cache: 3 views x 96 samples, 22.5 KiB, built in [\d.]+ s\n"
    assert re.fullmatch(line, first.stdout), first.stdout  # and nothing else: scripts read it
    before = files(tmp_path / "cache")
    again = command("build", "--config", config)
    assert (again.returncode, again.stdout) == (
        0,
        f"{tmp_path}/cache: 3 views x 96 samples, 22.5 KiB, already complete\n",
    )
    assert files(tmp_path / "cache") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "tiny.json"]  # no run folder
    verified = command("verify", tmp_path / "cache")
    assert verified == (0, f"{tmp_path}/cache: 1 of 1 shards are ok\n", "")


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("flip", "shard-00001.bin: bad records: 1, the first is 91"),
        ("truncate", "shard-00001.bin: truncated"),
        ("delete", "shard-00001.bin: not built"),
    ],
)
def test_only_a_bad_shard_is_repaired(copied: Path, damage: str, found: str) -> None:
    folder = copied.parent / "cache"
    shard, bad = folder / "shard-00001.bin", int(damage != "delete")
    content, untouched = shard.read_bytes(), files(folder)
    del untouched[shard.name]
    if damage == "flip":
        at = 11 * (len(content) // PER_SHARD) + 40
        shard.write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    elif damage == "truncate":
        os.truncate(shard, len(content) - 1)
    else:
        shard.unlink()

    verified = command("verify", "--config", copied)
    assert verified.returncode == 4
    said = verified.stdout.splitlines()
    assert said[0] == found
    assert said[1].startswith(f"{folder}: 3 of 4 shards are ok, 1 {'bad' if bad else 'not built'}; unikd cache ")
    assert ("--repair" in said[1]) == bool(bad)
    assert len(said) == 2

    repaired = command("verify", folder, "--repair")
    assert repaired.returncode == 0  # so that `verify --repair && build` mends a cache
    assert repaired.stdout.count("discarded") == 2 * bad
    assert "unikd cache build makes what is not there" in repaired.stdout
    assert not shard.exists()
    assert command("verify", folder) == (
        4,
        f"{shard.name}: not built\n{folder}: 3 of 4 shards are ok, 1 not built; unikd cache build makes what is not "
        "there\n",
        "",
    )
    rebuilt = command("build", "--config", copied)
    assert rebuilt.returncode == 0, rebuilt.stderr
    assert shard.read_bytes() == content
    assert {name: was for name, was in files(folder).items() if name != shard.name} == untouched
    assert command("verify", folder).returncode == 0
    assert command("verify", folder, "--repair") == (0, f"{folder}: 4 of 4 shards are ok\n", "")


def test_shared_files_cannot_be_repaired(copied: Path) -> None:
    head = copied.parent / "cache" / "teacher.safetensors"
    content = head.read_bytes()
    head.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for arguments in (("verify", head.parent, "--repair"), ("info", head.parent), ("build", "--config", copied)):
        said = command(*arguments)
        assert said.returncode == 4
        assert said.stderr.startswith(f"unikd cache {arguments[0]}: error: {head} is damaged")
        assert "build the cache again" in said.stderr
    head.unlink()
    said = command("verify", head.parent)
    assert said.returncode == 4
    assert f"{head} is missing, but the shards were made with it" in said.stderr


def test_a_comparison_builds_each_cache_once(tmp_path: Path) -> None:
    runs = {
        "alone": {"distill.method": "none"},
        "KD": {"distill.method": "kd"},
        "UniKD": {},
        "stronger": {"distill.unikd.alpha": 9},
    }
    config = cached_config(tmp_path, dir=str(tmp_path / "cache-{method}-{seed}"), views=1)
    arguments = ("--config", config, "--set", f"compare={json.dumps({'seeds': [0, 1], 'runs': runs})}")
    said = command("build", *arguments)
    assert said.returncode == 0, said.stderr
    folders = [f"{tmp_path}/cache-{method}-{seed}" for seed in (0, 1) for method in ("kd", "unikd")]
    assert [line.partition(":")[0] for line in said.stdout.splitlines()] == folders
    assert sorted(map(str, tmp_path.glob("cache-*"))) == sorted(folders)
    assert command("verify", *arguments).stdout.splitlines() == [
        f"{folder}: 1 of 1 shards are ok" for folder in folders
    ]
    assert [json.loads(line)["folder"] for line in command("info", *arguments, "--json").stdout.splitlines()] == folders

    runs["stronger"] = {"distill.unikd.gate": "channel"}
    said = command("build", "--config", config, "--set", f"compare={json.dumps({'seeds': [0], 'runs': runs})}")
    assert said.returncode == 4
    assert 'head.gate: "spatial" in the cache, "channel" now' in said.stderr
    assert "teacher.cache.dir" in said.stderr


@pytest.mark.long
def test_ranks_share_a_build(tmp_path: Path) -> None:
    config = cached_config(tmp_path, views=20)
    make_folder(config, 288)
    two = start(tmp_path, "build", "--config", config, processes=2).done()
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("20 views x 96 samples") == 1
    assert command("verify", "--config", config).returncode == 0


@pytest.mark.long
def test_concurrent_builds_share_the_work(tmp_path: Path) -> None:
    config = cached_config(tmp_path, views=20)
    make_folder(config, 288)
    for one in [start(tmp_path, "build", "--config", config) for _ in range(2)]:
        said = one.done()
        assert said.returncode == 0, said.stderr
        assert "20 views x 96 samples" in said.stdout
    assert command("verify", "--config", config).returncode == 0


@pytest.mark.long
def test_sigterm_stops_a_build_that_can_continue(tmp_path: Path) -> None:
    config = cached_config(tmp_path, views=60)
    folder = make_folder(config, 480)  # 12 shards
    process = start(tmp_path, "build", "--config", config)
    deadline = time.monotonic() + 60
    while not (folder.path / "shard-00001.bin").exists():
        assert process.poll() is None, process.said()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stopped = process.done()
    assert stopped.returncode == 143, stopped
    assert "what is written is kept, start it again" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    kept = {name: was for name, was in files(folder.path).items() if name.endswith(".bin")}
    assert 2 <= len(kept) < 12
    assert command("verify", folder.path).returncode == 4
    assert command("build", "--config", config).returncode == 0
    assert command("verify", folder.path).returncode == 0
    assert kept.items() <= files(folder.path).items()


def test_a_read_only_run_trains_from_a_built_cache(built: Path) -> None:
    folder = built.parent / "cache"
    before = files(folder)
    said = run(
        built, "--set", "teacher.cache.mode=read", "--set", "train.max_steps=2", "--set", "teacher.cache.views=3"
    )
    assert said.returncode == 0, said.stderr
    assert json.loads((built.parent / "tiny" / "teacher.json").read_text())["cache"] == str(folder)
    assert files(folder) == before
