"""Accuracy and cross-entropy of a network on a split, exact over any number of processes."""

import logging
import math
from collections.abc import Iterable, Iterator
from itertools import islice

import torch
from torch import Tensor, nn

from unikd_fast.engine.outputs import Outputs
from unikd_fast.engine.processes import Processes
from unikd_fast.methods import Method
from unikd_fast.values import Batch

_logger = logging.getLogger("unikd_fast")

_JOINED = 4
"""Micro-batches that are evaluated as one. Training keeps of an image what each layer put out, its gradient and the
teacher's; evaluation two or three of these at a time."""


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterable[Batch],
    processes: Processes,
    *,
    autocast: torch.dtype | None = None,
    keep: list[Outputs] | None = None,
) -> dict[str, float]:
    """Top-1 accuracy in percent, top-5 of more than five classes, mean cross-entropy and the number of samples.

    The host reads the device once, at the end. On a device several batches are one to the network, which without
    gradients keeps little of them; where the memory is not enough for that, it gets fewer images at a time.

    Args:
        network: maps images to Features; put into eval mode meanwhile.
        batches: this process's share; the shares may differ in number and size.
        autocast: what operations are cast to, as in training; None: nothing.
        keep: gets this process's outputs; they are there when this returns.
    """
    device = processes.device
    sums = torch.zeros(3, dtype=torch.float64, device=device)  # top-1, top-5, cross-entropy
    samples = 0
    training = network.training
    network.eval()
    forward = _Forward(network)
    for batch in joined(batches, 1 if device.type == "cpu" else _JOINED):
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            logits = forward(batch.images)
        logits = logits.float()
        if keep is not None:
            parts = (batch.sample_ids, logits, batch.labels)
            keep.append(Outputs(*(part.to("cpu", non_blocking=True) for part in parts)))
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
        ce = nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
        top5 = top.sum() if logits.shape[1] > 5 else torch.full_like(ce, math.nan)
        sums += torch.stack([top[:, 0].sum(), top5, ce]).double()
        samples += len(logits)
    network.train(training)
    counted = torch.full((1,), samples, dtype=torch.float64, device=device)
    top1, of_five, ce_sum, count = processes.sum_(torch.cat([sums, counted])).tolist()
    count = max(count, 1.0)
    five = {} if math.isnan(of_five) else {"top5": 100 * of_five / count}
    return {"accuracy": 100 * top1 / count, **five, "ce": ce_sum / count, "samples": int(count)}


def joined(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Join batches without second views, so many at a time; the last may be fewer."""
    rest = iter(batches)
    while group := list(islice(rest, count)):
        if len(group) == 1:
            yield group[0]
        else:
            yield Batch(*(torch.cat([getattr(batch, name) for batch in group]) for name in Batch._fields[:3]))


class _Forward:
    """The logits of a batch of images, in parts if the memory is not enough for all of them at once."""

    def __init__(self, network: nn.Module) -> None:
        self._network = network
        self._at_once: int | None = None

    def __call__(self, images: Tensor) -> Tensor:
        while True:
            at_once = len(images) if self._at_once is None else self._at_once
            try:
                parts = [self._network(part).logits for part in images.split(at_once)]
                return parts[0] if len(parts) == 1 else torch.cat(parts)
            except torch.OutOfMemoryError:
                if at_once == 1:
                    raise
            self._at_once = at_once // 2
            _logger.info("evaluation: the memory is not enough for %d images at once, trying %d", at_once, at_once // 2)


@torch.no_grad()
def head_indicators(
    method: Method, teacher: nn.Module | None, batches: Iterable[Batch], processes: Processes, *, limit: int = 16
) -> dict[str, float]:
    """The method's indicators, averaged over at most ``limit`` batches of each process; none without a teacher."""
    if teacher is None:
        return {}
    sums: dict[str, torch.Tensor] = {}
    count = 0
    for index, batch in enumerate(batches):
        if index == limit:
            break
        for name, value in method.indicators(teacher(batch.images), batch.labels).items():
            sums[name] = sums.get(name, 0.0) + value.double()
        count += 1
    gathered = processes.gather(({name: float(value) for name, value in sums.items()}, count))
    total = sum(n for _, n in gathered)
    names = {name for values, _ in gathered for name in values}
    return {name: sum(values.get(name, 0.0) for values, _ in gathered) / total for name in sorted(names)}
