"""Collect what `gpu_check.py` needs on a GPU machine that reaches no package index, as wheels in one folder.

    python benchmarks/gpu_wheels.py FOLDER [--python 3.12] [--limit MIB] [PACKAGE ...]

The machine is taken to have torch, triton, torchvision, timm and pytest with what they need. DALI, hundreds of MiB, is
not collected. Versions are those of the environment that runs this, so the tests there meet what was tested here.
Carry the folder and start the check with `make gpu-check PYTHON=python3 WHEELS=FOLDER`.
Exit code: 0, or 1 where the wheels are larger than the limit, or 2 where one cannot be had.
"""

import argparse
import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path

# DeepSpeed with what it imports, pydantic likewise, and what the tests and the loaders import.
PACKAGES = (
    *("deepspeed", "einops", "hjson", "msgpack", "py-cpuinfo", "psutil", "tqdm"),
    *("pydantic", "pydantic-core", "annotated-types", "typing-extensions", "typing-inspection"),
    *("hypothesis", "sortedcontainers", "safetensors", "threadpoolctl", "pytest-benchmark"),
)
MANYLINUX = ("manylinux2014_x86_64", *(f"manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28)))


def download(name: str, folder: Path, python: str) -> Path:
    """Fetch or build the wheel of a package at the version that is installed here.

    Args:
        python: version of Python on the GPU machine.

    Raises:
        LookupError: it is not installed here, or has no wheel and cannot be built without a compiler.
    """
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        raise LookupError(f"{name} is not installed for {sys.executable}; install it, or leave it out") from None
    found = wheel_of(name, version, folder)
    if found is not None:
        return found
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    platforms = [f"--platform={platform}" for platform in MANYLINUX]
    ready = ["--only-binary=:all:", f"--python-version={python}", "--implementation=cp", *platforms]
    requirement = [f"{name}=={version}", "--no-deps", "--quiet"]
    fetched = subprocess.run(
        [*pip, "download", *requirement, *ready, f"--dest={folder}"], capture_output=True, text=True
    )
    if fetched.returncode:
        # DeepSpeed has a source archive alone; without its compiled operators it is pure Python.
        environment = os.environ | {"DS_BUILD_OPS": "0"}
        build = [*pip, "wheel", *requirement, "--no-build-isolation", f"--wheel-dir={folder}"]
        built = subprocess.run(build, capture_output=True, text=True, env=environment)
        if built.returncode:
            last = (built.stderr.strip().splitlines() or ["pip says nothing"])[-1]
            raise LookupError(f"{name} {version} has no wheel for Python {python}, and building one failed: {last}")
    found = wheel_of(name, version, folder)
    if found is None:
        raise LookupError(f"pip left no wheel of {name} {version} in {folder}")
    if fetched.returncode and not found.name.endswith("-none-any.whl"):
        found.unlink()
        raise LookupError(f"{name} {version} has no wheel for Python {python}; one built here fits this Python alone")
    return found


def wheel_of(name: str, version: str, folder: Path) -> Path | None:
    """Return the wheel of a package in a folder."""
    plain = name.replace("-", "_").lower()
    fitting = (path for path in folder.glob("*.whl") if path.name.lower().replace("-", "_").startswith(f"{plain}_"))
    return next((path for path in fitting if path.name.split("-")[1] == version), None)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path, help="folder for the wheels; made where it is missing")
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help="more packages, each without what it needs")
    parser.add_argument("--python", default="3.12", metavar="X.Y", help="Python on the GPU machine (default 3.12)")
    parser.add_argument("--limit", type=float, default=64.0, metavar="MIB", help="what can be carried (default 64)")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    total = 0
    for name in (*PACKAGES, *options.packages):
        try:
            wheel = download(name, options.folder, options.python)
        except LookupError as error:
            print(f"gpu-wheels: {error}", file=sys.stderr)
            return 2
        total += wheel.stat().st_size
        print(f"{wheel.stat().st_size / 2**20:7.2f} MiB  {wheel.name}")
    print(f"{total / 2**20:7.2f} MiB  in {options.folder}, of {options.limit:g} that can be carried")
    if total > options.limit * 2**20:
        print(f"gpu-wheels: that is more than {options.limit:g} MiB; leave packages out", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
