"""Compiles the kernels for real GPUs without having one, exactly as the launching code would launch them.

Run as a process of its own, because `TRITON_INTERPRET` is read when a kernel is defined:

    python tests/support/compile_check.py --list | --variants | CASE[:TARGET] [CASE[:TARGET] ...]

prints one JSON line per compiled launch, for all targets if none is named; or how many variants of each kernel the
image sizes of `RESIZED` need. The launching code runs on CPU tensors with its kernels replaced by a recorder; what it
would launch is compiled, and registers and spills are read from the binary.
"""

import inspect
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia import compiler as nvidia
from triton.runtime import driver

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


class Recorder:
    """Stands in for a kernel: remembers its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches, self.grids = kernel, [], []

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            names = list(inspect.signature(self.kernel.fn).parameters)
            options = {name: kwargs.pop(name) for name in list(kwargs) if name not in names}
            bound = dict(zip(names, args, strict=False)) | kwargs
            assert set(bound) == set(names), f"{self.kernel.fn.__name__}: {set(names) ^ set(bound)}"
            self.launches.append((bound, options))
            self.grids.append(grid)

        return launch


@contextmanager
def recorded(modules: list[Any], names: list[str]) -> Iterator[list[Recorder]]:
    """Replace kernels in the modules that launch them."""
    recorders = [Recorder(getattr(module, name)) for module, name in zip(modules, names, strict=True)]
    for module, name, recorder in zip(modules, names, recorders, strict=True):
        setattr(module, name, recorder)
    try:
        yield recorders
    finally:
        for module, name, recorder in zip(modules, names, recorders, strict=True):
            setattr(module, name, recorder.kernel)


class WithoutGPU:
    """Stands in for Triton's driver where there is no GPU: enough of it to compile for one."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return str(self.target)  # the key of what was compiled before

    def get_current_stream(self, device: str) -> int:
        return 0


def compile_key(kernel: Any, bound: dict[str, Any], options: dict[str, Any]) -> str:
    """Return what Triton looks a launch up by among what it has compiled."""
    driver.set_active(WithoutGPU(TARGETS["sm_90"]))
    *_, binder = kernel.device_caches[driver.active.get_current_device()]
    _, specialization, rest = binder(**bound, **options)
    return f"{specialization} {rest}"


def compiled_launch(kernel: Any, bound: dict[str, Any], options: dict[str, Any], target: str) -> Any:
    """Compile one launch, its arguments handled as Triton does."""
    driver.set_active(WithoutGPU(TARGETS[target]))
    return kernel.warmup(grid=(1,), **bound, **options)


def compile_launch(kernel: Any, bound: dict[str, Any], options: dict[str, Any], target: str) -> dict[str, Any]:
    """Compile one launch and give what the assembler says of it."""
    compiled = compiled_launch(kernel, bound, options, target)
    report: dict[str, Any] = {"kernel": kernel.fn.__name__, "target": target, **options}
    if target.startswith("sm_"):
        report |= _nvidia(compiled, target)
    else:
        report |= _amd(compiled)
    report["int32_row_offsets"] = int32_row_offsets(compiled.asm["ttir"])
    return report


def resource_usage(compiled: Any) -> dict[str, int]:
    """Return what one thread of a kernel for NVIDIA uses: REG, STACK and others."""
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        used = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(binary)],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
    return {name: int(value) for name, value in re.findall(r"(\w+):(\d+)", used)}


def register_count(compiled: Any, target: str) -> int:
    """Return how many registers one thread of a kernel uses."""
    return _amd(compiled)["registers"] if target == "gfx942" else resource_usage(compiled)["REG"]


def _nvidia(compiled: Any, target: str) -> dict[str, Any]:
    ptx = compiled.asm["ptx"]
    used = resource_usage(compiled)
    widths = [_width(x) for x in re.findall(r"ld\.global[\w.:]*?((?:\.v\d)?\.b\d+)", ptx)]
    widths += [int(x, 0) for x in re.findall(r"cp\.async\.c[ag]\.shared\.global.*?, (0x\w+|\d+)[,;]", ptx)]
    stores = [_width(x) for x in re.findall(r"st\.global[\w.:]*?((?:\.v\d)?\.b\d+)", ptx)]
    return {
        "spills": _spills(ptx, target) if used["STACK"] else 0,  # a stack may be there for other reasons
        "registers": used["REG"],
        "widest_load": max(widths, default=0),
        "widest_store": max(stores, default=0),
    }


def _spills(ptx: str, target: str) -> int:
    """Ask the assembler, as Triton of this version calls it; it takes as long as to compile."""
    arch = re.search(r"\.target (sm_\w+)", ptx)
    assert arch is not None
    assembler = nvidia.get_ptxas(TARGETS[target].arch).path
    options = ["--regAllocOptLevel=2"] if "--regAllocOptLevel=2" in inspect.getsource(nvidia) else []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        done = subprocess.run(
            [assembler, "-v", *options, f"--gpu-name={arch[1]}", str(source), "-o", str(source.with_suffix(".cubin"))],
            capture_output=True,
            text=True,
            check=True,
        )
    return sum(int(x) for x in re.findall(r"(\d+) bytes spill stores", done.stderr))


def _width(suffix: str) -> int:
    """Bytes of a vector access such as .v4.b32."""
    parts = re.fullmatch(r"(?:\.v(\d))?\.b(\d+)", suffix)
    assert parts is not None
    return int(parts[1] or 1) * int(parts[2]) // 8


def _amd(compiled: Any) -> dict[str, Any]:
    """Spills to memory; scalar registers that spill into lanes of a vector register do not leave the chip."""
    text = compiled.asm["amdgcn"]
    spills = sum(int(x) for x in re.findall(r"\.(?:vgpr_spill_count|private_segment_fixed_size):\s*(\d+)", text))
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    wide = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4}
    loads = [wide[x] for x in re.findall(r"(?:global|buffer)_load_(dword(?:x\d)?)\b", text)]
    stores = [wide[x] for x in re.findall(r"(?:global|buffer)_store_(dword(?:x\d)?)\b", text)]
    return {
        "spills": spills,
        "registers": int(registers[1]) if registers else 0,
        "widest_load": max(loads, default=0),
        "widest_store": max(stores, default=0),
    }


def int32_row_offsets(ttir: str) -> int:
    """Count pointer tiles (ROWS, 1) whose offset was formed in 32 bits: N K may exceed 2^31."""
    pattern = r"tt\.addptr .*: tensor<\d+x1x!tt\.ptr<\w+>>, tensor<\d+x1xi(\d+)>"
    return sum(width == "32" for width in re.findall(pattern, ttir))


if __name__ == "__main__":
    sys.path[:0] = map(str, Path(__file__).parents[1:3])
    from support.compile_cases import LAUNCHES, RESIZED, reports, variants

    if sys.argv[1:] == ["--list"]:
        print("\n".join(LAUNCHES))
        sys.exit()
    if sys.argv[1:] == ["--variants"]:
        print(json.dumps({name: variants(name) for name in RESIZED}))
        sys.exit()
    for argument in sys.argv[1:]:
        name, _, target = argument.partition(":")
        for report in reports(name, [target] if target else list(TARGETS)):
            print(json.dumps({"case": name, **report}), flush=True)
