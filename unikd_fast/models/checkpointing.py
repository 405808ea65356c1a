"""Activation checkpointing: blocks that keep only their inputs and recompute the rest in the backward pass."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint


class Checkpointed(nn.Module):
    """Mixin that `checkpoint_blocks` adds to the class of a block, so that its parameters keep their names."""

    def forward(self, *inputs: Any) -> Any:
        """Run the block; in training keep only its inputs, and run it again in the backward pass."""
        forward = super().forward
        if not (self.training and torch.is_grad_enabled()):
            return forward(*inputs)
        return checkpoint(forward, *inputs, use_reentrant=False, context_fn=self._contexts)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), _buffers_kept(self)


@contextmanager
def _buffers_kept(module: nn.Module) -> Iterator[None]:
    """Keep BatchNorm's running statistics unchanged: the second forward pass would count the batch twice."""
    before = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in before:
                buffer.copy_(value)


def checkpoint_blocks(model: nn.Module) -> int:
    """Make the blocks of a network keep only their inputs for the backward pass.

    A block is an outermost element of an nn.Sequential or nn.ModuleList that has at least two modules with parameters:
    a residual block, a Conv-BN pair, a stage of a few of them. Gradients and buffers equal those without checkpointing
    bit for bit; state dicts do not change.

    Args:
        model: network that is changed in place.

    Returns:
        The number of blocks.

    Raises:
        ValueError: there are none.

    Example:
        >>> checkpoint_blocks(torchvision.models.resnet50())
        16
    """
    blocks = _blocks(model)
    if not blocks:
        raise ValueError(
            f"checkpoint_blocks: {type(model).__name__} has no blocks to recompute: no element of a Sequential or "
            "ModuleList holds two modules with parameters; set train.activation_checkpointing = false"
        )
    for block in blocks:
        block.__class__ = type(f"Checkpointed{type(block).__name__}", (Checkpointed, type(block)), {})
    return len(blocks)


def _blocks(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        listed = isinstance(module, nn.Sequential | nn.ModuleList)
        if listed and _parameterised(child) > 1 and not _is_stage(child):
            found.append(child)
        else:
            found += _blocks(child)
    return found


def _is_stage(module: nn.Module) -> bool:
    """Return whether this is a Sequential of blocks, each smaller than it."""
    return isinstance(module, nn.Sequential | nn.ModuleList) and any(_parameterised(child) > 1 for child in module)


def _parameterised(module: nn.Module) -> int:
    return sum(any(True for _ in inner.parameters(recurse=False)) for inner in module.modules())
