"""What the collapsed AFF costs an H200, from its machine code: there need be no GPU (`instruction_counts`).

python benchmarks/pooled_model.py [nearest | bilinear] [normalised] [BATCH]

prints it for the features of a ResNet-50 at 224 pixels in bf16, channels last, as they are or normalised; nearest and
bilinear and batches of 64 and 8 if nothing is said.

Each launch is compiled for sm_90 as it would be launched. Its PTX is then followed as thread 0 of some programs would
run it, on integers alone: which branches are taken and how often loops run depends on sizes, never on what is loaded.
Instructions executed are those, times the ratio of machine to PTX instructions in the same code. The model:

    time = max( instructions / (132 x 4 x 1.83 GHz), bytes / (4.3 TB/s x share) ),    share = min(1, in flight / 40 KB)

where in flight are the bytes that the programs of a multiprocessor load before they wait for one. The recursions on
scalar maps run as few programs of many dependent steps: their time is that of all warps' instructions, or of one warp's
with the latency of the L2 for each round of loads, whichever is longer, as often as programs follow one another.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

from instruction_counts import (
    MACHINES,
    ROOT,
    TARGET,
    disassemble,
    instructions,
)

MACHINE = MACHINES[TARGET]
SCHEDULERS = 4  # of a multiprocessor
LATENCY_CYCLES, BARRIER_CYCLES, IN_FLIGHT_BYTES = 250, 40, 40e3
SAMPLES = 48  # programs of a launch that are followed
# Instructions that are many in the machine's code.
LONG = {"div": 20, "rem": 20}

Number = int | None


class Trace(NamedTuple):
    """What a thread executed."""

    instructions: float
    rounds: int  # stretches without a branch that load from global memory
    barriers: int


class Program:
    """PTX of one kernel, followed on integers; what is loaded or not an integer is None."""

    def __init__(self, ptx: str) -> None:
        body = re.sub(r"//.*", "", ptx[ptx.index(".entry") :])
        body = body[body.index("{") + 1 :]
        self.labels: dict[str, int] = {}
        self.code: list[tuple[str, bool, str, list[str]]] = []
        for part in re.split(r"[;\n]", body.replace("\t", " ")):
            text = part.strip().lstrip("{").strip()
            if label := re.match(r"(\$\w+):", text):
                self.labels[label[1]] = len(self.code)
                continue
            found = re.match(r"(?:@(!?)(%\w+) )? *([a-z][\w.:]*) *(.*)", text)
            if found and not text.startswith("."):
                operands = re.findall(r"\[[^]]*\]|[-\w.%$]+", found[4].replace("{", " ").replace("}", " "))
                self.code.append((found[2] or "", bool(found[1]), found[3], operands))

    def static(self) -> float:
        return sum(LONG.get(op.split(".")[0], 1) for _, _, op, _ in self.code)

    def loaded_bytes(self, stages: int) -> int:
        """Return the bytes that a thread has under way before it waits, with so many tiles in turn."""
        most, now = 0, 0
        starts = set(self.labels.values())
        for at, (_, _, op, operands) in enumerate(self.code):
            if at in starts or op.startswith("bra"):
                now = 0
            if op.startswith("ld.global."):
                now += 4 * int((re.findall(r"\.v(\d)", op) or [1])[0])
            if op.startswith("cp.async.c") and "commit" not in op and int(operands[2], 0) == 16:
                now += 16 * (stages - 1)
            most = max(most, now)
        return most

    def run(self, program_id: int, arguments: list[int]) -> Trace:
        known: dict[str, Number] = {"%tid.x": 0, "%ctaid.x": program_id}
        at, count, rounds, barriers, loading = 0, 0.0, 0, 0, False
        while True:
            predicate, negated, op, operands = self.code[at]
            kind = op.split(".")[0]
            count += LONG.get(kind, 1)
            at += 1
            if kind == "ret":
                return Trace(count, rounds + loading, barriers)
            if kind == "bra":
                rounds, loading = rounds + loading, False
                if predicate:
                    held = known.get(predicate)
                    assert held is not None, f"a branch depends on what is loaded: {op} {operands}"
                    if bool(held) == negated:
                        continue
                at = self.labels[operands[0]]
                continue
            if op.startswith(("ld.global", "cp.async.c")) and "commit" not in op:
                loading = True
            if op.startswith("bar"):
                barriers += 1
                rounds, loading = rounds + loading, False
            if kind in ("st", "bar", "cp", "red", "prefetch"):
                continue
            if op.startswith("ld.param"):
                known[operands[0]] = arguments[int(re.search(r"param_(\d+)", operands[1])[1])]
                continue
            if not operands:
                continue
            known[operands[0]] = self.value(op, [self.operand(known, x) for x in operands[1:]])

    @staticmethod
    def operand(known: dict[str, Number], text: str) -> Number:
        if text.startswith("%"):
            return known.get(text)
        return int(text, 0) if re.fullmatch(r"-?(0x)?[\da-fA-F]+", text) and not text.startswith("0f") else None

    @staticmethod
    def value(op: str, x: list[Number]) -> Number:
        kind, *parts = op.split(".")
        if kind in ("and", "or") and len(x) == 2:  # either may settle it
            for one in x:
                if one is not None and (one == 0) == (kind == "and") and (one == 0 or parts[-1] == "pred"):
                    return one
        if any(part in ("f32", "f64", "bf16x2", "bf16", "f16") for part in parts) or any(one is None for one in x):
            return None
        width = 64 if parts[-1][-2:] == "64" else 32
        signed = parts[-1][0] == "s" or parts[-1][0] == "b"

        def wrap(value: int, bits: int = width) -> int:
            value &= (1 << bits) - 1
            return value - (1 << bits) if signed and value >> (bits - 1) else value

        unsigned = [one & ((1 << width) - 1) for one in x if isinstance(one, int)]
        a = [wrap(one) for one in unsigned]
        if kind == "mov" or kind == "cvt":
            return wrap(a[0]) if len(a) == 1 else None
        if kind == "setp":
            compared = {"lt": a[0] < a[1], "le": a[0] <= a[1], "gt": a[0] > a[1], "ge": a[0] >= a[1]}
            return int((compared | {"eq": a[0] == a[1], "ne": a[0] != a[1]})[parts[0]])
        if kind in ("mul", "mad"):
            if "wide" in parts:
                return a[0] * a[1] + (x[2] if kind == "mad" else 0)
            product = a[0] * a[1] >> (32 if "hi" in parts else 0)
            return wrap(product + (a[2] if kind == "mad" else 0))
        simple = {
            "add": lambda: a[0] + a[1],
            "sub": lambda: a[0] - a[1],
            "shl": lambda: a[0] << min(unsigned[1], 64),
            "shr": lambda: (a if parts[-1][0] == "s" else unsigned)[0] >> min(unsigned[1], 64),
            "and": lambda: a[0] & a[1],
            "or": lambda: a[0] | a[1],
            "xor": lambda: a[0] ^ a[1],
            "not": lambda: a[0] == 0 if parts[-1] == "pred" else ~a[0],
            "neg": lambda: -a[0],
            "min": lambda: min(a),
            "max": lambda: max(a),
            "selp": lambda: x[0] if x[2] else x[1],
            "div": lambda: int(a[0] / a[1]) if abs(a[0]) < 2**50 else a[0] // a[1],
            "rem": lambda: a[0] - a[1] * int(a[0] / a[1]),
        }
        return wrap(int(simple[kind]())) if kind in simple else None


class Cost(NamedTuple):
    """A launch by the model."""

    kernel: str
    programs: int
    threads: int
    registers: int
    resident: int  # programs per multiprocessor
    instructions: float  # of a warp, all programs together
    megabytes: float
    share: float  # of the memory's speed
    seconds: float


def assemble(ptx: str) -> int:
    """Return the machine instructions of PTX whose loops are not unrolled."""
    from triton.backends.nvidia.compiler import get_ptxas

    kept = re.sub(r"(?m)^(\$L__BB\w+:)", r'\1\n.pragma "nounroll";', ptx)
    with tempfile.TemporaryDirectory() as folder:
        source, binary = Path(folder) / "kernel.ptx", Path(folder) / "kernel.cubin"
        source.write_text(kept)
        subprocess.run([get_ptxas(90).path, "--gpu-name=sm_90a", str(source), "-o", str(binary)], check=True)
        found, _ = instructions(disassemble(binary.read_bytes()))
    return sum(not text.startswith("NOP") for text in found)


def flat(value: Any) -> list[Any]:
    return [y for x in value for y in flat(x)] if isinstance(value, tuple) else [value]


def arguments_of(kernel: Any, bound: dict[str, Any]) -> list[int]:
    """Return what the parameters of the compiled kernel hold: sizes as they are, pointers as an address."""
    values = [
        x
        for parameter in kernel.params
        if not parameter.is_constexpr
        for x in flat(bound[parameter.name])
        if x is not None
    ]
    values = [1 << 20 if hasattr(x, "data_ptr") else int(x) for x in values]
    return [*values, 1 << 20, 1 << 20]  # scratch memory of the compiler


def cost(kernel: Any, bound: dict[str, Any], options: dict[str, Any], grid: int, moved: float) -> Cost:
    """Return the cost of a launch that moves so many bytes; 0 for a recursion."""
    from support.compile_check import compiled_launch, resource_usage

    compiled = compiled_launch(kernel, bound, options, TARGET)
    registers, threads = resource_usage(compiled)["REG"], 32 * options["num_warps"]
    resident = MACHINE.programs(registers, threads, compiled.metadata.shared)
    program = Program(compiled.asm["ptx"])
    ratio = assemble(compiled.asm["ptx"]) / program.static()
    arguments = arguments_of(kernel, bound)
    # Spread evenly, and out of step with the programs of an image.
    chosen = [int(grid * (0.618034 * (i + 1) % 1)) for i in range(SAMPLES)] if moved else [0]
    traces = [program.run(i, arguments) for i in chosen]
    each = ratio * sum(t.instructions for t in traces) / len(traces) * options["num_warps"]
    issued = each * grid
    rate = MACHINE.multiprocessors * SCHEDULERS * MACHINE.clock_hz
    if moved:
        share = min(1.0, resident * threads * program.loaded_bytes(options.get("num_stages", 3)) / IN_FLIGHT_BYTES)
        seconds = max(issued / rate, moved / MACHINE.copy_bytes_per_s / share)
    else:
        share = 1.0
        turns = -(-grid // (MACHINE.multiprocessors * resident))
        together = min(resident, -(-grid // MACHINE.multiprocessors))
        waiting = LATENCY_CYCLES * traces[0].rounds + BARRIER_CYCLES * traces[0].barriers
        alone = each / options["num_warps"] + waiting
        seconds = turns * max(each * together / SCHEDULERS, alone) / MACHINE.clock_hz
    return Cost(kernel.fn.__name__, grid, threads, registers, resident, issued, moved / 1e6, share, seconds)


def bytes_of(levels: list[tuple[int, int]], batch: int, bound: dict[str, Any]) -> dict[str, float]:
    """Return the bytes that a launch of each kernel moves: bf16 features, scalar maps and parts of ∂M in fp32."""
    gates = len(levels) - 1
    parts = 0 if bound.get("parts_ptr") is None else bound["parts_ptr"].numel()
    reads = bool(parts) or bound.get("slope_ptr") is not None
    writes = any(x is not None for x in bound.get("grad_features", ()))
    rows = 4 * sum(c for c, _ in levels)
    areas = [size * size for _, size in levels]
    features = 2 * batch * sum(c * area for (c, _), area in zip(levels, areas, strict=True))
    seen = 4 * batch * sum(9 * i * area for i, area in enumerate(areas))
    own = 4 * batch * 9 * sum(areas[:gates])
    pixels = 4 * batch * sum(areas)
    return {
        "project_kernel": features + seen + own,
        "pixel_weights_kernel": 0,
        "average_kernel": features + 2 * pixels,
        "weight_gradient_kernel": features + pixels,
        "pixel_weights_backward_kernel": 0,
        "feature_gradient_kernel": (reads + writes) * features + seen + 3 * pixels + 4 * parts,
        "sum_parts_kernel": 4 * parts,
        "norm_gradient_kernel": rows * (2 * batch + 3 * 18 * gates),
    }


RESNET50 = [(256, 56), (512, 28), (1024, 14), (2048, 7)]
FORWARD = ("project_kernel", "pixel_weights_kernel", "average_kernel")


def costs(upsample: str, batch: int, *, normalised: bool) -> list[Cost]:
    import torch

    from support import compile_cases
    from support.compile_check import recorded
    from unikd_fast.kernels import _launch, _pooled_plan, pooled_fusion

    def plan_for(features: Any, upsample: str) -> Any:
        """Plan for a GPU; on a CPU few programs share the features."""
        return _pooled_plan.plan_of(_pooled_plan.levels_of(features), features[0].dtype, upsample, torch.device("cuda"))

    _pooled_plan.describe = lambda _: _launch.describe(torch.device("cpu"))
    pooled_fusion.plan_for = plan_for
    with recorded([m for m, _ in compile_cases.KERNELS], [k for _, k in compile_cases.KERNELS]) as recorders:
        compile_cases.pooled_case(torch.bfloat16, torch.channels_last, upsample, normalised, images=batch)
    found = []
    for recorder in recorders:
        for (bound, options), grid in zip(recorder.launches, recorder.grids, strict=True):
            moved = bytes_of(RESNET50, batch, bound)[recorder.kernel.fn.__name__]
            found.append(cost(recorder.kernel, bound, options, grid[0], moved))
    order = list(bytes_of(RESNET50, batch, {}))
    return sorted(found, key=lambda c: order.index(c.kernel))


def main(arguments: list[str]) -> None:
    batches = [int(x) for x in arguments if x.isdigit()] or [64, 8]
    normalised = "normalised" in arguments
    modes = [x for x in arguments if x in ("nearest", "bilinear")] or ["nearest", "bilinear"]
    for upsample in modes:
        for batch in batches:
            floor = 2 * batch * sum(c * s * s for c, s in RESNET50) / MACHINE.copy_bytes_per_s
            print(f"{upsample}, batch {batch}" + ", normalised" * normalised)
            found = costs(upsample, batch, normalised=normalised)
            for c in found:
                print(
                    f"  {c.kernel:30} {c.programs:6} x {c.threads}  registers {c.registers:3}  per SM {c.resident:2}  "
                    f"{c.instructions / 1e6:7.2f} M warp instructions  {c.megabytes:7.1f} MB  share {c.share:4.2f}  "
                    f"{1e6 * c.seconds:7.1f} us"
                )
            forward = sum(c.seconds for c in found if c.kernel in FORWARD)
            backward = sum(c.seconds for c in found) - forward
            print(f"  forward {1e6 * forward:.1f} us, {100 * floor / forward:.0f} % of its floor")
            print(f"  backward {1e6 * backward:.1f} us, {200 * floor / backward:.0f} % of its floor", flush=True)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    main(sys.argv[1:])
