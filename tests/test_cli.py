"""The command `unikd`: help without the extras, what is missing, refusals before torch is loaded, and the wheel."""

import json
import os
import re
import runpy
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from support.report_runs import config, write_result, write_run_folder
from unikd_fast import cli

ROOT = Path(__file__).parents[1]
SUB_COMMANDS = (
    ("train",),
    ("export",),
    ("cache",),
    ("cache", "build"),
    ("cache", "verify"),
    ("cache", "info"),
    ("cache", "plan"),
    ("data",),
    ("data", "pack"),
    ("report",),
    ("reproduce",),
)
# Arguments with which a sub-command comes to its work, and the extra that brings what it needs.
WORKING = {
    ("train", "--config", "digits"): "train",
    ("export", "{folder}", "--to", "{folder}/student.pt"): "export",
    ("cache", "build", "--config", "digits_cached"): "train",
    ("cache", "verify", "{folder}"): "train",
    ("cache", "info", "{folder}"): "train",
    ("cache", "plan", "--recipe", "cifar100/kd/vgg13-vgg8"): "train",
    ("data", "pack", "{folder}", "{folder}/packed"): "train",
    ("report", "{folder}", "--to", "{folder}/report.html"): "report",
    ("reproduce", "table6", "--data", "digits", "--out", "{folder}"): "train,report",
}

# Calls the command with each list of arguments, as in an install that lacks the packages in "refused". Whatever a
# process imports once is imported for all calls, so what must not be loaded is looked at after the last one.
CALLS = """
import contextlib, io, json, sys
calls, refused, unwanted = json.loads(sys.stdin.read())
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in refused:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
from unikd_fast.cli import main
said = []
for arguments in calls:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as end:
            code = end.code
    said.append((code, out.getvalue(), err.getvalue()))
print(json.dumps([said, sorted(set(unwanted) & sys.modules.keys())]))
"""
THIRD_PARTY = (
    *("torch", "triton", "numpy", "scipy", "PIL", "torchvision", "timm", "deepspeed", "pydantic", "safetensors"),
    *("tqdm", "tensorboard", "sklearn", "threadpoolctl", "datasets", "pyarrow", "nvidia", "psutil", "onnx"),
    *("onnxscript", "onnxruntime", "matplotlib"),
)


