"""What the losses cost a GPU in instructions, counted in their machine code: there need be no GPU.

python benchmarks/instruction_counts.py [TARGET] [CASE ...]           prints the table, for sm_90 if nothing is said
python benchmarks/instruction_counts.py --alternatives [TARGET] CASE  other launches of a case beside its own
python benchmarks/instruction_counts.py --write                       puts the tables into docs/kernels.md

Each launch is compiled as it would be launched, and disassembled. A loop is what lies between a label and a branch back
to it; the loop over rows contains those over the blocks of a row. All lanes of an instruction count, and what stands
under a condition counts as if it were always done; only the rows that are summed a second time, with more care
(`_divergence_device.is_close`), are left out. Floors are of one card for each architecture (`MACHINES`).
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- instructions:begin -->", "<!-- instructions:end -->"
TARGET = "sm_90"
# From asking for bytes to having them under load; 40 KB per multiprocessor then keep an H200's memory busy.
LATENCY_S = 1.2e-6

Unit = dict[str, int]  # lanes' places that an instruction takes there, by the first pattern that its name starts with


class Machine(NamedTuple):
    """A card, one for each architecture. What an instruction takes is counted in places, of which a lane has one."""

    card: str
    multiprocessors: int
    clock_hz: float
    copy_bytes_per_s: float
    units: tuple[Unit, ...]  # the one that issues, then others that may be busier
    lanes: int = 128  # places per multiprocessor and cycle
    warp: int = 32
    registers: int = 65536
    most_threads: int = 2048
    most_programs: int = 32
    shared_bytes: int = 227 * 1024

    @property
    def places_per_s(self) -> float:
        return self.multiprocessors * self.lanes * self.clock_hz

    @property
    def needed_bytes(self) -> float:
        """Bytes in flight per multiprocessor that keep the memory busy."""
        return self.copy_bytes_per_s * LATENCY_S / self.multiprocessors

    def programs(self, registers: int, threads: int, shared_bytes: int) -> int:
        """Return how many programs a multiprocessor holds."""
        by_registers = self.registers // (-(-registers // 8) * 8 * threads)
        by_shared = self.shared_bytes // (shared_bytes + 1024)
        return min(by_registers, by_shared, self.most_threads // threads, self.most_programs)


# Places from the table of arithmetic throughput in NVIDIA's CUDA C++ Programming Guide: per multiprocessor and cycle
# 128 instructions of a lane are issued, of which 16 special functions, 64 comparisons, shifts and conversions, and 128
# fp32 sums and products, 64 on sm_80. A packed pair of sm_100 is issued once and computed as two.
ISSUE, SPECIAL = {"": 1}, {"MUFU": 8}
LOGIC = {"FMNMX|FSET|FSEL|SEL|ISETP|LOP3|SHF|PRMT|F2F": 2}
NVIDIA = (ISSUE, SPECIAL, LOGIC)
# A SIMD unit of a CDNA 3 takes a wave of 64 in four cycles, of a special function in 16 (LLVM's SISchedule.td); what is
# scalar, loads or stores is issued beside it.
VECTOR = {"v_(exp|log|rcp|rsq|sqrt)_": 4, "v_": 1}
SPECIAL_FUNCTIONS = {"MUFU|v_(exp|log|rcp|rsq|sqrt)_": 1}
# Multiprocessors, boost clocks and memory from the vendors' data sheets, of whose bandwidth a copy gets 0.9, as was
# measured on an H200 (4.3 TB/s of 4.8), whose clock is a little below its boost. The other cards were not measured.
MACHINES = {
    "sm_80": Machine(
        "A100 SXM 80 GB", 108, 1.41e9, 0.9 * 2.04e12, (*NVIDIA, {"FADD|FMUL|FFMA": 2}), shared_bytes=163 * 1024
    ),
    "sm_90": Machine("H200 SXM", 132, 1.83e9, 4.3e12, NVIDIA),
    "sm_100": Machine("B200", 148, 1.965e9, 0.9 * 8e12, (*NVIDIA, {"FADD2|FMUL2|FFMA2": 2, "FH?ADD|FMUL|FFMA": 1})),
    "sm_120": Machine(
        "RTX PRO 6000", 188, 2.6e9, 0.9 * 1.79e12, NVIDIA, most_threads=1536, most_programs=24, shared_bytes=99 * 1024
    ),
    "gfx942": Machine(
        "MI300X", 304, 2.1e9, 0.9 * 5.3e12, (VECTOR,), lanes=64, warp=64, registers=131072, shared_bytes=64 * 1024
    ),
}


class Loop(NamedTuple):
    """Instructions from a label to the branch back to it."""

    first: int
    last: int

    def holds(self, place: int) -> bool:
        return self.first <= place <= self.last

    def within(self, other: "Loop") -> bool:
        return other.first <= self.first and self.last <= other.last and self != other


class Count(NamedTuple):
    """What one element of the logits costs a machine."""

    machine: Machine
    loops: tuple[float, ...]  # instructions in each loop over the blocks of a row
    rest: float  # and in what is done once a row
    busiest: float  # places that the busiest unit needs
    special: float
    registers: int
    threads: int
    programs: int  # per multiprocessor
    element_bytes: int  # that must be moved
    in_flight_bytes: int  # that a multiprocessor has asked for before it waits

    @property
    def total(self) -> float:
        return sum(self.loops) + self.rest

    def issue_s(self, elements: int) -> float:
        return elements * self.busiest / self.machine.places_per_s

    def memory_s(self, elements: int) -> float:
        return elements * self.element_bytes / self.machine.copy_bytes_per_s

    @property
    def share_of_roof(self) -> float:
        return self.memory_s(1) / max(self.memory_s(1), self.issue_s(1))


def instructions(code: str) -> tuple[list[str], list[Loop]]:
    """Return the instructions of a disassembled kernel, SASS without predicates or AMD's, and its loops."""
    labels: dict[str, int] = {}
    found: list[str] = []
    for line in code.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.search(r"/\*[0-9a-f]+\*/\s+(.*?);|^\t([a-z]+_\w.*)", line):
            found.append(re.sub(r"^@!?U?P\w+\s+", "", (instruction[1] or instruction[2]).strip()))
    ends: dict[int, int] = {}
    for at, text in enumerate(found):
        branch = re.search(r"BRA.*?`\((\.L_x_\d+)\)|^s_c?branch\w* (\.L\w+)", text)
        to = labels.get(branch[1] or branch[2], at) if branch else at
        if to < at:
            ends[to] = at
    return found, [Loop(first, last) for first, last in ends.items()]


