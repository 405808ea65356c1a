"""MLKD, multi-level logit distillation (Jin et al., CVPR 2023): instances, batches and classes, in two views."""

from collections.abc import Sequence
from typing import Annotated

import torch
from annotated_types import MinLen
from torch import Tensor

from unikd_fast.kernels import reference
from unikd_fast.kernels.reference import at_least_fp32, autocast_off
from unikd_fast.losses import softmax_kl
from unikd_fast.methods.method import Method, Needs
from unikd_fast.settings import NonNegative, Positive, settings
from unikd_fast.values import Batch, Loss, StudentOutput, Target


@settings
class MLKDSettings:
    """Multi-level distillation (Jin et al. 2023) of a weak and a strong view; needs data.second_view."""

    ce_weight: NonNegative = 0.1
    """w, weight of the weak view's cross-entropy. In a hybrid it is counted once."""
    second_ce_weight: NonNegative = 0.1
    """w_2, weight of the strong view's cross-entropy, also in a hybrid."""
    weight: NonNegative = 0.9
    """v, weight of the KL and Gram terms."""
    temperatures: Annotated[tuple[Positive, ...], MinLen(1)] = (3.0, 4.0, 5.0)
    """T, softmax temperatures of both views, as in the published code; the paper has 2 to 6."""
    first_view_temperatures: tuple[Positive, ...] = (2.0, 6.0)
    """F, further temperatures of the weak view, whose KL counts twice, as in the published code."""
    masks: bool = True
    """Scale the weak view's terms by the shares of samples and of classes for which the teacher is at most as confident
    as the median, about 1/2: the effect of the masks in the published code."""
    second_grams: bool = False
    """Compare Gram matrices of the strong view as well, as the public development code of UniKD does; MLKD's published
    code computes them and leaves them out."""
    standardized: bool = False
    """Logit standardisation of the KL terms, as in kd, but not of the Gram terms, as its authors do. Published with CE
    weights 1, weight 9, temperatures 2, 3, 5."""


