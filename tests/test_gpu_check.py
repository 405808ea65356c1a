"""`make gpu-check` and the table made from it: whatever of them needs no GPU."""

import datetime
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import gpu_check
import gpu_wheels
import pytest
import results_table
import torch
from gpu_check_plugin import LEFT_OUT, missing_package, read_record, summarise
from speed_targets import Target

ROOT = Path(__file__).parents[1]


def measured(**changes: Any) -> dict[str, Any]:
    row = {
        "loss": "softmax_kl",
        "variant": "ours",
        "rows": 8192,
        "classes": 32768,
        "dtype": "bfloat16",
        "median_ms": 0.4,
        "p20_ms": 0.39,
        "p80_ms": 0.42,
        "launches": 1,
        "cpu_us": 21.4,
        "peak_mib": 512.5,
        "retained_mib": 512.5,
        "gb_s": 4026.5,
        "percent_of_copy_roof": 100.7,
        "ratio_eager": 7.25,
        "targets": [],
    }
    return row | changes


def result(**changes: Any) -> dict[str, Any]:
    counts = {"passed": 40, "missed": 0, "failed": 0, "skipped": 2, "left_out": 1, "unfinished": 0}
    environment = {"gpu": "Some GPU", "commit": "0123456789ab", "dirty": True, "torch": "2.11.0", "triton": "3.6.0"}
    return {
        "date": "2026-01-02T03:04:05+00:00",
        "environment": environment | {"python": "3.12.3", "driver": "580.1"},
        "roofs": [{"dtype": "bfloat16", "rows": 8192, "classes": 32768, "copy_gb_s": 4000.0}],
        "rows": [measured(), measured(variant="eager")],
        "tests": {"counts": counts},
    } | changes


SAMPLE = {
    "tests/test_missing.py": "import no_such_package",
    "tests/test_own.py": "import unikd_fast.no_such_module",
    "tests/test_sample.py": """
import time, pytest
from speed_targets import TargetMissed

def test_passes(record_property): record_property("benchmark_rows", [{"a": 1}])
def test_fails(): assert 1 == 2
def test_misses(record_property):
    record_property("roofs", {"copy": 3})
    raise TargetMissed("too slow")
def test_lacks(): import no_such_package.part
@pytest.mark.skip(reason="no camera")
def test_skipped(): pass
@pytest.fixture
def broken():
    yield
    raise OSError("no teardown")
def test_teardown(broken): pass
""",
}


def run_sample(folder: Path, deadline: float) -> dict[str, Any]:
    for name, text in SAMPLE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --import-mode=importlib\n")
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider", "-p", "gpu_check_plugin"]
    command += [
        f"--gpu-check-record={folder / 'record'}",
        f"--gpu-check-deadline={deadline}",
        "-p",
        "no:hypothesispytest",
    ]
    subprocess.run(
        [*command, "--continue-on-collection-errors"],
        cwd=folder,
        env={"PYTHONPATH": f"{ROOT}:{ROOT / 'benchmarks'}"},
        capture_output=True,
    )
    return summarise(read_record(folder / "record"))


@pytest.fixture(scope="module")
def sampled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_sample(tmp_path_factory.mktemp("sample"), time.time() + 60)


def test_outcomes_are_recorded(sampled: dict[str, Any]) -> None:
    found, sample = sampled, "tests/test_sample.py::"
    assert found["counts"] == {"passed": 1, "missed": 1, "failed": 3, "skipped": 3, "left_out": 0, "unfinished": 0}
    assert found["skipped"] == {
        "tests/test_missing.py": "needs no_such_package, which is not installed",
        f"{sample}test_lacks": "needs no_such_package, which is not installed",
        f"{sample}test_skipped": "no camera",
    }
    assert found["failed"].keys() == {"tests/test_own.py", f"{sample}test_fails", f"{sample}test_teardown"}
    assert "unikd_fast.no_such_module" in found["failed"]["tests/test_own.py"]
    assert found["missed"] == {f"{sample}test_misses": "too slow"}
    assert (found["rows"], found["roofs"]) == ([{"a": 1}], [{"copy": 3}])


def test_a_table_says_what_ran_by_folder(sampled: dict[str, Any]) -> None:
    found = sampled
    kinds = ("passed", "missed", "failed", "skipped", "left_out", "unfinished")
    assert found["areas"] == {"tests": dict(zip(kinds, (1, 1, 3, 3, 0, 0), strict=True))}
    benchmarks = {"benchmarks": dict(zip(kinds, (2, 0, 0, 1, 0, 0), strict=True))}
    assert gpu_check.table({**found["areas"], **benchmarks}) == [
        "            passed  missed  failed  skipped",
        "tests            1       1       3        3",
        "benchmarks       2       0       0        1",
        "total            3       1       3        4",
    ]
    ended = {"exit_code": 0, "missed": {}, "left_out": [], "unfinished": [], "failed": {}}
    lacking = {f"tests/test_{name}.py": "needs scipy, which is not installed" for name in "ab"}
    lines = gpu_check.report(
        {
            "seconds": 59.6,
            "environment": {"gpu": "Some GPU", "commit": "abc", "missing_packages": ["scipy"]},
            "tests": {**found, "exit_code": 1, "skipped": lacking},
            "benchmarks": {**ended, "areas": benchmarks, "skipped": {"benchmarks/test_data.py": "no camera"}},
            "rows": [],
        }
    )
    assert lines[:2] == ["gpu-check on Some GPU, commit abc, 60 s", "not installed: scipy"]
    assert "skipped 2 in tests: needs scipy, which is not installed" in lines
    assert "skipped 1 in benchmarks: no camera" in lines
    assert sum(line.startswith("failed ") for line in lines) == 3


