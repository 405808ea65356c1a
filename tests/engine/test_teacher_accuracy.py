"""What the teacher knows is said before training, and one that knows nothing does not teach."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from support.cache_commands import command
from support.real_runs import (
    ALONE,
    CACHED,
    cached_config,
    opened,
    save_teacher,
    train_here,
    write_config,
)
from unikd_fast.config import ConfigError, load_config
from unikd_fast.data.sets import open_data
from unikd_fast.data.settings import DataSettings
from unikd_fast.engine import cache, teacher
from unikd_fast.engine.build import Experiment
from unikd_fast.engine.teacher import check_teacher, require_accuracy
from unikd_fast.models import build_model

ASKS = {"min_accuracy": None}


def knowing(source: Path, target: Path, images: int) -> float:
    """The network of a file with a last layer fitted to that many of the digits; its accuracy on their validation."""
    network = build_model("cifar/resnet8", num_classes=10, weights=str(source)).eval()
    splits = open_data(DataSettings(name="digits", image_size=16))
    mean, std = (torch.tensor(values)[:, None, None] for values in (splits.mean, splits.std))
    fc, network.fc = network.fc, torch.nn.Identity()
    with torch.no_grad():
        of_train, of_val = (
            torch.nn.functional.pad(network((split.images / 255 - mean) / std), (0, 1), value=1.0).double()
            for split in (splits.train.select(torch.arange(images).numpy()), splits.val)
        )
        wanted = torch.nn.functional.one_hot(torch.from_numpy(splits.train.labels[:images]), 10).double()
        fitted = torch.linalg.lstsq(of_train, wanted, driver="gelsd").solution
        fc.weight.copy_(fitted[:-1].T)
        fc.bias.copy_(fitted[-1])
        right = (of_val @ fitted).argmax(1) == torch.from_numpy(splits.val.labels)
    network.fc = fc
    torch.save(network.state_dict(), target)
    return 100 * float(right.double().mean())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weights")
    save_teacher(folder / "nothing.pth", seed=1)
    return folder


@pytest.fixture(scope="module")
def known(folder: Path) -> float:
    accuracy = knowing(folder / "nothing.pth", folder / "much.pth", 800)
    assert accuracy > 60
    return accuracy


def config_of(tmp_path: Path, weights: Path, *, student: dict[str, Any] | None = None, **teacher: Any) -> Path:
    sections = {**CACHED, "student": {"model": "cifar/resnet8", **(student or {})}, "distill": {"method": "kd"}}
    return write_config(tmp_path, **{**sections, "teacher": {"weights": str(weights), **ASKS, **teacher}})


def checked(experiment: Experiment, folder: Path, *, resume: bool = False) -> dict[str, Any]:
    check_teacher(experiment, folder, "run", resume=resume)
    return dict(experiment.teacher_record or {})


# Of K classes twice the odds of chance are 2 / (K + 1), less 2.33 deviations of a share of that many images.
JUDGED = [
    (10, 297, None, {"refused": (9.0, 12.9), "little": (13.1, 18.1), "said": (18.2, 99.0)}),
    (10, 20, None, {"little": (0.0, 15.0), "said": (20.0,)}),
    (2, 1000, None, {"refused": (50.0, 63.1), "little": (63.3, 66.6), "said": (66.7, 100.0)}),
    (1000, 50_000, None, {"refused": (0.1, 0.15), "little": (0.16,), "said": (0.21, 76.1)}),
    (10, 297, 0.5, {"refused": (0.0, 49.9), "said": (50.0,)}),
    (10, 297, 0.0, {"little": (0.0, 10.0), "said": (20.0,)}),
]


@pytest.mark.parametrize(("classes", "images", "asked", "expected"), JUDGED)
def test_what_is_enough(
    tmp_path: Path,
    classes: int,
    images: int,
    asked: float | None,
    expected: dict[str, tuple[float, ...]],
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = load_config(config_of(tmp_path, Path("teacher.pth"), min_accuracy=asked))
    for verdict, accuracies in expected.items():
        for accuracy in accuracies:
            caplog.clear()
            found = {"accuracy": accuracy, "samples": images}
            with caplog.at_level("INFO", "unikd_fast"):
                if verdict == "refused":
                    with pytest.raises(ConfigError, match=r"teacher\.weights = teacher\.pth, classifies") as error:
                        require_accuracy(config, found, classes, ALONE, "run")
                    but = f"chance is {100 / classes:.2f} %" if asked is None else f"teacher.min_accuracy is {asked}"
                    assert f" {accuracy:.2f} % of {images:,} validation images correctly, and {but}; check" in str(
                        error.value
                    )
                    continue
                require_accuracy(config, found, classes, ALONE, "run")
            line = f"[run] the teacher classifies {accuracy:.2f} % of {images:,} validation images correctly"
            warned = [record.message for record in caplog.records if record.levelname == "WARNING"]
            assert caplog.messages[0] == line, accuracy
            little = f"[run] the teacher's accuracy is low: chance is {100 / classes:.2f} %"
            assert [text.partition(";")[0] for text in warned] == [little] * (verdict == "little")
            assert all("check that the weights are for these classes" in text for text in warned)


def test_a_teacher_at_chance_is_refused(tmp_path: Path, folder: Path) -> None:
    config = load_config(config_of(tmp_path, folder / "nothing.pth"))
    with pytest.raises(ConfigError, match=r"classifies .* correctly, and chance is 10\.00 %") as error:
        train_here(config)
    assert error.value.exit_code == 2
    assert not Path(config.run.dir).exists()


def test_the_accuracy_is_logged_and_stored(
    tmp_path: Path, folder: Path, known: float, caplog: pytest.LogCaptureFixture
) -> None:
    experiment = opened(config_of(tmp_path, folder / "much.pth"))
    before = torch.random.get_rng_state()
    with caplog.at_level("INFO", "unikd_fast"):
        record = checked(experiment, tmp_path)
    assert record["validation"] == {"accuracy": pytest.approx(known), "samples": 297}
    assert f"the teacher classifies {known:.2f} % of 297 validation images correctly" in caplog.text
    assert not [each for each in caplog.records if each.levelname == "WARNING"]
    assert torch.equal(torch.random.get_rng_state(), before)


@pytest.mark.parametrize("probe", [True, False])
def test_the_probe_reuses_the_logits(tmp_path: Path, folder: Path, probe: bool) -> None:
    config = config_of(tmp_path, folder / "nothing.pth", min_accuracy=0)
    experiment = opened(config, ALONE) if probe else opened(_without_probe(config))
    logits = check_teacher(experiment, tmp_path, "run", resume=False)
    if not probe:
        assert logits is None
        return
    assert logits is not None and experiment.teacher is not None
    for batch in experiment.loader.evaluate("val"):
        asked = experiment.teacher(batch.images).logits
        assert torch.equal(asked, torch.stack([logits.pop(sample) for sample in batch.sample_ids.tolist()]))
    assert not logits


def _without_probe(path: Path) -> Path:
    content = json.loads(path.read_text())
    content["run"]["probe"] = False
    path.write_text(json.dumps(content))
    return path


def test_a_teacher_below_its_student_is_named(
    tmp_path: Path, folder: Path, known: float, caplog: pytest.LogCaptureFixture
) -> None:
    student = {"weights": str(folder / "much.pth")}
    experiment = opened(config_of(tmp_path, folder / "nothing.pth", student=student, min_accuracy=0))
    with caplog.at_level("INFO", "unikd_fast"):
        weak = checked(experiment, tmp_path)["validation"]["accuracy"]
    assert f"the student starts with {known:.2f} %" in caplog.text
    assert "the teacher is less accurate than the student at the start" in caplog.text
    assert f"its top-1 accuracy on the validation images is {weak:.2f} %, the student's {known:.2f} %" in caplog.text
    caplog.clear()
    experiment = opened(config_of(tmp_path, folder / "much.pth", student=student))
    with caplog.at_level("INFO", "unikd_fast"):
        checked(experiment, tmp_path)
    assert "the student starts with" in caplog.text and "less accurate" not in caplog.text


def test_random_weights_are_not_measured(tmp_path: Path) -> None:
    for accuracy in (None, 0):
        experiment = opened(config_of(tmp_path, Path("random"), min_accuracy=accuracy))
        assert checked(experiment, tmp_path)["validation"] is None
    with pytest.raises(ConfigError, match=r"and teacher\.min_accuracy is 0\.9; check"):
        checked(opened(config_of(tmp_path, Path("random"), min_accuracy=0.9)), tmp_path)


class Counted:
    """The evaluations before a run, counted: of the teacher, and of a student that begins with weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        for module, name in ((teacher, "measure_teacher"), (teacher, "_compare"), (cache, "measure_teacher")):
            monkeypatch.setattr(module, name, partial(self, getattr(module, name)))

    def __call__(self, measure: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        self.count += 1
        return measure(*arguments, **options)


@pytest.mark.slow
def test_a_resumed_run_does_not_measure_again(
    tmp_path: Path, folder: Path, known: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counted = Counted(monkeypatch)
    path = config_of(tmp_path, folder / "much.pth", student={"weights": str(folder / "nothing.pth")})
    config = load_config(path, ["train.max_steps=2"])
    run = train_here(config)
    assert counted.count == 2  # teacher and student
    record = json.loads((run / "teacher.json").read_text())
    assert record["validation"] == {"accuracy": pytest.approx(known), "samples": 297}
    caplog.clear()
    with caplog.at_level("INFO", "unikd_fast"):
        train_here(config, resume=True)
    assert counted.count == 2
    assert json.loads((run / "teacher.json").read_text()) == record
    assert f"the teacher classifies {known:.2f} %" in caplog.text


def test_no_cache_is_built_by_a_teacher_near_chance(tmp_path: Path, folder: Path) -> None:
    config = cached_config(tmp_path, folder / "nothing.pth", teacher={"min_accuracy": None})
    said = command("build", "--config", config)
    assert said.returncode == 2
    assert "and chance is 10.00 %" in said.stderr
    assert not list((tmp_path / "outputs").glob("shard-*"))


@pytest.mark.slow
def test_a_cache_stores_its_teachers_accuracy(
    tmp_path: Path, folder: Path, known: float, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    counted = Counted(monkeypatch)
    short = ["train.max_steps=1"]
    path = cached_config(tmp_path, folder / "much.pth", teacher={"min_accuracy": None})
    line = f"the teacher classifies {known:.2f} % of 297 validation images correctly"
    with caplog.at_level("INFO", "unikd_fast"):
        for number in range(2):
            caplog.clear()
            train_here(load_config(path, [*short, f"run.dir={tmp_path / str(number)}"]))
            assert caplog.text.count(line) == 1
        assert counted.count == 1
        strict = load_config(path, [*short, "teacher.min_accuracy=1", f"run.dir={tmp_path / 'strict'}"])
        with pytest.raises(ConfigError, match=r"and teacher\.min_accuracy is 1; check"):
            train_here(strict)
