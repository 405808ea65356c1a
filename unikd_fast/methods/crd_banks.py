"""What CRD remembers of the training samples: an embedding of each, of the student and of the teacher."""

import math
import os
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from unikd_fast.methods.philox import uniform_integers

_GIB = 2**30
_NEGATIVES, _POSITIVES = 0, 1  # streams


def bank_bytes(samples: int, width: int) -> int:
    """Bytes of both banks: 2 M D numbers in fp32.

    Example:
        >>> bank_bytes(50_000, 128) / 2**20
        48.828125
    """
    return 2 * 4 * samples * width


class Banks:
    """An embedding (D,) of each of M samples on both sides, and draws among them.

    The rows are sorted by class, so that the samples of other classes than c are all rows but one interval. What a draw
    gives depends on the seed, the step and the sample, and not on the batch or the process that asks.

    Args:
        sample_ids: (M,) integers, each once.
        labels: (M,) classes in [0, K).
        num_classes: K.
        width: D.
        seed: of the first embeddings and of the draws, in [0, 2^63).
        working_bytes: what a step needs besides, for the refusal.
        device: where the banks are.

    Raises:
        ValueError: ids that are not distinct, a single class, or banks that do not fit the memory of the device.

    Attributes:
        student, teacher: (M, D) fp32.
        step: 0-d int64, how often was drawn.
    """

    def __init__(
        self,
        sample_ids: Tensor,
        labels: Tensor,
        *,
        num_classes: int,
        width: int,
        seed: int,
        working_bytes: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        samples, device = len(sample_ids), torch.device(device)
        sample_ids, labels = sample_ids.long(), labels.long()
        if len(labels) != samples or len(sample_ids.unique()) != samples:
            raise ValueError(
                f"CRD: each sample has one id of its own and one class, got {samples} ids ({len(sample_ids.unique())} "
                f"of them distinct) and {len(labels)} classes; number the samples anew"
            )
        present = len(labels.unique())
        if present < 2:
            raise ValueError(
                f"CRD: negatives are samples of other classes, got {samples} samples of {present} class; train on two "
                "classes or more, or use another method"
            )
        _require_room(samples, width, working_bytes, device)
        order = labels.argsort(stable=True)
        counts = torch.bincount(labels, minlength=num_classes)
        self.seed = seed
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self._counts = counts.to(device)  # (K,)
        self._starts = (counts.cumsum(0) - counts).to(device)  # (K,), first row of a class
        ids, by_id = sample_ids[order].sort()
        self._ids = ids.to(device)  # (M,), sorted
        self._row_of = by_id.to(device)  # (M,), the row of each
        # As published: uniform in a cube, of norm 1 in the mean square.
        bound = math.sqrt(3 / width)
        generator = torch.Generator().manual_seed(seed)
        both = (torch.empty(samples, width).uniform_(-bound, bound, generator=generator).to(device) for _ in range(2))
        self.student, self.teacher = both

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def width(self) -> int:
        """D."""
        return self.student.shape[1]

    def rows(self, sample_ids: Tensor) -> Tensor:
        """(N,) rows of samples by their ids (N,), which must be among those of the banks."""
        return self._row_of[torch.searchsorted(self._ids, sample_ids).clamp(max=len(self) - 1)]

    def negatives(self, rows: Tensor, labels: Tensor, count: int) -> Tensor:
        """(N, count) rows, uniform over the samples of other classes, drawn with replacement."""
        own = self._counts[labels]
        drawn = uniform_integers(self.seed, self.step, rows, _NEGATIVES, count, len(self) - own)
        return torch.where(drawn < self._starts[labels][:, None], drawn, drawn + own[:, None])

    def same_class(self, rows: Tensor, labels: Tensor) -> Tensor:
        """(N,) rows, uniform over the samples of the same class."""
        drawn = uniform_integers(self.seed, self.step, rows, _POSITIVES, 1, self._counts[labels])
        return drawn[:, 0] + self._starts[labels]

    def remember(self, rows: Tensor, student: Tensor, teacher: Tensor, *, momentum: float) -> None:
        """Moves the embeddings of rows (N,) towards new ones (N, D): normalise(μ old + (1 - μ) new); counts a step.

        A sample that occurs twice takes the first of its embeddings, whatever the order of writing. One that is not
        finite is left out: it would otherwise be among the negatives for good.
        """
        first = (rows[:, None] == rows[None, :]).int().argmax(1)
        for bank, new in ((self.student, student), (self.teacher, teacher)):
            old = bank[rows]
            mixed = F.normalize(momentum * old + (1 - momentum) * new[first], dim=1)
            bank[rows] = torch.where(mixed.isfinite().all(1, keepdim=True), mixed, old)
        self.step += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "student": self.student,
            "teacher": self.teacher,
            "ids": self._ids,
            "rows": self._row_of,
            "step": self.step,
            "seed": self.seed,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes back what ``state_dict`` gave.

        Raises:
            ValueError: the state is of other samples, or of another width.
        """
        if state["student"].shape != self.student.shape:
            raise ValueError(
                f"CRD: the banks are {tuple(self.student.shape)}, the checkpoint's {tuple(state['student'].shape)}; "
                "resume with the data and the distill.crd.width that it was written with"
            )
        if not (torch.equal(state["ids"], self._ids.cpu()) and torch.equal(state["rows"], self._row_of.cpu())):
            raise ValueError(
                f"CRD: the checkpoint's {len(self)} samples are others, or of other classes, than the {len(self)} of "
                "the data; resume with the data that it was written with"
            )
        self.student.copy_(state["student"])
        self.teacher.copy_(state["teacher"])
        self.step.copy_(state["step"])
        self.seed = int(state["seed"])


def _require_room(samples: int, width: int, working_bytes: int, device: torch.device) -> None:
    banks, room = bank_bytes(samples, width), _memory_bytes(device)
    if banks + working_bytes > room:
        raise ValueError(
            f"CRD: the embeddings of {samples:,} training samples take 2 x {samples:,} x {width} x 4 bytes = "
            f"{banks / _GIB:.2f} GiB, and a step up to {working_bytes / _GIB:.2f} GiB, but {device} has "
            f"{room / _GIB:.2f} GiB left; lower distill.crd.width ({width}), train on fewer samples, or take a larger "
            "device"
        )


def _memory_bytes(device: torch.device) -> int:
    """Of a GPU what is free, otherwise all of the machine's, which cannot be said to be free or not."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
