"""The kernels on hardware that is not here: they compile, spill nothing, and load 16 bytes at a time.

Each is compiled as it would be launched, by processes of their own (`compile_check.py`): one case of each kernel for
one architecture, or, which takes a quarter of an hour, every case for every architecture.
"""

import json
import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

POOLED_MODEL = str(Path(__file__).parents[2] / "benchmarks" / "pooled_model.py")
COMPILE_CHECK = str(Path(__file__).parents[1] / "support" / "compile_check.py")
ALIGNED = (1000, 4096, 8192, 16384, 32768, 128256)  # rows of whole 16 bytes, in bf16 too
TARGETS = {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
KERNELS = 15  # of `compile_cases.KERNELS`
# Each kernel for one NVIDIA architecture; AMD's is in the long round.
QUICK = [
    "softmax_kl-1000:sm_90",
    "softmax_kl-1003:sm_90",
    "softmax_kl-maps-150:sm_90",
    "dkd-1000:sm_90",
    "gaussian_kl-1000:sm_90",
    "unikd_loss-1000:sm_90",
    "multiply-1000:sm_90",
    "pooled_fusion-normalised-bf16-channels_last:sm_90",
    "blend-bf16-channels_last:sm_90",
    "spilling:sm_90",
]

Reports = dict[str, list[dict[str, Any]]]


def python(*arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module", params=["quick", pytest.param("all", marks=pytest.mark.long)])
def reports(request: pytest.FixtureRequest) -> Reports:
    """What the compilers say of every case; in the long round by two processes at a time."""
    wanted, processes = QUICK, 1
    if request.param == "all":
        wanted, processes = python(COMPILE_CHECK, "--list").communicate()[0].split(), 2
        assert len(wanted) > 40
    running = [python(COMPILE_CHECK, *wanted[i::processes]) for i in range(processes)]
    collected: Reports = defaultdict(list)
    for process in running:
        out, err = process.communicate()
        assert process.returncode == 0, err[-3000:]
        for line in out.splitlines():
            report = json.loads(line)
            collected[report["case"]].append(report)
    assert set(collected) == {name.partition(":")[0] for name in wanted}
    return collected


@pytest.mark.slow
def test_every_kernel_compiles(reports: Reports) -> None:
    """In the long round every case for every architecture."""
    kernels = {x["kernel"] for compiled in reports.values() for x in compiled}
    assert len(kernels) == KERNELS
    if len(reports) > len(QUICK):
        for case, compiled in reports.items():
            assert {x["target"] for x in compiled} == TARGETS, case


@pytest.mark.slow
def test_nothing_spills(reports: Reports) -> None:
    spilling = [x for case, rows in reports.items() if case != "spilling" for x in rows if x["spills"]]
    assert not spilling, spilling


@pytest.mark.slow
def test_spills_are_detected(reports: Reports) -> None:
    """What `test_nothing_spills` looks at would show it."""
    assert all(x["spills"] for x in reports["spilling"] if x["target"].startswith("sm_"))


@pytest.mark.slow
def test_aligned_rows_move_16_bytes(reports: Reports) -> None:
    """K = 1000 is the one that is lost first: it is not a multiple of 16."""
    for case, compiled in reports.items():
        classes = int(case.rsplit("-", 1)[1]) if case[-1].isdigit() else 0
        for x in compiled:
            if classes in ALIGNED:
                assert x["widest_load"] == 16, x
                if "fp16" not in case:  # whose forward writes no gradient
                    assert x["widest_store"] == 16, x
            if classes == 1003:  # the figure is that of the rows: nothing else in a kernel is wide
                assert x["widest_load"] < 16, x


@pytest.mark.slow
def test_class_maps_move_16_bytes(reports: Reports) -> None:
    """Along pixels: their classes are 16,384 elements apart. Heavier kernels store 8."""
    for case, compiled in reports.items():
        for x in compiled:
            if case in ("softmax_kl-maps-150", "softmax_kl-maps-19"):
                assert x["widest_load"] == x["widest_store"] == 16, x
            elif "maps" in case and "odd" not in case:
                assert x["widest_load"] >= 8 and x["widest_store"] >= 8, x


@pytest.mark.slow
def test_channels_last_features_load_16_bytes(reports: Reports) -> None:
    """By the kernels that read features; the others read scalar maps and what is left of sums."""
    for case, compiled in reports.items():
        for x in compiled:
            scalar = x["kernel"].startswith("pixel") or x["kernel"] == "sum_parts_kernel"
            if case.endswith("channels_last") and x["target"] != "gfx942" and not scalar:
                assert x["widest_load"] == 16, x


@pytest.mark.slow
def test_new_image_size_compiles_nothing() -> None:
    """The fusions take sizes as arguments: one variant for each kind of launch."""
    process = python(COMPILE_CHECK, "--variants")
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    found = json.loads(out.splitlines()[-1])
    assert any(len(kernels) > 7 for kernels in found.values())
    assert not [(case, x) for case, kernels in found.items() for x in kernels.items() if x[1] > 1]


@pytest.mark.slow
@pytest.mark.long
def test_pooled_backward_by_the_model() -> None:
    """Half of its floor or better, and Up bilinearly at most half as much again as nearest."""
    process = python(POOLED_MODEL, "64")
    out, err = process.communicate()
    assert process.returncode == 0, err[-3000:]
    shares = [int(x) for x in re.findall(r"backward .* us, (\d+) % of its floor", out)]
    assert len(shares) == 2
    assert min(shares) >= 50, out
    for kernel in ("pixel_weights_kernel", "pixel_weights_backward_kernel"):
        nearest, bilinear = (float(x) for x in re.findall(rf"{kernel} .* (\d+\.\d) us", out))
        assert bilinear <= 1.5 * nearest, out


@pytest.mark.slow
def test_row_offsets_have_64_bits(reports: Reports) -> None:
    assert not [x for rows in reports.values() for x in rows if x["int32_row_offsets"]]


def test_row_offsets_of_32_bits_are_detected() -> None:
    from support.compile_check import int32_row_offsets

    line = "%1 = tt.addptr %a, %b : tensor<2x1x!tt.ptr<bf16>>, tensor<2x1xi{}> loc(#loc)"
    assert int32_row_offsets(line.format(32)) == 1
    assert int32_row_offsets(line.format(64)) == 0
