"""What a network cannot take ends in one message, in a dry run and in a run, before anything is trained."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.real_runs import ALONE, opened, write_config
from unikd_fast.config import ConfigError, load_config
from unikd_fast.engine.describe import describe
from unikd_fast.engine.networks import check_forward

VIT = {"model": "timm/vit_tiny_patch16_224", "weights": "random"}  # of 224 pixels
SMALL = {"model": "cifar/resnet8"}
DEEP = {"model": "torchvision/mobilenet_v3_small"}  # ends in maps of 1x1 at 32 pixels
ONE = {"global_batch_size": 2}  # in two micro-batches
KD = {"method": "kd", "teacher_head": "prefit"}

SIZES = {
    "student": (
        {"student": {"model": "timm/vit_tiny_patch16_224"}, "distill": KD},
        r"student\.model = timm/vit_tiny_patch16_224",
    ),
    "teacher": ({"teacher": VIT, "student": SMALL, "distill": KD}, r"teacher\.model = timm/vit_tiny_patch16_224"),
    "features": ({"student": {"model": "timm/vit_tiny_patch16_224"}}, r"student\.model = timm/vit_tiny_patch16_224"),
}


@pytest.mark.parametrize("case", SIZES)
def test_an_unsupported_image_size_is_refused(tmp_path: Path, case: str) -> None:
    sections, named = SIZES[case]
    path = write_config(tmp_path, **sections)
    role = named.partition("\\")[0]
    remedy = rf"set {role}\.image_size to the size it was built for, and data\.image_size to at least that"
    said = rf"^{named} does not take images of 32x32 \(\w+: .+\); {remedy}"
    with pytest.raises(ConfigError, match=said):
        describe(load_config(path), ALONE)
    with pytest.raises(ConfigError, match=said):
        opened(path)


UNIKD = {"method": "unikd", "teacher_head": "prefit", "norm": "input"}
SAMPLES: dict[str, tuple[dict[str, Any], str]] = {
    "student": ({"distill": KD}, r"student\.model = torchvision/mobilenet_v3_small"),
    "statistics": (
        {
            "student": SMALL,
            "teacher": {**DEEP, "fold_batch_norm": False},
            "distill": {**KD, "method": ["kd", "ofd"], "ofd": {"teacher_batch_statistics": True}},
        },
        r"teacher\.model = torchvision/mobilenet_v3_small",
    ),
    "adapter": ({"student": SMALL, "distill": {**KD, "method": "reviewkd"}}, "distill.method = reviewkd"),
    "hybrid": (
        {"student": SMALL, "teacher": DEEP, "distill": {**UNIKD, "method": ["kd", "unikd"]}},
        r"distill\.method = kd\+unikd",
    ),
    "head": ({"student": SMALL, "teacher": DEEP, "distill": UNIKD}, "distill.method = unikd"),
    "anchored": ({"student": SMALL, "teacher": DEEP, "distill": {"norm": "input"}}, "distill.method = unikd"),
}


@pytest.mark.parametrize("case", SAMPLES)
def test_batch_norm_of_one_sample_is_refused(tmp_path: Path, case: str) -> None:
    sections, named = SAMPLES[case]
    path = write_config(tmp_path, **sections, train=ONE)
    said = (
        rf"^{named} cannot be trained on micro-batches of 1 image of 32x32 \(ValueError: .+\b1, \d+, 1, "
        r"1\b.*\): BatchNorm needs more than one sample a process; raise train\.global_batch_size or lower "
        r"train\.accumulation_steps"
    )
    with pytest.raises(ConfigError, match=said):
        describe(load_config(path), ALONE)
    opened(write_config(tmp_path, **sections, train={"global_batch_size": 4}))


def test_a_dry_run_checks_the_teachers_training(tmp_path: Path) -> None:
    teacher = {**DEEP, "weights": None, "training": {"global_batch_size": 2}}
    path = write_config(tmp_path, teacher=teacher, student=SMALL, distill=KD)
    with pytest.raises(ConfigError, match=r"^teacher\.model = .*mobilenet_v3_small cannot be trained on micro-batches"):
        describe(load_config(path), ALONE)


class Changing(nn.Module):
    """Draws, counts and forgets as networks do, and remembers how it was called."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(3)
        self.register_buffer("seen", torch.zeros(()))
        self.calls: list[tuple[int, bool, bool]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.calls.append((len(images), self.training, torch.is_grad_enabled()))
        self.seen = self.seen + torch.rand(())
        return self.norm(images + torch.randn_like(images))


@pytest.mark.parametrize("training", [False, True])
def test_the_check_changes_nothing(training: bool) -> None:
    network = Changing().train(not training)
    state = {name: value.clone() for name, value in network.state_dict().items()}
    seen, random = network.seen, torch.get_rng_state()
    check_forward(network, {network: training}, what="it", image_size=4, batch=64)
    assert network.calls == [(2, training, False)]
    assert network.training is not training and network.seen is seen and torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())


def test_maps_too_small_are_named() -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.MaxPool2d(9))
    with pytest.raises(ConfigError, match=r"^it does not take images of 8x8 \(RuntimeError: .+ too small\); set data"):
        check_forward(network, {network: False}, what="it", image_size=8)


def test_out_of_memory_is_not_a_misfit() -> None:
    with pytest.raises(RuntimeError, match="memory"):
        check_forward(lambda images: images.new_empty(2**60), {}, what="it", image_size=4, batch=2)


def test_outputs_that_are_not_logits_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    maps = nn.Conv2d(3, 10, 1)
    monkeypatch.setattr("unikd_fast.engine.networks.build_model", lambda *_, **__: maps)
    with pytest.raises(
        ConfigError, match=r"^student\.model = .* must return logits \(2, 10\) for .*, got \(2, 10, 32, 32\)"
    ):
        opened(write_config(tmp_path, distill={"method": "none", "teacher_head": "prefit"}))
