"""What AFF and FDP take of a step of distillation on a GPU, beside the two networks themselves."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from gpu_timing import Call, call_us, device_times, launched, queued_calls
from measurement import Row, settle
from speed_targets import Target, judge_all
from torch import Tensor, nn

from unikd_fast import AdaptiveFeatureFusion, FeatureDistributionPrediction

if TYPE_CHECKING:
    from unikd_fast.models import FeatureExtractor

TARGETS = (Target("percent_of_step", "at_most", 5),)
SAMPLES = 10
CHECKED_IMAGES = 4


def build_networks(image_size: int, device: str) -> tuple["FeatureExtractor", "FeatureExtractor"]:
    """Return ResNet-50 and MobileNetV1 of 1000 classes, random weights, channels_last."""
    from unikd_fast.models import build_model, extract_features

    torch.manual_seed(0)
    networks = [
        extract_features(build_model(name, num_classes=1000), image_size=image_size)
        for name in ("torchvision/resnet50", "timm/mobilenetv1_100")
    ]
    teacher, student = (n.to(device).to(memory_format=torch.channels_last) for n in networks)
    return teacher, student


@torch.no_grad()
def set_statistics(network: nn.Module, images: Tensor) -> None:
    """Set the batch norms' statistics to those of a batch: random weights then give features of a usual size."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    network.train()(images)


def measure(
    case: str, teacher: "FeatureExtractor", student: "FeatureExtractor", images: Sequence[Tensor], width: int
) -> Row:
    """Return the times of the parts of a step in bf16 under autocast, and the share of AFF and FDP in percent.

    Args:
        case: what to call it.
        teacher: network that is run without gradients, in eval mode, with the statistics of the first batch.
        student: network that is trained with cross-entropy and SGD.
        images: batches to take turns over.
        width: D.

    Returns:
        `<part>_ms` on the GPU alone and `<part>_call_us` in a loop of calls, for the teacher's forward pass, the
        student's step, and AFF and FDP behind either (behind the student with backward); their sum in percent of the
        first two, `percent_of_step` and `call_percent_of_step`.

    Raises:
        AssertionError: an AFF is further from float64 than its stage-wise form and a rounding of the features' dtype,
            or a level gets no gradient.
    """
    settle()
    set_statistics(teacher, images[0])
    parts = _parts(teacher.eval().requires_grad_(False), student.train(), images, width)
    row: Row = {"case": case, "variant": "ours", "batch": len(images[0]), "width": width}
    for name, calls in parts.items():
        queued = queued_calls(len(launched(calls[0])))
        row[f"{name}_ms"] = round(device_times(calls, samples=SAMPLES, queued=queued).median_ms, 4)
        row[f"{name}_call_us"] = round(call_us(calls, rounds=3, length=2), 1)
    for unit, share in (("ms", "percent_of_step"), ("call_us", "call_percent_of_step")):
        teacher_time, step, *added = (row[f"{name}_{unit}"] for name in parts)
        row[share] = round(100 * sum(added) / (teacher_time + step), 2)
    row["targets"] = judge_all(TARGETS, row)
    return row


def _parts(
    teacher: "FeatureExtractor", student: "FeatureExtractor", images: Sequence[Tensor], width: int
) -> dict[str, list[Call]]:
    """Return the four parts: the two networks, then what is added behind them."""
    device, classes = images[0].device, student.num_classes
    autocast = partial(torch.autocast, device.type, torch.bfloat16)
    fusions = [
        AdaptiveFeatureFusion([channels for channels, *_ in network.level_shapes], width, norm="input").to(device)
        for network in (teacher, student)
    ]
    fusions[0].eval()  # fitted before
    # Fitted before and shared; the student's loss does not train it.
    distribution = FeatureDistributionPrediction(width, classes).to(device).requires_grad_(False)
    labels = torch.arange(len(images[0]), device=device) % classes
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4)

    @torch.no_grad()
    def run_teacher(batch: Tensor) -> tuple[Tensor, ...]:
        with autocast():
            return tuple(teacher(batch).levels)

    def student_step(batch: Tensor) -> tuple[Tensor, ...]:
        with autocast():
            features = student(batch)
            loss = F.cross_entropy(features.logits, labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return tuple(features.levels)

    @torch.no_grad()
    def behind_teacher(levels: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with autocast():
            return tuple(distribution(fusions[0].pooled(levels)))

    def behind_student(levels: tuple[Tensor, ...], upstream: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        with autocast():
            gaussian = distribution(fusions[1].pooled(levels))
        return torch.autograd.grad(gaussian, [*levels, *fusions[1].parameters()], upstream)

    teacher_levels = [run_teacher(batch) for batch in images]
    student_levels = [tuple(x.detach().requires_grad_() for x in student_step(batch)) for batch in images]
    for fusion, levels in zip(fusions, (teacher_levels[0], student_levels[0]), strict=True):
        _assert_no_worse_than_stagewise(fusion, levels, autocast)
    upstream = tuple(torch.randn_like(x) for x in behind_teacher(teacher_levels[0]))
    for gradient in behind_student(student_levels[0], upstream):
        assert gradient.isfinite().all(), "a gradient is not finite"
        assert gradient.any(), "a level or a parameter gets no gradient"
    return {
        "teacher": [partial(run_teacher, batch) for batch in images],
        "student_step": [partial(student_step, batch) for batch in images],
        "behind_teacher": [partial(behind_teacher, levels) for levels in teacher_levels],
        "behind_student": [partial(behind_student, levels, upstream) for levels in student_levels],
    }


@torch.no_grad()
def _assert_no_worse_than_stagewise(
    fusion: AdaptiveFeatureFusion, levels: Sequence[Tensor], autocast: Callable[[], torch.autocast]
) -> None:
    """A rounding besides, because new gates are near 1/2: weights that are all alike are all rounded alike."""
    some = [x[:CHECKED_IMAGES] for x in levels]
    truth = copy.deepcopy(fusion).double()([x.double() for x in some]).mean((2, 3))
    with autocast():
        forms = (fusion.pooled(some), fusion(some).mean((2, 3), dtype=torch.float32))
    ours, stagewise = (((x - truth).norm() / truth.norm()).item() for x in forms)
    allowed = stagewise + torch.finfo(some[0].dtype).eps / 2
    assert ours <= allowed, f"AFF of {fusion.in_channels}: error {ours:.2e}, allowed {allowed:.2e}"
