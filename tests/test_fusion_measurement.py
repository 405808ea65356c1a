"""How the fusion is measured on a GPU: whatever of it needs none."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import fusion_cases
import fusion_errors
import fusion_measurement
import measurement
import pooled_model
import pytest
import step_share
import torch
from fusion_cases import FORMS, RESNET50, Case, Pyramid, make_inputs, make_upstream, stagewise_pooled
from gpu_timing import Call, Times, queued_calls
from measurement import Compute, attempt, forward_and_gradients, percent_of_floor, samples_for
from roofs import Roofs
from torch import Tensor

from unikd_fast.models import build_model, extract_features

ROOFS = Roofs("bfloat16", 4, 1000, copy_gb_s=1e-4, read_gb_s=2e-4, two_reads_one_write_gb_s=1.5e-4)
SMALL = Pyramid("small", (4, 6), (4, 2))
POOLED = Case("pooled", SMALL, 6, 2, True, fusion_cases.BACKWARD_HALF)
BLENDED = Case("blend", Pyramid("4 over 2", (6, 6), (4, 2)), 6, 2, True, fusion_cases.BLENDED)
SMALL_CASES = [POOLED, replace(POOLED, backward=False), BLENDED]
KERNELS = dict(FORMS)


def timed(calls: Sequence[Call], **_: Any) -> Times:
    calls[0]()
    return Times(2.0, 1.0, 3.0)


def exactly(compute: Compute) -> Compute:
    """A stand-in for a kernel: the plain form in fp32."""
    return lambda *x: compute(*(t.float() for t in x)).to(torch.float32 if compute is stagewise_pooled else x[0].dtype)


@pytest.fixture
def without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every computation runs as it would on a GPU, ours replaced by the plain form; clocks and counters are made up."""

    def stages_timed(stages: Sequence[Callable[[], Call]], **_: Any) -> Times:
        return timed([lambda: stages[0]()()])

    def memory(call: Call) -> tuple[float, float]:
        call()
        return 1.0, 0.5

    def compiled(compute: Any, **_: Any) -> Any:
        return compute

    for module in (measurement, step_share):
        monkeypatch.setattr(module, "device_times", timed)
        monkeypatch.setattr(module, "call_us", lambda calls, **_: 2000.0)
        monkeypatch.setattr(module, "launched", lambda call: ["kernel"])
    monkeypatch.setattr(measurement, "staged_times", stages_timed)
    monkeypatch.setattr(measurement, "host_us", lambda calls, **_: 20.0)
    monkeypatch.setattr(measurement, "extra_mib", memory)
    monkeypatch.setattr(measurement, "waits_for_the_gpu", lambda call: False)
    monkeypatch.setattr(measurement, "is_launch_bound", lambda *_: False)
    monkeypatch.setattr(fusion_measurement, "is_launch_bound", lambda *_: False)
    monkeypatch.setattr(fusion_measurement, "cache_bytes", lambda: 500)
    monkeypatch.setattr(fusion_measurement, "measure_roofs", lambda *_: ROOFS)
    monkeypatch.setattr(torch, "compile", compiled)
    for name, form in FORMS.items():
        monkeypatch.setitem(FORMS, name, replace(form, ours=exactly(form.plain)))


def test_bytes_of_the_cases() -> None:
    teacher = Case("pooled", RESNET50, 2048, 1, False)
    features = 2 * (256 * 3136 + 512 * 784 + 1024 * 196 + 2048 * 49)
    assert teacher.feature_bytes == teacher.forward_bytes == teacher.least_bytes == features
    student = replace(teacher, backward=True)
    assert (student.backward_bytes, student.least_bytes) == (2 * features, 3 * features)
    pixels = 2 * 256 * 3136  # P of one image: the coarse map has a quarter of it
    blend = next(case for case in fusion_cases.CASES if case.form == "blend" and case.batch == 64)
    assert blend.forward_bytes == 64 * pixels * 9 // 4
    assert blend.backward_bytes == 64 * pixels * 14 // 4
    assert (percent_of_floor(4_000_000_000, 2.0, 4000.0), percent_of_floor(4_000, 2.0, 4000.0)) == (50.0, None)
    assert percent_of_floor(4_000_000_000, None, 4000.0) is None