def row_loops(code: str) -> tuple[list[str], Loop, list[Loop]]:
    """Return the instructions of a kernel that takes rows in turn, its loop over rows, and the loops over blocks."""
    found, loops = instructions(code)
    body = max(loops, key=lambda loop: loop.last - loop.first, default=Loop(0, len(found) - 1))
    inner = [loop for loop in loops if loop.within(body)]
    return found, body, sorted(loop for loop in inner if not any(loop.within(other) for other in inner))


def count_rows(
    code: str, unit: Unit, *, classes: int, rows: int, block: int, threads: int, read_bytes: int, moment_loops: int = 0
) -> tuple[float, ...]:
    """Return the places that a unit needs per element, in each loop over blocks and in the rest of a row.

    Args:
        code: disassembled kernel that takes tiles of `rows` rows in turn, `block` of their `classes` at a time.
        unit: what instructions take.
        threads: threads of a program.
        read_bytes: bytes of an element in all inputs that a loop reads.
        moment_loops: number of loops, the first ones, that read one input of two. Those that the compiler has unrolled
            to the end are no loops, and are known by their loads.
    """
    found, body, inner = row_loops(code)
    outside = [i for i in range(body.first, body.last + 1) if not any(loop.holds(i) for loop in inner)]
    loaded = sum(width for width in _load_widths([found[i] for i in outside]) if width > 2) * threads / rows
    moment_loops = max(0, moment_loops - round(2 * loaded / (classes * read_bytes)))
    places = [next((n for pattern, n in unit.items() if re.match(pattern, text)), 0) for text in found]
    whole_blocks = classes // block * block / classes
    rest = sum(places[body.first : body.last + 1])
    counts = []
    for i, loop in enumerate(inner):
        widths = _load_widths(found[loop.first : loop.last + 1])
        wide = sum(width for width in widths if width == max(widths))
        unrolled = max(1, round(wide * threads / (rows * block * read_bytes) * (1 + (i < moment_loops))))
        taken = sum(places[loop.first : loop.last + 1])
        counts.append(taken * threads / (unrolled * rows * block) * whole_blocks)
        rest -= taken
    return (*counts, rest * threads / (rows * classes))


