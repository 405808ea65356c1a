"""Runs as processes: order, number at a time, place, failures, and the end by a signal; the engine is shell scripts."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from unikd_fast.errors import FileError
from unikd_fast.recipes import runs
from unikd_fast.recipes.runs import Failure, Run, Training, expected_seconds, plan_runs
from unikd_fast.recipes.tables import TABLES, Cell, stand_in

PAIR = stand_in(TABLES["table6"]).pairs[0]
PATIENCE_S = 30.0
# Does what stands in a file with the name of the run's method.
ENGINE = 'method=$(basename "$(dirname "$(dirname "$2")")"); echo "$method begins" >> order; . ./$method.sh'

Script = Callable[..., Training]


@pytest.fixture
def training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Script:
    """Return the training of a run for each method, whose processes do what the scripts say."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(runs, "ENGINE", ("sh", str(tmp_path / "engine.sh")))
    (tmp_path / "engine.sh").write_text(ENGINE)

    def make(jobs: int = 1, **scripts: str) -> Training:
        for method, script in scripts.items():
            (tmp_path / f"{method}.sh").write_text(script)
        cells = [Cell(method, PAIR, 0) for method in scripts]
        return Training(plan_runs(cells, tmp_path, teachers="trained"), {"NAME": "value"}, jobs)

    return make


def run_of(method: str, out: Path) -> Run:
    return plan_runs([Cell(method, PAIR, 0)], out, teachers="trained")[0]


def wait_for(path: Path, *lines: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not (path.exists() and set(lines) <= set(path.read_text().splitlines())):
        assert time.monotonic() < deadline, f"{path}: no line {lines}"
        time.sleep(0.01)


def test_one_after_the_other_and_teachers_first(training: Script, tmp_path: Path) -> None:
    end = "echo $method ends >> order"
    training(kd=end, teacher=end, dkd=end).run()
    lines = [f"{method} {what}" for method in ("teacher", "kd", "dkd") for what in ("begins", "ends")]
    assert (tmp_path / "order").read_text().splitlines() == lines


def test_jobs_are_so_many_at_a_time(training: Script, tmp_path: Path) -> None:
    """Each of two waits for the other, and the third for both."""
    meets = "touch {}; for i in $(seq 500); do [ -e {} ] && break; sleep 0.02; done; [ -e {} ]; code=$?; "
    alone = "[ $(grep -c begins order) = 3 ]"
    scripts = {"kd": meets.format("a", "b", "b"), "dkd": meets.format("b", "a", "a")}
    both = training(2, **{name: f"{script} sleep 0.2; exit $code" for name, script in scripts.items()}, nkd=alone)
    both.run()
    assert both.failures == []


def test_a_log_is_continued_and_begins_with_the_command(training: Script, tmp_path: Path) -> None:
    for text in ("first", "second"):
        again = training(kd=f"echo {text}; echo $NAME; exit 3")
        again.run()
        assert [(each.code, each.reason) for each in again.failures] == [(3, (text, "value"))]
    lines = (tmp_path / "digits" / "kd" / PAIR.name / "seed-0.log").read_text().splitlines()
    assert [line for line in lines if not line.startswith("$ NAME=value ")] == ["first", "value", "second", "value"]
    assert lines[0].endswith(f"engine.sh --config {tmp_path}/digits/kd/{PAIR.name}/seed-0.json --resume auto")


def test_a_log_is_not_written_through_a_link(training: Script, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    log = run_of("kd", tmp_path).log
    log.parent.mkdir(parents=True)
    log.symlink_to(tmp_path / "precious")
    with pytest.raises(FileError, match=r"seed-0\.log cannot be written: .*it is a link, which is not followed"):
        training(kd="true").run()
    assert (tmp_path / "precious").read_text() == "mine"


def test_failures_name_their_remedy(tmp_path: Path) -> None:
    run = run_of("kd", tmp_path)
    assert str(Failure(run, 7, ("no memory",))) == (
        f"{run.name} failed with exit code 7; other runs shared the memory: lower --jobs; {run.log} ends\n  no memory"
    )
    assert str(Failure(run, -9, ("a", "b"))) == f"{run.name} failed with exit code -9; {run.log} ends\n  a\n  b"


SAVES = 'trap "echo saved; exit 143" TERM INT HUP; echo $method up >> order; while :; do sleep 0.02; done'


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_makes_runs_save_and_starts_no_more(
    training: Script, tmp_path: Path, number: signal.Signals, capfd: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(number)
    stopped = training(2, kd=SAVES, dkd=SAVES, nkd=SAVES)
    watch = threading.Thread(
        target=lambda: (wait_for(tmp_path / "order", "kd up", "dkd up"), os.kill(os.getpid(), number))
    )
    watch.start()
    stopped.run()
    watch.join()
    assert (stopped.signal, stopped.failures) == (number, [])
    for method in ("kd", "dkd"):
        assert run_of(method, tmp_path).log.read_text().splitlines()[-1] == "saved"
    assert not run_of("nkd", tmp_path).log.exists()
    assert capfd.readouterr().out.count("/seed-0: stopped after ") == 2
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_kills(training: Script, tmp_path: Path) -> None:
    deaf = training(kd='trap "" INT; trap "" TERM; echo up >> order; while :; do sleep 0.02; done')

    def press() -> None:
        wait_for(tmp_path / "order", "up")
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)

    watch = threading.Thread(target=press)
    watch.start()
    deaf.run()
    watch.join()
    assert deaf.signal == signal.SIGINT
    timings = run_of("kd", tmp_path).folder.with_name("seed-0.timings.jsonl").read_text()
    assert '"exit_code": -9' in timings


@pytest.mark.parametrize(
    ("jobs", "visible", "expected"),
    [(1, "0,1", [None]), (2, "0,1", ["0", "1"]), (3, "GPU-a,GPU-b", ["GPU-a", "GPU-b"]), (2, "", [None])],
)
def test_jobs_are_spread_over_the_gpus(
    jobs: int, visible: str, expected: list[str | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [place.get("CUDA_VISIBLE_DEVICES") for place in runs._places(jobs)] == expected


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="other systems do not tell which cores may be used")
def test_jobs_share_the_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    assert [runs._places(jobs)[0]["OMP_NUM_THREADS"] for jobs in (1, 3, 16)] == ["8", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert runs._places(2) == [{}]


def test_each_job_keeps_its_gpu(training: Script, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    meets = "touch {}; for i in $(seq 500); do [ -e {} ] && break; sleep 0.02; done; echo $CUDA_VISIBLE_DEVICES >> gpus"
    training(2, kd=meets.format("a", "b"), dkd=meets.format("b", "a")).run()
    assert sorted((tmp_path / "gpus").read_text().split()) == ["0", "1"]


def test_the_time_that_is_left_is_that_of_the_mean() -> None:
    assert expected_seconds(3, [10.0, 20.0]) == 45.0
    assert expected_seconds(3, []) is None
