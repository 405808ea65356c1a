"""Weights in the layout of Detectron2's zoo."""

import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

R50, R101 = (3, 4, 6, 3), (3, 4, 23, 3)


def detectron2_state(
    classes: int = 80, channels: int = 8, width: int = 16, blocks: Sequence[int] = R50
) -> dict[str, Tensor]:
    """Return weights of an R_50_FPN of such widths, or of another ResNet with so many bottlenecks in its stages."""
    generator, state = torch.manual_seed(11), {}

    def weight(name: str, *shape: int, bias: bool = True, gain: float = 1.0) -> None:
        std = gain * math.sqrt(2 / math.prod(shape[1:]))
        state[f"{name}.weight"] = std * torch.randn(*shape, generator=generator, dtype=torch.float64)
        if bias:
            state[f"{name}.bias"] = 0.1 * torch.randn(shape[0], generator=generator, dtype=torch.float64)

    def conv(name: str, *shape: int, gain: float = 1.0) -> None:
        weight(name, *shape, bias=False, gain=gain)
        for part in ("weight", "bias", "running_mean", "running_var"):
            base = torch.rand(shape[0], generator=generator, dtype=torch.float64)
            state[f"{name}.norm.{part}"] = base + 0.5 if part in ("weight", "running_var") else (base - 0.5) / 5

    conv("backbone.bottom_up.stem.conv1", 64, 3, 7, 7, gain=1 / 60)  # pixels are of this size
    before = 64
    for level, count in enumerate(blocks, 2):
        inner = 16 * 2**level
        for i in range(count):
            name = f"backbone.bottom_up.res{level}.{i}"
            if not i:
                conv(f"{name}.shortcut", 4 * inner, before, 1, 1, gain=0.7)
            conv(f"{name}.conv1", inner, before, 1, 1)
            conv(f"{name}.conv2", inner, inner, 3, 3)
            conv(f"{name}.conv3", 4 * inner, inner, 1, 1, gain=0.3)
            before = 4 * inner
    for level in range(2, 6):
        weight(f"backbone.fpn_lateral{level}", channels, 64 * 2**level, 1, 1, gain=0.5)
        weight(f"backbone.fpn_output{level}", channels, channels, 3, 3, gain=0.7)
    weight("proposal_generator.rpn_head.conv", channels, channels, 3, 3)
    weight("proposal_generator.rpn_head.objectness_logits", 3, channels, 1, 1)
    weight("proposal_generator.rpn_head.anchor_deltas", 12, channels, 1, 1, gain=0.3)
    weight("roi_heads.box_head.fc1", width, channels * 49)
    weight("roi_heads.box_head.fc2", width, width)
    weight("roi_heads.box_predictor.cls_score", classes + 1, width, gain=2.0)
    weight("roi_heads.box_predictor.bbox_pred", 4 * classes, width)
    return state


def as_pickle(state: dict[str, Tensor], path: Path, protocol: int = 4, **more: Any) -> str:
    arrays = {name: value.numpy() for name, value in state.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "a zoo", **more}, protocol=protocol))
    return str(path)
