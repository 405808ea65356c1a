"""The command from its arguments to ledger and page, with an engine that only pretends, and with the real one."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import product
from pathlib import Path

import pytest

from unikd_fast.cli import main
from unikd_fast.engine.distributed import Processes
from unikd_fast.recipes import recipe_names
from unikd_fast.recipes import runs as training
from unikd_fast.recipes.runs import Training
from unikd_fast.recipes.tables import TABLES, Cell, stand_in

ROOT = Path(__file__).parents[2]

# Leaves what a run leaves. A cell whose name is in the file "broken" fails.
ENGINE = """
import json, os, sys
from pathlib import Path
config = json.loads(Path(sys.argv[sys.argv.index("--config") + 1]).read_text())
assert sys.argv[-2:] == ["--resume", "auto"]
folder = Path(config["run"]["dir"])
with Path(sys.argv[1]).open("a") as file:
    file.write("/".join(folder.parts[-4:]) + "\\n")
name = "/".join(folder.parts[-3:])
folder.mkdir(parents=True, exist_ok=True)
(folder / "config.json").write_text(json.dumps(config))
broken = Path(sys.argv[1]).with_name("broken")
if broken.exists() and name in broken.read_text().split():
    sys.exit("launch_distill: error: no such thing")
weights = config.get("teacher", {}).get("weights", "")
if weights.startswith("${UNIKD"):
    path = Path(weights.replace("${UNIKD_TRAINED_TEACHERS}", os.environ["UNIKD_TRAINED_TEACHERS"]))
    assert path.parent.joinpath("result.json").exists(), path
figures = {"accuracy": 90.0 + config["run"]["seed"], "top5": 99.0, "ce": 0.5}
if config["data"]["name"] in ("coco", "toy_scenes"):
    figures = {"ap": 30.0, "ap50": 50.0, "ap75": 29.0, "ap_by_class": {"cat": 30.0}}
part = {"epoch": 3, "val": figures, "test": figures}
result = {"label": "student", "seed": config["run"]["seed"], "method": config["distill"]["method"],
    "model": config["student"]["model"], "steps": 10, "test_is_val": False, "best": part, "last": part, "weights": ""}
(folder / "environment.json").write_text(json.dumps({"gpus": [], "cpu": "a processor", "commit": "abc"}))
(folder / "result.json").write_text(json.dumps(result))
"""


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file in which the pretended engine notes the runs it is asked for."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    script = tmp_path / "engine.py"
    script.write_text(ENGINE)
    noted = tmp_path / "runs.txt"
    monkeypatch.setattr(training, "ENGINE", (sys.executable, str(script), str(noted)))
    return noted


def digits(out: Path, *arguments: str, table: str = "table6") -> int:
    return main(["reproduce", table, "--data", "digits", "--out", str(out), "--jobs", "4", *arguments])


def noted(runs: Path) -> list[str]:
    return sorted(runs.read_text().splitlines())


CELLS = [
    f"digits/{method}/{pair}/seed-{seed}"
    for method in ("unikd", "unikd_without_aff", "unikd_without_fdp_and_aff")
    for pair in ("resnet20-resnet8", "wrn_16_2-resnet8")
    for seed in (0, 1)
]
TEACHERS = ["digits/teacher/resnet20/seed-0", "digits/teacher/wrn_16_2/seed-0"]


def test_a_table_runs_to_its_ledger_and_page(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert digits(tmp_path, "--seeds", "2") == 0
    assert noted(runs) == sorted(CELLS + TEACHERS)
    home = tmp_path / "digits" / "table6"
    ledger = json.loads((home / "ledger.json").read_text())
    assert ledger["missing"] == []
    (cell,) = (e for e in ledger["entries"] if e["method"] == "unikd" and e["pair"] == "wrn_16_2-resnet8")
    assert cell["best"] == {"mean": 90.5, "std": pytest.approx(0.7071), "seeds": 2}
    assert cell["wall_s"] > 0
    assert (cell["hardware"], cell["commits"]) == (["a processor"], ["abc"])
    assert "Nothing: every cell is finished" in (home / "ledger.md").read_text()
    page = (home / "report.html").read_text()
    assert "UniKD without FDP and AFF, wrn_16_2-resnet8" in page
    out = capsys.readouterr().out
    assert out.startswith("14 runs to do, 4 at a time\n")
    assert "none left" in out

    assert digits(tmp_path, "--seeds", "2") == 0  # nothing is run again, and what is there is replaced
    assert len(noted(runs)) == 14
    assert digits(tmp_path, "--seeds", "3") == 0
    assert len(noted(runs)) == 20


def test_a_run_of_another_table_is_not_repeated(runs: Path, tmp_path: Path) -> None:
    assert digits(tmp_path, "--methods", "unikd", "--pairs", "resnet20-resnet8") == 0
    assert digits(tmp_path, "--methods", "unikd", "--pairs", "resnet20-resnet8", table="table1") == 0
    assert noted(runs) == [TEACHERS[0], "digits/unikd/resnet20-resnet8/seed-0"]
    ledger = json.loads((tmp_path / "digits" / "table6" / "ledger.json").read_text())
    assert len(ledger["missing"]) == 5 + 1  # the whole table, with the teacher of the other pair


def test_a_row_of_other_settings_is_not_in_the_ledger(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The ledger says that its settings are those of all rows, also of those that are not asked for."""
    assert digits(tmp_path, "--methods", "unikd", "--pairs", "resnet20-resnet8", "--set", "distill.unikd.alpha=7") == 0
    before = noted(runs)
    capsys.readouterr()
    assert digits(tmp_path, "--methods", "unikd_without_aff") == 2
    said = capsys.readouterr().err
    assert "unikd/resnet20-resnet8/seed-0 was run with another configuration: distill.unikd.alpha was 7.0" in said
    assert noted(runs) == before  # said before anything runs


