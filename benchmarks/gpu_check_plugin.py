"""A pytest plugin that writes down what each test did as it happens, for `gpu_check.py`.

One JSON object a line, so that a process that dies or is stopped leaves what it had. Besides, it skips by name what
needs a package that is not installed, and what starts after a deadline.
"""

import json
import sys
import time
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import pytest
from speed_targets import TargetMissed

LEFT_OUT = "left out, the time is spent"
_RECORDED_PROPERTIES = ("benchmark_rows", "roofs")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("gpu check")
    group.addoption("--gpu-check-record", type=Path, help="file to write outcomes to, a JSON object a line")
    group.addoption("--gpu-check-deadline", type=float, help="time in seconds since 1970 after which nothing starts")


def pytest_configure(config: pytest.Config) -> None:
    record = config.getoption("--gpu-check-record")
    if record is not None:
        config.pluginmanager.register(
            Recorder(record, config.getoption("--gpu-check-deadline"), first_party(config.rootpath))
        )


def first_party(root: Path) -> set[str]:
    """Return the names of modules that are the repository's own: missing one of those is an error."""
    own = {"unikd_fast"}
    return own | {path.stem for folder in ("tests", "benchmarks") for path in (root / folder).rglob("*.py")}


def missing_package(error: BaseException | None, own: set[str]) -> str | None:
    """Return the package whose absence caused the error, None if it is anything else."""
    while error is not None:
        if isinstance(error, ModuleNotFoundError) and error.name:
            top = error.name.partition(".")[0]
            return None if top in own or top in sys.stdlib_module_names else top
        error = error.__cause__
    return None


class Recorder:
    """The hooks."""

    def __init__(self, record: Path, deadline: float | None, own: set[str]) -> None:
        self.record, self.deadline, self.own = record, deadline, own

    def write(self, **entry: Any) -> None:
        with self.record.open("a") as file:
            file.write(json.dumps(entry) + "\n")

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        report = yield
        call = getattr(report, "call", None)
        package = missing_package(call.excinfo.value if call and call.excinfo else None, self.own)
        if report.failed and package is not None:
            reason = f"Skipped: needs {package}, which is not installed"
            return pytest.CollectReport(report.nodeid, "skipped", (str(collector.path), 0, reason), [])
        return report

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.outcome != "passed":
            self.write(test=report.nodeid, when="collect", outcome=report.outcome, reason=_reason(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.write(test=nodeid, when="start")

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_setup(self) -> None:
        if self.deadline is not None and time.time() > self.deadline:
            pytest.skip(LEFT_OUT)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(
        self, item: pytest.Item, call: pytest.CallInfo[None]
    ) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        error = call.excinfo.value if call.excinfo else None
        package = missing_package(error, self.own)
        if report.failed and package is not None:
            report.outcome = "skipped"
            report.longrepr = (str(item.path), 0, f"Skipped: needs {package}, which is not installed")
        if isinstance(error, TargetMissed):
            report.user_properties.append(("target_missed", str(error)))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        missed = report.failed and "target_missed" in properties
        entry: dict[str, Any] = {
            "test": report.nodeid,
            "when": report.when,
            "outcome": "missed" if missed else report.outcome,
            "reason": properties["target_missed"] if missed else _reason(report),
        }
        if report.when == "call":
            entry |= {name: properties[name] for name in _RECORDED_PROPERTIES if name in properties}
        self.write(**entry)


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    if report.outcome == "passed" or report.longrepr is None:
        return ""
    if isinstance(report.longrepr, tuple):
        return str(report.longrepr[2]).removeprefix("Skipped: ")
    crash = getattr(report.longrepr, "reprcrash", None)
    text = str(crash.message if crash is not None else report.longrepr).strip()
    return text.splitlines()[0 if crash is not None else -1][:300] if text else ""


def read_record(path: Path) -> list[dict[str, Any]]:
    """Return the entries; a last line that a killed process did not finish is dropped."""
    lines = path.read_text().split("\n") if path.exists() else []
    return [json.loads(line) for line in lines[:-1]]


def summarise(entries: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Return what a run did.

    Returns:
        counts: passed, missed, failed, skipped, left_out and unfinished tests, and areas: the same by folder; then
        failed and skipped as name -> reason, left_out and unfinished as names, missed as name -> targets, and the
        recorded rows and roofs.
    """
    outcomes: dict[str, str] = {}
    named: dict[str, dict[str, str]] = {"failed": {}, "skipped": {}, "missed": {}}
    started: dict[str, None] = {}
    rows: list[Any] = []
    roofs: list[Any] = []
    for entry in entries:
        test, when = entry["test"], entry["when"]
        if when == "start":
            started[test] = None
            continue
        rows += entry.get("benchmark_rows", [])
        if "roofs" in entry and entry["roofs"] not in roofs:
            roofs.append(entry["roofs"])
        if when == "teardown":
            started.pop(test, None)
        outcome = entry["outcome"]
        if outcome == "skipped" and entry["reason"] == LEFT_OUT:
            outcome = "left_out"
        # What passes its call can still fail in its teardown; the setup alone says nothing yet.
        if outcome != "passed" or (when == "call" and test not in outcomes):
            outcomes[test] = outcome
            if outcome in named:
                named[outcome][test] = entry["reason"]
    outcomes |= dict.fromkeys(started, "unfinished")
    kinds = ("passed", "missed", "failed", "skipped", "left_out", "unfinished")
    areas: dict[str, dict[str, int]] = {}
    for test, outcome in outcomes.items():
        counts = areas.setdefault(test.partition("::")[0].rpartition("/")[0] or ".", dict.fromkeys(kinds, 0))
        counts[outcome] += 1
    return {
        "counts": {kind: sum(outcome == kind for outcome in outcomes.values()) for kind in kinds},
        "areas": dict(sorted(areas.items())),
        **named,
        "left_out": [test for test, outcome in outcomes.items() if outcome == "left_out"],
        "unfinished": list(started),
        "rows": rows,
        "roofs": roofs,
    }