def test_wheels_of_a_folder_are_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel is installed beside what is there, found in this process and in those it starts."""
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    (tmp_path / "wheels").mkdir()
    assert gpu_check.install(tmp_path / "wheels", tmp_path / "site").endswith("make them with benchmarks/gpu_wheels.py")
    wheel = tmp_path / "wheels" / "carried_thing-1.5-py3-none-any.whl"
    wheel.write_bytes(b"cut off")
    assert f"--wheels {wheel.parent} cannot be installed" in gpu_check.install(wheel.parent, tmp_path / "site")
    with zipfile.ZipFile(wheel, "w") as file:
        about = "carried_thing-1.5.dist-info"
        file.writestr("carried_thing.py", "")
        file.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: carried-thing\nVersion: 1.5\n")
        file.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{about}/RECORD", "")
    assert gpu_check.install(wheel.parent, tmp_path / "site") == ""
    assert importlib.util.find_spec("carried_thing") is not None
    assert gpu_check.missing_packages(["carried-thing"]) == []
    assert gpu_check.os.environ["PYTHONPATH"] == f"{tmp_path / 'site'}:elsewhere"


def test_wheels_at_hand_are_summed_and_limited(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No index is asked for those that are there, of the versions installed here; an older one does not count."""
    for name in gpu_wheels.PACKAGES:
        version = importlib.metadata.version(name)
        (tmp_path / f"{name.replace('-', '_')}-{version}-py3-none-any.whl").write_bytes(bytes(2**20))
    (tmp_path / "deepspeed-0.1-py3-none-any.whl").write_bytes(bytes(2**20))
    count = len(gpu_wheels.PACKAGES)
    assert gpu_wheels.main([str(tmp_path)]) == 0
    assert f"{count:.2f} MiB  in {tmp_path}, of 64 that can be carried" in capsys.readouterr().out
    assert gpu_wheels.main([str(tmp_path), "--limit", str(count - 1)]) == 1
    assert f"that is more than {count - 1} MiB; leave packages out" in capsys.readouterr().err
    assert gpu_wheels.main([str(tmp_path), "no-such-package"]) == 2
    assert "no-such-package is not installed" in capsys.readouterr().err


