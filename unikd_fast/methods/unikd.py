"""UniKD: feature and logit knowledge under one KL paradigm (Eq. 4-7 of the paper).

Trained through L_FL alone the teacher's side, AFF_t and FDP, has a trivial optimum: a projection that goes to zero
gives L_FL = 0 for any features. So it is fitted to describe the teacher's own logits instead (L_anchor), by an
optimiser of its own.
"""

import itertools
import logging
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from unikd_fast.distribution import FeatureDistributionPrediction
from unikd_fast.fusion import AdaptiveFeatureFusion
from unikd_fast.kernels import reference
from unikd_fast.losses import unikd_loss
from unikd_fast.methods.method import Method, Needs, Ramp
from unikd_fast.values import Batch, Features, Gaussian, Loss, StudentOutput, Target


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


_logger = logging.getLogger("unikd_fast")

TEACHER_HEADS = ("prefit", "anchored", "literal")
FDP_FORMS = ("auto", "projected", "direct")
MAX_PROJECTED_CLASSES = 2048
"""Up to so many classes FDP has the paper's two layers K -> K unless asked otherwise: 8.4 million weights."""


class UniKD(Method):
    """L = L_CE + alpha L_FL + beta L_L (Eq. 7).

    Student and teacher have an AFF each; FDP is shared. ``teacher_head`` says what trains the teacher's side:
    "prefit" (fitted to the teacher's logits first, then frozen), "anchored" (the same objective, along with the
    student) or "literal" (through the total loss; it collapses and is kept for the record). In the first two the
    student uses FDP with detached weights: sharing stays literal, and the student's loss cannot deform FDP.

    Args:
        student_channels, teacher_channels: C_l of each level, fine to coarse.
        num_classes: K.
        width: D, the fused width of both sides; None: min(256, the teacher's coarsest width).
        fusion: "aff", or "last" for the coarsest level alone (the paper's "FDP only" row).
        fusion_path, fusion_impl, gate, upsample, norm: see AdaptiveFeatureFusion.
        fdp: form of FDP, see FeatureDistributionPrediction; "auto": "direct" above 2,048 classes.
        fdp_norm, variance_floor: see FeatureDistributionPrediction.
        teacher_head, head_steps, head_learning_rate: see above; head_steps batches are used by "prefit".
        alpha, beta, temperature, scale_by_t2, feature_reduction, label_smoothing, impl: see unikd_loss.
        alpha_ramp_epochs: epochs over which alpha rises linearly from 0.

    Raises:
        ValueError: unknown teacher_head, fusion or fdp.
    """

    needs = Needs(levels=True)

    def __init__(
        self,
        student_channels: Sequence[int],
        teacher_channels: Sequence[int],
        num_classes: int,
        *,
        width: int | None = None,
        fusion: str = "aff",
        fusion_path: str = "auto",
        fusion_impl: str = "auto",
        gate: str = "spatial",
        upsample: str = "nearest",
        norm: str | None = "input",
        fdp: str = "auto",
        fdp_norm: str = "layer",
        variance_floor: float = 0.1,
        teacher_head: str = "prefit",
        head_steps: int = 1000,
        head_learning_rate: float = 1e-3,
        alpha: float = 4.0,
        beta: float = 1.0,
        alpha_ramp_epochs: float = 0.0,
        temperature: float = 4.0,
        scale_by_t2: bool = True,
        feature_reduction: str = "mean",
        label_smoothing: float = 0.0,
        impl: str = "auto",
        device: torch.device | str = "cpu",
    ) -> None:
        if teacher_head not in TEACHER_HEADS:
            raise ValueError(f"UniKD: teacher_head must be one of {', '.join(TEACHER_HEADS)}, got {teacher_head!r}")
        if fusion not in ("aff", "last"):
            raise ValueError(f"UniKD: fusion must be aff or last, got {fusion!r}")
        if fdp not in FDP_FORMS:
            raise ValueError(f"UniKD: fdp must be one of {', '.join(FDP_FORMS)}, got {fdp!r}")
        first = 0 if fusion == "aff" else -1
        width = width or min(256, teacher_channels[-1])
        if fdp == "auto":
            fdp = "projected" if num_classes <= MAX_PROJECTED_CLASSES else "direct"
            if fdp == "direct":
                _logger.info(
                    "distill.fdp = auto: the direct form, two layers %d -> %s, for more than %s classes",
                    width,
                    f"{num_classes:,}",
                    f"{MAX_PROJECTED_CLASSES:,}",
                )
        fused = partial(
            AdaptiveFeatureFusion,
            width=width,
            gate=gate,
            upsample=upsample,
            norm=norm,
            path=fusion_path,
            impl=fusion_impl,
        )
        # The head first: its random weights, and so the Gaussians it is fitted to, are the same for every student.
        self.head = TeacherHead(
            PooledFusion(fused(teacher_channels[first:])),
            FeatureDistributionPrediction(width, num_classes, form=fdp, norm=fdp_norm, variance_floor=variance_floor),
        ).to(device)
        self.adapter: PooledFusion = PooledFusion(fused(student_channels[first:])).to(device)
        self.teacher_head, self.head_steps = teacher_head, head_steps
        self._head_settings = {
            "steps": head_steps,
            "learning_rate": head_learning_rate,
            "fusion": fusion,
            "gate": gate,
            "upsample": upsample,
            "norm": norm,
            "fdp_norm": fdp_norm,
            "variance_floor": variance_floor,
            # Not the form that all caches had which were made before there were two.
            **({"fdp": fdp} if fdp != "projected" else {}),
        }
        self.trainer = HeadTrainer(self.head, learning_rate=head_learning_rate)
        if teacher_head == "literal":
            self.companion: nn.Module | None = self.head
        self.alpha = Ramp(alpha, epochs=alpha_ramp_epochs, device=device)
        self.objective = partial(
            unikd_loss,
            beta=beta,
            temperature=temperature,
            scale_by_t2=scale_by_t2,
            feature_reduction=feature_reduction,
            label_smoothing=label_smoothing,
            impl=impl,
        )

    def prepare(self, batches: Iterable[Features]) -> None:
        if self.teacher_head == "prefit":
            self.trainer.fit(batches, self.head_steps)
            self._freeze()

    def set_progress(self, epochs: float) -> None:
        self.alpha.set_progress(epochs)

    def target(self, teacher: Features, second: Features | None = None) -> Target:
        if self.teacher_head == "prefit":
            with torch.no_grad():
                return Target(teacher.logits, self.head(teacher))
        if self.teacher_head == "anchored":
            return Target(teacher.logits, self.trainer.predict(teacher))
        return Target(teacher.logits, self.head(teacher))

    def student_gaussian(self, pooled: Tensor) -> Gaussian:
        """(m_s, log v_s) of the student's pooled vector, through the shared FDP."""
        shared = self.head.distribution
        if self.teacher_head == "literal":
            return shared(pooled)
        gaussian: Gaussian = functional_call(shared, {k: p.detach() for k, p in shared.named_parameters()}, (pooled,))
        return gaussian

    @property
    def term_names(self) -> tuple[str, ...]:
        anchor = ("anchor",) if self.teacher_head == "anchored" else ()
        return ("ce", "feature_kl", "logit_kl", *anchor)

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        assert target.gaussian is not None
        assert student.adapted is not None
        gaussian = target.gaussian
        if self.teacher_head != "literal":
            gaussian = Gaussian(gaussian.mean.detach(), gaussian.log_var.detach())
        found = self.objective(
            student.logits,
            target.logits,
            batch.labels,
            self.student_gaussian(student.adapted),
            gaussian,
            alpha=self.alpha.value,
            ce_weight=self.ce_weight,
            anchor=target.gaussian if self.teacher_head == "anchored" else None,
        )
        terms = {"ce": found.ce, "feature_kl": found.feature_kl, "logit_kl": found.logit_kl}
        if found.anchor is not None:
            terms["anchor"] = found.anchor
        return Loss(found.total, terms)

    def train_head(self, loss: Loss, *, accumulation_steps: int, update: bool, leave_out: bool = False) -> None:
        if self.teacher_head != "anchored":
            return
        self.trainer.backward(loss.terms["anchor"], accumulation_steps=accumulation_steps)
        if update:
            self.trainer.update(leave_out=leave_out)

    @torch.no_grad()
    def indicators(self, teacher: Features, labels: Tensor) -> dict[str, Tensor]:
        """How alive the teacher's head is; a collapse shows as std(m_t) -> 0 and accuracy at chance."""
        training = self.head.training
        mean, log_var = self.head.eval()(teacher)
        self.head.train(training)
        return {
            "head_mean_std": mean.std(unbiased=False),
            "head_variance": log_var.exp().mean(),
            "head_accuracy": (mean.argmax(1) == labels).float().mean(),
        }

    @property
    def uncacheable(self) -> str | None:
        if self.teacher_head == "prefit":
            return None
        return (
            f"with distill.teacher_head = {self.teacher_head!r} the teacher's head changes with every step and needs "
            "the teacher's feature levels, not only its outputs; with 'prefit' it does not"
        )

    @property
    def uncapturable(self) -> str | None:
        if self.teacher_head != "anchored":
            return None
        return (
            "with distill.teacher_head = 'anchored' an optimiser of its own, which counts on the host, trains the head"
        )

    @property
    def heads(self) -> tuple[nn.Module, ...]:
        return (self.head,)

    @property
    def fitted_head(self) -> nn.Module | None:
        return self.head if self.teacher_head == "prefit" else None

    @property
    def head_settings(self) -> dict[str, Any]:
        return dict(self._head_settings)

    def adopt_head(self, state: Mapping[str, Tensor]) -> None:
        self.head.load_state_dict(dict(state))
        self._freeze()

    def state_dict(self) -> dict[str, Any]:
        return self.trainer.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.trainer.load_state_dict(state)
        if self.teacher_head == "prefit":
            self._freeze()

    def _freeze(self) -> None:
        self.head.requires_grad_(False).eval()
