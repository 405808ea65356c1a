"""The schema of a configuration file. One class a section, one docstring a field; unknown keys are errors."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, create_model, model_validator

from unikd_fast.data.settings import DataSettings
from unikd_fast.methods import METHODS
from unikd_fast.settings import Fraction, NonNegative, Positive, PositiveInt, Text


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


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


OWN_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes in which torch.compile captures CUDA graphs by itself."""


class LossConfig(Section):
    """How the losses are computed."""

    impl: Literal["auto", "reference", "fused"] = "auto"
    """auto: fused kernels on a GPU, the PyTorch reference otherwise; fused raises where it cannot run."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Label smoothing of the cross-entropy."""


class TrainConfig(Section):
    """The optimisation of the student."""

    total_epochs: PositiveInt
    """Passes over the training split."""
    max_steps: PositiveInt | None = None
    """Stop after this many optimiser steps, if that is earlier; the schedule then ends there as well."""
    global_batch_size: PositiveInt
    """Samples per optimiser step, over all processes and accumulation steps."""
    accumulation_steps: PositiveInt = 1
    """Micro-batches per optimiser step."""
    optimizer: Literal["sgd", "adamw", "fused_adamw", "cpu_adamw"] = "sgd"
    """sgd (momentum) or adamw of torch; fused_adamw: DeepSpeed's in one kernel; cpu_adamw: DeepSpeed's for optimiser
    states that are offloaded to the CPU. These two are compiled when they are first used."""
    learning_rate: Positive
    """Peak learning rate."""
    momentum: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.9
    """Momentum of sgd."""
    nesterov: bool = False
    """Nesterov momentum of sgd."""
    weight_decay: NonNegative = 0.0
    """Weight decay."""
    schedule: Literal["cosine", "step", "constant"] = "cosine"
    """cosine: to zero at the end; step: times gamma at each milestone."""
    milestones: tuple[NonNegative, ...] = ()
    """Epochs of the step schedule's drops."""
    gamma: Positive = 0.1
    """Factor of each drop."""
    warmup_epochs: NonNegative = 0.0
    """Epochs of linear warm-up from zero."""
    clip_grad_norm: NonNegative = 0.0
    """Clip the gradient's norm to this; 0: off."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: autocast of the student's forward and backward; parameters and losses stay fp32. fp16 scales the loss
    and skips steps whose gradients overflow."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is inf or NaN. stop: the run ends and says where; skip: that step changes nothing and is
    counted, at most ten in a row. Without ZeRO the host then waits for the device in every step."""
    activation_checkpointing: bool = False
    """Keep of each of the student's blocks only what goes in, and compute the rest again in the backward pass: less
    memory, a third more work."""
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    """torch.compile mode of the student; null: eager. reduce-overhead and max-autotune replay CUDA graphs, which do not
    go with accumulation_steps above 1."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Evaluate and export an exponential moving average of the student; null: off."""
    channels_last: bool = False
    """NHWC memory format, where it is safe (DeepSpeed ZeRO stage 0)."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Capture the whole step in a CUDA graph and replay it; launching its kernels one by one is what bounds small
    networks. auto: where that is possible (one GPU, data in its memory, no ZeRO), and on a GPU the log says whether and
    why; on: an error where it is not."""

    @model_validator(mode="after")
    def _divisible(self) -> "TrainConfig":
        if self.global_batch_size % self.accumulation_steps:
            raise ValueError(
                f"train.global_batch_size ({self.global_batch_size}) must be divisible by train.accumulation_steps "
                f"({self.accumulation_steps})"
            )
        return self

    @model_validator(mode="after")
    def _keeps_outputs(self) -> "TrainConfig":
        if self.compile in OWN_GRAPHS and self.accumulation_steps > 1:
            raise ValueError(
                f"train.compile = {self.compile!r} replays CUDA graphs, in which a micro-batch overwrites what the one "
                f"before left, and train.accumulation_steps = {self.accumulation_steps}; set train.compile to 'default'"
            )
        return self


if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[*METHODS]


def _a_sum(names: tuple[str, ...]) -> tuple[str, ...]:
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

METHOD_SECTIONS = tuple(name for name in METHODS if name != "none")
"""Methods with settings of their own, in a section of ``distill`` that bears their name."""


