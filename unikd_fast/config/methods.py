"""The names of the methods, and the settings that one method alone has.

A method with settings of its own adds its name to `MethodName`, a `MethodSection` here with the defaults of the
literature, and a field of its name to `DistillConfig`: ``dkd: DKD | None = None``. null means the defaults; given for a
method that the run does not use, the section is an error.
"""

from collections.abc import Iterable
from typing import Annotated, Any, Literal, cast, get_args

from pydantic import AfterValidator, Discriminator, Field, Tag

from unikd_fast.config.section import NonNegative, Positive, PositiveInt, Section

MethodName = Literal[
    "unikd", "kd", "fitnet", "at", "ofd", "reviewkd", "dkd", "nkd", "mlkd", "flg", "crd", "blockwise", "none"
]


def _a_sum(names: tuple[MethodName, ...]) -> tuple[MethodName, ...]:
    if len(set(names)) < max(2, len(names)) or "none" in names:
        raise ValueError(
            f"distill.method = {list(names)}: a list names two methods or more, each once, and none of them is 'none'; "
            "a single method is given by its name"
        )
    return names


# Told apart by their kind, so that an error is about the one that was meant.
OneMethod = Annotated[MethodName, Tag("one method")]
SeveralMethods = Annotated[tuple[MethodName, ...], AfterValidator(_a_sum), Tag("several methods")]
MethodField = Annotated[
    OneMethod | SeveralMethods,
    Discriminator(lambda value: "several methods" if isinstance(value, list | tuple) else "one method"),
]

TOP_K_METHODS = ("unikd", "kd")
"""Methods whose loss of the logits can do with the largest of them."""


class MethodSection(Section):
    """Settings of one method; the field of `DistillConfig` bears the method's name."""


class KD(MethodSection):
    """Of kd, beside temperature, beta, ce_weight and scale_by_t2."""

    standardized: bool = False
    """Logit standardisation (Sun et al. 2024): each sample's logits to mean 0 and standard deviation 1 before the KL.
    Published with ce_weight 1, beta 9 and temperature 2."""


class DKD(MethodSection):
    """Decoupled distillation (Zhao et al. 2022): the target class and the others by themselves."""

    ce_weight: NonNegative = 1.0
    """Weight of the cross-entropy; a hybrid counts its own."""
    alpha: NonNegative = 1.0
    """Weight of the target class against the others."""
    beta: NonNegative = 8.0
    """Weight of the others among themselves."""
    temperature: Positive = 4.0
    """Softmax temperature: 4 on CIFAR, 1 on ImageNet."""
    ramp_epochs: NonNegative | None = None
    """Epochs over which alpha and beta rise linearly from 0; null: 20, but at most 8 % of the run."""
    standardized: bool = False
    """Logit standardisation, as in kd. Published with temperature 2, and alpha and beta of 9 times the usual."""


class NKD(MethodSection):
    """Normalised distillation (Yang et al. 2023): the teacher's target probability, and the others renormalised."""

    ce_weight: NonNegative = 1.0
    """Weight of the cross-entropy; a hybrid counts its own."""
    gamma: NonNegative = 1.5
    """Weight of the classes that are not the label."""
    temperature: Positive = 1.0
    """Softmax temperature of these."""


class MLKD(MethodSection):
    """Multi-level distillation (Jin et al. 2023) of a weak and a strong view, which data.second_view makes."""

    ce_weight: NonNegative = 0.1
    """Weight of the weak view's cross-entropy; a hybrid counts its own."""
    second_ce_weight: NonNegative = 0.1
    """Weight of the strong view's cross-entropy, in a hybrid too."""
    weight: NonNegative = 0.9
    """Weight of the KL and Gram terms."""
    temperatures: Annotated[tuple[Positive, ...], Field(min_length=1)] = (3.0, 4.0, 5.0)
    """Softmax temperatures of both views. The published code has these; its paper's are 2 to 6."""
    first_view_temperatures: tuple[Positive, ...] = (2.0, 6.0)
    """Temperatures of the weak view alone, whose KL counts twice, as in the published code."""
    masks: bool = True
    """Weaken the weak view's terms by the shares of samples and of classes in which the teacher is at most as confident
    as in the median one, about 1/2: what the masks of the published code come to."""
    standardized: bool = False
    """Logit standardisation of the KL terms, as in kd. Published with CE weights 1, weight 9, temperatures 2, 3, 5."""


