"""From the configuration to a method: one small function each, given what the run knows.

A method is a file in `unikd_fast.methods`, a function here and a line in METHODS. What it needs of the networks and of
the data is stated by its class (`Needs`), and nothing else in the engine knows it.
"""

from collections.abc import Callable
from functools import reduce
from typing import NamedTuple

from unikd_fast.config import Config, ConfigError
from unikd_fast.config import schema as sections
from unikd_fast.config.schema import DistillConfig
from unikd_fast.data.mixing import Mixing
from unikd_fast.engine.surroundings import Surroundings
from unikd_fast.engine.zero import zero_stage
from unikd_fast.methods import (
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
    Hybrid,
    Method,
    Needs,
    ReviewKD,
    StudentAlone,
    UniKD,
)


def needs_of(distill: DistillConfig) -> Needs:
    """What the method, or the sum of several, needs, before any of them is built."""
    return reduce(Needs.union, (METHODS[name].needs_with(distill) for name in distill.methods))


def check_needs(config: Config, needs: Needs) -> None:
    """Refuses settings of the data that the method of a run cannot do with.

    Raises:
        ConfigError: one of them.
    """
    mixing = config.data.mixing
    if needs.hard_labels and Mixing(**mixing.model_dump()).is_on:
        raise ConfigError(
            f"data.mixing.mixup_alpha = {mixing.mixup_alpha} and cutmix_alpha = {mixing.cutmix_alpha} with "
            f"distill.method = {config.distill.label!r}, which needs one class a sample; set both alphas to 0"
        )
    if needs.teacher_batch_statistics and config.teacher is not None and config.teacher.fold_batch_norm:
        raise ConfigError(
            "distill.ofd.teacher_batch_statistics = true with teacher.fold_batch_norm = true: a BatchNorm that is "
            "folded has no statistics of a batch; set teacher.fold_batch_norm = false"
        )
    literal = "unikd" in config.distill.methods and config.distill.teacher_head == "literal"
    if literal and zero_stage(config) == 3:
        raise ConfigError(
            "distill.teacher_head = 'literal' with deepspeed.zero_optimization.stage = 3, which shards the head's "
            "weights where the loss needs them whole; set the stage to 2 or less"
        )


def check_classes(config: Config, needs: Needs, classes: int) -> None:
    """Refuse data of too few classes for the method of a run.

    Raises:
        ConfigError: one class, for a method that weighs classes against each other.
    """
    if needs.two_classes and classes < 2:
        raise ConfigError(
            f"distill.method = {config.distill.label!r} weighs classes against each other and needs at least 2, got "
            f"{classes} in data.name = {config.data.name!r}; train on more classes or use another method"
        )


def build_method(distill: DistillConfig, around: Surroundings) -> Method:
    """The method of ``distill``, or the sum of several."""
    parts: dict[str, Method] = {name: METHODS[name].build(distill, around) for name in distill.methods}
    if len(parts) == 1:
        return parts[distill.methods[0]]
    return Hybrid(parts, label_smoothing=around.label_smoothing)


def _student_alone(distill: DistillConfig, around: Surroundings) -> Method:
    return StudentAlone(label_smoothing=around.label_smoothing)


def _kd(distill: DistillConfig, around: Surroundings) -> Method:
    return KD(
        ce_weight=0.1 if distill.ce_weight is None else distill.ce_weight,
        beta=0.9 if distill.beta is None else distill.beta,
        temperature=distill.temperature,
        scale_by_t2=distill.scale_by_t2,
        standardized=distill.kd is not None and distill.kd.standardized,
        label_smoothing=around.label_smoothing,
        impl=around.impl,
    )


def _dkd(distill: DistillConfig, around: Surroundings) -> Method:
    own = distill.dkd or sections.DKD()
    return DKD(
        ce_weight=own.ce_weight,
        alpha=own.alpha,
        beta=own.beta,
        temperature=own.temperature,
        ramp_epochs=around.ramp(20.0) if own.ramp_epochs is None else own.ramp_epochs,
        standardized=own.standardized,
        label_smoothing=around.label_smoothing,
        impl=around.impl,
        device=around.device,
    )


def _nkd(distill: DistillConfig, around: Surroundings) -> Method:
    own = distill.nkd or sections.NKD()
    return NKD(
        ce_weight=own.ce_weight,
        gamma=own.gamma,
        temperature=own.temperature,
        label_smoothing=around.label_smoothing,
        impl=around.impl,
    )


def _mlkd(distill: DistillConfig, around: Surroundings) -> Method:
    own = distill.mlkd or sections.MLKD()
    return MLKD(
        ce_weight=own.ce_weight,
        second_ce_weight=own.second_ce_weight,
        weight=own.weight,
        temperatures=own.temperatures,
        first_view_temperatures=own.first_view_temperatures,
        masks=own.masks,
        standardized=own.standardized,
        label_smoothing=around.label_smoothing,
        impl=around.impl,
    )


def _flg(distill: DistillConfig, around: Surroundings) -> Method:
    own = distill.flg or sections.FLG()
    _, classifier_weight = around.classifier_weights
    return FLG(
        around.student_width,
        around.teacher_width,
        classifier_weight,
        ce_weight=own.ce_weight,
        beta=own.beta,
        gamma=own.gamma,
        temperature=own.temperature,
        label_smoothing=around.label_smoothing,
        impl=around.impl,
    )


