"""Before torch and the kernels are loaded: OpenMP's threads must not spin for long, see unikd_fast/cli.py.

Without a GPU the kernels run interpreted, which Triton decides when a kernel is defined.
"""

import os
import resource
import signal
from collections.abc import Iterator

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
# The processes of `make test` have a core each, and two threads for such small tensors take a third more of it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

from support.alone import alone

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts jobs in the background with Ctrl-C ignored, nohup with the hang-up, and so would be the processes that
# tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    with alone():
        yield


@pytest.fixture
def small_files() -> Iterator[None]:
    """No file of this process grows beyond a kilobyte, which is what a full disk looks like."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1024, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)