class MethodChoice(Section):
    """The distillation method. Its settings stand in the section of its name; given for a method that the run does not
    use, a section is an error."""

    method: MethodField = "unikd"
    """unikd: Eq. 7; kd: cross-entropy and softened KL; none: the student alone; the others: see docs/methods.md. A list
    of methods is their sum, with the cross-entropy counted once."""
    max_levels: PositiveInt = 4
    """Feature levels used at most, counted from the coarsest, by methods on levels."""

    @property
    def methods(self) -> tuple[str, ...]:
        """The method, or those of the list."""
        return method_names(self.method)

    @property
    def label(self) -> str:
        """The method in a word: "kd", "kd+crd"."""
        return "+".join(self.methods)

    @property
    def settings(self) -> dict[str, Any]:
        """Settings of each method, by its name; the defaults where no section is given."""
        return {name: getattr(self, name, None) or METHODS[name].settings_class() for name in self.methods}

    def unused_sections(self, methods: Iterable[str]) -> list[str]:
        """Return the methods whose sections are given although they are none of these."""
        used = set(methods)
        return [name for name in METHOD_SECTIONS if getattr(self, name) is not None and name not in used]


if TYPE_CHECKING:

    class DistillConfig(MethodChoice):
        def __getattr__(self, name: str) -> Any: ...

else:
    DistillConfig = create_model(
        "DistillConfig",
        __base__=MethodChoice,
        __doc__=MethodChoice.__doc__,
        **{
            name: (
                METHODS[name].settings_class | None,
                Field(default=None, description=f"Settings of method {name}; null: its defaults."),
            )
            for name in METHOD_SECTIONS
        },
    )


def method_names(method: Any) -> tuple[str, ...]:
    """Return the names in ``distill.method``, which is one or a list.

    Example:
        >>> method_names("kd"), method_names(["kd", "unikd"])
        (('kd',), ('kd', 'unikd'))
    """
    return (method,) if isinstance(method, str) else tuple(method)


class RunConfig(Section):
    """Where a run writes and how often."""

    dir: Text = "runs/{name}-{hash}"
    """Run folder. {name} is the configuration file's name, {hash} a digest of the resolved configuration, so that the
    same experiment always meets its own folder and another one never does."""
    nodes: PositiveInt | None = None
    """Number of nodes that the run is to be started on; on another number it is refused. null: any."""
    timeout_minutes: Positive = 10.0
    """How long processes wait for each other before they give up: longer than the slowest thing that one does alone,
    such as writing a checkpoint of a large student to a slow disk."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the weights, the order of the samples and the augmentation."""
    log_every_steps: PositiveInt = 50
    """Steps between two lines of metrics; also the only steps at which the host reads from the device."""
    checkpoint_every_steps: PositiveInt | None = None
    """Steps between two checkpoints, besides the one before every evaluation."""
    keep_checkpoints: PositiveInt = 2
    """Number of the newest checkpoints that are kept; the student of the best evaluation is kept besides."""
    async_checkpoints: bool = True
    """Write checkpoints in a thread while training goes on; an error then comes with the next one."""
    deepspeed_checkpoints: bool = False
    """Besides, have DeepSpeed write its own to checkpoints/deepspeed, for its tools (zero_to_fp32, universal
    checkpoints). They are pickled and written while training waits; runs go on from ours alone."""
    evaluate_every_epochs: PositiveInt = 1
    """Epochs between two evaluations on the validation split; the last epoch is always evaluated."""
    test_logits: bool = True
    """Write the logits of the last student, and of a teacher that was given, over the test split to
    test_logits.safetensors, two bytes each: what `unikd report` draws distributions and correlations of."""
    probe: bool = True
    """At every evaluation, τ² KL from the teacher to the student at τ = 4 on the validation split (probe_kl), which
    compares methods whose own losses do not. The teacher sees the split once; where its outputs are cached, there is no
    teacher to ask, and no probe."""
    show_head: bool = False
    """Print the figures of the method's head (head_accuracy, head_mean_std, head_variance) at every evaluation as well;
    they are in metrics.jsonl in any case."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""


class CompareConfig(Section):
    """Several runs in one folder, over several seeds, with one table at the end."""

    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    """Seeds; every run, the teacher's training included, is made once per seed."""
    runs: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Label in the table -> settings of that run, {"distill.method": "kd", ...}."""


class Config(Section):
    """One experiment."""

    json_schema: Text | None = Field(default=None, alias="$schema")
    """Path of the exported JSON schema, for editors."""
    run: RunConfig = RunConfig()
    """Where the run writes and how often."""
    data: DataSettings
    """The data set and how it is read."""
    teacher: TeacherConfig | None = None
    """The frozen network the student learns from; not needed for distill.method = none."""
    student: StudentConfig
    """The network that is trained."""
    distill: DistillConfig = DistillConfig()
    """The distillation method."""
    loss: LossConfig = LossConfig()
    """How the losses are computed."""
    train: TrainConfig
    """The optimisation of the student."""
    compare: CompareConfig | None = None
    """Several runs with one table; null: a single run."""
    deepspeed: dict[str, Any] = Field(default={})
    """Passed to DeepSpeed as it is. What this schema already states (batch size, precision, clipping, optimiser) may
    not be repeated here."""