class MLKD(Method[MLKDSettings]):
    """Distillation of a weak and a strong view at temperatures T, and of the weak view alone at further temperatures F.

        L = w CE(weak) + w_2 CE(strong) + v [ Σ_{T,F} m KL_τ(weak) + Σ_T KL_τ(strong) + Σ_F KL_τ(weak)
                                              + Σ_{T,F} m ‖P Pᵀ - Q Qᵀ‖² / N + Σ_{T,F} c ‖Pᵀ P - Qᵀ Q‖² / K ]

    KL_τ = τ² KL(p(τ) || q(τ)), averaged over the batch; P and Q (N, K) are the teacher's and the student's
    probabilities of the weak view at τ; ‖·‖² sums squares. Terms are summed over temperatures, not averaged. This is
    what the published code (Multi-Level-Logit-Distillation, KD_ours) computes, with w = w_2 = 0.1, v = 0.9, T = (3, 4,
    5), F = (2, 6). About that code:

    - m and c stand for its masks: of samples whose teacher is at most as confident as the median, and of classes whose
      probabilities, summed over the batch, are at most the median. It multiplies already reduced sums by these masks
      and takes the mean, so they select nothing: they are factors, m and c the shares of samples and of classes kept,
      1/2 apart from ties and odd numbers.
    - The strong view's KL at τ = 2 and 6 is computed from the weak view's logits, so F counts the weak view once more.
    - It also computes Gram terms of the strong view, but leaves them out of the loss. With ``second_grams`` they are in
      it, with weight v: those of samples with the factor m, those of classes without c, and at F of the weak view.

    Its strong view is weaker than our default (``data.second_view``): two operations, each at a random magnitude,
    although it is given as "10", and a grey square at any place, with a random side up to half the image's.

    The formula without those accidents has T = (2, 3, 4, 5, 6), no F and m = c = 1 (``masks=False``). ‖Pᵀ P - Qᵀ Q‖²
    grows with the number of samples squared: both Gram terms are of the micro-batch of one process (64 as published).
    """

    settings_class = MLKDSettings
    needs = Needs(second_view=True)

    @classmethod
    def needs_of(cls, settings: MLKDSettings) -> Needs:
        """Return what the method needs: a row of one class has no standard deviation."""
        return cls.needs._replace(two_classes=settings.standardized)

    @property
    def term_names(self) -> tuple[str, ...]:
        grams = ("second_batch_gram", "second_class_gram") if self.settings.second_grams else ()
        return ("ce", "second_ce", "logit_kl", "second_logit_kl", "batch_gram", "class_gram", *grams)

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        assert isinstance(target.logits, Tensor)
        assert student.second_logits is not None
        assert target.second_logits is not None
        ce, second_ce = (
            reference.cross_entropy(logits, batch.labels, label_smoothing=self.label_smoothing)
            for logits in (student.logits, student.second_logits)
        )
        shared = self._divergence(student.logits, target.logits, self.settings.temperatures)
        again = self._divergence(student.logits, target.logits, self.settings.first_view_temperatures)
        second_kl = self._divergence(student.second_logits, target.second_logits, self.settings.temperatures)
        q, p = (self._probabilities(logits) for logits in (student.logits, target.logits))
        with autocast_off(q.device):
            batch_gram, class_gram = _gram_gap(p, q), _gram_gap(p.mT, q.mT)
        m, c = self._shares_kept(target.logits)
        first = m * (shared + again) + again
        total = self.settings.weight * (first + second_kl + m * batch_gram + c * class_gram)
        total = total + self.ce_weight * ce + self.settings.second_ce_weight * second_ce
        values = [ce, second_ce, shared + again, second_kl, batch_gram, class_gram]
        if self.settings.second_grams:
            q_2, p_2 = (self._probabilities(logits) for logits in (student.second_logits, target.second_logits))
            both = len(self.settings.temperatures)
            with autocast_off(q.device):
                batch_gram = _gram_gap(p_2, q_2)
                class_gram = _gram_gap(p_2[:both].mT, q_2[:both].mT) + _gram_gap(p[both:].mT, q[both:].mT)
            total = total + self.settings.weight * (m * batch_gram + class_gram)
            values += [batch_gram, class_gram]
        return Loss(total, {name: value.detach() for name, value in zip(self.term_names, values, strict=True)})

    def _divergence(self, student: Tensor, teacher: Tensor, temperatures: Sequence[float]) -> Tensor:
        """Return Σ τ² KL over these temperatures, 0 if there are none."""
        total = torch.zeros((), dtype=torch.float32, device=student.device)
        for temperature in temperatures:
            total = total + softmax_kl(
                student, teacher, temperature=temperature, standardized=self.settings.standardized, impl=self.impl
            )
        return total

    def _probabilities(self, logits: Tensor) -> Tensor:
        """Return (T, N, K) for all temperatures."""
        rows = at_least_fp32(logits)
        return torch.stack(
            [
                rows / temperature
                for temperature in (*self.settings.temperatures, *self.settings.first_view_temperatures)
            ]
        ).softmax(dim=-1)

    def _shares_kept(self, teacher: Tensor) -> tuple[Tensor | float, Tensor | float]:
        """Return m of the samples and c of the classes."""
        if not self.settings.masks:
            return 1.0, 1.0
        p = at_least_fp32(teacher).softmax(dim=-1)
        return _share_up_to_the_median(p.amax(dim=-1)), _share_up_to_the_median(p.sum(dim=0))


def _gram_gap(p: Tensor, q: Tensor) -> Tensor:
    """Return Σ ‖p pᵀ - q qᵀ‖² / M over matrices (T, M, ·)."""
    return (p @ p.mT - q @ q.mT).square().sum() / p.shape[-2]


def _share_up_to_the_median(values: Tensor) -> Tensor:
    """Return the share of values (M,) at or below their median, the mean of the two middle values if M is even."""
    return (values <= values.quantile(0.5)).to(values.dtype).mean()
