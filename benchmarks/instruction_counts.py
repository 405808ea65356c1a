"""What the losses cost a GPU in instructions, counted in their machine code: there need be no GPU.

python benchmarks/instruction_counts.py [CASE ...]     prints the table, or some of its rows
python benchmarks/instruction_counts.py --write        puts it into docs/kernels.md

Each launch is compiled for sm_90 as it would be launched, and disassembled. A loop is what lies between a label and a
branch back to it; the loop over rows contains those over the blocks of a row. All lanes of an instruction count, and
what stands under a condition counts as if it were always done; only the rows that are summed a second time, with more
care (`_divergence_device.is_close`), are left out. Floors are of an H200: its schedulers issue 4 instructions of 32
lanes per multiprocessor and cycle, of which special functions (MUFU) take 8 places, and its memory copies 4.3 TB/s.
"""

import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- instructions:begin -->", "<!-- instructions:end -->"
TARGET = "sm_90"

MULTIPROCESSORS, LANES, CLOCK_HZ, COPY_BYTES_PER_S = 132, 128, 1.83e9, 4.3e12
MUFU_PLACES = 8
REGISTERS, MOST_THREADS, MOST_PROGRAMS, SHARED_BYTES = 65536, 2048, 32, 227 * 1024


class Loop(NamedTuple):
    """Instructions from a label to the branch back to it."""

    first: int
    last: int

    def within(self, other: "Loop") -> bool:
        return other.first <= self.first and self.last <= other.last and self != other


class Count(NamedTuple):
    """What one element of the logits costs."""

    loops: tuple[float, ...]  # instructions in each loop over the blocks of a row
    rest: float  # and in what is done once a row
    mufu: float
    registers: int
    threads: int
    programs: int  # per multiprocessor
    element_bytes: int  # that must be moved

    @property
    def total(self) -> float:
        return sum(self.loops) + self.rest

    def issue_s(self, elements: int) -> float:
        return elements * max(self.total, MUFU_PLACES * self.mufu) / (MULTIPROCESSORS * LANES * CLOCK_HZ)

    def memory_s(self, elements: int) -> float:
        return elements * self.element_bytes / COPY_BYTES_PER_S

    @property
    def share_of_roof(self) -> float:
        return self.memory_s(1) / max(self.memory_s(1), self.issue_s(1))


def instructions(sass: str) -> tuple[list[str], list[Loop]]:
    """Return the instructions of a disassembled kernel, without predicates, and its loops."""
    labels: dict[str, int] = {}
    found: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(found)
        elif instruction := re.search(r"/\*[0-9a-f]+\*/\s+(.*?);", line):
            found.append(re.sub(r"^@!?U?P\w+\s+", "", instruction[1].strip()))
    ends: dict[int, int] = {}
    for at, text in enumerate(found):
        branch = re.search(r"BRA.*?`\((\.L_x_\d+)\)", text)
        if branch and labels.get(branch[1], at) < at:
            ends[labels[branch[1]]] = at
    return found, [Loop(first, last) for first, last in ends.items()]


def count_rows(
    sass: str, *, classes: int, rows: int, block: int, threads: int, read_bytes: int
) -> tuple[tuple[float, ...], float, float]:
    """Return instructions an element in each loop over blocks, in the rest of a row, and MUFU instructions in all.

    Args:
        sass: disassembled kernel that takes tiles of `rows` rows in turn, `block` of their `classes` at a time.
        threads: threads of a program.
        read_bytes: bytes of an element in all inputs that a loop reads.
    """
    found, loops = instructions(sass)
    body = max(loops, key=lambda loop: loop.last - loop.first, default=Loop(0, len(found) - 1))
    inner = [loop for loop in loops if loop.within(body)]
    inner = sorted(loop for loop in inner if not any(loop.within(other) for other in inner))
    whole_blocks = classes // block * block / classes
    outside = set(range(body.first, body.last + 1))
    counts, mufu = [], 0.0
    for loop in inner:
        lines = found[loop.first : loop.last + 1]
        widths = [_width(text) for text in lines if text.startswith(("LDG", "LDGSTS"))]
        wide = sum(width for width in widths if width == max(widths))
        unrolled = max(1, round(wide * threads / (block * read_bytes)))
        share = threads / (unrolled * block) * whole_blocks
        counts.append(len(lines) * share)
        mufu += sum(text.startswith("MUFU") for text in lines) * share
        outside -= set(range(loop.first, loop.last + 1))
    share = threads / (rows * classes)
    mufu += sum(found[i].startswith("MUFU") for i in outside) * share
    return tuple(counts), len(outside) * share, mufu


def _width(text: str) -> int:
    for suffix, width in ((".128", 16), (".64", 8), (".U16", 2), (".S16", 2), (".U8", 1), (".S8", 1)):
        if suffix in text.split()[0]:
            return width
    return 4


