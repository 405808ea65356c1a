"""What AFF and FDP add to a step of distillation on a GPU: ResNet-50 to MobileNetV1, the ImageNet pair of the paper."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from speed_targets import raise_if_missed
from step_share import build_networks, measure

BATCH, IMAGE_SIZE, WIDTH = 256, 224, 256


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_step_share(benchmark: Any, record_property: Callable[[str, Any], None]) -> None:
    for package in ("torchvision", "timm", "safetensors"):
        pytest.importorskip(package)
    teacher, student = build_networks(IMAGE_SIZE, "cuda")
    generator = torch.Generator("cuda").manual_seed(0)
    shape = (BATCH, 3, IMAGE_SIZE, IMAGE_SIZE)
    images = [
        torch.randn(shape, generator=generator, device="cuda").contiguous(memory_format=torch.channels_last)
        for _ in range(2)
    ]
    case = f"step ResNet-50 to MobileNetV1, D={WIDTH}, batch {BATCH}, {IMAGE_SIZE} px"
    row = measure(case, teacher, student, images, WIDTH)
    record_property("benchmark_rows", [row])
    benchmark.group = case
    benchmark.extra_info.update(gpu=torch.cuda.get_device_name(), torch=torch.__version__, rows=[row])
    print("", *(f"{column} {value}" for column, value in row.items()), sep="\n")
    benchmark.pedantic(torch.cuda.synchronize, rounds=1)  # the times are in the row; this enters it in the record
    raise_if_missed(case, row["targets"])
