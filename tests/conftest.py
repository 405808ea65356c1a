"""Before torch and the kernels are loaded: OpenMP's threads must not spin for long, see launch_distill.py.

Without a GPU the kernels run interpreted, which Triton decides when a kernel is defined.
"""

import os
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

HERE = Path(__file__).parent


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Where several processes test (`-n 2 --dist loadgroup`), each takes whole files, for their fixtures' sake.

    One process takes all tests that train: two runs at a time would share the cores with a third.
    """
    for item in items:
        path = item.path.relative_to(HERE) if item.path.is_relative_to(HERE) else item.path
        item.add_marker(pytest.mark.xdist_group(path.parts[0] if path.parts[0] == "engine" else str(path)))
