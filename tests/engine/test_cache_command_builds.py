"""What unikd cache builds as users type it: alone and in several processes, and what it finds wrong and puts right."""

import json
import os
import re
import signal
import time
from pathlib import Path

import pytest

from support.cache_commands import (
    PER_SHARD,
    cached_config,
    command,
    files,
    make_folder,
    start,
)
from support.real_runs import run

pytestmark = pytest.mark.slow


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


def test_ranks_share_a_build(tmp_path: Path) -> None:
    config = cached_config(tmp_path, views=20)
    make_folder(config, 288)
    two = start(tmp_path, "build", "--config", config, processes=2).done()
    assert two.returncode == 0, two.stderr
    assert two.stdout.count("20 views x 96 samples") == 1
    assert command("verify", "--config", config).returncode == 0


def test_concurrent_builds_share_the_work(tmp_path: Path) -> None:
    config = cached_config(tmp_path, views=20)
    make_folder(config, 288)
    for one in [start(tmp_path, "build", "--config", config) for _ in range(2)]:
        said = one.done()
        assert said.returncode == 0, said.stderr
        assert "20 views x 96 samples" in said.stdout
    assert command("verify", "--config", config).returncode == 0


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
