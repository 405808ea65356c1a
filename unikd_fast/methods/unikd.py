"""UniKD: feature and logit knowledge under one KL paradigm (Eq. 4-7 of the paper).

Trained by L_FL alone, the teacher head, AFF_t and FDP, has a trivial optimum: a projection that goes to zero gives
L_FL = 0 for any features. So it is fitted to predict the teacher's own logits instead (L_anchor), by an optimiser of
its own.
"""

import logging
from collections.abc import Iterable
from functools import partial
from typing import Literal

from torch import Tensor, nn
from torch.func import functional_call

from unikd_fast.distribution import FeatureDistributionPrediction
from unikd_fast.fusion import AdaptiveFeatureFusion
from unikd_fast.losses import unikd_loss
from unikd_fast.methods.context import RunContext
from unikd_fast.methods.head import TeacherHead
from unikd_fast.methods.method import Method, Needs, Ramp
from unikd_fast.settings import NonNegative, Positive, PositiveInt, settings
from unikd_fast.values import Batch, Features, Gaussian, Loss, StudentOutput, Target


class PooledFusion(nn.Module):
    """Maps a network's Features to AFF of its levels (Eq. 4), globally average-pooled, (N, D).

    Args:
        fusion: AFF module, of all levels or of the coarsest alone.
    """

    def __init__(self, fusion: AdaptiveFeatureFusion) -> None:
        super().__init__()
        self.fusion = fusion

    def forward(self, features: Features) -> Tensor:
        return self.fusion.pooled(features.levels[-len(self.fusion.expanders) :])


class GaussianHead(nn.Module):
    """AFF_t and FDP: maps the teacher's Features to Gaussian(mean, log_var), (N, K) each."""

    def __init__(self, fusion: PooledFusion, distribution: FeatureDistributionPrediction) -> None:
        super().__init__()
        self.fusion = fusion
        self.distribution = distribution

    def forward(self, features: Features) -> Gaussian:
        return self.distribution(self.fusion(features))


_logger = logging.getLogger("unikd_fast")

MAX_PROJECTED_CLASSES = 2048
"""Up to this many classes FDP has the paper's two K -> K layers by default: 8.4 million weights."""


_OF_THE_HEAD = ("fusion", "gate", "upsample", "norm", "fdp_norm", "variance_floor")


@settings
class UniKDSettings:
    """UniKD (Huang et al. 2024): a feature distribution loss and a logit loss, both KL divergences."""

    alpha: NonNegative = 4.0
    """Weight of the feature distribution loss L_FL (Eq. 7). Unpublished; 4 with the mean over classes."""
    beta: NonNegative = 1.0
    """Weight of the logit loss L_L (Eq. 7)."""
    temperature: Positive = 4.0
    """Softmax temperature τ of the logit loss (Eq. 2): 4 on CIFAR, 1 on ImageNet."""
    scale_by_t2: bool = True
    """Multiply the logit loss by τ². Eq. 1 has no τ²; without it the gradient shrinks as 1/τ²."""
    feature_reduction: Literal["mean", "sum"] = "mean"
    """Reduction over classes in Eq. 6; with the mean, alpha has the same effect for any number of classes."""
    alpha_ramp_epochs: NonNegative | None = None
    """Warm-up: epochs over which alpha rises linearly from 0. If null, 20, but at most 8 % of the run."""
    teacher_head: Literal["prefit", "anchored", "literal"] = "prefit"
    """How the teacher head (AFF_t and FDP) is trained. prefit: fitted to the teacher's logits before the student, then
    frozen; anchored: fitted along with the student; literal: by the total loss, which collapses."""
    head_steps: PositiveInt | None = None
    """Batches of the prefit. If null, 1000, but at most as many as the student is trained on."""
    width: PositiveInt | Literal["auto", "deepest"] = "auto"
    """Fused width D of both AFF modules. auto: min(256, the teacher's deepest width); deepest: that width."""
    fusion: Literal["aff", "last"] = "aff"
    """aff: all levels by Eq. 4, as in the paper; last: the coarsest level alone (the paper's "FDP only"), which costs
    less; on three small pairs our study does not tell them apart, on a larger one aff is ahead."""
    gate: Literal["spatial", "channel"] = "spatial"
    """One gate map for all channels, or one per channel."""
    upsample: Literal["nearest", "bilinear"] = "nearest"
    """Upsampling of the coarser level."""
    norm: Literal["input", "batch"] | None = "input"
    """Batch normalisation at the 1x1 expanders of AFF. input: before them; batch: after them. If null, none."""
    fdp: Literal["auto", "projected", "direct"] = "auto"
    """Form of FDP. projected: the paper's, a layer D -> K and two K -> K; direct: two layers D -> K, for many classes;
    auto: direct above 2,048 classes."""
    fdp_norm: Literal["layer", "none"] = "layer"
    """Normalisation of the pooled vector before FDP."""
    variance_floor: Positive = 0.1
    """Lower bound of FDP's variances."""


