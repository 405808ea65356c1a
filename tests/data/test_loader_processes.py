"""What a process that loads images holds on to, and how it and those that decode for it come to an end."""

import signal
import time
from pathlib import Path

import pytest

from support.generated_images import write_jpegs
from support.processes import finished, running
from unikd_fast.data.dali import dali_problem

pytestmark = pytest.mark.slow
needs_dali = pytest.mark.skipif(dali_problem() is not None, reason="DALI does not work here")
kinds = pytest.mark.parametrize("kind", ["torchvision", pytest.param("dali", marks=needs_dali)])

LOADER = """
import sys
from pathlib import Path
from unikd_fast.data import files
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.sets.image_folder import load_image_folder
import sys; sys.path.insert(0, "tests")
from support.loaders import build_loader
files._GRACE_S = 60  # for how long decoding processes put SIGTERM off
del files  # a module that is held is emptied before the iterators end
splits = load_image_folder(Path(sys.argv[1]), 224)
settings = dict(augmentation=Augmentation(crop="resized"), kind=sys.argv[2], seed=0, device="cpu", workers=2)
loader = build_loader(splits, global_batch_size=16, **settings)
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_jpegs(tmp_path_factory.mktemp("jpegs"), {"train": 64, "val": 20}, sides=((60, 80), (90, 50)))


HELD = """
import ctypes, time
from dataclasses import replace
import psutil
trim = getattr(ctypes.CDLL(None), "malloc_trim", lambda _: None)  # gives back what glibc keeps of freed memory

def train(number, of):
    for batch in of.train(number): pass

def epoch(number, of):
    train(number, of)
    for batch in of.evaluate("val"): pass

def held():
    "Memory in MiB, open files, threads and processes, of this process and those it started."
    trim(0)
    processes = [psutil.Process(), *psutil.Process().children(recursive=True)]
    memory = sum(process.memory_info().rss for process in processes) / 2**20
    return memory, sum(p.num_fds() for p in processes), sum(p.num_threads() for p in processes), len(processes)

def grown(before):
    "By how much these have grown; what ended needs a moment to be gone."
    deadline = time.monotonic() + 5
    while any(now > then for now, then in zip(held()[1:], before[1:])) and time.monotonic() < deadline:
        time.sleep(0.05)
    return [now - then for now, then in zip(held(), before)]

small = build_loader(replace(splits, image_size=112), global_batch_size=16, **settings)
for number in range(3):
    epoch(number, loader)
    epoch(number, small)
time.sleep(0.5)
before = held()
for number in range(3, 8):
    epoch(number, loader)
print(*grown(before))
for number in range(5):
    next(loader.train(number))
    next(loader.evaluate("val"))
epoch(0, loader)
print(*grown(before))
for number in range(20):
    train(number, small)
print(*grown(before))
"""


@pytest.mark.long
@kinds
def test_epochs_and_dropped_iterators_leave_nothing_behind(root: Path, kind: str) -> None:
    """A batch of 16 views kept of each of five epochs, of each of five iterators, or of each of twenty epochs where it
    is a quarter as large, would be 46 MiB."""
    code, said, errors = finished(LOADER + HELD, root, kind)
    assert code == 0, errors
    for line in said.splitlines():
        memory, files, threads, processes = map(float, line.split())
        assert memory < 23
        assert max(files, threads, processes) <= 0
    assert len(said.splitlines()) == 3


OPEN = """
kept = [loader.train(0), loader.evaluate("val")]
for iterator in kept * 2:  # a batch from each of two workers
    next(iterator)
"""
# What Ctrl-C and launchers send to all processes: those that decode are to serve until the run has saved.
SIGNALLED = """
import multiprocessing, os, signal
assert len(multiprocessing.active_children()) == 4
for worker in multiprocessing.active_children():
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(worker.pid, number)
assert len(list(kept[0])) == 2
kept.append(loader.views([]))  # whose have only just begun
"""


@pytest.mark.parametrize(
    ("kind", "program"),
    [("torchvision", OPEN + SIGNALLED), pytest.param("dali", OPEN, marks=needs_dali)],
    ids=["torchvision", "dali"],
)
def test_a_process_with_iterators_open_ends_at_once(root: Path, kind: str, program: str) -> None:
    """And does not wait until the decoding processes have put SIGTERM off for long enough."""
    with running(LOADER + program + 'print("ready", flush=True)\nraise SystemExit(3)', root, kind) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        start = time.monotonic()
        assert process.communicate(timeout=100) == ("", "")
        assert time.monotonic() - start < 30
    assert process.returncode == 3


@kinds
def test_ctrl_c_ends_a_process_that_loads(root: Path, kind: str) -> None:
    program = LOADER + 'print("ready", flush=True)\nwhile True:\n    for batch in loader.train(1): pass\n'
    with running(program, root, kind) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        start = time.monotonic()
        _, said = process.communicate(timeout=100)
        assert time.monotonic() - start < 30
    assert "KeyboardInterrupt" in said.splitlines()  # a worker may then report its closed pipe
    assert process.returncode == -signal.SIGINT


SHUT_DOWN = """
import signal
from nvidia.dali import Pipeline

shut_down = Pipeline._shutdown

def interrupted(self):
    if self._pipe:
        signal.raise_signal(signal.SIGINT)
    shut_down(self)

Pipeline._shutdown = interrupted
for batch in loader.train(1): pass
print("lost")
"""


@needs_dali
def test_ctrl_c_is_not_lost_while_a_pipeline_is_shut_down(root: Path) -> None:
    """Which takes a good part of a short epoch."""
    code, said, errors = finished(LOADER + SHUT_DOWN, root, "dali")
    assert said == ""
    assert "KeyboardInterrupt" in errors
    assert code == -signal.SIGINT
