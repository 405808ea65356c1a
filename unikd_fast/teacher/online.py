"""The teacher, run on every batch: frozen, in eval mode, outside the training engine."""

from typing import Self

import torch
from torch import Tensor, nn

from unikd_fast.values import Features

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class OnlineTeacher(nn.Module):
    """Runs a frozen network without gradients and returns its feature levels and fp32 logits.

    It stays a plain module outside the DeepSpeed engine: inside, ``engine.train()`` would switch it to batch statistics
    and its weights would enter every checkpoint.

    Args:
        network: maps images (N, 3, H, W) to Features.
        precision: "fp32", "bf16" or "fp16"; weights and activations are held in it.

    Example:
        >>> model = build_model("torchvision/resnet50", num_classes=1000, weights="IMAGENET1K_V1")
        >>> teacher = OnlineTeacher(extract_features(model, image_size=224), precision="fp16")
        >>> features = teacher(images)
    """

    def __init__(self, network: nn.Module, *, precision: str = "fp32") -> None:
        super().__init__()
        if precision not in PRECISIONS:
            raise ValueError(f"OnlineTeacher: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
        self.dtype = PRECISIONS[precision]
        self.network = network.to(self.dtype).requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Keeps eval mode whatever is asked: a teacher with batch statistics is another teacher."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Features:
        features = self.network(images.to(self.dtype))
        return Features(tuple(features.levels), features.logits.float())