WITHOUT = """
import sys
sys.modules["deepspeed"] = sys.modules["nvidia.dali"] = None
sys.exit(__import__("pytest").main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.long
def test_captured_steps_and_loaders_run_without_deepspeed() -> None:
    """As on a GPU machine without it: what needs it says so, and the rest is collected and runs."""
    tests = [
        "tests/engine/test_captured_steps.py::test_no_changing_value_is_baked_in[kd]",
        "tests/engine/test_captured_on_gpu.py",
        "tests/data/test_every_loader.py::test_an_epoch_gives_each_id_to_one_rank_once[1-device-memory]",
    ]
    command = [sys.executable, "-c", WITHOUT, *tests, "-q", "-p", "no:cacheprovider", "-p", "no:xdist"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "error" not in done.stdout


def test_nothing_starts_after_the_deadline(tmp_path: Path) -> None:
    found = run_sample(tmp_path, time.time() - 1)
    assert len(found["left_out"]) == found["counts"]["left_out"] == 6
    assert found["counts"]["passed"] == 0


def test_a_process_that_died_names_the_test_it_was_in(tmp_path: Path) -> None:
    record = tmp_path / "record"
    passed = {"test": "a", "when": "call", "outcome": "passed", "reason": ""}
    entries = [passed, {"test": "b", "when": "start"}]
    record.write_text("".join(json.dumps(entry) + "\n" for entry in entries) + '{"test": "b", "wh')
    found = summarise(read_record(record))
    assert found["unfinished"] == ["b"]
    assert found["counts"]["passed"] == found["counts"]["unfinished"] == 1
    assert gpu_check.conclude(found, -11)["failed_run"]  # a crash
    assert not gpu_check.conclude(found, None)["failed_run"]  # stopped for time
    assert not gpu_check.conclude(found, 5)["failed_run"]  # no test found
    left = summarise([{"test": "a", "when": "setup", "outcome": "skipped", "reason": LEFT_OUT}])
    assert left["left_out"] == ["a"]
    assert left["skipped"] == {}
    assert read_record(tmp_path / "none") == []


def test_only_packages_of_others_may_be_missing() -> None:
    assert missing_package(ModuleNotFoundError("x", name="timm.models"), {"unikd_fast"}) == "timm"
    assert missing_package(ModuleNotFoundError("x", name="unikd_fast.models"), {"unikd_fast"}) is None
    assert missing_package(ImportError("cannot import name"), set()) is None
    packages = gpu_check.packages_of(ROOT / "pyproject.toml")
    assert {"deepspeed", "hypothesis", "liger-kernel", "pytest-benchmark"} <= set(packages)
    assert "unikd-fast" not in packages
    assert gpu_check.missing_packages(["torch", "no-such-package"]) == ["no-such-package"]


def test_the_file_is_named_after_gpu_day_and_commit(tmp_path: Path) -> None:
    path = gpu_check.result_path(tmp_path, "NVIDIA H100 80GB HBM3", datetime.date(2026, 1, 2), "abc")
    assert path == tmp_path / "nvidia-h100-80gb-hbm3" / "2026-01-02-abc.json"
    assert gpu_check.commit(tmp_path, {"UNIKD_COMMIT": "abc-dirty"}) == ("abc", True)
    assert gpu_check.commit(tmp_path, {}) == ("unknown", None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_without_a_gpu_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main(["--out", str(tmp_path / "out")]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("gpu-check: there is no GPU: torch ")
    assert captured.err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_table_of_the_newest_result_of_each_gpu(tmp_path: Path) -> None:
    assert results_table.render(results_table.newest_results(tmp_path)) == results_table.NOTHING
    missed = Target("percent_of_copy_roof", "at_least", 110).judge(measured())
    newer = result(date="2026-01-03T00:00:00+00:00", rows=[measured(targets=[missed])])
    (tmp_path / "some-gpu").mkdir()
    for name, content in (("a", newer), ("b", result())):
        (tmp_path / "some-gpu" / f"{name}.json").write_text(json.dumps(content))
    table = results_table.render(results_table.newest_results(tmp_path))
    assert table.splitlines() == [
        "**Some GPU**, 2026-01-03, commit 0123456789ab with changes, torch 2.11.0, triton 3.6.0, Python 3.12.3, "
        "driver 580.1. GPU tests: 40 passed, 0 failed, 2 skipped, 1 not run to the end.",
        "",
        "| " + " | ".join(results_table.COLUMNS) + " |",
        "|---" * len(results_table.COLUMNS) + "|",
        "| softmax_kl 8192x32768, bfloat16 | 0.4000 (0.3900 to 0.4200) | 4026 | 101 % | 1 | 21 | 512.5 / 512.5 "
        "| 7.2x |  |  | missed: percent of copy roof |",
        "",
        "Device copy in the same run, GB/s: 4000 (bfloat16 8192x32768).",
    ]


def test_the_fusion_has_a_table_of_its_own_and_the_step_a_line() -> None:
    floor = {"forward_percent_of_floor": 71.4, "backward_percent_of_floor": None, "peak_percent_of_features": 2.34}
    fusion = {k: v for k, v in measured().items() if k != "loss"} | floor
    fusion |= {"fusion": "pooled", "case": "pooled ResNet-50 D=256, batch 64, forward", "ratio_collapsed": 3.0}
    step = {"case": "step", "variant": "ours", "teacher_ms": 25.0, "student_step_ms": 50.0, "percent_of_step": 1.6}
    step |= {"behind_teacher_ms": 0.4, "behind_student_ms": 0.8}
    step["targets"] = [Target("percent_of_step", "at_most", 5).judge(step)]
    text = results_table.render([result(rows=[fusion, fusion | {"variant": "compile"}, step])])
    assert text.splitlines()[1:7] == [
        "",
        "| " + " | ".join(results_table.FUSION_COLUMNS) + " |",
        "|---" * len(results_table.FUSION_COLUMNS) + "|",
        "| pooled ResNet-50 D=256, batch 64, forward, bfloat16 | 0.4000 (0.3900 to 0.4200) | 4026 | 71 % |  | 1 | 21 "
        "| 2.3 % | 7.2x |  | 3.0x | 0 of 0 reached |",
        "",
        "step: AFF and FDP take 0.40 ms behind the teacher and 0.80 ms behind the student, 1.6 % of the teacher's "
        "forward pass (25.0 ms) and the student's own step (50.0 ms); targets: 1 of 1 reached.",
    ]
    assert results_table.COLUMNS[0] not in text


def test_the_table_of_gpu_results_is_current() -> None:
    page = results_table.PAGE.read_text()
    block = results_table.render(results_table.newest_results(results_table.RESULTS))
    assert results_table.replace_block(page, block) == page, "run `python benchmarks/results_table.py`"
    with pytest.raises(ValueError, match="each once"):
        results_table.replace_block("no marks", block)
