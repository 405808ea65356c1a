"""Where there is a GPU the kernels' tests run on it, and `pytest -m gpu` selects them."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        return
    for item in items:
        on_cpu = item.path.name.startswith(("test_compile", "test_reference"))
        if item.path.is_relative_to(Path(__file__).parent) and not on_cpu:
            item.add_marker("gpu")