class FLG(MethodSection):
    """KL of the logits, and the embedding's gap as the teacher's classifier sees it."""

    ce_weight: NonNegative = 1.0
    """Weight of the cross-entropy; a hybrid counts its own."""
    beta: NonNegative = 1.0
    """Weight of the KL of the logits."""
    gamma: NonNegative = 1.0
    """Weight of the embedding's gap."""
    temperature: Positive = 4.0
    """Softmax temperature of both."""


class FitNet(MethodSection):
    """One level of the student regressed onto the teacher's."""

    weight: NonNegative = 100.0
    """Weight of the mean squared difference."""
    level: Annotated[int, Field(ge=0)] = 1
    """The level of each network, from 0, its finest."""


class AT(MethodSection):
    """Maps of attention of the student's levels held to the teacher's."""

    weight: NonNegative = 1000.0
    """Weight of the mean squared differences, summed over levels."""


class OFD(MethodSection):
    """Levels before activation held to the teacher's, where a ReLU would show the difference."""

    weight: NonNegative = 1e-3
    """Weight of the partial squared differences, summed over channels and pixels; 1e-4 on ImageNet."""
    teacher_batch_statistics: bool = False
    """Let the teacher's BatchNorms normalise by each batch, as the authors' code, which keeps the teacher in training
    mode; needs teacher.fold_batch_norm = false."""


class ReviewKD(MethodSection):
    """The student's levels, each with what lies above it, held to the teacher's."""

    weight: NonNegative = 1.0
    """Weight of the hierarchical context loss; from 0.6 to 8 in the literature, by the pair of networks."""
    ramp_epochs: NonNegative | None = None
    """Epochs over which the weight rises linearly from 0; null: 20, but at most 8 % of the run."""
    width: PositiveInt | None = None
    """Channels inside of the fusions; null: the width of the student's embedding, but at most 512."""
    student_before_activation: bool = False
    """Take the student's levels before their activation, as the teacher's are; false in the literature on CIFAR, true
    on ImageNet."""


class CRD(MethodSection):
    """A sample's embeddings told from those of other classes, between student and teacher."""

    weight: NonNegative = 0.8
    """Weight of the contrastive loss."""
    width: PositiveInt = 128
    """Width of the embeddings that are compared; 8 bytes of it are kept for each training sample."""
    negatives: Annotated[int, Field(ge=1, le=2**18)] = 16384
    """Samples of other classes that each sample is told from."""
    temperature: Positive = 0.07
    """Temperature of the similarities."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.5
    """Share of the old embedding of a sample that its bank keeps when it sees the sample again."""
    positives: Literal["exact", "relax"] = "exact"
    """What is told from them: exact: the sample itself; relax: any of its class."""


class Blockwise(MethodSection):
    """The student up to a level, continued by the teacher's frozen blocks: stepping stones between the two."""

    task_weight: NonNegative = 1.0
    """Weight of the cross-entropies, of the student and of the stones."""
    distill_weight: NonNegative = 1.0
    """Weight of the softened KL to the teacher, likewise."""
    cross_weight: NonNegative = 1.0
    """Weight of the softened KL to the mean of the stones, likewise."""
    temperature: Positive = 4.0
    """Softmax temperature of both."""
    light: bool = False
    """The last stone alone, of the student's last level and the teacher's classifier."""


def method_names(method: Any) -> tuple[MethodName, ...]:
    """The names in ``distill.method``, which is one or a list.

    Example:
        >>> method_names("kd"), method_names(["kd", "unikd"])
        (('kd',), ('kd', 'unikd'))
    """
    return cast(tuple[MethodName, ...], (method,) if isinstance(method, str) else tuple(method))


def section_names(distill: type[Section]) -> list[str]:
    """The fields of the class of ``distill`` that are sections of one method."""
    return [
        name
        for name, field in distill.model_fields.items()
        if any(isinstance(part, type) and issubclass(part, MethodSection) for part in get_args(field.annotation))
    ]


def unused_sections(distill: Section, methods: Iterable[str]) -> list[str]:
    """Methods whose sections are given although they are none of these."""
    used = set(methods)
    return [n for n in section_names(type(distill)) if getattr(distill, n) is not None and n not in used]
