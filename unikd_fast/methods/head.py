"""A network on the teacher's features that a method trains by itself, not by the student's loss."""

import itertools
from collections.abc import Iterable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unikd_fast.kernels import reference
from unikd_fast.values import Features, Gaussian

LEARNING_RATE = 1e-3  # of AdamW


class TeacherHead:
    """Maps the teacher's Features to a Gaussian(m, log v) over the classes, and learns to predict the teacher's logits.

    L_anchor = 1/2 mean_k[ (y_t - m_t)^2 / v_t + ln v_t ], y_t = the teacher's logits standardised per sample; AdamW,
    gradients averaged over all processes.

    Args:
        module: network from Features to Gaussian(mean, log_var), (N, K) each.
        training: "prefit": fitted before the student and fixed from then on, so that its outputs can be cached;
            "anchored": trained along with the student, by `Loss.terms`; "literal": trained by the student's loss, as
            part of `Method.companion`, and not by this class.
        steps: number of batches that "prefit" takes.
        settings: what determines how the module is built, apart from its initial weights; part of a cache's key.
        term: key of L_anchor in `Loss.terms`.
    """

    def __init__(
        self,
        module: nn.Module,
        *,
        training: Literal["prefit", "anchored", "literal"],
        steps: int,
        settings: Mapping[str, Any],
        term: str = "anchor",
    ) -> None:
        self.module, self.term, self.steps = module, term, steps
        self.fixed, self._anchored = training == "prefit", training == "anchored"
        self.settings = {"steps": steps, "learning_rate": LEARNING_RATE, **settings}
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=LEARNING_RATE)
        self._replicated: nn.Module | None = None
        self._kept: list[Tensor] | None = None  # the buffers before the update that is under way

    def __call__(self, features: Features) -> Gaussian:
        """Return Gaussian(m_t, log v_t) of a step; if fixed, without gradient."""
        if self._anchored:
            return self._predict(features)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.fixed):
            gaussian: Gaussian = self.module(features)
        return gaussian

    def fit(self, batches: Iterable[Features]) -> None:
        """Fit the module by one AdamW step on each of ``steps`` batches, and fix it."""
        for features in itertools.islice(batches, self.steps):
            gaussian = self._predict(features)
            reference.gaussian_anchor(features.logits, gaussian.mean, gaussian.log_var).backward()
            self._update()
        self.fix()

    def train(self, terms: Mapping[str, Tensor], *, accumulation_steps: int, update: bool, leave_out: bool) -> None:
        """Train an "anchored" head after the student's backward pass; others are left as they are.

        Args:
            terms: `Loss.terms` of the micro-batch.
            accumulation_steps: number of micro-batches in an optimiser step.
            update: whether this is the last of them.
            leave_out: whether the step was not finite and is skipped, with the running statistics it changed.
        """
        if not self._anchored:
            return
        (terms[self.term] / accumulation_steps).backward()
        if update:
            self._update(leave_out=leave_out)

    @torch.no_grad()
    def indicators(self, features: Features, labels: Tensor) -> dict[str, Tensor]:
        """Return 0-d metrics of one batch; a collapse shows as std(m_t) -> 0 and accuracy at chance level."""
        training = self.module.training
        mean, log_var = self.module.eval()(features)
        self.module.train(training)
        return {
            "head_mean_std": mean.std(unbiased=False),
            "head_variance": log_var.exp().mean(),
            "head_accuracy": (mean.argmax(1) == labels).float().mean(),
        }

    def adopt(self, weights: Mapping[str, Tensor]) -> None:
        """Load the weights of a module that was fitted before, and fix it."""
        self.module.load_state_dict(dict(weights))
        self.fix()

    def state_dict(self) -> dict[str, Any]:
        return {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.fixed:
            self.fix()

    def _predict(self, features: Features) -> Gaussian:
        """Return the Gaussian with gradient to the module, synchronised over processes in the backward pass."""
        if self._kept is None:
            self._kept = [buffer.clone() for buffer in self.module.buffers()]
        if self._replicated is None:
            several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
            self._replicated = DistributedDataParallel(self.module) if several else self.module
        gaussian: Gaussian = self._replicated(features)
        return gaussian

    def _update(self, *, leave_out: bool = False) -> None:
        if not leave_out:
            self.optimizer.step()
        elif self._kept is not None:
            for buffer, kept in zip(self.module.buffers(), self._kept, strict=True):
                buffer.copy_(kept)
        self._kept = None
        self.optimizer.zero_grad(set_to_none=True)

    def fix(self) -> None:
        """Freeze the module, in eval mode."""
        self.module.requires_grad_(False).eval()
