"""A network's logits over an evaluated split: kept for the report, and compared with the teacher's."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from unikd_fast.data.pixels import to_device
from unikd_fast.engine.processes import Processes
from unikd_fast.io import make_folder
from unikd_fast.losses import softmax_kl
from unikd_fast.report.run_files import write_test_logits
from unikd_fast.values import Batch

PROBE_TEMPERATURE = 4.0


class Outputs(NamedTuple):
    """Of one batch, on the CPU."""

    sample_ids: Tensor  # (N,)
    logits: Tensor  # (N, K) fp32
    labels: Tensor  # (N,)


class Probe:
    """τ² KL(p_t(τ) || p_s(τ)) with τ = 4 on held-out samples: one figure for methods whose own losses do not compare.

    The teacher sees the split once; this process keeps the logits of its share.

    Args:
        teacher: maps images to Features.
        batches: this process's share of the split, anew at every call.
        known: the teacher's logits (K,) for these batches by sample id, where it has seen them already.
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
    def measure(self, student: Sequence[Outputs]) -> float:
        """The mean over all processes' samples.

        Args:
            student: its outputs for the batches. Either network may lack samples, whose images were skipped.
        """
        if self._known is None:
            ids, logits = [], []
            for batch in self._batches():
                ids.append(batch.sample_ids)
                logits.append(self._teacher(batch.images).logits.float().to("cpu", non_blocking=True))
            # Reading the ids waits for the logits as well, which were copied before.
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


def write_outputs(folder: Path, outputs: Sequence[Outputs], processes: Processes, *, split: str) -> None:
    """Writes test_logits.safetensors from the outputs of all processes, in the order of the split; all must call it.

    Raises:
        FileError: on all processes: it cannot be written.
    """
    own = Outputs(*(torch.cat(parts) for parts in zip(*outputs, strict=True))) if outputs else None
    shares = [share for share in processes.gather(own) if share is not None]

    def write() -> bool:
        ids, logits, labels = (torch.cat(parts) for parts in zip(*shares, strict=True))
        order = ids.argsort()
        make_folder(folder)
        write_test_logits(folder, logits[order].numpy(), labels[order].numpy(), split=split)
        return True

    if shares:
        processes.from_first(write)
