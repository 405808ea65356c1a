"""What a network costs: parameters, multiply-adds, bytes and measured latency."""

import logging
import statistics
import time
from typing import Any

import torch
from torch import nn

from unikd_fast.engine.timing import describe_hardware
from unikd_fast.models import parameter_count
from unikd_fast.models.graph import in_mode

_logger = logging.getLogger("unikd_fast")

LATENCY_BATCHES = (1, 32)

_WARM_UP, _REPEATS, _SECONDS = 2, 30, 1.0  # after a second, three repeats are enough


def cost_of(network: nn.Module, image_size: int, device: torch.device) -> dict[str, Any]:
    """Return ``{"cost": ...}`` for the result of a run, or nothing, with a warning, if it cannot be measured."""
    try:
        return {"cost": measure_cost(network, image_size, device)}
    except Exception as error:  # a figure for the report must not end a run that is done
        _logger.warning(f"what the network costs is not measured: {str(error).partition(chr(10))[0]}")
        return {}


@torch.no_grad()
def measure_cost(network: nn.Module, image_size: int, device: torch.device) -> dict[str, Any]:
    """Return what a network costs in evaluation, in fp32 and eager mode, on a device; takes seconds.

    Args:
        network: network that is on the device, and does nothing else meanwhile.
        image_size: height and width of the images.
        device: device that it runs on.

    Returns:
        image_size; parameters; bytes of its state as a file; multiply_adds of one image, half of what torch's
        FlopCounterMode counts (convolutions, matrix products and attention; neither normalisation nor activations);
        latency_ms, the median time of a batch by its size; hardware.
    """
    from torch.utils.flop_counter import FlopCounterMode  # a second of imports

    images = torch.zeros(max(LATENCY_BATCHES), 3, image_size, image_size, device=device)
    with in_mode(network, training=False):
        with FlopCounterMode(display=False) as counter:
            network(images[:1])
        latency = {str(size): _latency_ms(network, images[:size]) for size in LATENCY_BATCHES}
    return {
        "image_size": image_size,
        "parameters": parameter_count(network),
        "bytes": sum(tensor.numel() * tensor.element_size() for tensor in network.state_dict().values()),
        "multiply_adds": counter.get_total_flops() // 2,
        "latency_ms": latency,
        "hardware": describe_hardware(device),
    }


def _latency_ms(network: nn.Module, images: torch.Tensor) -> float:
    for _ in range(_WARM_UP):
        network(images)
    times: list[float] = []
    _wait(images.device)
    began = time.perf_counter()
    while len(times) < 3 or (len(times) < _REPEATS and time.perf_counter() - began < _SECONDS):
        start = time.perf_counter()
        network(images)
        _wait(images.device)
        times.append(1000 * (time.perf_counter() - start))
    return statistics.median(times)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
