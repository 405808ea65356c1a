"""Contrastive representation distillation (Tian et al., ICLR 2020), with its memory banks of embeddings."""

import math
import os
from typing import Annotated, Any, Literal

import torch
import torch.distributed as dist
from annotated_types import Ge, Le, Lt
from torch import Tensor, nn
from torch.nn import functional as F

from unikd_fast.kernels import reference
from unikd_fast.methods.context import RunContext
from unikd_fast.methods.method import Method, Needs
from unikd_fast.settings import NonNegative, Positive, PositiveInt, settings
from unikd_fast.values import Batch, Features, Loss, StudentOutput, Target

_ROUNDS = 10
_WORD, _BITS = 0xFFFFFFFF, 32
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)


def philox_4x32(counter: tuple[Tensor, Tensor, Tensor, Tensor], seed: int) -> Tensor:
    """Return the four random words of each counter.

    Args:
        counter: four words in [0, 2^32), int64 tensors that broadcast to a shape (...).
        seed: key in [0, 2^64).

    Returns:
        (..., 4) int64 in [0, 2^32).

    Example:
        >>> hex(philox_4x32((torch.zeros(1, dtype=torch.int64),) * 4, seed=0)[0, 0])
        '0x6627e8d5'
    """
    c0, c1, c2, c3 = torch.broadcast_tensors(*counter)
    k0, k1 = seed & _WORD, seed >> _BITS
    for _ in range(_ROUNDS):
        # A product of two words may overflow into the sign bit; both of its halves are correct all the same.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> _BITS) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> _BITS) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _KEY_STEPS[0]) & _WORD, (k1 + _KEY_STEPS[1]) & _WORD
    return torch.stack((c0, c1, c2, c3), dim=-1)


