"""Jobs as processes: order, number at a time, failures, what follows from them, and the end by a signal."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import pytest

from unikd_fast.errors import FileError
from unikd_fast.reproduce.schedule import Ended, Job, Schedule, Started

ROOT = Path(__file__).parents[2]
PATIENCE_S = 30.0


class Places:
    """So many at a time."""

    def __init__(self, count: int) -> None:
        self.count, self.offers = count, 0

    def offer(self, running: Sequence[Mapping[str, str]]) -> Mapping[str, str] | None:
        if len(running) >= self.count:
            return None
        self.offers += 1
        return {"PLACE": str(self.offers)}

    def narrow(self, running: int) -> bool:
        self.count = max(1, running)
        return running > 0


def job(folder: Path, name: str, script: str = "true", *needs: str) -> Job:
    return Job(name, ("sh", "-c", script), folder / f"{name}.log", needs, {"NAME": name})


def run(schedule: Schedule) -> list[Started | Ended]:
    return list(schedule.run())


def started(events: Sequence[Started | Ended]) -> list[str]:
    return [event.job.name for event in events if isinstance(event, Started)]


def ended(events: Sequence[Started | Ended]) -> dict[str, Ended]:
    return {event.job.name: event for event in events if isinstance(event, Ended)}


def wait_for(path: Path, text: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not (path.exists() and text in path.read_text().splitlines()):
        assert time.monotonic() < deadline, f"{path}: no line {text}"
        time.sleep(0.02)


def test_one_at_a_time_in_order(tmp_path: Path) -> None:
    jobs = [job(tmp_path, name, "sleep 0.1") for name in "cab"]
    events = run(Schedule(jobs, Places(1)))
    assert [(type(event).__name__, event.job.name) for event in events] == [
        (kind, name) for name in "cab" for kind in ("Started", "Ended")
    ]
    assert all(0.1 <= event.wall_s < PATIENCE_S and event.code == 0 for event in ended(events).values())


def test_no_more_at_a_time_than_there_is_room_for(tmp_path: Path) -> None:
    jobs = [job(tmp_path, name, "sleep 0.2") for name in "abcde"]
    running, most = 0, 0
    for event in Schedule(jobs, Places(2)).run():
        running += 1 if isinstance(event, Started) else -1
        most = max(most, running)
        assert event.beside <= 1
    assert most == 2


def test_a_job_waits_for_what_it_needs_and_others_go_first(tmp_path: Path) -> None:
    jobs = [
        job(tmp_path, "teacher", "sleep 0.3; touch taught"),
        job(tmp_path, "student", "test -e taught", "teacher"),
        job(tmp_path, "alone"),
        job(tmp_path, "last", "true", "not scheduled, so there already"),
    ]
    jobs = [each._replace(command=("sh", "-c", f"cd {tmp_path}; {each.command[2]}")) for each in jobs]
    events = run(Schedule(jobs, Places(2)))
    assert started(events)[:2] == ["teacher", "alone"]
    assert started(events).index("student") > 1
    assert [event.code for event in ended(events).values()] == [0] * 4


def test_a_failure_stops_nothing_but_what_needs_it(tmp_path: Path) -> None:
    lines = "; ".join(f"echo line {number}" for number in range(20))
    jobs = [
        job(tmp_path, "bad", f"{lines}; echo; echo 'what is wrong' >&2; exit 5"),
        job(tmp_path, "needs it", "touch never", "bad"),
        job(tmp_path, "needs that", "touch never", "needs it"),
        job(tmp_path, "good", "echo $NAME in $PLACE"),
        job(tmp_path, "killed", "kill -9 $$"),
    ]
    events = run(Schedule(jobs, Places(1)))
    found = ended(events)
    assert started(events) == ["bad", "good", "killed"]
    assert {name: event.code for name, event in found.items()} == {
        "bad": 5,
        "needs it": None,
        "needs that": None,
        "good": 0,
        "killed": -9,
    }
    assert found["bad"].last_lines == (*(f"line {number}" for number in range(13, 20)), "what is wrong")
    assert found["needs that"].last_lines == ("not started: it needs needs it, which failed",)
    assert "good in 2" in (tmp_path / "good.log").read_text().splitlines()


def test_a_log_is_continued_and_begins_with_the_command(tmp_path: Path) -> None:
    for text in ("first", "second"):
        (event,) = ended(run(Schedule([job(tmp_path, "a", f"echo {text}")], Places(1)))).values()
        assert event.last_lines == (text,)
    lines = (tmp_path / "a.log").read_text().splitlines()
    assert lines == ["$ NAME=a PLACE=1 sh -c 'echo first'", "first", "$ NAME=a PLACE=1 sh -c 'echo second'", "second"]


def test_a_log_is_not_written_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "a.log").symlink_to(tmp_path / "precious")
    with pytest.raises(FileError, match=r"a\.log cannot be written: .*it is a link, which is not followed; remove it"):
        run(Schedule([job(tmp_path, "a", "echo text")], Places(1)))
    assert (tmp_path / "precious").read_text() == "mine"


def test_out_of_memory_beside_others_is_tried_again_with_fewer(tmp_path: Path) -> None:
    greedy = f"test -e {tmp_path}/once && exit 0; touch {tmp_path}/once; exit 7"
    places = Places(2)
    events = run(Schedule([job(tmp_path, "beside", "sleep 0.5"), job(tmp_path, "greedy", greedy)], places))
    assert started(events) == ["beside", "greedy", "greedy"]
    first, second = (event for event in events if isinstance(event, Ended) and event.job.name == "greedy")
    assert (first.code, first.again, first.beside) == (7, True, 1)
    assert (second.code, second.again, second.beside) == (0, False, 0)
    assert places.count == 1


def test_out_of_memory_alone_is_a_failure(tmp_path: Path) -> None:
    (event,) = ended(run(Schedule([job(tmp_path, "a", "exit 7")], Places(4)))).values()
    assert (event.code, event.again) == (7, False)


SAVES = 'trap "echo saved; exit 143" TERM; echo up; while :; do sleep 0.05; done'


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_ends_all_children_which_save_and_starts_no_more(tmp_path: Path, number: signal.Signals) -> None:
    before = signal.getsignal(number)
    schedule = Schedule([job(tmp_path, name, SAVES) for name in "abc"], Places(2))
    events: list[Started | Ended] = []
    for event in schedule.run():
        events.append(event)
        if started(events) == ["a", "b"] and len(events) == 2:
            for name in "ab":
                wait_for(tmp_path / f"{name}.log", "up")
            os.kill(os.getpid(), number)
    assert (schedule.signal, schedule.waiting) == (number, 1)
    assert {name: (event.code, event.last_lines[-1]) for name, event in ended(events).items()} == {
        "a": (143, "saved"),
        "b": (143, "saved"),
    }
    assert signal.getsignal(number) == before


def test_a_second_ctrl_c_kills_who_does_not_listen(tmp_path: Path) -> None:
    schedule = Schedule([job(tmp_path, "deaf", 'trap "" TERM; echo up; while :; do sleep 0.05; done')], Places(1))
    events: list[Started | Ended] = []
    for event in schedule.run():
        events.append(event)
        if len(events) == 1:
            wait_for(tmp_path / "deaf.log", "up")
            os.kill(os.getpid(), signal.SIGINT)
            again = threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT))
            again.start()
    assert ended(events)["deaf"].code == -signal.SIGKILL
    again.join()


def test_who_stops_listening_leaves_no_process_behind(tmp_path: Path) -> None:
    events = Schedule([job(tmp_path, "a", "echo $$; exec sleep 60")], Places(1)).run()
    next(events)
    deadline = time.monotonic() + PATIENCE_S
    while len(lines := (tmp_path / "a.log").read_text().splitlines()) < 2:
        assert time.monotonic() < deadline
    events.close()  # type: ignore[attr-defined]
    with pytest.raises(ProcessLookupError):
        os.kill(int(lines[1]), 0)


@pytest.mark.skipif(
    not sys.platform.startswith("linux"), reason="other systems do not tell a child of its parent's end"
)
def test_children_are_told_to_save_when_the_parent_is_killed(tmp_path: Path) -> None:
    script = f"""
from pathlib import Path
from unikd_fast.reproduce.room import CpuRoom
from unikd_fast.reproduce.schedule import Job, Schedule
list(Schedule([Job("a", ("sh", "-c", {SAVES!r}), Path({str(tmp_path / "a.log")!r}))], CpuRoom(1, 1)).run())
"""
    parent = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT)
    wait_for(tmp_path / "a.log", "up")
    parent.kill()
    parent.wait()
    wait_for(tmp_path / "a.log", "saved")
