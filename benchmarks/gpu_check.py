"""Run all tests and benchmarks that need a GPU, and write what they found to one JSON file.

    python benchmarks/gpu_check.py [--budget SECONDS] [--out DIR] [--wheels DIR]

Works in an environment that has no more than torch, triton and pytest: what needs another package is skipped by name.
Where the machine reaches no package index, --wheels takes the folder that `gpu_wheels.py` made elsewhere.
Where there is no git repository, UNIKD_COMMIT names the commit, with `-dirty` after it for a changed tree.
Exit code: 0, or 1 after a failed test, or 2 where it cannot run at all. A missed target is recorded and is no failure.
"""

import argparse
import datetime
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import signal
import subprocess
import sys
import tempfile
import time
import tomllib
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from gpu_check_plugin import read_record, summarise
from speed_targets import describe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# The benchmarks get what the tests leave, and at least the rest of the budget.
TESTS_SHARE = 0.5
# What has begun at the deadline may take this long, before it is stopped.
GRACE_SECONDS = 30.0
FORMAT = 1


def slug(name: str) -> str:
    """Return a name as a folder: ``NVIDIA H200`` -> ``nvidia-h200``."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def packages_of(pyproject: Path) -> list[str]:
    """Return the packages that tests and benchmarks use, from the extras."""
    extras = tomllib.loads(pyproject.read_text())["project"]["optional-dependencies"]
    names = {re.match(r"[A-Za-z0-9._-]+", line)[0] for lines in extras.values() for line in lines}  # type: ignore[index]
    return sorted((names - {"unikd-fast"}) | {"liger-kernel"})


def missing_packages(names: list[str]) -> list[str]:
    missing = []
    for name in names:
        try:
            importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            missing.append(name)
    return missing


def commit(root: Path, environment: Mapping[str, str]) -> tuple[str, bool | None]:
    """Return the commit and whether the tree differs from it; UNIKD_COMMIT says so where there is no repository."""
    given = environment.get("UNIKD_COMMIT")
    if given:
        return given.removesuffix("-dirty"), given.endswith("-dirty")
    try:
        name = _output(["git", "rev-parse", "--short=12", "HEAD"], root)
        changed = _output(["git", "status", "--porcelain", "--", ".", ":!benchmarks/results"], root)
    except (OSError, subprocess.CalledProcessError):
        return "unknown", None
    return name, bool(changed)


def result_path(out: Path, gpu: str, day: datetime.date, name: str) -> Path:
    return out / slug(gpu) / f"{day.isoformat()}-{name}.json"


def what_is_missing() -> str:
    """Return why this cannot run here, empty if it can."""
    for package in ("torch", "triton", "pytest"):
        if importlib.util.find_spec(package) is None:
            return f"the package {package} is not installed for {sys.executable}"
    import torch

    if not torch.cuda.is_available():
        return f"there is no GPU: torch {torch.__version__} sees no CUDA device"
    return ""


def describe_environment() -> dict[str, Any]:
    import torch
    import triton

    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
        driver = _output(query, ROOT)
    except (OSError, subprocess.CalledProcessError):
        driver = "unknown"
    properties = torch.cuda.get_device_properties(0)
    name, dirty = commit(ROOT, os.environ)
    return {
        "gpu": properties.name,
        "gpu_memory_gib": round(properties.total_memory / 2**30, 1),
        "gpu_l2_mib": round(properties.L2_cache_size / 2**20, 1),
        "multiprocessors": properties.multi_processor_count,
        "driver": driver,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "commit": name,
        "dirty": dirty,
        "missing_packages": missing_packages(packages_of(ROOT / "pyproject.toml")),
    }


def install(wheels: Path, target: Path) -> str:
    """Install wheels into a folder, put it on the path, and return what went wrong, empty if nothing did."""
    found = sorted(wheels.glob("*.whl"))
    if not found:
        return f"--wheels {wheels} holds no wheels; make them with benchmarks/gpu_wheels.py"
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--target"]
    done = subprocess.run([*pip, str(target), *map(str, found)], capture_output=True, text=True)
    if done.returncode:
        return f"--wheels {wheels} cannot be installed: {done.stderr.strip().rpartition(chr(10))[2]}"
    sys.path.insert(0, str(target))
    os.environ["PYTHONPATH"] = os.pathsep.join([str(target), *filter(None, [os.environ.get("PYTHONPATH")])])
    return ""


def run_pytest(what: str, deadline: float, scratch: Path) -> dict[str, Any]:
    """Run the GPU tests of a folder in a process of their own: a GPU error there cannot reach the next."""
    record = scratch / f"{what}.jsonl"
    command = [sys.executable, "-B", "-m", "pytest", what, "-m", "gpu", "-q", "-s", "-p", "no:cacheprovider"]
    command += ["-p", "gpu_check_plugin", f"--gpu-check-record={record}", f"--gpu-check-deadline={deadline}"]
    paths = [str(ROOT), str(ROOT / "benchmarks"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HYPOTHESIS_STORAGE_DIRECTORY": str(scratch / "hypothesis"),
    }
    environment.pop("TRITON_INTERPRET", None)
    process = subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)
    try:
        code = process.wait(timeout=max(deadline - time.time(), 0) + GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # with the compiler's workers
        process.wait()
        code = None
    return conclude(summarise(read_record(record)), code)


def conclude(summary: dict[str, Any], code: int | None) -> dict[str, Any]:
    """Add how the process ended: None when it was stopped for time, which is no failure."""
    # 0 and 1 are passed and failed tests, 5 is that none was found. Anything else ended before its end.
    died = code is not None and code not in (0, 1, 5)
    return summary | {"exit_code": code, "failed_run": bool(summary["failed"]) or died}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--budget", type=float, default=540.0, help="seconds after which nothing new starts")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to use besides what is installed")
    options = parser.parse_args(arguments)
    start = time.time()
    with tempfile.TemporaryDirectory() as scratch:
        reason = install(options.wheels, Path(scratch) / "site") if options.wheels else ""
        reason = reason or what_is_missing()
        if reason:
            print(f"gpu-check: {reason}; nothing was run and nothing written", file=sys.stderr)
            return 2
        environment = describe_environment()
        tests = run_pytest("tests", start + TESTS_SHARE * options.budget, Path(scratch))
        benchmarks = run_pytest("benchmarks", start + options.budget, Path(scratch))
    now = datetime.datetime.now(datetime.UTC)
    result = {
        "format": FORMAT,
        "date": now.isoformat(timespec="seconds"),
        "seconds": round(time.time() - start, 1),
        "budget_seconds": options.budget,
        "environment": environment,
        "roofs": benchmarks.pop("roofs"),
        "rows": benchmarks.pop("rows"),
        "tests": {key: value for key, value in tests.items() if key not in ("rows", "roofs")},
        "benchmarks": benchmarks,
    }
    path = result_path(options.out, environment["gpu"], now.date(), environment["commit"])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print("\n".join(report(result)), f"written to {path}", sep="\n")
    return 1 if tests["failed_run"] or benchmarks["failed_run"] else 0


def report(result: Mapping[str, Any]) -> list[str]:
    """Return the lines that end the output."""
    environment = result["environment"]
    lines = [f"gpu-check on {environment['gpu']}, commit {environment['commit']}, {result['seconds']:.0f} s"]
    lines.append(f"not installed: {', '.join(environment['missing_packages']) or 'nothing'}")
    lines += table({**result["tests"]["areas"], **result["benchmarks"]["areas"]})
    for what in ("tests", "benchmarks"):
        run = result[what]
        if run["exit_code"] not in (0, 1, 5):
            lines.append(f"{what}: the run ended early, exit code {run['exit_code']} (None: stopped for time)")
        lines += [f"failed {test}: {why}" for test, why in run["failed"].items()]
        why_skipped = Counter(run["skipped"].values())
        lines += [f"skipped {count} in {what}: {why}" for why, count in why_skipped.most_common()]
        for kind in ("left_out", "unfinished"):
            lines += [f"{kind.replace('_', ' ')} {test}" for test in run[kind]]
    for row in result["rows"]:
        for target in row.get("targets", []):
            lines.append(f"{'reached' if target['reached'] else 'MISSED '} {row['case']}: {describe(target)}")
    return lines


def table(areas: Mapping[str, Mapping[str, int]]) -> list[str]:
    """Return what was done by folder, as the lines of a table.

    Example:
        >>> table({"tests/data": {"passed": 3, "skipped": 1}})
        ['              passed  skipped', 'tests/data         3        1', 'total              3        1']
    """
    kinds = list(dict.fromkeys(kind for counts in areas.values() for kind in counts))
    total = {kind: sum(counts.get(kind, 0) for counts in areas.values()) for kind in kinds}
    shown = [kind for kind in kinds if total[kind]]
    width = max(map(len, ["total", *areas]))
    heads = [f"{kind.replace('_', ' '):>{max(len(kind), 6)}}" for kind in shown]
    lines = ["  ".join([" " * width, *heads])]
    for area, counts in [*areas.items(), ("total", total)]:
        figures = [f"{counts.get(kind, 0):>{len(head)}}" for kind, head in zip(shown, heads, strict=True)]
        lines.append("  ".join([f"{area:{width}}", *figures]))
    return lines


def _output(command: list[str], folder: Path) -> str:
    done = subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


if __name__ == "__main__":
    sys.exit(main())
