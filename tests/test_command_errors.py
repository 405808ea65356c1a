"""The one place where the commands' errors become messages."""

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from unikd_fast import command
from unikd_fast.command import run_command
from unikd_fast.errors import ConfigError, Interrupted, LostProcess, OutOfMemory, describe_os_error

FULL = OSError(28, "No space left on device", "/runs/a/config.json")


def raising(error: BaseException) -> Callable[[], int]:
    def body() -> int:
        raise error

    return body


def second_ctrl_c() -> int:
    """What it leaves of a condition that is waited for: the lock is not held when the way out releases it."""
    condition = threading.Condition()
    try:
        with condition:
            condition.release()
            raise KeyboardInterrupt
    finally:
        time.sleep(0)
    return 0


@pytest.mark.parametrize(
    ("body", "code", "message"),
    [
        pytest.param(raising(ConfigError("a = 1; set 2")), 2, "a = 1; set 2", id="ConfigError"),
        pytest.param(raising(OutOfMemory("no room")), 7, "no room", id="OutOfMemory"),
        pytest.param(raising(Interrupted(15, "stopped")), 143, "stopped", id="Interrupted"),
        pytest.param(raising(FULL), 1, "/runs/a/config.json: No space left on device", id="OSError"),
        pytest.param(raising(BrokenPipeError(32, "Broken pipe", "worker")), 1, "worker: Broken pipe", id="worker"),
        pytest.param(raising(KeyboardInterrupt()), 130, "stopped by Ctrl-C", id="Ctrl-C"),
        pytest.param(second_ctrl_c, 130, "stopped by Ctrl-C", id="second Ctrl-C"),
    ],
)
def test_one_line_and_the_exit_code(
    capfd: pytest.CaptureFixture[str], body: Callable[[], int], code: int, message: str
) -> None:
    assert run_command("unikd x", body) == code
    assert capfd.readouterr() == ("", f"unikd x: error: {message}\n")


def test_internal_errors_keep_their_traceback() -> None:
    with pytest.raises(ZeroDivisionError):
        run_command("unikd x", lambda: 1 // 0)


@pytest.mark.parametrize(
    ("error", "described"),
    [
        (ModuleNotFoundError("No module named 'pydantic'", name="pydantic"), True),
        (ModuleNotFoundError("No module named 'onnx.checker'", name="onnx.checker"), True),
        (ModuleNotFoundError("No module named 'pytest.nowhere'", name="pytest.nowhere"), False),  # there, but broken
        (ModuleNotFoundError("No module named 'unikd_fast.nowhere'", name="unikd_fast.nowhere"), False),
        (ModuleNotFoundError("no name"), False),
    ],
)
def test_a_missing_package_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: ModuleNotFoundError, described: bool
) -> None:
    for package in ("pydantic", "onnx"):
        monkeypatch.delitem(sys.modules, package, raising=False)
    if described:
        assert run_command("unikd x", raising(error), extra="train") == 2
        said = capsys.readouterr().err
        assert said.startswith(f"unikd x: error: the package {error.name} is not installed for {sys.executable}; ")
        assert said.endswith("or pip install 'unikd-fast[train]'\n")
    else:
        with pytest.raises(ModuleNotFoundError):
            run_command("unikd x", raising(error), extra="train")
    with pytest.raises(ModuleNotFoundError):
        run_command("unikd x", raising(error))


def test_os_errors_name_their_paths() -> None:
    assert describe_os_error(OSError("no disk")) == "no disk"
    assert describe_os_error(OSError(5, "Input/output error")) == "Input/output error"
    assert describe_os_error(OSError(18, "Invalid cross-device link", b"a", None, "b")) == (
        "a -> b: Invalid cross-device link"
    )


@pytest.mark.parametrize(
    ("error", "pauses", "said"),
    [
        pytest.param(ConfigError("no"), [10.0], "no", id="after the first"),
        pytest.param(FULL, [10.0], "/runs/a/config.json: No space left on device", id="OSError"),
        pytest.param(LostProcess("gone"), [], "gone", id="at once"),
        pytest.param(KeyboardInterrupt(), [], None, id="never"),
    ],
)
def test_errors_are_printed_once_across_processes(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: BaseException,
    pauses: list[float],
    said: str | None,
) -> None:
    slept: list[float] = []
    monkeypatch.setattr(command.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "1")
    run_command("unikd x", raising(error))
    assert slept == pauses
    assert capsys.readouterr().err == ("" if said is None else f"unikd x: error: {said}\n")


def test_ctrl_c_while_waiting_for_the_first_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", interrupted)
    monkeypatch.setenv("RANK", "1")
    assert run_command("unikd x", raising(ConfigError("no"))) == 130
    assert capsys.readouterr().err == ""


def start(text: str, stdout: int) -> "subprocess.CompletedProcess[str]":
    code = f"import sys; from unikd_fast.command import run_command\nsys.exit(run_command('unikd x', lambda: {text}))"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", code], stdout=stdout, stderr=subprocess.PIPE, text=True, env=environment
    )


@pytest.mark.parametrize("lines", [1, 10**5])
def test_a_closed_output_is_not_an_error(lines: int) -> None:
    read, write = os.pipe()
    os.close(read)
    done = start(f"print('line\\n' * {lines})", write)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize(("lines", "where"), [(1, "standard output: "), (10**5, "")])
def test_output_on_a_full_disk(lines: int, where: str) -> None:
    with Path("/dev/full").open("w") as full:
        done = start(f"print('line\\n' * {lines})", full.fileno())
    assert (done.returncode, done.stderr) == (1, f"unikd x: error: {where}No space left on device\n")
