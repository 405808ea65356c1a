"""Kills a process at each of its file operations in turn."""

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_OPERATIONS = {"open", "os.rename", "os.link", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}


def killed_at_each_operation(
    action: Callable[[], object], folder: Path, before: Callable[[], object] = lambda: None
) -> Iterator[int]:
    """Run `action` in a forked process that is killed before its first file operation in `folder`, then its second, ...

    Yield the number of each operation after its kill, until a process comes to its end.

    Args:
        before: makes the folder as each process finds it; otherwise a process finds what the one before has left.
    """
    number = 0
    while True:
        number += 1
        before()
        child = os.fork()
        if child == 0:
            _die_at(number, str(folder))
            try:
                action()
            except BaseException:  # the parent raises on any code but 0
                os._exit(1)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            assert os.WEXITSTATUS(status) == 0, f"the action failed on its own at operation {number}"
            return
        assert os.WTERMSIG(status) == signal.SIGKILL
        yield number


def _die_at(number: int, folder: str) -> None:
    seen = 0

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in _OPERATIONS and str(arguments[0]).startswith(folder):
            seen += 1
            if seen == number:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
