"""Training with each way of pooling AFF: stage-wise or collapsed, plain or with kernels, it is the same run.

The kernels are interpreted on a CPU, which takes a second a step where training itself takes milliseconds. So the plain
ways are run on the networks' own levels, the kernels on two small levels and few images, for fewer steps.
"""

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support.real_runs import ROOT, command, write_config

STEPS = 20
KERNEL_STEPS = {"digits": 10, "pair": 5}
# Path and implementation. The first is what the others are compared with.
PLAIN = (("stagewise", "reference"), ("collapsed", "reference"))
KERNELS = (("collapsed", "fused"), ("stagewise", "fused"))
TERMS = ("total", "ce", "feature_kl", "logit_kl")  # and the anchor, where the head trains along

ANCHORED = {"distill.teacher_head": "anchored"}
PREFIT = {"distill.teacher_head": "prefit", "distill.head_steps": 2}
SMALL_DIGITS = {
    "train.max_steps": KERNEL_STEPS["digits"],
    "train.global_batch_size": 1,
    "distill.max_levels": 2,
    "distill.width": 16,
    "distill.alpha_ramp_epochs": 0.0,  # an epoch has 200 steps
}
SMALL_PAIR = {
    "train.max_steps": KERNEL_STEPS["pair"],
    "data.image_size": 40,
    "data.synthetic_samples": 2,
    "train.global_batch_size": 2,
    "teacher.feature_nodes": ["layer1", "layer2"],
    "student.feature_nodes": ["blocks.1", "blocks.2"],
    "distill.width": 16,
}


class Group(NamedTuple):
    """Runs that differ only in the way of pooling."""

    settings: dict[str, Any]
    ways: tuple[tuple[str, str], ...]


DIGITS: dict[str, Any] = {
    "data": {"name": "digits", "image_size": 16, "train_samples": 200, "num_classes": 10},
    "student": {"model": "cifar/resnet8"},
    "train": {"global_batch_size": 32, "learning_rate": 0.0005},
}
# A random ResNet-50 has logits in the tens, and the student normalises over 8 to 16 numbers: at 0.0005 the difference
# of the last bit grows tenfold with every step, to several hundredths. Lower rates are no better than rounding either:
# at 1e-5 changing the last bit of one weight of the student moves the loss by 1.5e-4 of it within 20 steps, and the
# other path by 9e-5; at 3e-6 it is 1.4e-5 and 1.2e-5. Every step sees the same images, which shows that it trains.
# At such a rate a wrong gradient of the pooled vector is not seen, a wrong vector is; digits show both.
PAIR: dict[str, Any] = {
    "data": {
        "name": "synthetic",
        "image_size": 64,
        "synthetic_samples": 4,
        "num_classes": 10,
        "augmentation": {"crop": "none", "flip_probability": 0.0},
    },
    "teacher": {"model": "torchvision/resnet50", "weights": "random"},
    "student": {"model": "timm/mobilenetv1_100"},
    "train": {"global_batch_size": 4, "learning_rate": 3e-6},
}
EXPERIMENTS: dict[str, tuple[dict[str, Any], dict[str, Group]]] = {
    "digits": (
        DIGITS,
        {
            "anchored": Group(ANCHORED, PLAIN),
            "prefit": Group(PREFIT, PLAIN),
            "small-anchored": Group(ANCHORED | SMALL_DIGITS, (PLAIN[0], *KERNELS)),
        },
    ),
    "pair": (PAIR, {"whole": Group(PREFIT, PLAIN), "small": Group(PREFIT | SMALL_PAIR, (PLAIN[0], *KERNELS))}),
}
CASES = [
    pytest.param(name, group, way, id="-".join((name, group, *way)))
    for name, (_, groups) in EXPERIMENTS.items()
    for group, (_, ways) in groups.items()
    for way in ways[1:]
]


class Started(NamedTuple):
    """A comparison that was started."""

    folder: Path
    process: subprocess.Popen[bytes]
    log: Path


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Started]]:
    """Start each experiment as one comparison of all its runs, so that torch is loaded once for them."""
    assert os.environ.get("TRITON_INTERPRET") == "1", "needs the interpreter"
    home = tmp_path_factory.mktemp("fusion_paths")
    found = {}
    for name, (sections, groups) in EXPERIMENTS.items():
        runs = {
            "-".join((group, *way)): settings | {"distill.fusion_path": way[0], "distill.fusion_impl": way[1]}
            for group, (settings, ways) in groups.items()
            for way in ways
        }
        train = {"total_epochs": STEPS, "max_steps": STEPS, "accumulation_steps": 1} | sections["train"]
        config = write_config(
            home,
            name=name,
            run={"evaluate_every_epochs": STEPS + 1, "checkpoint_every_steps": None},
            compare={"seeds": [0], "runs": runs},
            **sections | {"train": train},
        )
        log = home / f"{name}.log"
        with log.open("wb") as file:
            process = subprocess.Popen(command(config), cwd=ROOT, stdout=file, stderr=subprocess.STDOUT)
        found[name] = Started(home / name, process, log)
    yield found
    for one in found.values():
        one.process.kill()
        one.process.wait()


def curve(one: Started, group: str, way: tuple[str, str]) -> list[dict[str, float]]:
    path = one.folder / "seed-0" / "-".join((group, *way)) / "metrics.jsonl"
    assert path.exists(), one.log.read_text()[-3000:]
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    names = (*TERMS, "anchor") if "anchored" in group else TERMS
    return [{name: x[name] for name in names} for x in lines if x["kind"] == "train"]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "group", "way"), CASES)
def test_every_way_of_pooling_gives_the_same_loss_curve(
    started: dict[str, Started], name: str, group: str, way: tuple[str, str]
) -> None:
    one = started[name]
    one.process.wait(timeout=300)
    expected, found = (curve(one, group, x) for x in (PLAIN[0], way))
    steps = KERNEL_STEPS[name] if way in KERNELS else STEPS
    assert len(expected) == len(found) == steps
    assert len({x["total"] for x in expected}) == steps  # it trains
    if name == "pair":  # on the same images
        assert abs(expected[-1]["ce"] / expected[0]["ce"] - 1) > 1e-3
    # The loss to 1e-4, and what the fusion is in for; what is small next to it to 1e-4 of its size.
    for term in expected[0]:
        values = [[x[term] for x in run] for run in (expected, found)]
        small = 0 if term in ("total", "feature_kl") else 1e-4 * min(x["total"] for x in expected)
        assert values[1] == pytest.approx(values[0], rel=1e-4, abs=small), term
    assert found != expected  # and the way really was another