def _load_widths(found: list[str]) -> list[int]:
    """Return the bytes that a lane gets from each load."""
    widths = ((".128|x4", 16), ("x3", 12), (".64|x2", 8), (".[US]16|[us]short", 2), (".[US]8|[us]byte", 1))
    names = [text.split()[0] for text in found if re.match("LDG|buffer_load|global_load", text)]
    return [next((width for pattern, width in widths if re.search(pattern, name)), 4) for name in names]


def disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


class Case(NamedTuple):
    """A launch and the shape that its floors are for."""

    launch: Callable[[], None]
    rows: int
    classes: int
    maps: int = 2  # of the logits' size that are read, and of which gradients are written
    gradients: int = 1
    moment_loops: int = 0


def cases() -> dict[str, Case]:
    from support.compile_cases import dkd_case, gaussian_case, maps_case, softmax_case, unikd_case

    found = {}
    for rows, classes in ((8192, 32768), (65536, 1000), (8192, 128256), (8192, 8192), (65536, 100)):
        found[f"softmax_kl {rows}x{classes}"] = Case(partial(softmax_case, classes), rows, classes)
    for rows, classes in ((8192, 32768), (65536, 1000)):
        for kind in ("jsd", "reverse"):
            launch = partial(softmax_case, classes, divergence=kind, beta=0.5)
            found[f"softmax_kl {kind} {rows}x{classes}"] = Case(launch, rows, classes)
        launch = partial(softmax_case, classes, standardized=True)
        found[f"softmax_kl standardized {rows}x{classes}"] = Case(launch, rows, classes, moment_loops=4)
        found[f"unikd_loss {rows}x{classes}"] = Case(partial(unikd_case, classes, gaussian=False), rows, classes)
        found[f"dkd {rows}x{classes}"] = Case(partial(dkd_case, classes), rows, classes)
    found["softmax_kl 8x150x128x128"] = Case(partial(maps_case, 150), 8 * 128 * 128, 150)
    found["gaussian_kl 65536x1000"] = Case(partial(gaussian_case, 1000), 65536, 1000, maps=4, gradients=2)
    return found


def count(case: Case, target: str, changes: dict[str, Any] | None = None) -> Count:
    """Compile the launch of a case and count.

    Args:
        case: the launch and its shape.
        target: key of `MACHINES`.
        changes: arguments and options of the launch to replace.
    """
    from support.compile_cases import launches_for
    from support.compile_check import compiled_launch, register_count

    ((kernel, bound, options),) = launches_for(case.launch, target)
    bound, options = ({name: (changes or {}).get(name, x) for name, x in given.items()} for given in (bound, options))
    machine = MACHINES[target]
    compiled = compiled_launch(kernel, bound, options, target)
    # Without the rows that are summed again, which are not the usual ones.
    usual = compiled_launch(kernel, bound | ({"CARE": 0} if bound.get("CARE", 3) < 3 else {}), options, target)
    threads = machine.warp * options["num_warps"]
    code = usual.asm["amdgcn"] if target == "gfx942" else disassemble(usual.asm["cubin"])
    counts = [
        count_rows(
            code,
            unit,
            classes=case.classes,
            rows=bound["ROWS"],
            block=bound["BLOCK_K"],
            threads=threads,
            read_bytes=2 * case.maps,
            moment_loops=case.moment_loops,
        )
        for unit in (*machine.units, SPECIAL_FUNCTIONS)
    ]
    registers = register_count(compiled, target)
    programs = machine.programs(registers, threads, compiled.metadata.shared)
    found, body, inner = row_loops(code)
    loading = max(sum(_load_widths(found[x.first : x.last + 1])) for x in inner or [body])
    return Count(
        machine,
        counts[0][:-1],
        counts[0][-1],
        max(sum(x) for x in counts[:-1]),
        sum(counts[-1]),
        registers,
        threads,
        programs,
        2 * (case.maps + case.gradients),
        loading * threads * programs,
    )


