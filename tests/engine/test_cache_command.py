"""unikd-cache as users type it: what it builds, what it finds wrong and puts right, what it says, its exit codes."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from real_runs import LAUNCHERS, ROOT, run, write_config

from unikd_fast.config import load_config
from unikd_fast.config.load import cache_dir
from unikd_fast.engine.build import build_experiment
from unikd_fast.engine.cache_command import main
from unikd_fast.engine.processes import Processes
from unikd_fast.teacher.cache import CacheFolder

pytestmark = pytest.mark.slow

ALONE = Processes(rank=0, world_size=1, local_rank=0, device=torch.device("cpu"))
PREFIT = {"method": "unikd", "teacher_head": "prefit", "head_steps": 3}
VIEWS, SAMPLES, PER_SHARD, SHARDS = 3, 96, 80, 4  # shards of 80, 80, 80 and 48 records


class Said(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command in this process."""

    def call(*arguments: object) -> Said:
        capsys.readouterr()
        with patch.dict(os.environ):  # joining a group of one process writes there
            code = main([str(argument) for argument in arguments])
        return Said(code, *capsys.readouterr())

    return call


def start(*arguments: object, launcher: str = "python", processes: int = 1) -> "subprocess.Popen[str]":
    """The command in processes of its own, with a thread each."""
    before = [*LAUNCHERS[launcher], str(processes)] if launcher != "python" else LAUNCHERS[launcher]
    return subprocess.Popen(
        [*before, "-m", "unikd_fast.engine.cache_command", *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def ended(process: "subprocess.Popen[str]") -> Said:
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return Said(process.returncode, out, err)


def cached_config(folder: Path, *, distill: dict[str, Any] = PREFIT, **cache: Any) -> Path:
    """The tiny experiment, with its cache in ``folder / cache``; mode stays off."""
    return write_config(folder, distill=distill, teacher={"cache": {"dir": str(folder / "cache"), **cache}})


def make_folder(config: Path, records_per_shard: int) -> CacheFolder:
    """The folder of a configuration's cache with small shards, none of them built."""
    elsewhere = config.with_name("cache-that-only-knows-the-key")
    read = load_config(config, ["teacher.cache.mode=read_write", f"teacher.cache.dir={elsewhere}"])
    cache = build_experiment(read, ALONE).cache
    assert cache is not None
    found = cache.folder
    return CacheFolder.create_or_open(
        cache_dir(load_config(config)), found.key, found.codec, found.sample_ids, found.views, records_per_shard
    )


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """What tells whether a shard's file was touched: inode and time."""
    return {path.name: (path.stat().st_ino, path.stat().st_mtime_ns) for path in sorted(folder.glob("shard-*"))}


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A configuration whose cache is built, in several shards."""
    config = cached_config(tmp_path_factory.mktemp("built"))
    make_folder(config, PER_SHARD)
    with patch.dict(os.environ):
        assert main(["build", "--config", str(config)]) == 0
    return config


@pytest.fixture
def copied(built: Path, tmp_path: Path) -> Path:
    """A configuration with a copy of that cache, to be harmed."""
    shutil.copytree(built.parent / "cache", tmp_path / "cache")
    return cached_config(tmp_path)


def test_build_makes_the_cache_without_training_and_a_second_build_finds_it_complete(
    tmp_path: Path, command: Command
) -> None:
    config = cached_config(tmp_path)
    first = ended(start("build", "--config", config))
    assert first.code == 0, first.err
    line = rf"{tmp_path}/cache: 3 views x 96 samples, 22.5 KiB, built in [\d.]+ s\n"
    assert re.fullmatch(line, first.out), first.out  # and nothing else: scripts read it
    before = files(tmp_path / "cache")
    again = command("build", "--config", config)
    assert (again.code, again.out) == (0, f"{tmp_path}/cache: 3 views x 96 samples, 22.5 KiB, already complete\n")
    assert files(tmp_path / "cache") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "tiny.json"]  # no run folder
    verified = ended(start("verify", tmp_path / "cache"))
    assert verified == (0, f"{tmp_path}/cache: 1 of 1 shards are ok\n", "")


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        ("flip", "shard-00001.bin: bad records: 1, the first is 91"),
        ("truncate", "shard-00001.bin: truncated"),
        ("delete", "shard-00001.bin: not built"),
    ],
)
def test_a_bad_shard_is_named_discarded_and_alone_built_anew(
    copied: Path, command: Command, damage: str, found: str
) -> None:
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
    assert verified.code == 4
    said = verified.out.splitlines()
    assert said[0] == found
    assert said[1].startswith(f"{folder}: 3 of 4 shards are ok, 1 {'bad' if bad else 'not built'}; unikd-cache ")
    assert ("--repair" in said[1]) == bool(bad)
    assert len(said) == 2

    repaired = command("verify", folder, "--repair")
    assert repaired.code == 0  # so that `verify --repair && build` mends a cache
    assert repaired.out.count("discarded") == 2 * bad
    assert "unikd-cache build makes what is not there" in repaired.out
    assert not shard.exists()
    assert command("verify", folder) == (
        4,
        f"{shard.name}: not built\n{folder}: 3 of 4 shards are ok, 1 not built; unikd-cache build makes what is not "
        "there\n",
        "",
    )
    rebuilt = command("build", "--config", copied)
    assert rebuilt.code == 0, rebuilt.err
    assert shard.read_bytes() == content
    assert {name: was for name, was in files(folder).items() if name != shard.name} == untouched
    assert command("verify", folder).code == 0
    assert command("verify", folder, "--repair") == (0, f"{folder}: 4 of 4 shards are ok\n", "")


def test_what_belongs_to_all_shards_cannot_be_repaired(copied: Path, command: Command) -> None:
    head = copied.parent / "cache" / "teacher.safetensors"
    content = head.read_bytes()
    head.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    for arguments in (("verify", head.parent, "--repair"), ("info", head.parent), ("build", "--config", copied)):
        said = command(*arguments)
        assert said.code == 4
        assert said.err.startswith(f"unikd-cache: error: {head} is damaged")
        assert "build the cache again" in said.err
    head.unlink()
    said = command("verify", head.parent)
    assert said.code == 4
    assert f"{head} is missing, and the shards were made with what it held" in said.err


def test_info_tells_sizes_key_and_builder_as_text_and_json(copied: Path, command: Command) -> None:
    folder = copied.parent / "cache"
    (folder / "shard-00003.bin").unlink()
    text = command("info", folder)
    assert text.code == 0
    lines = text.out.splitlines()
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
    assert command("info", "--config", copied).out == text.out

    found = json.loads(command("info", folder, "--json").out)
    assert (found["shards_done"], found["shards"], found["bytes_total"]) == (3, SHARDS, VIEWS * SAMPLES * 80)
    assert (found["views"], found["samples"], found["records"]) == (VIEWS, SAMPLES, VIEWS * SAMPLES)
    assert found["codec"] == {"kind": "fp16", "num_classes": 10, "top_k": None, "gaussian": True, "record_bytes": 64}
    assert found["key"]["teacher"]["model"] == "cifar/resnet8"
    assert found["builder"]["precision"] == "fp32"


def test_info_before_anything_is_built(tmp_path: Path, command: Command) -> None:
    config = cached_config(tmp_path, distill={"method": "kd"}, logits="top_k", top_k=3)
    arguments = ("--config", config, "--set", "distill.temperature=1")
    read = load_config(config, ["teacher.cache.mode=read_write", "distill.temperature=1"])
    build_experiment(read, ALONE)
    said = command("info", *arguments)
    assert said.code == 0
    for line in ("shards      0 of 1 are built", "codec       the 3 largest logits of 10 classes, 24 bytes a view"):
        assert line in said.out
    assert said.out.endswith("builder: nobody yet\n")
    assert json.loads(command("info", tmp_path / "cache", "--json").out)["builder"] is None
    assert command("verify", *arguments).out.splitlines()[0] == "shard-00000.bin: not built"


def test_plan_measures_and_makes_no_folder(tmp_path: Path, command: Command) -> None:
    config = cached_config(tmp_path, views=7)
    said = command("plan", "--config", config)
    assert said.code == 0, said.err
    assert said.out.startswith(f"folder      {tmp_path}/cache\nstored      7 views x 96 samples\n")
    for pattern in (
        r"size +7.5 KiB a view, 52.5 KiB in all",
        r"[\d.]+ ms a micro-batch of 8",
        r"break-even +after \d+",
    ):
        assert re.search(pattern, said.out), said.out
    found = json.loads(command("plan", "--config", config, "--json").out)
    assert (found["run"], found["epochs"], found["micro_batches"]) == ("student", 3, 12)
    assert found["sizes"]["missing_bytes"] == 7 * found["sizes"]["view_bytes"] == 7 * SAMPLES * 80
    assert found["epoch_s"] > found["cached_epoch_s"] > 0
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]


def test_plan_shows_each_kind_of_run_once_and_needs_no_trained_teacher(tmp_path: Path, command: Command) -> None:
    kd = {"distill.method": "kd"}
    runs = {"alone": {"distill.method": "none"}, "KD": kd, "KD again": kd, "UniKD": {"distill.alpha": 2.0}}
    config = cached_config(tmp_path, dir=str(tmp_path / "{method}-{seed}"))
    trained = ("--set", "teacher.weights=null", "--set", "teacher.training.total_epochs=1")
    compare = f"compare={json.dumps({'seeds': [4, 5, 6], 'runs': runs})}"
    said = command("plan", "--config", config, *trained, "--set", compare)
    assert said.code == 0, said.err
    lines = said.out.splitlines()
    assert [line for line in lines if "(and 2 more: a cache each)" in line] == [
        "KD, seed 4 (and 2 more: a cache each)",
        "UniKD, seed 4 (and 2 more: a cache each)",
    ]
    folders = [line.split()[1] for line in lines if line.startswith("folder")]
    assert folders == [f"{tmp_path}/kd-4", f"{tmp_path}/unikd-4"]
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.json"]
    refused = command("plan", "--config", config, "--set", "distill.teacher_head=anchored")
    assert refused.code == 2
    assert "5.25 MiB a view of all samples" in refused.err
    refused = command("build", "--config", config, *trained)
    assert refused.code == 2
    assert "the run trains its teacher itself" in refused.err
    assert "give teacher.weights" in refused.err


def test_a_comparison_builds_each_cache_once_and_refuses_two_in_one_folder(tmp_path: Path, command: Command) -> None:
    runs = {
        "alone": {"distill.method": "none"},
        "KD": {"distill.method": "kd"},
        "UniKD": {},
        "stronger": {"distill.alpha": 9},
    }
    config = cached_config(tmp_path, dir=str(tmp_path / "cache-{method}-{seed}"), views=1)
    arguments = ("--config", config, "--set", f"compare={json.dumps({'seeds': [0, 1], 'runs': runs})}")
    said = command("build", *arguments)
    assert said.code == 0, said.err
    folders = [f"{tmp_path}/cache-{method}-{seed}" for seed in (0, 1) for method in ("kd", "unikd")]
    assert [line.partition(":")[0] for line in said.out.splitlines()] == folders
    assert sorted(map(str, tmp_path.glob("cache-*"))) == sorted(folders)
    assert command("verify", *arguments).out.splitlines() == [f"{folder}: 1 of 1 shards are ok" for folder in folders]
    assert [json.loads(line)["folder"] for line in command("info", *arguments, "--json").out.splitlines()] == folders

    runs["stronger"] = {"distill.gate": "channel"}
    said = command("build", "--config", config, "--set", f"compare={json.dumps({'seeds': [0], 'runs': runs})}")
    assert said.code == 4
    assert 'head.gate: "spatial" in the cache, "channel" now' in said.err
    assert "teacher.cache.dir" in said.err


def test_several_processes_share_the_work(tmp_path: Path, command: Command) -> None:
    config = cached_config(tmp_path, views=20)
    make_folder(config, 288)
    two = ended(start("build", "--config", config, launcher="torchrun", processes=2))
    assert two.code == 0, two.err
    assert two.out.count("20 views x 96 samples") == 1
    assert command("verify", "--config", config).code == 0


def test_independent_builds_of_one_folder_share_the_work(tmp_path: Path, command: Command) -> None:
    config = cached_config(tmp_path, views=20)
    make_folder(config, 288)
    for one in [start("build", "--config", config) for _ in range(2)]:
        said = ended(one)
        assert said.code == 0, said.err
        assert "20 views x 96 samples" in said.out
    assert command("verify", "--config", config).code == 0


def test_sigterm_ends_a_build_with_143_and_the_next_one_goes_on(tmp_path: Path, command: Command) -> None:
    config = cached_config(tmp_path, views=60)
    folder = make_folder(config, 480)  # 12 shards
    process = start("build", "--config", config)
    deadline = time.monotonic() + 60
    while not (folder.path / "shard-00001.bin").exists():
        assert process.poll() is None, ended(process)
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    stopped = ended(process)
    assert stopped.code == 143, stopped
    assert "what is written is kept, start it again" in stopped.err
    assert "Traceback" not in stopped.err
    kept = {name: was for name, was in files(folder.path).items() if name.endswith(".bin")}
    assert 2 <= len(kept) < 12
    assert command("verify", folder.path).code == 4
    assert command("build", "--config", config).code == 0
    assert command("verify", folder.path).code == 0
    assert kept.items() <= files(folder.path).items()


def test_a_run_that_may_only_read_trains_from_what_was_built(built: Path) -> None:
    folder = built.parent / "cache"
    before = files(folder)
    said = run(
        built, "--set", "teacher.cache.mode=read", "--set", "train.max_steps=2", "--set", "teacher.cache.views=3"
    )
    assert said.returncode == 0, said.stderr
    assert json.loads((built.parent / "tiny" / "teacher.json").read_text())["cache"] == str(folder)
    assert files(folder) == before


def test_errors_are_one_line_with_their_exit_code(tmp_path: Path, command: Command) -> None:
    config = cached_config(tmp_path)
    for arguments, code, part in [
        (("verify", tmp_path / "nowhere"), 4, "nowhere is no cache"),
        (("info", tmp_path / "nowhere"), 4, "nowhere is no cache"),
        (("info", "--config", config), 4, "cache is no cache, manifest.json is missing; build the cache first"),
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
        assert (said.code, said.out) == (code, ""), (arguments, said)
        assert said.err.startswith("unikd-cache: error: ")
        assert part in said.err
    with pytest.raises(SystemExit, match="2"):
        command("verify")
    with pytest.raises(SystemExit, match="2"):
        command("verify", tmp_path, "--config", config)


@pytest.mark.parametrize(
    ("error", "code"), [(KeyboardInterrupt(), 130), (OSError(5, "Input/output error", "shard-00001.bin"), 4)]
)
def test_ctrl_c_and_a_broken_disk_give_no_traceback(
    built: Path, command: Command, monkeypatch: pytest.MonkeyPatch, error: BaseException, code: int
) -> None:
    def fail(*_: object) -> None:
        raise error

    monkeypatch.setattr(CacheFolder, "verify", fail)
    said = command("verify", built.parent / "cache")
    assert (said.code, said.out) == (code, "")
    assert said.err.startswith("unikd-cache: error: ")
    assert said.err.count("\n") == 1


def test_a_wrong_configuration_is_refused_and_help_is_given_without_torch(tmp_path: Path) -> None:
    """As the launchers start it: deepspeed's puts --local_rank before everything."""
    code = (
        "import sys; from unikd_fast.engine.cache_command import main\n"
        "try: code = main(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code\n"
        "assert 'torch' not in sys.modules; sys.exit(code)"
    )

    def call(*arguments: object) -> Said:
        done = subprocess.run(
            [sys.executable, "-c", code, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        return Said(done.returncode, done.stdout, done.stderr)

    assert call("--help").code == 0
    assert "exit codes: 0 every shard is ok" in call("verify", "--help").out
    wrong = call("--local_rank=0", "build", "--config", cached_config(tmp_path), "--set", "teacher.cache.views=0")
    assert (wrong.code, wrong.out) == (2, "")
    assert wrong.err.startswith("unikd-cache: error: ")
    assert "teacher.cache.views = 0" in wrong.err
