"""Any teacher with any student: a step of training, or a refusal that names methods that work."""

import copy
import itertools
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
from torch import Tensor, nn

from unikd_fast import Distiller
from unikd_fast.models import build_model

pytestmark = pytest.mark.long

SIZE, CLASSES = 64, 5


class Own(nn.Module):
    """A network of one's own that torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())
        self.two = nn.Sequential(nn.Conv2d(8, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.ReLU())
        self.head = nn.Linear(16, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        features = self.two(self.one(images))
        if features.sum() > 1e9:
            features = features / 2
        return self.head(features.mean((2, 3)))


def hugging_face() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3, "intermediate_size": 96}
    return ViTForImageClassification(ViTConfig(image_size=SIZE, patch_size=8, num_labels=CLASSES, **sizes))


build = partial(build_model, num_classes=CLASSES)
NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet": lambda: build("torchvision/resnet18"),
    "convnext": lambda: build("timm/convnext_atto"),
    "vit": lambda: build("timm/vit_tiny_patch16_224", model_args={"img_size": SIZE, "depth": 4}),
    "swin": lambda: build("timm/swin_tiny_patch4_window7_224", model_args={"img_size": SIZE, "depths": (1, 1, 2, 1)}),
    "mobilenet": lambda: build("timm/mobilenetv4_conv_small"),
    "efficientnet": lambda: build("timm/efficientnet_lite0"),
    "hugging face": hugging_face,
    "own": Own,
}
# Levels before activation are found in a graph alone: ReviewKD compares the teacher's, and OFD those of both. OFD also
# needs the BatchNorms before the teacher's.
WITHOUT = {"hugging face", "own"}
REFUSED_TEACHERS = {"reviewkd": WITHOUT, "ofd": WITHOUT | {"convnext", "vit", "swin"}}
REFUSED_STUDENTS = {"ofd": WITHOUT}
# OFD asks one thing of a teacher and another of a student: it meets every one of both.
PAIRS = list(itertools.product(NETWORKS, NETWORKS))
CASES = [(method, *pair) for method in ("unikd", "kd", "reviewkd") for pair in PAIRS]
CASES += [("ofd", *pair) for pair in PAIRS if pair[0] == "mobilenet" or pair[1] == "resnet"]


@cache
def built(name: str) -> nn.Module:
    torch.manual_seed(0)
    return NETWORKS[name]()


@pytest.mark.parametrize(("method", "teacher", "student"), CASES)
def test_every_pair_trains_or_is_refused_by_name(method: str, teacher: str, student: str) -> None:
    torch.manual_seed(0)
    pair = built(teacher), copy.deepcopy(built(student))  # the Distiller copies the teacher
    if teacher in REFUSED_TEACHERS.get(method, ()) or student in REFUSED_STUDENTS.get(method, ()):
        with pytest.raises(ValueError, match=r"use (a method that needs none|another method), such as unikd, .*kd"):
            Distiller(*pair, method=method, image_size=SIZE)
        return
    distiller = Distiller(*pair, method=method, image_size=SIZE)
    images = torch.randn(2, 3, SIZE, SIZE)
    distiller.fit_teacher([images], steps=1)
    before = [parameter.detach().clone() for parameter in distiller.parameters()]
    optimizer = torch.optim.SGD(distiller.parameters(), lr=0.01)
    loss = distiller(images, torch.arange(2))
    loss.total.backward()
    optimizer.step()
    assert loss.total.isfinite()
    moved = [not torch.equal(old, new) for old, new in zip(before, distiller.parameters(), strict=True)]
    assert sum(moved) > len(moved) / 2
