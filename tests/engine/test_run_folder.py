"""What may go wrong with the files of a run: one line, an exit code, and a folder that can be resumed."""

import errno
import json
import os
import stat
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from support.long_rounds import quick
from support.ranks import Done
from support.real_runs import ALONE, merged, run, write_config
from unikd_fast.config import load_config
from unikd_fast.engine import folder as run_folder
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.folder import import_student, open_run_folder, read_result, read_teacher
from unikd_fast.engine.metrics import MetricsWriter, read_metrics
from unikd_fast.engine.trackers import TrackedRun, Trackers
from unikd_fast.errors import ConfigError, FileError

Train = Callable[..., Done]
DAMAGE = {"empty": b"", "zeros": bytes(64), "cut": b'{"run": {"dir": "ru'}
SECTIONS: dict[str, dict[str, Any]] = {
    "data": {"image_size": 16, "synthetic_samples": 32},
    "student": {"model": "cifar/resnet8"},
    "distill": {"method": "kd"},
    "train": {"total_epochs": 1, "max_steps": 1, "accumulation_steps": 1, "ema_decay": None},
}


@pytest.fixture
def train(tmp_path: Path) -> Train:
    """`unikd train` in this process, on a run of one step in "run"."""

    def call(*arguments: str, **sections: dict[str, Any]) -> Done:
        return run(write_config(tmp_path, name="run", **merged(SECTIONS, sections)), *arguments)

    return call


def full_at(name: str) -> Callable[[int], None]:
    """os.fsync of a disk that is full when a file of this name is written."""
    sync = os.fsync

    def full(descriptor: int) -> None:
        if f".{name}." in Path(f"/proc/self/fd/{descriptor}").readlink().name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(descriptor)

    return full


def state(folder: Path) -> dict[str, tuple[int, bytes]]:
    """Time of change and content of everything in a folder."""
    return {
        str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"")
        for path in [folder, *folder.rglob("*")]
    }


def said_once(said: Done, message: str) -> None:
    """It is one line, and no traceback stands before it."""
    errors = [line for line in said.stderr.splitlines() if line.startswith("unikd train: error: ")]
    assert len(errors) == 1 and message in errors[0], said.stderr
    assert "Traceback" not in said.stderr


