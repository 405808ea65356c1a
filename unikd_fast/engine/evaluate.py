"""Accuracy and cross-entropy of a network on a split, exact over any number of processes."""

from collections.abc import Iterable

import torch
from torch import nn

from unikd_fast.engine.outputs import Outputs
from unikd_fast.engine.processes import Processes
from unikd_fast.methods import Method
from unikd_fast.values import Batch


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterable[Batch],
    processes: Processes,
    *,
    autocast: torch.dtype | None = None,
    keep: list[Outputs] | None = None,
) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent, mean cross-entropy and the number of samples.

    Args:
        network: maps images to Features; put into eval mode meanwhile.
        batches: this process's share; the shares may differ in number and size.
        autocast: what operations are cast to, as in training; None: nothing.
        keep: gets this process's outputs, batch by batch.
    """
    device = processes.device
    sums = torch.zeros(4, dtype=torch.float64, device=device)  # top-1, top-5, cross-entropy, samples
    training = network.training
    network.eval()
    for batch in batches:
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            logits = network(batch.images).logits
        logits = logits.float()
        if keep is not None:
            keep.append(Outputs(batch.sample_ids.cpu(), logits.cpu(), batch.labels.cpu()))
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices == batch.labels[:, None]
        ce = nn.functional.cross_entropy(logits, batch.labels, reduction="sum")
        sums += torch.stack([top[:, 0].sum(), top.sum(), ce, ce.new_tensor(len(logits))]).double()
    network.train(training)
    top1, top5, ce_sum, count = processes.sum_(sums).tolist()
    count = max(count, 1.0)
    return {"accuracy": 100 * top1 / count, "top5": 100 * top5 / count, "ce": ce_sum / count, "samples": int(count)}


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
