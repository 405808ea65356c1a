"""Settings of the benchmarks: OpenMP must not spin for long (see launch_distill.py), and the ratios are printed."""

import os
from typing import Any

import pytest

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

from unikd_fast.engine.processes import reuse_freed_memory

reuse_freed_memory()  # as a run does; here before any benchmark, so that their order does not matter


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """pytest-benchmark shows times, and keeps what was measured beside them for its JSON."""
    session = getattr(config, "_benchmarksession", None)
    measured = [b for b in getattr(session, "benchmarks", []) if "ratio" in b.extra_info]
    if measured:
        terminalreporter.section("ratios")
    for benchmark in measured:
        figures = "  ".join(f"{name} {value}" for name, value in benchmark.extra_info.items())
        terminalreporter.write_line(f"{benchmark.group}: {figures}")