def _unikd(distill: DistillConfig, around: Surroundings) -> Method:
    deepest, width = around.teacher_channels[-1], distill.width
    if isinstance(width, str):
        width = {"auto": min(256, deepest), "deepest": deepest}[width]
    return UniKD(
        around.student_channels,
        around.teacher_channels,
        around.num_classes,
        width=width,
        fusion=distill.fusion,
        fusion_path=distill.fusion_path,
        fusion_impl=distill.fusion_impl,
        gate=distill.gate,
        upsample=distill.upsample,
        norm=distill.norm,
        fdp=distill.fdp,
        fdp_norm=distill.fdp_norm,
        variance_floor=distill.variance_floor,
        teacher_head=distill.teacher_head,
        head_steps=min(1000, around.total_steps) if distill.head_steps is None else distill.head_steps,
        head_learning_rate=distill.head_learning_rate,
        alpha=distill.alpha,
        beta=1.0 if distill.beta is None else distill.beta,
        alpha_ramp_epochs=around.ramp(20.0) if distill.alpha_ramp_epochs is None else distill.alpha_ramp_epochs,
        temperature=distill.temperature,
        scale_by_t2=distill.scale_by_t2,
        feature_reduction=distill.feature_reduction,
        label_smoothing=around.label_smoothing,
        impl=around.impl,
        device=around.device,
    )


def _fitnet(distill: DistillConfig, around: Surroundings) -> Method:
    settings = distill.fitnet or sections.FitNet()
    return FitNet(
        around.student_shapes,
        around.teacher_shapes,
        level=settings.level,
        weight=settings.weight,
        label_smoothing=around.label_smoothing,
    )


def _at(distill: DistillConfig, around: Surroundings) -> Method:
    settings = distill.at or sections.AT()
    return AT(
        around.student_shapes,
        around.teacher_shapes,
        weight=settings.weight,
        label_smoothing=around.label_smoothing,
    )


def _ofd(distill: DistillConfig, around: Surroundings) -> Method:
    settings = distill.ofd or sections.OFD()
    return OFD(
        around.student_shapes,
        around.teacher_shapes,
        around.teacher_norms,
        weight=settings.weight,
        teacher_batch_statistics=settings.teacher_batch_statistics,
        label_smoothing=around.label_smoothing,
        device=around.device,
    )


def _reviewkd(distill: DistillConfig, around: Surroundings) -> Method:
    settings = distill.reviewkd or sections.ReviewKD()
    return ReviewKD(
        around.student_shapes,
        around.teacher_shapes,
        around.student_width,
        around.teacher_width,
        weight=settings.weight,
        ramp_epochs=around.ramp(20.0) if settings.ramp_epochs is None else settings.ramp_epochs,
        width=settings.width,
        student_before_activation=settings.student_before_activation,
        label_smoothing=around.label_smoothing,
        device=around.device,
    )


def _crd(distill: DistillConfig, around: Surroundings) -> Method:
    settings = distill.crd or sections.CRD()
    return CRD(
        around.student_width,
        around.teacher_width,
        around.sample_ids,
        around.sample_labels,
        around.num_classes,
        weight=settings.weight,
        width=settings.width,
        negatives=settings.negatives,
        temperature=settings.temperature,
        momentum=settings.momentum,
        positives=settings.positives,
        label_smoothing=around.label_smoothing,
        device=around.device,
    )


def _blockwise(distill: DistillConfig, around: Surroundings) -> Method:
    settings = distill.blockwise or sections.Blockwise()
    return Blockwise(
        around.student_shapes,
        around.teacher_shapes,
        around.teacher_blocks(),
        task_weight=settings.task_weight,
        distill_weight=settings.distill_weight,
        cross_weight=settings.cross_weight,
        temperature=settings.temperature,
        light=settings.light,
        label_smoothing=around.label_smoothing,
        impl=around.impl,
        device=around.device,
    )


def _needs_of_kd(distill: DistillConfig) -> Needs:
    return KD.needs_with(standardized=distill.kd is not None and distill.kd.standardized)


def _needs_of_mlkd(distill: DistillConfig) -> Needs:
    return MLKD.needs_with(standardized=distill.mlkd is not None and distill.mlkd.standardized)


def _needs_of_ofd(distill: DistillConfig) -> Needs:
    settings = distill.ofd or sections.OFD()
    return OFD.needs_with(teacher_batch_statistics=settings.teacher_batch_statistics)


def _needs_of_reviewkd(distill: DistillConfig) -> Needs:
    settings = distill.reviewkd or sections.ReviewKD()
    return ReviewKD.needs_with(student_before_activation=settings.student_before_activation)


class Entry(NamedTuple):
    """A method's class, for what it needs, and how it is built; what it needs by its settings, if they decide it."""

    method: type[Method]
    build: Callable[[DistillConfig, Surroundings], Method]
    needs: Callable[[DistillConfig], Needs] | None = None

    def needs_with(self, distill: DistillConfig) -> Needs:
        """What it needs with these settings."""
        return self.method.needs if self.needs is None else self.needs(distill)


METHODS: dict[str, Entry] = {
    "none": Entry(StudentAlone, _student_alone),
    "kd": Entry(KD, _kd, needs=_needs_of_kd),
    "dkd": Entry(DKD, _dkd),
    "nkd": Entry(NKD, _nkd),
    "mlkd": Entry(MLKD, _mlkd, needs=_needs_of_mlkd),
    "flg": Entry(FLG, _flg),
    "unikd": Entry(UniKD, _unikd),
    "fitnet": Entry(FitNet, _fitnet),
    "at": Entry(AT, _at),
    "ofd": Entry(OFD, _ofd, needs=_needs_of_ofd),
    "reviewkd": Entry(ReviewKD, _reviewkd, needs=_needs_of_reviewkd),
    "crd": Entry(CRD, _crd),
    "blockwise": Entry(Blockwise, _blockwise),
}
