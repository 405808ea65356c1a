"""The sections of the networks: the teacher with its training and its cache, and the student."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unikd_fast.config.section import Fraction, Positive, PositiveInt, Section, Text


class TeacherTraining(Section):
    """Train the teacher first, as the student would be trained alone. null fields: as in train and data."""

    total_epochs: PositiveInt | None = None
    """Epochs of the teacher's training."""
    train_samples: PositiveInt | None = None
    """Class-balanced subset the teacher is trained on; null: the whole training split."""
    learning_rate: Positive | None = None
    """Peak learning rate."""
    global_batch_size: PositiveInt | None = None
    """Samples per optimiser step."""


class TeacherFidelity(Section):
    """Before training, the teacher as it runs is compared with the same weights in fp32, unfolded and eager."""

    batches: Annotated[int, Field(ge=0)] = 4
    """Training batches per process to compare on; 0: no comparison."""
    min_agreement: Fraction = 0.995
    """Smallest share of images on which both must name the same class; near ties count as agreement."""


class TeacherCache(Section):
    """The teacher's outputs, stored on disk for every view and read back instead of running the teacher."""

    mode: Literal["off", "read", "read_write"] = "off"
    """off; read: a finished cache; read_write: what is missing is built before training, by all processes."""
    dir: Text = "caches/{name}-{method}-seed{seed}"
    """Folder of one cache. {name} is the configuration file's name, {method} and {seed} are the run's: methods store
    different outputs, and seeds show different views."""
    views: PositiveInt | None = None
    """Views stored of each training sample. Epoch e trains on the augmentation of epoch e modulo views; null: one for
    each epoch, so that every epoch is the one that training without a cache would see."""
    logits: Literal["fp16", "uint8", "top_k"] = "fp16"
    """How logits are stored: two bytes a class; one byte a class, scaled by sample; or the top_k largest and the
    log-sum-exp, for temperature 1 only."""
    top_k: PositiveInt | None = None
    """Number of logits kept by logits = top_k."""
    batch_size: PositiveInt = 64
    """Views the teacher sees at a time while the cache is built or checked."""
    recheck: Fraction = 0.001
    """Share of the stored outputs, at least one batch, that the first process computes again before training and
    compares; 0: none, and the teacher's weights are read for their hash alone."""

    @model_validator(mode="after")
    def _top_k_counted(self) -> "TeacherCache":
        if (self.logits == "top_k") != (self.top_k is not None):
            raise ValueError(
                f"teacher.cache.logits = {self.logits!r} with teacher.cache.top_k = {self.top_k}: top_k is the number "
                "of logits kept by logits = 'top_k'; set both or neither"
            )
        return self


class TeacherConfig(Section):
    """The frozen network the student learns from."""

    model: Text
    """torchvision/<name>, timm/<name> or cifar/<name>."""
    weights: Text | None = None
    """A file, a torchvision or timm weight identifier, or "random" to allow a teacher that knows nothing (smoke runs,
    benchmarks). null needs teacher.training. Environment variables are written ${CIFAR100_TEACHERS}."""
    weights_key: Text | None = None
    """Key of the state dict in a weights file that holds several; null: the exponential average where there is one
    (state_dict_ema, model_ema), otherwise the first of model, state_dict, model_state and student."""
    training: TeacherTraining | None = None
    """Train the teacher in this run before the student, when weights is null."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the teacher's weights and features. auto: on a GPU fp16, or bf16 where fp16 overflows on training
    images; on a CPU bf16 if it has bf16 units, otherwise fp32."""
    fold_batch_norm: bool = True
    """Fold BatchNorm into the convolutions before it, in fp32, wherever that is exact."""
    compile: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    """Mode of torch.compile for the teacher; null: eager. Needs a compiler: Triton on a GPU, C++ on a CPU. Of method
    blockwise it compiles the teacher's own pass; the blocks inside the student's stones run eagerly."""
    fidelity: TeacherFidelity = TeacherFidelity()
    """Comparison of the teacher with itself in fp32, before training."""
    min_accuracy: Fraction | None = None
    """Smallest share of the validation images whose class the teacher must name, or the run is refused. null: twice the
    odds of chance, 2 / (K + 1) for K classes, with an allowance for few images; 0: whatever it knows. A teacher of
    weights = random is not asked."""
    cache: TeacherCache = TeacherCache()
    """The teacher's outputs, stored on disk."""
    feature_nodes: tuple[Text, ...] | None = None
    """Modules whose outputs are the feature levels, fine to coarse; null: the end of each stage."""

    @model_validator(mode="after")
    def _key_of_a_file(self) -> "TeacherConfig":
        _require_weights("teacher", self.weights, self.weights_key)
        return self


class StudentConfig(Section):
    """The network that is trained."""

    model: Text
    """torchvision/<name>, timm/<name> or cifar/<name>."""
    weights: Text | None = None
    """Weights to start from: a file or an identifier; null: random."""
    weights_key: Text | None = None
    """Key of the state dict in a weights file that holds several, as of the teacher."""
    feature_nodes: tuple[Text, ...] | None = None
    """Modules whose outputs are the feature levels, fine to coarse; null: the end of each stage."""

    @model_validator(mode="after")
    def _key_of_a_file(self) -> "StudentConfig":
        _require_weights("student", self.weights, self.weights_key)
        return self


def _require_weights(role: str, weights: str | None, key: str | None) -> None:
    if key is not None and weights in (None, "random"):
        raise ValueError(
            f"{role}.weights_key = {key!r} with {role}.weights = {weights!r}: it is the key of the weights in a file; "
            f"set {role}.weights to the file, or leave the key out"
        )