def test_a_failure_is_told_at_the_end_and_run_again(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = tmp_path / "broken"
    broken.write_text("unikd/resnet20-resnet8/seed-0 teacher/wrn_16_2/seed-0")
    assert digits(tmp_path) == 1
    # What needs the broken teacher is not started, all else is.
    assert len(noted(runs)) == 2 + 3
    captured = capsys.readouterr()
    assert "digits/unikd/resnet20-resnet8/seed-0: FAILED after " in captured.out
    assert "5 runs failed; start it again to run these alone" in captured.err
    assert "digits/unikd/resnet20-resnet8/seed-0 failed with exit code 1; " in captured.err
    assert "  launch_distill: error: no such thing" in captured.err
    assert "not started: it needs digits/teacher/wrn_16_2/seed-0, which failed" in captured.err
    ledger = json.loads((tmp_path / "digits" / "table6" / "ledger.json").read_text())
    assert {(m["method"], m["pair"]) for m in ledger["missing"]} == {
        ("teacher", "wrn_16_2-resnet8"),
        ("unikd", "resnet20-resnet8"),
        *((method, "wrn_16_2-resnet8") for method in ("unikd", "unikd_without_aff", "unikd_without_fdp_and_aff")),
    }
    assert (tmp_path / "digits" / "table6" / "report.html").exists()
    broken.unlink()
    runs.unlink()
    assert digits(tmp_path) == 0
    assert len(noted(runs)) == 5


def test_a_dry_run_lists_and_runs_nothing(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert digits(tmp_path, "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.count("  missing\n") == 8
    assert f"8 runs in {tmp_path}: 0 done, 8 to run; time: unknown before one is finished" in out
    assert not runs.exists()
    assert list(tmp_path.iterdir()) == [tmp_path / "engine.py"]
    assert digits(tmp_path, "--methods", "unikd") == 0
    for file in (tmp_path / "digits").rglob("*.timings.jsonl"):
        file.write_text('{"seconds": 90, "exit_code": 0}\n')
    capsys.readouterr()
    assert digits(tmp_path, "--dry-run") == 0
    out = capsys.readouterr().out
    assert out.count("done, 90 s\n") == 4
    assert f"8 runs in {tmp_path}: 4 done, 4 to run; time: 6 min one after the other" in out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["reproduce", *map(str, arguments)]) == 2
    message = capsys.readouterr().err
    assert message.startswith("unikd reproduce: error: ")
    return message


def test_without_data_it_says_what_to_put_where(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("CIFAR100_ROOT", "CIFAR100_TEACHERS", "IMAGENET_ROOT", "COCO_ROOT", "DETECTRON2_ZOO"):
        monkeypatch.delenv(name, raising=False)
    out = ("--out", tmp_path / "out")
    message = refused(capsys, "table1", *out)
    for part in (
        "CIFAR100_ROOT is not set",
        "cifar-100-python/{train,test,meta}",
        "CIFAR100_TEACHERS is not set",
        "FOLDER/resnet56_vanilla/ckpt_epoch_240.pth",
        "FOLDER/vgg13_vanilla/ckpt_epoch_240.pth",
        "--teachers train",
        "--data digits",
    ):
        assert part in message
    assert "ResNet50_vanilla" not in message  # of Table 2
    assert "TEACHERS" not in refused(capsys, "table1", "--teachers", "train", *out)
    assert "TEACHERS" not in refused(capsys, "table1", "--methods", "none", *out)
    message = refused(capsys, "table3", *out)
    assert "IMAGENET_ROOT is not set" in message
    assert "FOLDER/train/<class>/<image>" in message
    message = refused(capsys, "table4", *out)
    for part in (
        "COCO_ROOT is not set",
        "FOLDER/annotations/instances_{train,val}2017.json",
        "FOLDER/{train,val}2017/<image>",
        "resnet18-f37072fd.pth",
        "DETECTRON2_ZOO is not set",
        "FOLDER/COCO-Detection/faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1.pkl",
        "https://dl.fbaipublicfiles.com/detectron2/<file>",
        "--data toy_scenes",
    ):
        assert part in message
    assert "--data digits" not in message
    assert "R_101" not in refused(capsys, "table4", *out, "--pairs", "resnet50-mobilenet_v2")
    (tmp_path / "empty").mkdir()
    message = refused(capsys, "table4", *out, "--root", tmp_path / "empty", "--teachers", "train")
    assert f"{tmp_path / 'empty'} has no annotations of train; it must hold annotations/instances_train" in message
    assert "FOLDER" in message and "zoo" not in message
    assert not (tmp_path / "out").exists()
    assert not runs.exists()


def test_a_teacher_that_is_not_there_is_named(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data, teachers = tmp_path / "data" / "cifar-100-python", tmp_path / "teachers"
    data.mkdir(parents=True)
    for part in ("train", "test", "meta"):
        (data / part).touch()
    there = teachers / "wrn_40_2_vanilla" / "ckpt_epoch_240.pth"
    there.parent.mkdir(parents=True)
    there.touch()
    common = ("--root", tmp_path / "data", "--teachers", teachers, "--out", tmp_path / "out")
    message = refused(capsys, "table6", *common)
    assert f"1 of 2 teachers are missing in {teachers}:\n  {teachers}/resnet110_vanilla/ckpt_epoch_240.pth\n" in message
    assert "CIFAR100_ROOT" not in message
    assert (
        main([str(a) for a in ("reproduce", "table6", *common, "--pairs", "wrn_40_2-ShuffleV1", "--methods", "unikd")])
        == 0
    )
    assert noted(runs) == ["cifar100/unikd/wrn_40_2-ShuffleV1/seed-0"]
    log = (tmp_path / "out" / "cifar100" / "unikd" / "wrn_40_2-ShuffleV1" / "seed-0.log").read_text()
    assert f"CIFAR100_TEACHERS={teachers}" in log


def test_detectors_are_taught_by_the_zoo_or_by_one_trained_here(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, zoo, out = tmp_path / "coco", tmp_path / "zoo", tmp_path / "out"
    (root / "annotations").mkdir(parents=True)
    for part in ("train", "val"):
        (root / "annotations" / f"instances_{part}2017.json").touch()
    file = zoo / TABLES["table4"].pairs[2].teacher_weights
    file.parent.mkdir(parents=True)
    file.touch()
    one = ("reproduce", "table4", "--root", root, "--pairs", "resnet50-mobilenet_v2", "--methods", "dkd")
    cell = "coco/dkd/resnet50-mobilenet_v2/seed-0"
    assert main([str(each) for each in (*one, "--teachers", zoo, "--out", out, "--dry-run")]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("MLKD: not run: ")
    assert not runs.exists()
    assert main([str(each) for each in (*one, "--teachers", zoo, "--out", out)]) == 0
    assert noted(runs) == [cell]
    given = json.loads((out / f"{cell}.json").read_text())["teacher"]
    assert (given["weights"], given["model_args"]["stride_in_1x1"]) == (
        "${DETECTRON2_ZOO}/COCO-Detection/faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl",
        True,
    )
    assert f"DETECTRON2_ZOO={zoo}" in (out / f"{cell}.log").read_text()
    runs.unlink()
    assert main([str(each) for each in (*one, "--teachers", "train", "--out", tmp_path / "trained")]) == 0
    assert noted(runs) == [cell, "coco/teacher/resnet50/seed-0"]
    files = [tmp_path / "trained" / f"{name}.json" for name in (cell, "coco/teacher/resnet50/seed-0")]
    taught, trained = (json.loads(file.read_text()) for file in files)
    assert taught["teacher"]["model_args"] == trained["student"]["model_args"] == {"conventions": "detectron2"}


def test_a_stand_in_of_detectors(runs: Path, tmp_path: Path) -> None:
    assert main(["reproduce", "table4", "--data", "toy_scenes", "--out", str(tmp_path), "--jobs", "4"]) == 0
    assert len(noted(runs)) == 10
    home = tmp_path / "toy_scenes" / "table4"
    assert "a stand-in on generated scenes" in (home / "ledger.md").read_text()
    assert json.loads((home / "ledger.json").read_text())["missing"] == []
    assert "UniKD, test_resnet-test_efficientnet" in (home / "report.html").read_text()


def test_arguments_that_do_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = ("--data", "digits", "--out", tmp_path)
    assert "has no such, only unikd_without" in refused(capsys, "table6", *out, "--methods", "kd")
    assert "only resnet20-resnet8, wrn_16_2-resnet8" in refused(capsys, "table6", *out, "--pairs", "vgg13-vgg8")
    assert "with digits teachers are trained here" in refused(capsys, "table6", *out, "--teachers", "/x")
    assert "digits needs no files" in refused(capsys, "table6", *out, "--root", "/x")
    assert "study has data of its own" in refused(capsys, "study", *out)
    assert "with study teachers are trained here" in refused(capsys, "study", *out[2:], "--teachers", "/x")
    on_cifar = ("--pairs", "resnet20-resnet8", "--root", tmp_path)
    said = refused(capsys, "study", *out[2:], *on_cifar)
    assert f"the root of data set image_folder, {tmp_path}/cifar10/train, is missing" in said
    assert "CIFAR-10 as JPEG files is at" in said
    (tmp_path / "cifar10" / "train").mkdir(parents=True)  # enough for the teacher, and not for its students
    assert f"{tmp_path}/cifar10/val is missing" in refused(capsys, "study", *out[2:], *on_cifar)
    assert "torchvision's" in refused(capsys, "table3", "--out", tmp_path, "--teachers", "/x")
    assert "the table decides run.dir; see --out" in refused(capsys, "table6", *out, "--set", "run.dir=/x")
    assert "train.nonsense" in refused(capsys, "table6", *out, "--set", "train.nonsense=1")
    assert "no table is given; give one of table1, " in refused(capsys)
    assert "--list imagnet: no recipe begins with it" in refused(capsys, "--list", "imagnet")
    assert "the stand-in of table4 is on toy_scenes; give that" in refused(capsys, "table4", *out)
    assert "the stand-in of table1 is on digits; give that" in refused(capsys, "table1", "--data", "toy_scenes")
    assert "toy_scenes needs no files" in refused(capsys, "table4", "--data", "toy_scenes", "--root", "/x")
    for wrong in (["table8"], ["table6", "--seeds", "0"], ["table6", "--jobs", "many"], ["table6", "--methods", ""]):
        with pytest.raises(SystemExit) as end:
            main(["reproduce", *wrong])
        assert end.value.code == 2


def test_recipes_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, prefix in ((["--list"], ""), (["--list", "imagenet/unikd"], "imagenet/unikd")):
        assert main(["reproduce", *arguments]) == 0
        assert capsys.readouterr().out.splitlines() == recipe_names(prefix)
    assert recipe_names("imagenet/unikd") == [
        "imagenet/unikd/resnet34-resnet18",
        "imagenet/unikd/resnet50-mobilenetv1",
    ]


def test_the_study_writes_its_own_page_too(runs: Path, tmp_path: Path) -> None:
    for name in ("cifar10", "tiny_imagenet"):
        for part in ("train", "val"):
            (tmp_path / "images" / name / part).mkdir(parents=True)
    given = ("--root", str(tmp_path / "images"), "--out", str(tmp_path), "--jobs", "4", "--seeds", "2")
    assert main(["reproduce", "study", *given, "--methods", "none,tuned_kd,tuned_dkd"]) == 0
    assert len(noted(runs)) == 2 * (1 + 6)
    page = (tmp_path / "study" / "study" / "study.md").read_text()
    assert "| student alone" in page
    study = json.loads((tmp_path / "study" / "study" / "study.json").read_text())
    for pair in ("resnet20-resnet8", "wrn_16_1-resnet8"):
        assert study["accuracies"][pair]["tuned_dkd"] == {"0": 90.0, "1": 91.0}


def start(*arguments: object) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "unikd_fast", "reproduce", *map(str, arguments)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


SHORT = ("--set", "train.max_steps=2", "--set", "distill.unikd.head_steps=2", "--set", "teacher.min_accuracy=0")
ONE_CELL = ("table6", "--data", "digits", "--methods", "unikd", "--pairs", "resnet20-resnet8")


def train_here(training: Training) -> None:
    """Run in this process, with the engine's own command, what Training would start processes for."""
    for run in training._runs:
        with pytest.MonkeyPatch.context() as patch:
            for name, value in training._environment.items():
                patch.setenv(name, value)
            run.write_config()
            assert main(["train", "--config", str(run.config_file), "--resume", "auto"]) == 0


def test_a_table_on_digits_with_the_real_engine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Training, "run", train_here)
    monkeypatch.setattr(Processes, "leave", lambda self: None)  # DeepSpeed keeps the group of the first run
    assert main(["reproduce", *ONE_CELL, "--out", str(tmp_path), *SHORT]) == 0
    assert_one_cell(tmp_path, capsys.readouterr().out)


@pytest.mark.long
def test_a_table_of_detectors_with_the_real_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Training, "run", train_here)
    monkeypatch.setattr(Processes, "leave", lambda self: None)
    one = ("table4", "--data", "toy_scenes", "--methods", "unikd", "--out", str(tmp_path))
    assert main(["reproduce", *one, *SHORT]) == 0
    home = tmp_path / "toy_scenes" / "table4"
    finished = [e for e in json.loads((home / "ledger.json").read_text())["entries"] if e["best"] is not None]
    metrics = ("ap", "ap50", "ap75")
    assert {(e["method"], e["metric"]) for e in finished} == set(product(("teacher", "unikd"), metrics))
    folder = Cell("unikd", stand_in(TABLES["table4"]).pairs[0], 0).folder(tmp_path)
    result = json.loads((folder / "result.json").read_text())
    assert (result["steps"], result["method"]) == (2, "unikd+dkd")
    assert '<th scope="col">AP75</th>' in (home / "report.html").read_text()


@pytest.mark.long
@pytest.mark.slow
def test_a_table_on_digits_in_processes(tmp_path: Path) -> None:
    stdout, stderr = start(*ONE_CELL, "--out", tmp_path, *SHORT).communicate(timeout=240)
    assert_one_cell(tmp_path, stdout + stderr)
    ledger = json.loads((tmp_path / "digits" / "table6" / "ledger.json").read_text())
    assert all(entry["wall_s"] > 0 for entry in ledger["entries"] if entry["best"] is not None)


def assert_one_cell(out: Path, said: str) -> None:
    assert "page: " in said, said
    ledger = json.loads((out / "digits" / "table6" / "ledger.json").read_text())
    finished = {entry["method"]: entry for entry in ledger["entries"] if entry["best"] is not None}
    assert set(finished) == {"teacher", "unikd"}
    assert 0 <= finished["unikd"]["best"]["mean"] <= 100
    assert finished["unikd"]["hardware"][0]
    folder = out / "digits" / "unikd" / "resnet20-resnet8" / "seed-0"
    assert json.loads((folder / "result.json").read_text())["steps"] == 2
    # The teacher that taught is the one that was trained here.
    trained = json.loads((out / "digits" / "teacher" / "resnet20" / "seed-0" / "result.json").read_text())
    assert json.loads((folder / "teacher" / "result.json").read_text())["last"]["test"]["accuracy"] == pytest.approx(
        trained["last"]["test"]["accuracy"]
    )
    assert "unikd" in (out / "digits" / "table6" / "report.html").read_text().lower()


@pytest.mark.long
@pytest.mark.slow
def test_ctrl_c_saves_and_the_next_start_continues(tmp_path: Path) -> None:
    endless = ("--set", "train.total_epochs=100000", "--set", "run.log_every_steps=1")
    arguments = ("table1", "--data", "digits", "--out", tmp_path, "--methods", "none", *endless)
    process = start(*arguments, "--pairs", "resnet20-resnet8")
    folder = tmp_path / "digits" / "none" / "resnet8" / "seed-0"
    deadline = time.monotonic() + 120
    while not (folder / "metrics.jsonl").exists() or '"step": 3,' not in (folder / "metrics.jsonl").read_text():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stdout + stderr
    assert "digits/none/resnet8/seed-0: stopped after " in stdout
    assert "stopped; start it again to continue" in stderr
    assert "saved " in (folder.with_name("seed-0.log")).read_text().splitlines()[-1]
    assert list((folder / "checkpoints").glob("step-*"))
    assert json.loads((tmp_path / "digits" / "table1" / "ledger.json").read_text())["missing"]
    stdout, _ = start(*arguments, "--pairs", "resnet20-resnet8", "--dry-run").communicate(timeout=60)
    assert "digits/none/resnet8/seed-0  unfinished" in stdout