def uniform_integers(seed: int, step: Tensor, ids: Tensor, stream: int, count: int, below: Tensor) -> Tensor:
    """Return integers in [0, below), uniform to within below / 2^32; a larger count keeps the first ones.

    Args:
        seed: seed in [0, 2^64).
        step: step number, 0-d int64.
        ids: ids (N,) int64 in [0, 2^32), one per row.
        stream: number in [0, 2^16) of the purpose of these integers.
        count: number of integers per row, at most 2^18.
        below: upper bounds (N,) int64 in [1, 2^31].

    Returns:
        (N, count) int64.
    """
    blocks = torch.arange((count + 3) // 4, device=ids.device) + (stream << 16)
    high, low = (step >> _BITS) & _WORD, step & _WORD
    words = philox_4x32((ids[:, None], low, high, blocks), seed).flatten(1)[:, :count]
    return (words * below[:, None]) >> _BITS


_GIB = 2**30
_NEGATIVES, _POSITIVES = 0, 1  # streams


def bank_bytes(samples: int, width: int) -> int:
    """Return the bytes of both banks: 2 M D numbers in fp32.

    Example:
        >>> bank_bytes(50_000, 128) / 2**20
        48.828125
    """
    return 2 * 4 * samples * width


class Banks:
    """An embedding (D,) of each of M samples for student and teacher, and draws among them.

    The rows are sorted by class, so that the samples of classes other than c are all rows but one interval. A draw
    depends on the seed, the step and the sample, but not on the batch or the process.

    Args:
        sample_ids: distinct integers (M,).
        labels: classes (M,) in [0, K).
        num_classes: number of classes K.
        width: width D of the embeddings.
        seed: seed of the first embeddings and of the draws, in [0, 2^63).
        working_bytes: further bytes that a step needs, for the check that the banks fit.
        device: device of the banks.

    Raises:
        ValueError: ids are not distinct, there is a single class, or the banks do not fit into the device's memory.

    Attributes:
        student, teacher: banks (M, D) in fp32.
        step: number of draws so far, 0-d int64.
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
                f"CRD: each sample needs one id of its own and one class, got {samples} ids "
                f"({len(sample_ids.unique())} of them distinct) and {len(labels)} classes; renumber the samples"
            )
        present = len(labels.unique())
        if present < 2:
            raise ValueError(
                f"CRD: negatives are samples of other classes, got {samples} samples of {present} class; train on at "
                "least two classes, or use another method"
            )
        _require_room(samples, width, working_bytes, device)
        order = labels.argsort(stable=True)
        counts = torch.bincount(labels, minlength=num_classes)
        self.seed = seed
        self.step = torch.zeros((), dtype=torch.int64, device=device)
        self._counts = counts.to(device)  # (K,)
        self._starts = (counts.cumsum(0) - counts).to(device)  # (K,), first row of each class
        ids, by_id = sample_ids[order].sort()
        self._ids = ids.to(device)  # (M,), sorted
        self._row_of = by_id.to(device)  # (M,), row of each
        # As published: uniform in a cube, with a mean squared norm of 1.
        bound = math.sqrt(3 / width)
        generator = torch.Generator().manual_seed(seed)
        both = (torch.empty(samples, width).uniform_(-bound, bound, generator=generator).to(device) for _ in range(2))
        self.student, self.teacher = both

    def __len__(self) -> int:
        return len(self._ids)

    @property
    def width(self) -> int:
        """Return D, the width of the embeddings."""
        return self.student.shape[1]

    def rows(self, sample_ids: Tensor) -> Tensor:
        """Return the rows (N,) of samples by their ids (N,), which must be among those of the banks."""
        return self._row_of[torch.searchsorted(self._ids, sample_ids).clamp(max=len(self) - 1)]

    def negatives(self, rows: Tensor, labels: Tensor, count: int) -> Tensor:
        """Return rows (N, count), uniform over the samples of other classes, drawn with replacement."""
        own = self._counts[labels]
        drawn = uniform_integers(self.seed, self.step, rows, _NEGATIVES, count, len(self) - own)
        return torch.where(drawn < self._starts[labels][:, None], drawn, drawn + own[:, None])

    def same_class(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return rows (N,), uniform over the samples of the same class."""
        drawn = uniform_integers(self.seed, self.step, rows, _POSITIVES, 1, self._counts[labels])
        return drawn[:, 0] + self._starts[labels]

    def remember(self, rows: Tensor, student: Tensor, teacher: Tensor, *, momentum: float) -> None:
        """Move the embeddings of rows (N,) towards new ones (N, D), normalise(μ old + (1 - μ) new), and count a step.

        A sample that occurs twice gets the first of its embeddings, whatever the order of writes. Non-finite embeddings
        are skipped, as they would stay among the negatives for good.
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
        """Restore what ``state_dict`` returned.

        Raises:
            ValueError: the state is of other samples, or of another width.
        """
        if state["student"].shape != self.student.shape:
            raise ValueError(
                f"CRD: the banks are {tuple(self.student.shape)}, the checkpoint's {tuple(state['student'].shape)}; "
                "resume with the data and the distill.crd.width it was written with"
            )
        if not (torch.equal(state["ids"], self._ids.cpu()) and torch.equal(state["rows"], self._row_of.cpu())):
            raise ValueError(
                f"CRD: the checkpoint's {len(self)} samples, or their classes, are not those of the {len(self)} in "
                "the data; resume with the data it was written with"
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
            f"{room / _GIB:.2f} GiB left; lower distill.crd.width ({width}), train on fewer samples, or use a larger "
            "device"
        )


def _memory_bytes(device: torch.device) -> int:
    """Return the free memory of a GPU, otherwise the machine's total, as its free memory is not well defined."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


_WORKING_BYTES = 2**29


class Embed(nn.Linear):
    """Maps (N, D_in) to unit vectors (N, D): a linear layer, normalised in fp32.

    A subclass of nn.Linear: under autocast DeepSpeed exchanges weights of nn.Linear itself in half precision, but the
    teacher's is called outside autocast.
    """

    def forward(self, embedding: Tensor) -> Tensor:
        return F.normalize(super().forward(embedding.to(self.weight.dtype)).float(), dim=1)


class StudentEmbed(nn.Module):
    """Maps the student's Features to unit vectors (N, D)."""

    def __init__(self, inside: int, width: int) -> None:
        super().__init__()
        self.embed = Embed(inside, width)

    def forward(self, features: Features) -> Tensor:
        embedded: Tensor = self.embed(features.embedding)
        return embedded


@settings
class CRDSettings:
    """A sample's embeddings in student and teacher are contrasted with those of other classes."""

    weight: NonNegative = 0.8
    """b, weight of the contrastive loss."""
    width: PositiveInt = 128
    """D, width of the compared embeddings; the banks take 8 D bytes per training sample."""
    negatives: Annotated[int, Ge(1), Le(2**18)] = 16384
    """K, number of negatives per sample: samples of other classes."""
    temperature: Positive = 0.07
    """τ, temperature of the similarities."""
    momentum: Annotated[float, Ge(0.0), Lt(1.0)] = 0.5
    """μ, momentum of the banks: the share of a sample's old embedding that is kept when it is seen again."""
    positives: Literal["exact", "relax"] = "exact"
    """Positives: exact: the sample itself; relax: any sample of its class."""


class CRD(Method[CRDSettings]):
    """L = w L_CE + b (L_s + L_t): which of K + 1 samples is the anchor's, for student and teacher in turn.

        L_s = -1/N Σ_n [ ln h(v_n, u_n) + Σ_k ln( 1 - h(v_n, u_nk) ) ],    h(v, u) = e / ( e + K / M ),
        e = exp( v·u / τ ) / Z

    v is the student's embedding: its classifier's input, mapped by a linear layer to D numbers and normalised. u_n is
    the sample's own entry and u_nk are those of K other samples in a bank of the teacher's embeddings of all M training
    samples. L_t is the same with the roles exchanged: the teacher's embedding, whose linear layer is trained too,
    against a bank of the student's. After each step both banks move towards the batch's embeddings: μ old + (1 - μ)
    new, normalised. Z is M times the mean exp(v·u / τ) of the first batch, one for each side.

    Differences to the published code (HobbitLong/RepDistiller, and megvii-research/mdistiller after it):

    - The paper allows negatives of the same class; the published recipe draws them from the other classes, and so do
      we. ``positives`` is its mode: "exact", the sample itself, which the published figures use, or "relax", any
      sample of its class.
    - Negatives are drawn uniformly with replacement. The code draws without replacement if there are K
      others, otherwise with; its alias method, for samples of any class, is with replacement and equal weights, which
      is uniform.
    - A negative drawn c times counts c times, and scores are computed against the whole bank at once: the same sum,
      without K embeddings of D numbers for each row of the batch (half a GiB for 64 rows of 16384).
    - The code adds 1e-7 to e + K / M to avoid a division by zero. The logarithms here are those of a sigmoid, which
      do not need it.
    - With several processes the code would keep separate banks, and a separate Z, in each. Here the embeddings of all
      processes are gathered, so the banks are the same everywhere.

    A step takes up to half a GiB, and the banks 8 M D bytes (49 MiB on CIFAR, 1.2 GiB on ImageNet); a device with less
    memory is refused. A draw is a function of (seed, step, sample), so a resumed run draws the same.

    The seed of the draws comes from torch's generator, which is in the same state in all processes of a run.

    Raises:
        ValueError: the samples allow no negatives, or the banks do not fit the device.
    """

    settings_class = CRDSettings
    needs = Needs(embedding=True, labels=True, hard_labels=True)

    def __init__(self, settings: CRDSettings, context: RunContext) -> None:
        super().__init__(settings, context)
        assert context.sample_ids is not None and context.sample_labels is not None
        device = context.device
        self.adapter = StudentEmbed(context.student_width, settings.width).to(device)
        self.companion = self.teacher_embed = Embed(context.teacher_width, settings.width).to(device)
        self.banks = Banks(
            context.sample_ids,
            context.sample_labels,
            num_classes=context.num_classes,
            width=settings.width,
            seed=int(torch.randint(2**62, ())),
            working_bytes=_WORKING_BYTES,
            device=device,
        )
        self.log_z = torch.zeros(2, device=device)
        self._knows_z = False

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("ce", "crd")

    def target(self, teacher: Features, second: Features | None = None) -> Target:
        return super().target(teacher, second)._replace(extra=teacher.embedding)

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        ce = reference.cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
        with torch.autocast(student.logits.device.type, enabled=False):
            crd = self._contrast(student.adapted, self.teacher_embed(target.extra), batch)
        return Loss(self.ce_weight * ce + self.settings.weight * crd, {"ce": ce.detach(), "crd": crd.detach()})

    def device_bytes(self, batch: int) -> int:
        """Return the bytes of the banks, and of the scores and draws of the rows computed at once."""
        rows = min(batch, self._rows_at_once)
        return bank_bytes(len(self.banks), self.banks.width) + rows * self._bytes_of_a_row

    def _contrast(self, student: Tensor, teacher: Tensor, batch: Batch) -> Tensor:
        """Return L_s + L_t for embeddings (N, D), and update the banks."""
        rows = self.banks.rows(batch.sample_ids)
        positive = rows if self.settings.positives == "exact" else self.banks.same_class(rows, batch.labels)
        sides = [(student, self.banks.teacher), (teacher, self.banks.student)]
        own = [(anchors * bank[positive]).sum(1) / self.settings.temperature for anchors, bank in sides]
        if not self._knows_z:
            self._find_z(sides, own, rows, batch.labels)
        # ln(e M / K), so that h is its sigmoid.
        shifts = self.log_z + math.log(self.settings.negatives / len(self.banks))
        total = F.softplus(shifts[:, None] - torch.stack(own)).sum()
        for part in self._parts(len(rows)):
            counts = self._counts(rows[part], batch.labels[part])
            for (anchors, bank), shift in zip(sides, shifts, strict=True):
                total = total + _Negatives.apply(anchors[part], bank, counts, shift, self.settings.temperature)
        with torch.no_grad():
            both = _from_all(torch.cat([student, teacher], dim=1)).chunk(2, dim=1)
            self.banks.remember(_from_all(rows), *both, momentum=self.settings.momentum)
        loss: Tensor = total / len(rows)
        return loss

    @torch.no_grad()
    def _find_z(self, sides: list[tuple[Tensor, Tensor]], own: list[Tensor], rows: Tensor, labels: Tensor) -> None:
        """Compute Z from the first batch of all processes; the host knows which batch is first."""
        top = 1 / self.settings.temperature  # about the largest score, subtracted to avoid overflow
        sums = torch.stack([(scores - top).exp().sum() for scores in own])
        for part in self._parts(len(rows)):
            counts = self._counts(rows[part], labels[part])
            scores = (anchors[part] @ bank.T / self.settings.temperature for anchors, bank in sides)
            sums += torch.stack([(counts * (s - top).exp()).sum() for s in scores])
        mean = _from_all(sums[None]).mean(0) / (len(rows) * (self.settings.negatives + 1))
        self.log_z.copy_((mean * len(self.banks)).log() + top)
        self._knows_z = True

    @property
    def _bytes_of_a_row(self) -> int:
        """Return the bytes of a few numbers per sample and per draw."""
        return 16 * len(self.banks) + 96 * self.settings.negatives

    @property
    def _rows_at_once(self) -> int:
        """Return how many rows fit in memory."""
        return max(1, _WORKING_BYTES // self._bytes_of_a_row)

    def _parts(self, rows: int) -> list[slice]:
        """Return slices of a batch, each as large as memory allows."""
        size = self._rows_at_once
        return [slice(start, start + size) for start in range(0, rows, size)]

    def _counts(self, rows: Tensor, labels: Tensor) -> Tensor:
        """Return (N, M) fp32, how often each sample is drawn for each row: whole numbers, whose sums are exact."""
        drawn = self.banks.negatives(rows, labels, self.settings.negatives)
        counts = torch.zeros(len(rows), len(self.banks), device=rows.device)
        return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float32))

    def state_dict(self) -> dict[str, Any]:
        return {"banks": self.banks.state_dict(), "log_z": self.log_z, "knows_z": self._knows_z}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.banks.load_state_dict(state["banks"])
        self.log_z.copy_(state["log_z"])
        self._knows_z = bool(state["knows_z"])


class _Negatives(torch.autograd.Function):
    """Σ_nm c_nm softplus( v_n·u_m / τ - shift ), computing the gradient of v along the way: only (N, D) is saved."""

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, bank: Tensor, counts: Tensor, shift: Tensor, temperature: float) -> Tensor:
        scores = (anchors @ bank.T).div_(temperature).sub_(shift)
        total = (counts * F.softplus(scores)).sum()
        ctx.save_for_backward((scores.sigmoid_().mul_(counts) @ bank).div_(temperature))
        return total

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return upstream[0] * gradient, None, None, None, None


def _from_all(own: Tensor) -> Tensor:
    """Return the rows (N, ...) of all processes, in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own.detach()
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own.detach().contiguous())
    return torch.cat(found)
