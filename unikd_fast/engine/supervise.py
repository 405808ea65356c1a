"""Starting a run again after a fault: each process of it is watched by one that does nothing else."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

_FINAL = (0, 2, 3)  # done, a configuration that will not get better, a loss that will not
_PAUSE_S = 5.0
_DIES_WITH_PARENT = 1  # PR_SET_PDEATHSIG


def supervise(command: Sequence[str], restarts: int) -> int:
    """Runs a command, and again with `--resume auto` when it ends by a fault, at most so often.

    Every process of a run does so for itself. When one dies, the others notice, end too, and are started again as well;
    they meet at the same address as before. SIGTERM and SIGINT are passed on, and nothing is started after them.

    Args:
        command: of a launch_distill that does not supervise.
        restarts: how often at most.

    Returns:
        The last exit code; 128 + n for signal n.
    """
    asked = 0
    child: subprocess.Popen[bytes] | None = None

    def pass_on(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = number
        if child is not None:
            child.send_signal(number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    code = 0
    for attempt in range(restarts + 1):
        again = [] if attempt == 0 else ["--resume", "auto"]
        child = subprocess.Popen([*command, *again], preexec_fn=_die_with_parent)
        code = child.wait()
        code = 128 - code if code < 0 else code
        if code in _FINAL or asked or attempt == restarts:
            break
        print(
            f"launch_distill: process {os.environ.get('RANK', '0')} ended with exit code {code}; restart {attempt + 1} "
            f"of {restarts} from the newest checkpoint",
            file=sys.stderr,
            flush=True,
        )
        time.sleep(_PAUSE_S)  # the others notice and end
    return code


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(_DIES_WITH_PARENT, signal.SIGKILL)