def test_cases_have_unique_names_and_valid_targets(without_a_gpu: None) -> None:
    assert len({str(case) for case in fusion_cases.CASES}) == len(fusion_cases.CASES)
    rows = {}
    for small in (POOLED, replace(POOLED, backward=False), BLENDED):
        rows[small.form + str(small.backward)] = fusion_measurement.measure(small, device="cpu")[0][0]
    for case in fusion_cases.CASES:
        row = rows[case.form + str(case.backward)]
        assert all(row[target.column] is not None for target in case.targets), case


@pytest.mark.parametrize("case", SMALL_CASES, ids=str)
def test_a_case_from_end_to_end(without_a_gpu: None, case: Case) -> None:
    rows, roofs = fusion_measurement.measure(case, device="cpu")
    ours = rows[0]
    assert [row["variant"] for row in rows] == ["ours", "eager", "compile", *FORMS[case.form].peers]
    assert not any("missing" in row for row in rows)
    assert roofs is ROOFS
    assert ours["ratio_compile"] == ours["call_ratio_eager"] == 1.0
    assert (ours["backward_ms"] is None) == (not case.backward)
    assert ours["forward_percent_of_floor"] == percent_of_floor(
        case.forward_bytes, 2.0, ROOFS.gb_s(FORMS[case.form].forward_roof)
    )
    assert len(ours["targets"]) == len(case.targets)
    errors = {column for column in ours if column.endswith("_error")}
    expected = {"value_error"} | ({"features_error", "gates_error"} if case.backward else set())
    assert errors == expected | ({"expanders_error"} if case.backward and case.form == "pooled" else set())
    gradients = sum(x.numel() * x.element_size() for x in make_inputs(case, device="cpu")) if case.backward else 0
    beyond = 2**20 - gradients - case.result_bytes
    assert ours["peak_percent_of_features"] == round(100 * beyond / case.feature_bytes, 2)


@pytest.mark.parametrize("case", [POOLED, pytest.param(BLENDED, marks=pytest.mark.long)], ids=str)
def test_the_kernels_from_end_to_end(without_a_gpu: None, monkeypatch: pytest.MonkeyPatch, case: Case) -> None:
    if case.form == "blend":
        pytest.importorskip("unikd_fast.kernels.feature_fusion")
    monkeypatch.setitem(FORMS, case.form, KERNELS[case.form])
    rows, _ = fusion_measurement.measure(case, device="cuda" if torch.cuda.is_available() else "cpu")
    assert rows[0]["value_error"] <= rows[1]["value_error"]


