"""Folders as transformers' save_pretrained writes them, of tiny networks with random weights."""

from pathlib import Path
from typing import Any

import torch
from torch import nn

SIZES: dict[str, dict[str, Any]] = {
    "vit": {"patch_size": 8, "hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 3},
    "convnext": {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 2, 1]},
}


def vit(*, image_size: int = 32, classes: int = 7, **settings: Any) -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {**SIZES["vit"], "intermediate_size": 96, **settings}
    return ViTForImageClassification(ViTConfig(image_size=image_size, num_labels=classes, **sizes))


def convnext(*, classes: int = 7) -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    return ConvNextForImageClassification(ConvNextConfig(num_labels=classes, **SIZES["convnext"]))


def saved(folder: Path, network: Any, processor: str | None = None, **settings: Any) -> Path:
    """Write a network, and a processor with these settings beside it."""
    import transformers

    network.save_pretrained(folder)
    if processor is not None:
        getattr(transformers, f"{processor}ImageProcessor")(**settings).save_pretrained(folder)
    return folder


def saved_vit(folder: Path, *, seed: int = 0, **settings: Any) -> Path:
    """Write a ViT whose images are squashed to its size, with mean and deviation 0.5."""
    torch.manual_seed(seed)
    side = settings.get("image_size", 32)
    return saved(folder, vit(**settings), "ViT", size={"height": side, "width": side})
