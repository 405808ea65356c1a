"""The teacher's side of UniKD, AFF_t and FDP, and what trains it.

Trained through L_FL alone this side has a trivial optimum: a projection that goes to zero gives L_FL = 0 for any
features. So it is fitted to describe the teacher's own logits instead (L_anchor), by an optimiser of its own.
"""

import itertools
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from unikd_fast.distribution import FeatureDistributionPrediction
from unikd_fast.fusion import AdaptiveFeatureFusion
from unikd_fast.kernels import reference
from unikd_fast.values import Features, Gaussian


class PooledFusion(nn.Module):
    """A network's Features -> AFF of its levels (Eq. 4) -> global average pool, (N, D).

    Args:
        fusion: the AFF module, of all levels or of the coarsest alone.
    """

    def __init__(self, fusion: AdaptiveFeatureFusion) -> None:
        super().__init__()
        self.fusion = fusion

    def forward(self, features: Features) -> Tensor:
        return self.fusion.pooled(features.levels[-len(self.fusion.expanders) :])


class TeacherHead(nn.Module):
    """AFF_t and FDP: the teacher's Features -> Gaussian(mean, log_var), (N, K) each."""

    def __init__(self, fusion: PooledFusion, distribution: FeatureDistributionPrediction) -> None:
        super().__init__()
        self.fusion = fusion
        self.distribution = distribution

    def forward(self, features: Features) -> Gaussian:
        return self.distribution(self.fusion(features))


class HeadTrainer:
    """Fits a TeacherHead to the teacher's logits with AdamW, averaged over all processes.

    L_anchor = 1/2 mean_k[ (y_t - m_t)^2 / v_t + ln v_t ], y_t = the teacher's logits standardised per sample.

    Args:
        head: the module to fit.
        learning_rate: of AdamW.
    """

    def __init__(self, head: TeacherHead, *, learning_rate: float) -> None:
        self.head = head
        self.optimizer = torch.optim.AdamW(head.parameters(), lr=learning_rate)
        self._replicated: nn.Module | None = None
        self._keep_buffers()

    def predict(self, features: Features) -> Gaussian:
        """(m_t, log v_t) with gradient to the head, synchronised over processes in its backward pass."""
        if self._replicated is None:
            several = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
            self._replicated = DistributedDataParallel(self.head) if several else self.head
        gaussian: Gaussian = self._replicated(features)
        return gaussian

    def anchor(self, gaussian: Gaussian, logits: Tensor) -> Tensor:
        return reference.gaussian_anchor(logits, gaussian.mean, gaussian.log_var)

    def fit(self, batches: Iterable[Features], steps: int) -> None:
        """Takes ``steps`` batches, one AdamW step each."""
        for features in itertools.islice(batches, steps):
            self.backward(self.anchor(self.predict(features), features.logits))
            self.update()

    def backward(self, anchor: Tensor, *, accumulation_steps: int = 1) -> None:
        (anchor / accumulation_steps).backward()

    def update(self, *, leave_out: bool = False) -> None:
        """One AdamW step; with ``leave_out`` none, and running statistics are those of the last update again."""
        if leave_out:
            for buffer, kept in zip(self.head.buffers(), self._kept, strict=True):
                buffer.copy_(kept)
        else:
            self.optimizer.step()
            self._keep_buffers()
        self.optimizer.zero_grad(set_to_none=True)

    def _keep_buffers(self) -> None:
        self._kept = [buffer.clone() for buffer in self.head.buffers()]

    def state_dict(self) -> dict[str, Any]:
        return {"head": self.head.state_dict(), "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._keep_buffers()