class UniKD(Method[UniKDSettings]):
    """L = L_CE + alpha L_FL + beta L_L (Eq. 7).

    Student and teacher have an AFF each; FDP is shared. ``teacher_head`` says how the teacher head is trained: "prefit"
    (fitted to the teacher's logits first, then frozen), "anchored" (the same objective, along with the student) or
    "literal" (by the total loss; it collapses and is kept for reference). In the first two the student uses FDP with
    detached weights: FDP is still shared, but the student's loss cannot deform it.
    """

    settings_class = UniKDSettings
    accepts_top_k = True
    needs = Needs(levels=True, pooled=True)

    @classmethod
    def needs_of(cls, settings: UniKDSettings) -> Needs:
        """Return what the method needs: trained by the total loss, the head's weights must be unsharded."""
        return cls.needs._replace(whole_head=settings.teacher_head == "literal")

    def __init__(self, settings: UniKDSettings, context: RunContext) -> None:
        super().__init__(settings, context)
        first = 0 if settings.fusion == "aff" else -1
        teacher_channels = [shape[0] for shape in context.teacher_shapes]
        width, fdp = settings.width, settings.fdp
        if isinstance(width, str):
            width = {"auto": min(256, teacher_channels[-1]), "deepest": teacher_channels[-1]}[width]
        if fdp == "auto":
            fdp = "projected" if context.num_classes <= MAX_PROJECTED_CLASSES else "direct"
            if fdp == "direct":
                _logger.info(
                    "distill.unikd.fdp = auto: the direct form, two layers %d -> %s, for more than %s classes",
                    width,
                    f"{context.num_classes:,}",
                    f"{MAX_PROJECTED_CLASSES:,}",
                )
        fused = partial(
            AdaptiveFeatureFusion,
            width=width,
            gate=settings.gate,
            upsample=settings.upsample,
            norm=settings.norm,
        )
        # Build the head first: its random weights, and so the fitted Gaussians, are the same for every student.
        network = GaussianHead(
            PooledFusion(fused(teacher_channels[first:])),
            FeatureDistributionPrediction(
                width,
                context.num_classes,
                form=fdp,
                norm=settings.fdp_norm,
                variance_floor=settings.variance_floor,
            ),
        ).to(context.device)
        student_channels = [shape[0] for shape in context.student_shapes]
        self.adapter: PooledFusion = PooledFusion(fused(student_channels[first:])).to(context.device)
        self.teacher_head = settings.teacher_head
        self.distribution = network.distribution
        self.head: TeacherHead = TeacherHead(
            network,
            training=settings.teacher_head,
            steps=settings.head_steps or min(1000, context.total_steps),
            settings={"fdp": fdp, **{key: getattr(settings, key) for key in _OF_THE_HEAD}},
        )
        if settings.teacher_head == "literal":
            self.companion: nn.Module | None = network
        ramp_epochs = context.ramp(settings.alpha_ramp_epochs)
        self.alpha = Ramp(settings.alpha, epochs=ramp_epochs, device=context.device)
        self.objective = partial(
            unikd_loss,
            beta=settings.beta,
            temperature=settings.temperature,
            scale_by_t2=settings.scale_by_t2,
            feature_reduction=settings.feature_reduction,
            label_smoothing=self.label_smoothing,
            impl=self.impl,
        )

    def prepare(self, batches: Iterable[Features]) -> None:
        if self.head.fixed:
            self.head.fit(batches)

    def set_progress(self, epochs: float) -> None:
        self.alpha.set_progress(epochs)

    def target(self, teacher: Features, second: Features | None = None) -> Target:
        return Target(teacher.logits, self.head(teacher))

    def student_gaussian(self, pooled: Tensor) -> Gaussian:
        """Return (m_s, log v_s) of the student's pooled vector, through the shared FDP."""
        shared = self.distribution
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

    @property
    def uncacheable(self) -> str | None:
        if self.head.fixed:
            return None
        return (
            f"with distill.unikd.teacher_head = {self.teacher_head!r} the teacher head changes with every step and "
            "needs the teacher's feature levels, not only its outputs; with 'prefit' it does not"
        )

    @property
    def uncapturable(self) -> str | None:
        if self.teacher_head != "anchored":
            return None
        return "with distill.unikd.teacher_head = 'anchored' the head's own optimiser counts on the host"