@pytest.mark.long
def test_a_full_disk_at_any_file_can_be_resumed(tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each start gets one file further than the one before; the last trains no step again."""
    folder = tmp_path / "run"
    before = ["environment.json", "config.json"]
    within = ["teacher.json", "metrics.jsonl", "best.safetensors", "student.safetensors"]
    after = ["test_logits.safetensors", "result.json", "report.md"]
    for name in before + within + after:
        with monkeypatch.context() as patched:
            patched.setattr("os.fsync", full_at(name))
            said = train(*([] if name in before else ["--resume", "auto"]))
        assert said.returncode == 1
        said_once(said, f"{name} cannot be written: No space left on device, ")
        assert said.stderr.count("step 1/1") <= 2
        if name == "student.safetensors":
            trained = (folder / "metrics.jsonl").read_bytes()
    done = train("--resume", "auto")
    assert done.returncode == 0, done.stderr
    assert (folder / "metrics.jsonl").read_bytes() == trained and b'"evaluation"' in trained
    assert not [path for path in folder.rglob("*") if path.name.endswith(".tmp")]


def test_the_same_command_works_after_a_full_disk(
    tmp_path: Path, train: Train, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full_at("config.json"))
        assert train().returncode == 1
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [".lock", "environment.json"]
    (tmp_path / "run" / ".config.json.0123456789abcdef.tmp").write_text("of a kill")
    done = train()
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "run" / "starts.jsonl").exists()


@pytest.mark.parametrize(
    ("place", "said"),
    [
        ("file/run", "Not a directory; part of its path is a file; choose another"),
        ("file", "Not a directory"),
        ("x" * 300, "File name too long; choose a shorter name"),
        ("gone/run", "File exists; a file of that name exists"),
    ],
    ids=["under a file", "a file", "a long name", "under a link to nothing"],
)
def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path, train: Train, place: str, said: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "gone").symlink_to(tmp_path / "nowhere")
    for resume in ("never", "auto"):
        found = train("--resume", resume, run={"dir": str(tmp_path / place)})
        assert found.returncode == 2
        said_once(found, f"run.dir = {tmp_path / place} cannot be written: {said}")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs a user to change to")
def test_a_read_only_folder_is_named(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, name="run"))
    os.seteuid(65534)
    try:
        with (
            pytest.raises(ConfigError, match=r"run\.dir = .*/run cannot be written: Permission denied; check its perm"),
            open_run_folder(config, ALONE, resume=False),
        ):
            pass
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("content", quick(DAMAGE.values(), DAMAGE["cut"]), ids=DAMAGE)
def test_the_teachers_figures_beside_a_cache_are_named(tmp_path: Path, train: Train, content: bytes) -> None:
    cached = {"teacher": {"cache": {"mode": "read_write", "dir": str(tmp_path / "cache"), "recheck": 0.0}}}
    assert train(**cached).returncode == 0
    path = tmp_path / "cache" / "teacher_result.json"
    figures = path.read_bytes()
    path.write_bytes(content)
    found = train(**cached, run={"dir": str(tmp_path / "another")})
    assert found.returncode == 1
    said_once(found, f"{path} is ")
    assert "remove it, and the teacher is evaluated again" in found.stderr
    path.unlink()
    assert train("--resume", "auto", **cached, run={"dir": str(tmp_path / "another")}).returncode == 0
    assert path.read_bytes() == figures


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_configuration_is_named(tmp_path: Path, train: Train, content: bytes) -> None:
    assert train().returncode == 0
    path = tmp_path / "run" / "config.json"
    path.write_bytes(content)
    found = train("--resume", "auto")
    assert found.returncode == 2
    said_once(found, f"{path} is ")
    assert "restore the configuration that the run was started with" in found.stderr
    path.write_bytes((tmp_path / "run.json").read_bytes())
    assert train("--resume", "auto").returncode == 0


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_result_is_named(tmp_path: Path, train: Train, content: bytes) -> None:
    assert train().returncode == 0
    path = tmp_path / "run" / "result.json"
    result, trained = path.read_bytes(), (tmp_path / "run" / "metrics.jsonl").read_bytes()
    path.write_bytes(content)
    found = train("--resume", "auto")
    assert found.returncode == 1
    said_once(found, f"{path} is ")
    assert "remove it and continue with --resume auto" in found.stderr
    path.unlink()
    assert train("--resume", "auto").returncode == 0
    assert path.read_bytes() == result and (tmp_path / "run" / "metrics.jsonl").read_bytes() == trained


@pytest.mark.parametrize("content", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_record_of_the_teacher_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "teacher.json"
    assert read_teacher(tmp_path) is None
    path.write_bytes(content)
    with pytest.raises(FileError, match=rf"{path} is .*; remove it and continue with --resume auto, which writes it"):
        read_teacher(tmp_path)


FIGURES: dict[str, Any] = {"epoch": 1, "test": {"accuracy": 50.0, "ce": 1.0}}
WRITTEN: dict[str, Any] = {"label": "student", "seed": 0, "model": "m", "test_is_val": True, "last": FIGURES}


@pytest.mark.parametrize(
    "content",
    [
        {},
        WRITTEN,
        {**WRITTEN, "best": 3},
        {**WRITTEN, "best": {"test": {"accuracy": 1.0, "ce": 1.0}}},
        {**WRITTEN, "best": FIGURES, "label": []},
        {**WRITTEN, "best": {"epoch": 1, "test": {"accuracy": "x"}}},
    ],
    ids=["empty", "no best", "a number", "no epoch", "a list as label", "a text as accuracy"],
)
def test_an_impossible_result_is_named(tmp_path: Path, content: dict[str, Any]) -> None:
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(FileError, match=r"result.json is damaged: it does not hold .*; remove it and continue"):
        read_result(tmp_path)
    whole = {**WRITTEN, "best": {**FIGURES, "epoch": None}}
    (tmp_path / "result.json").write_text(json.dumps(whole))
    assert read_result(tmp_path) == whole


@pytest.mark.parametrize("figures", [5, {}, {"accuracy": 50.0, "samples": 0}, {"accuracy": "x", "samples": 4}])
def test_impossible_teacher_figures_are_named(tmp_path: Path, figures: object) -> None:
    (tmp_path / "teacher.json").write_text(json.dumps({"validation": figures}))
    with pytest.raises(FileError, match=r"teacher.json is damaged: it does not hold .*; remove it and continue"):
        read_teacher(tmp_path)
    for known in (None, {"accuracy": 50.0, "samples": 4}):
        (tmp_path / "teacher.json").write_text(json.dumps({"validation": known}))
        assert read_teacher(tmp_path) == {"validation": known}


@pytest.mark.parametrize("content", [None, b"x" * 20], ids=["missing", "damaged"])
def test_lost_best_weights_are_named(tmp_path: Path, content: bytes | None) -> None:
    path = tmp_path / "best.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FileError, match=rf"{path} cannot be read: .*; restore it, or start a new run folder"):
        import_student(nn.Linear(2, 2), path)


def test_an_evaluation_without_figures_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"kind": "evaluation", "step": 1, "accuracy": 50.0}\n')
    with pytest.raises(FileError, match=r"metrics\.jsonl: line 1 is damaged \('ce'\); remove it"):
        read_metrics(tmp_path)


def test_damaged_metrics_are_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "train", "step": 1}\n' + bytes(8) + b"\n")
    with pytest.raises(FileError, match=r"metrics\.jsonl: line 2 is damaged .*; remove it"):
        read_metrics(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "train", "step": 1}\n{"kind": "tr')
    assert read_metrics(tmp_path) == [{"kind": "train", "step": 1}]


def test_showing_a_finished_run_changes_nothing(tmp_path: Path, train: Train) -> None:
    first = train()
    assert first.returncode == 0, first.stderr
    (tmp_path / "run" / ".lock").unlink()
    before = state(tmp_path / "run")
    shown = train("--resume", "auto")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.splitlines()[-3:] == first.stdout.splitlines()[-3:]
    assert state(tmp_path / "run") == before
    other = train("--resume", "auto", "--set", "train.learning_rate=0.25")
    assert other.returncode == 2
    said_once(other, "train.learning_rate was 0.05, now 0.25")
    assert state(tmp_path / "run") == before


def test_further_starts_are_appended_to_the_record(tmp_path: Path, train: Train) -> None:
    assert train().returncode == 0
    folder = tmp_path / "run"
    first = (folder / "environment.json").read_bytes()
    assert json.loads(first)["time"].endswith("+00:00") and not (folder / "starts.jsonl").exists()
    for _ in range(2):
        (folder / "report.md").unlink()
        assert train("--resume", "auto").returncode == 0
    assert (folder / "environment.json").read_bytes() == first
    starts = [json.loads(line) for line in (folder / "starts.jsonl").read_text().splitlines()]
    assert [sorted(start) for start in starts] == [["command", "commit", "time", "versions", "world_size"]] * 2
    assert starts[0]["versions"] == json.loads(first)["versions"] and starts[0]["time"] <= starts[1]["time"]


def test_links_in_the_folder_are_not_written_through(tmp_path: Path, train: Train) -> None:
    precious = tmp_path / "precious"
    precious.write_text("kept")
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / ".lock").symlink_to(precious)
    refused = train()
    assert refused.returncode == 1
    said_once(refused, f"{folder / '.lock'} cannot be written: Too many levels of symbolic links; it is a link")
    (folder / ".lock").unlink()
    (folder / ".lock").hardlink_to(precious)
    refused = train()
    assert refused.returncode == 1
    said_once(refused, f"{folder / '.lock'} has another name too (a hard link)")
    (folder / ".lock").unlink()
    (folder / "environment.json").symlink_to(precious)
    assert train().returncode == 0
    written = ["config.json", "metrics.jsonl", "result.json", "student.safetensors", "test_logits.safetensors"]
    (folder / "config.tmp").symlink_to(precious)
    for name in ("starts.jsonl", *written[2:]):
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(precious)
    (folder / "result.json").unlink()
    refused = train("--resume", "auto")
    assert refused.returncode == 1
    said_once(refused, f"{folder / 'starts.jsonl'} cannot be written: Too many levels of symbolic links")
    (folder / "starts.jsonl").unlink()
    assert train("--resume", "auto").returncode == 0
    assert not any((folder / name).is_symlink() for name in written)
    assert precious.read_text() == "kept"


def test_every_file_has_the_mode_of_umask(tmp_path: Path, train: Train) -> None:
    before = os.umask(0o027)
    try:
        done = train(run={"trackers": ["tensorboard"]})
    finally:
        os.umask(before)
    assert done.returncode == 0, done.stderr
    files = [path for path in (tmp_path / "run").rglob("*") if path.is_file()]
    assert {"student.safetensors", "test_logits.safetensors", "best.safetensors"} <= {path.name for path in files}
    assert {path.name for path in files if stat.S_IMODE(path.stat().st_mode) != 0o640} == set()


@pytest.mark.usefixtures("small_files")
def test_a_full_disk_while_training_is_named(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, ALONE, label="x", total_steps=9, start_step=0)
    with pytest.raises(FileError, match=r"metrics\.jsonl cannot be written: File too large, .*make room"):
        for step in range(1, 1000):
            writer.write("train", step, {"loss": 0.5})
    writer.close()


@pytest.mark.usefixtures("small_files")
def test_tensorboard_without_room_is_left_out(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    tracked = Trackers(["tensorboard"], TrackedRun(tmp_path, "x", "x, seed 0", {}, "unknown", 0))
    said = ""
    for step in range(1, 1000):
        tracked.log("train", step, {f"a figure of step {step}": 0.5})
        said += capfd.readouterr().err  # what captures it is a file, too, and TensorBoard writes late
    tracked.close(finished=True)
    assert "Traceback" not in said + capfd.readouterr().err
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(warnings) == 1
    assert "[x, seed 0] tracking with tensorboard ends here, and the run goes on: " in warnings[0]
    assert "File too large" in warnings[0]


def test_other_ranks_get_the_error_of_rank_0(tmp_path: Path) -> None:
    class Second(Processes):
        def broadcast(self, value: Any) -> Any:
            assert value is None
            return None, FileError, "metrics.jsonl cannot be written"

    with pytest.raises(FileError, match=r"^metrics\.jsonl cannot be written$"):
        second = Second(1, 2, 1, ALONE.device)
        MetricsWriter(tmp_path, second, label="x", total_steps=9, start_step=0)
    assert list(tmp_path.iterdir()) == []


def test_the_commit_of_another_project_is_not_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*arguments: str) -> str:
        identity = ("-c", "user.name=a", "-c", "user.email=a@b")
        done = subprocess.run(["git", *identity, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    (tmp_path / "folder.py").touch()
    monkeypatch.setattr(run_folder, "__file__", str(tmp_path / "folder.py"))
    git("init")
    git("commit", "--allow-empty", "--message", "another project")
    assert run_folder.commit() == "unknown"
    git("add", "folder.py")
    git("commit", "--message", "ours")
    assert run_folder.commit() == git("rev-parse", "HEAD")
    (tmp_path / "folder.py").write_text("changed")
    assert run_folder.commit() == git("rev-parse", "HEAD") + "-dirty"
