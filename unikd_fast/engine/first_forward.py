"""The first forward pass of every network, before anything is trained: what does not fit ends in one message."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from unikd_fast.config import ConfigError
from unikd_fast.engine.out_of_memory import lacks_memory
from unikd_fast.models.graph import in_mode

T = TypeVar("T")


def check_forward(
    run: Callable[[Tensor], T],
    modes: Mapping[nn.Module, bool],
    *,
    what: str,
    image_size: int,
    batch: int = 2,
    device: torch.device | str = "cpu",
) -> T:
    """Run networks once on images (N, 3, H, W) of zeros, without gradients, and return what they give.

    N is 2, or 1 where a micro-batch has one sample: nothing else of its size matters to a network. Parameters, buffers,
    modes and random state are afterwards as they were.

    Args:
        run: calls the networks.
        modes: the networks that it runs, and whether each is in training mode meanwhile.
        what: the key that the networks come from, with its value.
        image_size: H and W.
        batch: samples of a micro-batch.
        device: of the networks.

    Raises:
        ConfigError: they do not take images of this size, or not one sample in training.
    """

    def attempt(count: int) -> T:
        images = torch.zeros(count, 3, image_size, image_size, device=device)
        with _unchanged(modes, torch.device(device)), torch.no_grad():
            return run(images)

    count = min(batch, 2)
    try:
        return attempt(count)
    except Exception as error:
        if lacks_memory(error):
            raise
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        size = f"{image_size}x{image_size}"
        if count == 1 and any(modes.values()) and _succeeds(lambda: attempt(2)):
            raise ConfigError(
                f"{what} cannot be trained on micro-batches of 1 image of {size} ({said}): BatchNorm "
                "needs more than one sample a process; raise train.global_batch_size or lower train.accumulation_steps"
            ) from error
        raise ConfigError(
            f"{what} does not take images of {size} ({said}); set data.image_size to the size it was built for"
        ) from error


def _succeeds(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except Exception:
        return False
    return True


@contextmanager
def _unchanged(modes: Mapping[nn.Module, bool], device: torch.device) -> Iterator[None]:
    """The networks in these modes, and afterwards as they were; and so is the random state."""
    holders = [module._buffers for network in modes for module in network.modules()]
    names = [dict(holder) for holder in holders]  # a forward may put another tensor in a buffer's place
    values = [(buffer, buffer.clone()) for holder in holders for buffer in holder.values() if buffer is not None]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        for network, training in modes.items():
            stack.enter_context(in_mode(network, training=training))
        try:
            yield
        finally:
            for holder, buffers in zip(holders, names, strict=True):
                holder.update(buffers)
            for buffer, value in values:
                buffer.copy_(value)