HEADER = (
    "op, bf16",
    "instructions an element, by loop",
    "in all",
    "special functions",
    "registers x threads",
    "programs a multiprocessor",
    "in flight",
    "bytes an element",
    "issue floor",
    "memory floor",
    "of the roof, at most",
)


def table_row(name: str, case: Case, counted: Count) -> tuple[str, ...]:
    elements = case.rows * case.classes
    return (
        name,
        " + ".join(f"{x:.1f}" for x in (*counted.loops, counted.rest)),
        f"{counted.total:.1f}",
        f"{counted.special:.1f}",
        f"{counted.registers} x {counted.threads}",
        str(counted.programs),
        f"{counted.in_flight_bytes / 1024:.0f} KB",
        str(counted.element_bytes),
        f"{1e6 * counted.issue_s(elements):,.0f} µs",
        f"{1e6 * counted.memory_s(elements):,.0f} µs",
        f"{100 * counted.share_of_roof:.0f} %",
    )


def table(header: Sequence[str], rows: Iterator[tuple[str, ...]]) -> Iterator[str]:
    """Return the lines of a table; each row is printed as soon as it is there."""
    yield from ("| " + " | ".join(header) + " |", "|" + "---|" * len(header))
    for row in rows:
        print(*row, sep="   ", flush=True)
        yield "| " + " | ".join(row) + " |"


def counts(wanted: Sequence[str], target: str) -> Iterator[tuple[str, ...]]:
    """Return the row of each wanted case, or of all."""
    for name, case in cases().items():
        if not wanted or name in wanted:
            yield table_row(name, case, count(case, target))


def shares() -> Iterator[tuple[str, ...]]:
    """Return for each case and card the instructions an element and the most that it reaches of the memory's roof."""
    for name, case in cases().items():
        counted = [count(case, target) for target in MACHINES]
        yield (name, *(f"{x.total:.1f}, {100 * x.share_of_roof:.0f} %" for x in counted))


def alternatives(name: str, target: str) -> Iterator[tuple[str, ...]]:
    """Return the row of a case as it is launched, then with other warps, rows of a tile and blocks of classes."""
    from support.compile_cases import launches_for

    case = cases()[name]
    ((_, bound, options),) = launches_for(case.launch, target)
    yield table_row(name, case, count(case, target))
    tile = "ROWS" if bound["SINGLE"] else "BLOCK_K"
    for num_warps, factor in product((1, 2, 4, 8, 16), (0.5, 1, 2)):
        changes = {"num_warps": num_warps, tile: int(bound[tile] * factor)}
        if "maxnreg" in options:
            changes["maxnreg"] = min(options["maxnreg"] * options["num_warps"] // num_warps, 255) // 8 * 8
        if changes[tile] and changes != {x: (bound | options)[x] for x in changes}:
            label = " ".join(f"{x}={value}" for x, value in changes.items())
            yield table_row(label, case, count(case, target, changes))


def committed(page: str) -> tuple[str, dict[str, float]]:
    """Return the version of Triton that the table in the page is from, and its instructions an element by case."""
    caption, table, *_ = page.partition(BEGIN)[2].partition(END)[0].strip().split("\n\n")
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:])
    return caption.rpartition("Triton ")[2].rstrip(":"), {row[0]: float(row[2]) for row in cells}


def main(arguments: list[str]) -> None:
    import triton

    wanted = [x for x in arguments if x not in MACHINES and not x.startswith("--")]
    target = next((x for x in arguments if x in MACHINES), TARGET)
    if "--alternatives" in arguments:
        list(table(HEADER, alternatives(wanted[0], target)))
        return
    lines = [f"Compiled for {target} by Triton {triton.__version__}:", "", *table(HEADER, counts(wanted, target))]
    if "--write" in arguments:
        from unikd_fast.io import write_file

        cards = [f"{name}, {machine.card}" for name, machine in MACHINES.items()]
        lines += ["", "The same for each architecture, instructions an element and the share of the roof:", ""]
        lines += table((HEADER[0], *cards), shares())
        page = PAGE.read_text()
        before, begin, rest = page.partition(BEGIN)
        _, end, after = rest.partition(END)
        write_file(PAGE, before + begin + "\n" + "\n".join(lines) + "\n" + end + after)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    main(sys.argv[1:])
