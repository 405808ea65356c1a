"""The section of the distillation method: which it is, and what UniKD and KD are set to.

The settings of the other methods are sections of their names, see config/methods.py.
"""

from typing import Literal

from unikd_fast.config.methods import (
    AT,
    CRD,
    DKD,
    FLG,
    KD,
    MLKD,
    NKD,
    OFD,
    Blockwise,
    FitNet,
    MethodField,
    MethodName,
    ReviewKD,
    method_names,
)
from unikd_fast.config.section import NonNegative, Positive, PositiveInt, Section


class DistillConfig(Section):
    """The distillation method and what the paper leaves open about it. What is not in the section of a method is
    UniKD's; kd reads beta, ce_weight, temperature and scale_by_t2 too, and methods on feature levels max_levels."""

    method: MethodField = "unikd"
    """unikd: Eq. 7; kd: cross-entropy and softened KL; none: the student alone; the others have their settings in the
    sections of their names. A list of methods is their sum, with the cross-entropy counted once."""
    alpha: NonNegative = 4.0
    """Weight of the feature distribution loss L_FL (Eq. 7). Unpublished; 4 with the mean over classes."""
    beta: NonNegative | None = None
    """Weight of the logit loss L_L (Eq. 7); null: 1 for unikd, 0.9 for kd."""
    ce_weight: NonNegative | None = None
    """Weight of kd's cross-entropy; null: 0.1. Eq. 7 has 1 for unikd."""
    temperature: Positive = 4.0
    """Softmax temperature τ of the logit loss (Eq. 2): 4 on CIFAR, 1 on ImageNet."""
    scale_by_t2: bool = True
    """Multiply the logit loss by τ². Eq. 1 prints no τ²; without it the gradient shrinks as 1/τ²."""
    feature_reduction: Literal["mean", "sum"] = "mean"
    """Over classes in Eq. 6; the mean keeps alpha's meaning across numbers of classes."""
    alpha_ramp_epochs: NonNegative | None = None
    """Epochs over which alpha rises linearly from 0; null: 20, but at most 8 % of the run."""
    teacher_head: Literal["prefit", "anchored", "literal"] = "prefit"
    """What trains the teacher's side (AFF_t and FDP): fitted to the teacher's logits before the student and frozen;
    fitted along with the student; or through the total loss, which collapses."""
    head_steps: PositiveInt | None = None
    """Batches of the prefit; null: 1000, but at most as many as the student's training has."""
    head_learning_rate: Positive = 1e-3
    """AdamW learning rate of the teacher's head (prefit and anchored)."""
    width: PositiveInt | Literal["auto", "deepest"] = "auto"
    """Fused width D of both AFF modules; auto: min(256, the teacher's deepest width); deepest: that width."""
    fusion: Literal["aff", "last"] = "aff"
    """aff: all levels, Eq. 4; last: the coarsest level alone (the paper's "FDP only" ablation)."""
    fusion_path: Literal["auto", "collapsed", "stagewise"] = "auto"
    """How AFF is pooled, with the same result; auto: collapsed where that is exact (spatial gates);
    collapsed raises where it is not; stagewise forms the maps."""
    fusion_impl: Literal["auto", "reference", "fused"] = "auto"
    """auto: AFF's kernels on a GPU, plain PyTorch otherwise; fused raises where they cannot run."""
    gate: Literal["spatial", "channel"] = "spatial"
    """One gate map for all channels, or one per channel."""
    upsample: Literal["nearest", "bilinear"] = "nearest"
    """Upsampling of the coarser level."""
    norm: Literal["input", "batch"] | None = "input"
    """Batch normalisation at the 1x1 expanders of AFF: input, before them; batch, after them; null: none."""
    fdp: Literal["auto", "projected", "direct"] = "auto"
    """Form of FDP. projected: the paper's, a layer D -> K and two K -> K; direct: two layers D -> K, for many classes;
    auto: direct above 2,048 classes."""
    fdp_norm: Literal["layer", "none"] = "layer"
    """Normalisation of the pooled vector before FDP."""
    variance_floor: Positive = 0.1
    """Lower bound of FDP's variances."""
    max_levels: PositiveInt = 4
    """Feature levels used at most, counted from the coarsest."""
    # Here a section for each further method, by its name and of a class of config/methods.py: `dkd: DKD | None = None`.
    kd: KD | None = None
    """Settings of method kd besides those above; null: its defaults."""
    dkd: DKD | None = None
    """Settings of method dkd; null: its defaults."""
    nkd: NKD | None = None
    """Settings of method nkd; null: its defaults."""
    mlkd: MLKD | None = None
    """Settings of method mlkd; null: its defaults."""
    flg: FLG | None = None
    """Settings of method flg; null: its defaults."""
    fitnet: FitNet | None = None
    """Settings of method fitnet; null: its defaults."""
    at: AT | None = None
    """Settings of method at; null: its defaults."""
    ofd: OFD | None = None
    """Settings of method ofd; null: its defaults."""
    reviewkd: ReviewKD | None = None
    """Settings of method reviewkd; null: its defaults."""
    crd: CRD | None = None
    """Settings of method crd; null: its defaults."""
    blockwise: Blockwise | None = None
    """Settings of method blockwise; null: its defaults."""

    @property
    def methods(self) -> tuple[MethodName, ...]:
        """The method, or those of the list."""
        return method_names(self.method)

    @property
    def label(self) -> str:
        """The method in a word: "kd", "kd+crd"."""
        return "+".join(self.methods)
