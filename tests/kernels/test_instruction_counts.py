"""Instructions an element, from the machine code: no more than docs/kernels.md says, and counted rightly."""

import os
import subprocess
import sys
from pathlib import Path

import instruction_counts
import pytest
import triton
from instruction_counts import ISSUE, MACHINES, SPECIAL, VECTOR, Loop, committed, count_rows, instructions

from support.long_rounds import long

ROOT = Path(__file__).parents[2]
VERSION, COMMITTED = committed((ROOT / "docs" / "kernels.md").read_text())
ALLOWED = {
    "softmax_kl 8192x32768": 42,
    "softmax_kl 65536x1000": 42,
    "softmax_kl 8192x128256": 42,
    "softmax_kl 8192x8192": 42,
    "unikd_loss 8192x32768": 55,
    "unikd_loss 65536x1000": 55,
    "dkd 8192x32768": 70,
    "dkd 65536x1000": 70,
    "softmax_kl jsd 8192x32768": 100,
    "softmax_kl jsd 65536x1000": 100,
}

SASS = """
        /*0000*/                   S2R R0, SR_TID.X ;
.L_x_1:
        /*0010*/                   LDG.E.128 R4, [R2.64] ;
        /*0020*/              @!P0 MUFU.EX2 R5, R4 ;
.L_x_0:
        /*0030*/                   LDG.E.128 R8, [R2.64] ;
        /*0040*/                   LDG.E.128 R12, [R2.64+0x10] ;
        /*0050*/                   MUFU.EX2 R5, R8 ;
        /*0060*/               @P1 BRA `(.L_x_0) ;
        /*0070*/                   STG.E [R2.64], R5 ;
        /*0080*/               @P2 BRA `(.L_x_1) ;
.L_x_2:
        /*0090*/                   BRA `(.L_x_2);
"""

AMDGCN = """
.LBB0_1:
	.loc	2 88 16
	v_add_u32_e32 v21, 0x2000, v21
.LBB0_2:                                ;   Parent Loop BB0_6 Depth=1
	buffer_load_dwordx4 v[4:7], v21, s[24:27], 0 offen
	buffer_load_dwordx4 v[8:11], v20, s[24:27], 0 offen
	s_waitcnt vmcnt(0)
	v_exp_f32_e32 v5, v8
	v_pk_add_f32 v[4:5], v[4:5], v[8:9]
	s_cmp_lg_u32 s2, 0
	s_cbranch_scc1 .LBB0_2
	v_add_u32_e32 v20, 0x2000, v21
	s_branch .LBB0_1
	s_endpgm
"""


def test_what_is_promised_is_in_the_table() -> None:
    assert ALLOWED.keys() <= COMMITTED.keys() == instruction_counts.cases().keys()
    assert all(COMMITTED[case] <= most for case, most in ALLOWED.items())


@pytest.mark.slow
@pytest.mark.skipif(triton.__version__ != VERSION, reason=f"the table is from Triton {VERSION}")
@pytest.mark.parametrize("wanted", [["softmax_kl 65536x1000"], long(list(COMMITTED))], ids=["one", "all"])
def test_counts_do_not_grow(wanted: list[str]) -> None:
    """In a process of its own: whether kernels are interpreted is decided when they are defined."""
    command = [sys.executable, "-W", "ignore", "benchmarks/instruction_counts.py", *wanted]
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True, check=True
    )
    counted = {row[0]: float(row[2]) for row in (line.split("   ") for line in done.stdout.splitlines())}
    assert counted.keys() == set(wanted)
    grown = {case: (COMMITTED[case], found) for case, found in counted.items() if found > 1.05 * COMMITTED[case]}
    assert not grown


def test_loops_and_predicates_are_found() -> None:
    found, loops = instructions(SASS)
    assert found[2] == "MUFU.EX2 R5, R4"
    assert loops == [Loop(3, 6), Loop(1, 8)]


def test_a_count_is_per_element_and_loop() -> None:
    """A thread takes 8 of 1024 bf16 from each of two inputs in an iteration, and there are 128 threads."""
    shape = {"rows": 1, "block": 1024, "threads": 128, "read_bytes": 4}
    assert count_rows(SASS, ISSUE, classes=4096, **shape) == (4 / 8, 4 * 128 / 4096)
    assert count_rows(SASS, ISSUE, classes=4096, moment_loops=1, **shape)[0] == 4 / 16  # of one input two iterations
    assert count_rows(SASS, SPECIAL, classes=4096, **shape) == (8 / 8, 8 * 128 / 4096)
    shape |= {"block": 4096, "threads": 512}
    loop, _ = count_rows(SASS, ISSUE, classes=4096 + 1024, **shape)
    assert loop == 4 / 8 * 4096 / 5120  # what is left of a row is counted with the rest


def test_what_amd_issues_beside_vectors_is_free() -> None:
    """A lane takes 8 of 1024 bf16 from each of two inputs; a wave has 64 lanes, and a special function four places."""
    found, loops = instructions(AMDGCN)
    assert found[4] == "v_exp_f32_e32 v5, v8"
    assert loops == [Loop(1, 7), Loop(0, 9)]
    assert count_rows(AMDGCN, VECTOR, classes=4096, rows=1, block=1024, threads=128, read_bytes=4) == (
        (4 + 1) / 8,
        2 * 128 / 4096,
    )


def test_programs_of_a_multiprocessor() -> None:
    h200, mi300x = MACHINES["sm_90"], MACHINES["gfx942"]
    assert h200.programs(128, 256, 0) == 2
    assert h200.programs(129, 256, 0) == 1
    assert h200.programs(16, 64, 0) == 32
    assert h200.programs(16, 64, 100 * 1024) == 2
    assert mi300x.programs(128, 256, 0) == 4  # four SIMD units of 512 registers a lane
