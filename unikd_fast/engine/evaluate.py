"""Evaluation of a network on a split: accuracy and cross-entropy, exact over all processes, and its logits."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from unikd_fast.data.device import to_device
from unikd_fast.engine.distributed import Processes
from unikd_fast.io import make_folder
from unikd_fast.losses import softmax_kl
from unikd_fast.methods.head import TeacherHead
from unikd_fast.report.run_files import write_test_logits
from unikd_fast.tasks import classification
from unikd_fast.values import Batch, Features

PROBE_TEMPERATURE = 4.0


class BatchLogits(NamedTuple):
    """The logits of one batch, on the CPU."""

    sample_ids: Tensor  # (N,)
    logits: Tensor  # (N, K) fp32
    labels: Tensor  # (N,)


class Probe:
    """τ² KL(p_t(τ) || p_s(τ)) with τ = 4 on held-out samples, to compare methods whose own losses are not comparable.

    The teacher sees the split once; this process keeps the logits of its share.

    Args:
        teacher: maps images to Features.
        batches: function that returns this process's share of the split.
        processes: processes that share the split.
        known: teacher's logits (K,) for these batches by sample id. If None, the teacher is run.
    """

    def __init__(
        self,
        teacher: nn.Module,
        batches: Callable[[], Iterable[Batch]],
        processes: Processes,
        known: dict[int, Tensor] | None = None,
    ) -> None:
        self._teacher, self._batches, self._processes = teacher, batches, processes
        self._known: dict[int, Tensor] | None = known  # logits (K,) by sample id

    @torch.no_grad()
    def measure(self, student: Sequence[BatchLogits]) -> float:
        """Return the mean over the samples of all processes.

        Args:
            student: the student's logits for the batches. Samples that either network lacks are left out: their
                images were skipped.
        """
        if self._known is None:
            ids, logits = [], []
            for batch in self._batches():
                ids.append(batch.sample_ids)
                logits.append(self._teacher(batch.images).logits.float().to("cpu", non_blocking=True))
            # Reading the ids also waits for the logits, which were copied before.
            self._known = dict(zip(torch.cat(ids).tolist(), torch.cat(logits), strict=True)) if ids else {}
        device = self._processes.device
        sums = torch.zeros(2, dtype=torch.float64, device=device)
        for own in student:
            rows = [row for row, sample_id in enumerate(own.sample_ids.tolist()) if sample_id in self._known]
            if not rows:
                continue
            theirs = torch.stack([self._known[sample_id] for sample_id in own.sample_ids[rows].tolist()])
            both = (to_device(own.logits[rows], device), to_device(theirs, device))
            kl = softmax_kl(*both, temperature=PROBE_TEMPERATURE, reduction="sum", impl="reference")
            sums += torch.stack([kl.double(), torch.full_like(kl, len(rows), dtype=torch.float64)])
        total, count = self._processes.sum_(sums).tolist()
        return total / max(count, 1.0)


def write_outputs(folder: Path, outputs: Sequence[BatchLogits], processes: Processes, *, split: str) -> None:
    """Write test_logits.safetensors from the logits of all processes, in the order of the split; all must call it.

    Raises:
        FileError: on all processes: the file cannot be written.
    """
    own = BatchLogits(*(torch.cat(parts) for parts in zip(*outputs, strict=True))) if outputs else None
    shares = [share for share in processes.gather(own) if share is not None]

    def write() -> bool:
        ids, logits, labels = (torch.cat(parts) for parts in zip(*shares, strict=True))
        order = ids.argsort()
        make_folder(folder)
        write_test_logits(folder, logits[order].numpy(), labels[order].numpy(), split=split)
        return True

    if shares:
        processes.from_first(write)


_logger = logging.getLogger("unikd_fast")

_JOINED = 4
"""Micro-batches that are evaluated as one: training keeps the outputs of all layers and their gradients, evaluation two
or three of them at a time."""


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterable[Batch],
    processes: Processes,
    *,
    autocast: torch.dtype | None = None,
    keep: list[BatchLogits] | None = None,
) -> dict[str, float]:
    """Return top-1 accuracy in percent, top-5 for more than five classes, mean cross-entropy and number of samples.

    The host reads the device once, at the end. On a GPU several batches are joined for the network, which without
    gradients keeps little of them; if the memory is not sufficient, it gets fewer images at a time.

    Args:
        network: maps images to Features; put into eval mode meanwhile.
        batches: this process's share, which may differ from others in number and size.
        processes: processes that share the split.
        autocast: dtype that operations are cast to, as in training. If None, nothing is cast.
        keep: list to append this process's logits to. If None, they are not kept.
    """
    device = processes.device
    counts = torch.zeros(4, dtype=torch.float64, device=device)
    training = network.training
    network.eval()
    forward = _Forward(network)
    for batch in join_batches(batches, 1 if device.type == "cpu" else _JOINED):
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            logits = forward(batch.images)
        logits = logits.float()
        if keep is not None:
            parts = (batch.sample_ids, logits, batch.labels)
            keep.append(BatchLogits(*(part.to("cpu", non_blocking=True) for part in parts)))
        counts += classification.count(logits, batch.labels)
    network.train(training)
    return classification.figures(processes.sum_(counts))


def join_batches(batches: Iterable[Batch], count: int) -> Iterator[Batch]:
    """Join batches, without second views, ``count`` at a time; the last may be fewer."""
    rest = iter(batches)
    while group := list(islice(rest, count)):
        if len(group) == 1:
            yield group[0]
        else:
            images, labels, ids = (torch.cat(parts) for parts in zip(*(batch[:3] for batch in group), strict=True))
            yield Batch(images, labels, ids)


class _Forward:
    """Computes the logits of a batch, in parts if the memory is not sufficient for the whole."""

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
            _logger.info(
                "evaluation: the memory is not sufficient for %d images at once, trying %d", at_once, at_once // 2
            )


TeacherFeatures = Callable[[Any, Any], tuple[Features, Tensor]]


def image_features(teacher: nn.Module, batch: Batch) -> tuple[Features, Tensor]:
    """Return the teacher's features of a batch of images, and their labels."""
    return teacher(batch.images), batch.labels


@torch.no_grad()
def head_indicators(
    head: TeacherHead | None,
    teacher: nn.Module | None,
    batches: Iterable[Any],
    processes: Processes,
    *,
    features: TeacherFeatures = image_features,
    limit: int = 16,
) -> dict[str, float]:
    """Return the head's indicators, averaged over at most ``limit`` batches of each process.

    Args:
        features: see `Task.teacher_features`.
    """
    if head is None or teacher is None:
        return {}
    sums: dict[str, torch.Tensor] = {}
    count = 0
    for index, batch in enumerate(batches):
        if index == limit:
            break
        for name, value in head.indicators(*features(teacher, batch)).items():
            sums[name] = sums.get(name, 0.0) + value.double()
        count += 1
    gathered = processes.gather(({name: float(value) for name, value in sums.items()}, count))
    total = sum(n for _, n in gathered)
    names = {name for values, _ in gathered for name in values}
    return {name: sum(values.get(name, 0.0) for values, _ in gathered) / total for name in sorted(names)}