def test_a_wrong_result_is_not_measured(without_a_gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    right = FORMS["pooled"]
    for factor in (1.1, float("nan")):
        wrong = replace(right, ours=lambda *x, factor=factor: right.ours(*x) * factor)
        monkeypatch.setitem(FORMS, "pooled", wrong)
        with pytest.raises(AssertionError, match="value_error"):
            fusion_measurement.measure(POOLED, device="cpu")


@pytest.mark.parametrize("failing", ["eager", "compile", "collapsed"])
def test_a_failing_peer_is_reported(without_a_gpu: None, monkeypatch: pytest.MonkeyPatch, failing: str) -> None:
    real = fusion_measurement.variants

    def out_of_memory(*_: Tensor) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried to allocate 33 GiB")

    monkeypatch.setattr(fusion_measurement, "variants", lambda case: real(case) | {failing: out_of_memory})
    rows, _ = fusion_measurement.measure(POOLED, device="cpu")
    (row,) = (row for row in rows if row["variant"] == failing)
    assert row["missing"] == "OutOfMemoryError: CUDA out of memory."
    assert measurement.as_line(row).endswith("CUDA out of memory.")
    assert f"ratio_{failing}" not in rows[0]
    assert len(rows) == 4
    with pytest.raises(ZeroDivisionError):
        attempt(lambda: 1 // 0, "ours", {}, needed=("ours",))


@pytest.mark.parametrize("case", [POOLED, BLENDED], ids=str)
def test_parts_of_the_images_add_up(case: Case) -> None:
    case = replace(case, batch=5, dtype=torch.float64)
    inputs, upstream = make_inputs(case, device="cpu"), make_upstream(case, device="cpu").double()
    plain = FORMS[case.form].plain
    whole = forward_and_gradients(plain, [x.detach().double().requires_grad_() for x in inputs], upstream)
    elements = 2 * case.width * case.pyramid.sizes[0] ** 2  # two images at a time
    parts = fusion_errors.in_parts(case, plain, inputs, upstream, torch.float64, part_elements=elements)
    assert len(parts) == len(whole) == 1 + len(inputs)
    errors = fusion_errors.errors_against(case, inputs, parts, whole)
    assert max(errors.values()) < 1e-12
    doubled = fusion_errors.errors_against(case, inputs, tuple(2 * x for x in whole), whole)
    assert all(error == pytest.approx(1.0) for error in doubled.values())


def test_without_gradients_batch_ends_are_checked() -> None:
    case = replace(POOLED, batch=40, backward=False)
    inputs, upstream = make_inputs(case, device="cpu"), make_upstream(case, device="cpu")
    plain = FORMS["pooled"].plain
    truth = fusion_errors.in_parts(case, plain, inputs, upstream, torch.float64)
    value = plain(*(x.double() for x in inputs))
    assert truth[0].shape == (16, 6)
    assert fusion_errors.errors_against(case, inputs, fusion_errors.at_checked_images(case, (value,)), truth) == {
        "value_error": pytest.approx(0.0, abs=1e-12)
    }


def test_queued_calls_and_samples_are_bounded() -> None:
    assert [queued_calls(launches) for launches in (0, 1, 50, 150, 800, 5000)] == [16, 16, 16, 5, 1, 1]
    assert [samples_for(us) for us in (10.0, 12_500.0, 25_000.0, 1e6)] == [40, 40, 20, 8]


def test_share_of_a_step(without_a_gpu: None) -> None:
    torch.manual_seed(0)
    teacher, student = (
        extract_features(build_model(name, num_classes=10), image_size=16)
        for name in ("cifar/resnet14", "cifar/resnet8")
    )
    images = [torch.randn(4, 3, 16, 16) for _ in range(2)]
    before = [p.detach().clone() for p in teacher.parameters()]
    row = step_share.measure("a step", teacher, student, images, 8)
    assert row["percent_of_step"] == row["call_percent_of_step"] == 100.0  # four parts of equal length
    (target,) = row["targets"]
    assert (target["measured"], target["reached"]) == (100.0, False)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.parameters(), strict=True))


def test_the_model_follows_loops() -> None:
    """A loop of `size` / 64 rounds, in each of which 16 bytes are loaded; a block that thread 0 of program 1 skips."""
    ptx = """
    .visible .entry kernel(.param .u32 kernel_param_0)
    {
        .reg .pred %p<3>;
        ld.param.b32 %r1, [kernel_param_0];
        mov.u32 %r2, %ctaid.x;
        setp.ne.b32 %p1, %r2, 0;
        @%p1 bra $L__BB0_2;
        mul.lo.s32 %r1, %r1, 2;
    $L__BB0_2:
        mov.b32 %r3, 0;
    $L__BB0_3:
        // begin inline asm
        @%p2 ld.global.v4.b32 { %r4, %r5, %r6, %r7 }, [ %rd1 + 0 ];
        // end inline asm
        add.s32 %r3, %r3, 64;
        setp.lt.s32 %p1, %r3, %r1;
        @%p1 bra $L__BB0_3;
        bar.sync 0;
        ret;
    }
    """
    program = pooled_model.Program(ptx)
    assert program.run(0, [640]) == (5 + 1 + 20 * 4 + 2, 20, 1)
    assert program.run(1, [640]) == (4 + 1 + 10 * 4 + 2, 10, 1)
    assert program.loaded_bytes(3) == 16
