"""Where there is a GPU these tests run on it, and `pytest -m gpu` takes them along."""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        return
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.path.name != "test_compile.py":
            item.add_marker("gpu")
