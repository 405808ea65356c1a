"""Settings of the benchmarks: OpenMP must not spin for long (see unikd_fast/cli.py), and what was found is printed."""

import importlib.util
import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

from unikd_fast.engine.distributed import reuse_freed_memory

reuse_freed_memory()  # as a run does; here before any benchmark, so that their order does not matter

if importlib.util.find_spec("pytest_benchmark") is None:

    class Unrecorded:
        """Stands in for pytest-benchmark's fixture where a benchmark measures and records its figures itself."""

        def __init__(self) -> None:
            self.group = ""
            self.extra_info: dict[str, Any] = {}

        def pedantic(self, function: Callable[..., Any], **_: Any) -> None:
            """Time nothing: there is nowhere to write it."""

    @pytest.fixture
    def benchmark() -> Unrecorded:
        return Unrecorded()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Several threads on shared cores wait for each other, and that would be what is compared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """pytest-benchmark shows times, and keeps what was measured beside them for its JSON."""
    session = getattr(config, "_benchmarksession", None)
    measured = [b for b in getattr(session, "benchmarks", []) if "ratio" in b.extra_info]
    if measured:
        terminalreporter.section("ratios")
    for benchmark in measured:
        figures = "  ".join(f"{name} {value}" for name, value in benchmark.extra_info.items())
        terminalreporter.write_line(f"{benchmark.group}: {figures}")