def disassemble(cubin: bytes) -> str:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def programs_per_multiprocessor(registers: int, threads: int, shared_bytes: int) -> int:
    by_registers = REGISTERS // (-(-registers // 8) * 8 * threads)
    by_shared = SHARED_BYTES // (shared_bytes + 1024)
    return min(by_registers, by_shared, MOST_THREADS // threads, MOST_PROGRAMS)


class Case(NamedTuple):
    """A launch and the shape that its floors are for."""

    launch: Callable[[], None]
    rows: int
    classes: int
    maps: int = 2  # of the logits' size that are read, and of which gradients are written
    gradients: int = 1


def cases() -> dict[str, Case]:
    from support.compile_cases import dkd_case, gaussian_case, softmax_case, unikd_case

    found = {}
    for rows, classes in ((8192, 32768), (65536, 1000), (8192, 128256), (8192, 8192), (65536, 100)):
        found[f"softmax_kl {rows}x{classes}"] = Case(partial(softmax_case, classes), rows, classes)
    for rows, classes in ((8192, 32768), (65536, 1000)):
        for kind in ("jsd", "reverse"):
            launch = partial(softmax_case, classes, divergence=kind, beta=0.5)
            found[f"softmax_kl {kind} {rows}x{classes}"] = Case(launch, rows, classes)
        launch = partial(softmax_case, classes, standardized=True)
        found[f"softmax_kl standardized {rows}x{classes}"] = Case(launch, rows, classes)
        found[f"unikd_loss {rows}x{classes}"] = Case(partial(unikd_case, classes, gaussian=False), rows, classes)
        found[f"dkd {rows}x{classes}"] = Case(partial(dkd_case, classes), rows, classes)
    found["gaussian_kl 65536x1000"] = Case(partial(gaussian_case, 1000), 65536, 1000, maps=4, gradients=2)
    return found


def count(case: Case) -> Count:
    """Compile the launch of a case and count."""
    from support.compile_cases import launches_for
    from support.compile_check import compiled_launch, resource_usage

    ((kernel, bound, options),) = launches_for(case.launch, TARGET)
    compiled = compiled_launch(kernel, bound, options, TARGET)
    # Without the rows that are summed again, which are not the usual ones.
    usual = compiled_launch(kernel, bound | ({"CARE": 0} if "CARE" in bound else {}), options, TARGET)
    threads = 32 * options["num_warps"]
    loops, rest, mufu = count_rows(
        disassemble(usual.asm["cubin"]),
        classes=case.classes,
        rows=bound["ROWS"],
        block=bound["BLOCK_K"],
        threads=threads,
        read_bytes=2 * case.maps,
    )
    registers = resource_usage(compiled)["REG"]
    return Count(
        loops,
        rest,
        mufu,
        registers,
        threads,
        programs_per_multiprocessor(registers, threads, compiled.metadata.shared),
        2 * (case.maps + case.gradients),
    )


HEADER = (
    "op, bf16",
    "instructions an element, by loop",
    "in all",
    "MUFU",
    "registers x threads",
    "programs a multiprocessor",
    "bytes an element",
    "issue floor",
    "memory floor",
    "of the roof, at most",
)


def table_rows(wanted: Sequence[str] = ()) -> Iterator[tuple[str, ...]]:
    for name, case in cases().items():
        if wanted and name not in wanted:
            continue
        counted = count(case)
        elements = case.rows * case.classes
        parts = " + ".join(f"{x:.1f}" for x in (*counted.loops, counted.rest))
        yield (
            name,
            parts,
            f"{counted.total:.1f}",
            f"{counted.mufu:.1f}",
            f"{counted.registers} x {counted.threads}",
            str(counted.programs),
            str(counted.element_bytes),
            f"{1e6 * counted.issue_s(elements):,.0f} µs",
            f"{1e6 * counted.memory_s(elements):,.0f} µs",
            f"{100 * counted.share_of_roof:.0f} %",
        )


def committed(page: str) -> tuple[str, dict[str, float]]:
    """Return the version of Triton that the table in the page is from, and its instructions an element by case."""
    caption, *lines = page.partition(BEGIN)[2].partition(END)[0].strip().splitlines()
    lines = [line for line in lines if line.startswith("|")][2:]
    cells = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return caption.rpartition("Triton ")[2].rstrip(":"), {row[0]: float(row[2]) for row in cells}


def main(arguments: list[str]) -> None:
    import triton

    write = "--write" in arguments
    caption = f"Compiled for {TARGET} by Triton {triton.__version__}:"
    lines = [caption, "", "| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for row in table_rows([x for x in arguments if x != "--write"]):
        lines.append("| " + " | ".join(row) + " |")
        print(*row, sep="   ", flush=True)
    if write:
        from unikd_fast.io import write_file

        page = PAGE.read_text()
        before, begin, rest = page.partition(BEGIN)
        _, end, after = rest.partition(END)
        write_file(PAGE, before + begin + "\n" + "\n".join(lines) + "\n" + end + after)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    main(sys.argv[1:])