def called(
    calls: Sequence[Sequence[object]], *, refused: Sequence[str] = (), unwanted: Sequence[str] = ()
) -> tuple[list[tuple[int, str, str]], list[str]]:
    """Return code, output and errors of each call in one new process, and which unwanted modules it has loaded."""
    given = json.dumps([[[str(argument) for argument in call] for call in calls], refused, unwanted])
    done = subprocess.run([sys.executable, "-c", CALLS], cwd=ROOT, input=given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said, loaded = json.loads(done.stdout)
    return [tuple(one) for one in said], loaded


def run_folder(path: Path) -> Path:
    """A finished run, which passes for a cache and an image folder until something of it is read."""
    write_result(write_run_folder(path, config()), "student")
    for part in ("train/one", "val/one"):
        (path / part).mkdir(parents=True)
    return path


def test_help_needs_no_extra_and_what_is_missing_is_named(tmp_path: Path) -> None:
    folder = run_folder(tmp_path / "run")
    helps = [(), *SUB_COMMANDS]
    works = [[argument.format(folder=folder) for argument in arguments] for arguments in WORKING]
    said, _ = called([*((*sub, "--help") for sub in helps), *works], refused=THIRD_PARTY)
    for sub, (code, out, err) in zip(helps, said[: len(helps)], strict=True):
        assert (code, err) == (0, ""), sub
        assert out.startswith(f"usage: {' '.join(('unikd', *sub))} ")
        assert len(re.findall(r"(?m)^ +\S", out)) > 2, sub
    for (arguments, extra), (code, out, err) in zip(WORKING.items(), said[len(helps) :], strict=True):
        assert (code, out) == (2, ""), (arguments, err)
        name = " ".join(arguments[: 2 if arguments[0] in ("cache", "data") else 1])
        package = r"the package \w+ is not installed for \S+; activate the environment that has it, or "
        assert re.fullmatch(rf"unikd {name}: error: {package}pip install 'unikd-fast\[{extra}\]'\n", err), err


def test_every_extra_that_is_named_exists() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["scripts"] == {"unikd": "unikd_fast.cli:main"}
    named = {name for extra in WORKING.values() for name in extra.split(",")}
    assert named <= project["optional-dependencies"].keys()


def test_refusals_come_before_anything_slow_is_loaded(tmp_path: Path) -> None:
    """Also of what DeepSpeed's launcher makes of the arguments: --local_rank before everything."""
    wrong = ("--set", "teacher.cache.views=0")
    imagenet = ("train", "--config", "imagenet_r50_mbv1", "--set")
    refusals: dict[tuple[object, ...], tuple[str, str]] = {
        ("--local_rank=0", "cache", "build", "--config", "digits_cached", *wrong): (
            "cache build",
            "teacher.cache.views = 0",
        ),
        ("cache", "plan", "--config", "digit"): ("cache plan", "did you mean digits"),
        ("train", "--local_rank=1", "--config", "digits", "--set", "train.nonsense=1"): ("train", "train.nonsense"),
        (*imagenet, "data.root=/no/such/imagenet"): ("train", "--set data.root="),
        (*imagenet, "data.root=${UNIKD_TEST_UNSET}"): ("train", "UNIKD_TEST_UNSET is not set"),
        ("train", "--config", "synthetic", "--set", "teacher.weights=${UNIKD_TEST_UNSET}/teacher.pth"): (
            "train",
            "teacher.weights is '${UNIKD_TEST_UNSET}/teacher.pth' and UNIKD_TEST_UNSET is not set",
        ),
        ("export", tmp_path, "--to", "a.pt"): ("export", f"{tmp_path} is not a run folder"),
        ("reproduce", "table6", "--data", "digits", "--methods", "kd"): ("reproduce", "--methods kd: "),
    }
    slow = ("torchvision", "timm", "deepspeed", "sklearn", "datasets", "matplotlib")
    said, loaded = called(list(refusals), unwanted=slow)
    for (name, part), (code, out, err) in zip(refusals.values(), said, strict=True):
        assert (code, out) == (2, ""), (name, err)
        assert err.startswith(f"unikd {name}: error: ") and part in err, err
    assert loaded == []
    said, loaded = called([("report", tmp_path, "--to", tmp_path / "r.html")], unwanted=(*slow, "torch", "numpy"))
    assert said == [(2, "", said[0][2])] and f"{tmp_path} is not a run folder" in said[0][2]
    assert loaded == []
    assert list(tmp_path.iterdir()) == []


def test_help_takes_half_a_second() -> None:
    """Of the processor, so that other processes don't count."""
    process = subprocess.Popen(
        [sys.executable, "-m", "unikd_fast", "train", "--help"], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    with process.stdout as output:
        assert output.read().startswith(b"usage: unikd train ")
    _, status, usage = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert usage.ru_utime + usage.ru_stime <= 0.5


@pytest.mark.parametrize(
    ("arguments", "missing"),
    [
        ([], "required: COMMAND"),
        (["cache"], "required: COMMAND"),
        (["data"], "required: COMMAND"),
        (["trian"], "'trian'"),
        (["train"], "one of the arguments --config --recipe is required"),
        (["train", "--config", "digits", "--recipe", "cifar100/kd/vgg13-vgg8"], "not allowed with argument --config"),
        (["train", "--config", "digits", "--resume", "maybe"], "'maybe'"),
        (["export", "run"], "required: --to"),
        (["export", "run", "--to", "a.onnx", "--opset", "0"], "0 is less than 1"),
        (["cache", "verify"], "one of the arguments --config --recipe FOLDER is required"),
        (["cache", "verify", "folder", "--config", "digits"], "not allowed with argument"),
        (["report"], "required: RUN"),
        (["reproduce", "table6", "--jobs", "many"], "'many'"),
    ],
)
def test_arguments_that_do_not_parse(capsys: pytest.CaptureFixture[str], arguments: list[str], missing: str) -> None:
    with pytest.raises(SystemExit) as end:
        cli.main(arguments)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("usage: unikd")
    assert missing in said.splitlines()[-1]


def test_script_and_module_are_the_same_command(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def main(arguments: Sequence[str] | None = None) -> int:
        seen.append(sys.argv[1:] if arguments is None else arguments)
        return 7

    monkeypatch.setattr(cli, "main", main)
    for start, arguments in (
        (lambda: runpy.run_module("unikd_fast", run_name="__main__", alter_sys=True), ["train", "--config", "digits"]),
        (lambda: runpy.run_path(str(ROOT / "launch_distill.py"), run_name="__main__"), ["--config", "digits"]),
    ):
        monkeypatch.setattr(sys, "argv", ["unikd", *arguments])
        with pytest.raises(SystemExit) as end:
            start()
        assert end.value.code == 7
    assert seen == [["train", "--config", "digits"]] * 2


def test_openmp_is_told_not_to_spin(monkeypatch: pytest.MonkeyPatch) -> None:
    for before, after in ((None, "1000"), ("5", "5")):
        monkeypatch.setenv("GOMP_SPINCOUNT", before) if before else monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
        with pytest.raises(SystemExit):
            cli.main(["--help"])
        assert os.environ["GOMP_SPINCOUNT"] == after


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of the files that git knows, so that nothing is built in the checkout."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.rstrip("\0").split("\0"):
        if (ROOT / name).exists():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            if (ROOT / name).is_symlink():
                (source / name).symlink_to((ROOT / name).readlink())
            else:
                (source / name).write_bytes((ROOT / name).read_bytes())
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", ".", "--quiet", "--no-deps", "--no-build-isolation", "-w", str(out)],
        cwd=source,
        check=True,
    )
    (built,) = out.glob("unikd_fast-*.whl")
    return built


@pytest.mark.long
def test_the_wheel_has_the_configurations(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith("unikd_fast/configs/")}
        assert names == {f"unikd_fast/configs/{path.name}" for path in (ROOT / "configs").glob("*.json")}
        for name in names:
            assert archive.read(name) == (ROOT / "configs" / Path(name).name).read_bytes()
        assert "unikd_fast/kernels/softmax_kl.py" in archive.namelist()


@pytest.mark.long
def test_the_wheel_in_an_empty_environment(wheel: Path, tmp_path: Path) -> None:
    """First without any other package, then with those of this environment below it, where it trains on digits."""
    home = tmp_path / "environment"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(home)], check=True)
    install = ["install", "--quiet", "--no-deps", str(wheel)]
    subprocess.run([sys.executable, "-m", "pip", "--python", str(home / "bin/python"), *install], check=True)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}

    def unikd(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(home / "bin" / "unikd"), *arguments]
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)

    for sub in ((), *SUB_COMMANDS):
        done = unikd(*sub, "--help")
        assert (done.returncode, done.stderr) == (0, ""), sub
    folder = run_folder(tmp_path / "run")
    for arguments, extra in WORKING.items():
        done = unikd(*(argument.format(folder=folder) for argument in arguments))
        assert done.returncode == 2
        assert done.stderr.count("\n") == 1 and f"pip install 'unikd-fast[{extra}]'" in done.stderr

    (site,) = home.glob("lib/python*/site-packages")
    (site / "below.pth").write_text(next(path for path in sys.path if path.endswith("site-packages")))
    short = ("--set", "compare=null", "--set", "train.max_steps=2", "--set", "teacher.training.total_epochs=1")
    done = unikd("train", "--config", "digits", *short, "--set", "teacher.min_accuracy=0", "--set", "run.dir=out")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "student.safetensors").exists()
