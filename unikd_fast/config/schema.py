"""The schema of a configuration file: one class per section, one docstring per field; unknown keys are errors."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, create_model, model_validator

from unikd_fast.data.settings import DataSettings
from unikd_fast.methods import METHODS
from unikd_fast.settings import Fraction, ImageSize, NonNegative, Positive, PositiveInt, Text


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class TeacherTraining(Section):
    """Train the teacher first, as the student would be trained alone."""

    total_epochs: PositiveInt | None = None
    """Number of epochs of the teacher's training. If null, train.total_epochs."""
    train_samples: PositiveInt | None = None
    """Number of samples of the class-balanced subset that the teacher is trained on. If null, the whole training split,
    whatever data.train_samples is."""
    learning_rate: Positive | None = None
    """Peak learning rate. If null, train.learning_rate."""
    global_batch_size: PositiveInt | None = None
    """Samples per optimiser step. If null, train.global_batch_size."""


class TeacherFidelity(Section):
    """Before training, the teacher as it runs is compared with the same weights in fp32, unfolded and eager."""

    batches: Annotated[int, Field(ge=0)] = 4
    """Number of training batches per process to compare on. 0 turns the comparison off."""
    min_agreement: Fraction = 0.995
    """Smallest share of images, or of regions of a detector, on which both must predict the same class; near ties count
    as agreement."""


class TeacherCache(Section):
    """The teacher's outputs, stored on disk for every view and read back instead of running the teacher."""

    mode: Literal["off", "read", "read_write"] = "off"
    """off; read: use a finished cache; read_write: all processes build what is missing before training."""
    dir: Text = "caches/{name}-{method}-seed{seed}"
    """Folder of one cache. {name} is the configuration file's name, {method} and {seed} are the run's: methods store
    different outputs, and seeds have different views."""
    views: PositiveInt | None = None
    """Number of views stored of each training sample. Epoch e trains on view e modulo views. If null, one per epoch, so
    that every epoch is the same as without a cache."""
    logits: Literal["fp16", "uint8", "top_k"] = "fp16"
    """How logits are stored. fp16: two bytes per class; uint8: one byte per class, scaled by sample; top_k: the top_k
    largest and the log-sum-exp, for temperature 1 only."""
    top_k: PositiveInt | None = None
    """Number of logits kept per sample, for logits = top_k."""
    batch_size: PositiveInt = 64
    """Batch size of the teacher while the cache is built or checked."""
    recheck: Fraction = 0.001
    """Share of the stored outputs, at least one batch, that the first process recomputes and compares before training.
    With 0, nothing is recomputed, and the teacher's weights are only read for their hash."""

    @model_validator(mode="after")
    def _top_k_counted(self) -> "TeacherCache":
        if (self.logits == "top_k") != (self.top_k is not None):
            raise ValueError(
                f"teacher.cache.logits = {self.logits!r} with teacher.cache.top_k = {self.top_k}: top_k is the number "
                "of logits kept by logits = 'top_k'; set both or neither"
            )
        return self


class TeacherMember(Section):
    """A further network of a teacher."""

    model: Text
    """Name of the network, as for the teacher."""
    model_args: dict[str, Any] = Field(default={})
    """Further arguments of the network's class or function; num_classes is given to it."""
    weights: Text
    """Weights, as for the teacher."""
    weights_key: Text | None = None
    """Key of the state dict in a weights file that holds several, as for the teacher."""
    image_size: PositiveInt | None = None
    """Height and width of the images that it sees, as for the teacher."""
    weight: Positive = 1.0
    """Weight of its logits in the mean."""


class TeacherConfig(Section):
    """The frozen network that the student learns from."""

    model: Text
    """torchvision/<name>, timm/<name>, cifar/<name>, hf/<name or folder> for Hugging Face, or <module>:<class> for your
    own, imported also from the current folder."""
    model_args: dict[str, Any] = Field(default={})
    """Further arguments of the network's class or function; num_classes is given to it."""
    weights: Text | None = None
    """File, "pretrained", torchvision or timm weight identifier, or "random" for an untrained teacher (smoke runs,
    benchmarks). If null, the teacher is trained from scratch as teacher.training says. Environment variables are
    written ${CIFAR100_TEACHERS}."""
    weights_key: Text | None = None
    """Key of the state dict in a weights file that holds several. If null, the moving average (state_dict_ema,
    model_ema) if there is one, otherwise the first of model, state_dict, model_state and student."""
    training: TeacherTraining | None = None
    """Settings of the teacher's own training, before the student's. Weights are fine-tuned, with a new classifier if
    they have other classes than the data. Required if weights is null, and not used if weights is random."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the teacher's weights and features. auto: on a GPU fp16, or bf16 if fp16 overflows on training
    images; on a CPU bf16 if it has bf16 units, otherwise fp32; and fp32 if the check of teacher.fidelity fails."""
    fold_batch_norm: bool = True
    """Fold BatchNorm into the preceding convolutions, in fp32, wherever that is exact."""
    compile: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    """Mode of torch.compile for the teacher. If null, it runs eagerly. Needs a compiler: Triton on a GPU, C++ on a CPU.
    With method blockwise only the teacher's own pass is compiled; its blocks inside the stepping stones run eagerly."""
    fidelity: TeacherFidelity = TeacherFidelity()
    """Comparison of the teacher with itself in fp32, before training."""
    min_accuracy: Fraction | None = None
    """Smallest validation accuracy (0 to 1) of the teacher; below it the run is refused. If null, twice chance level, 2
    / (K + 1) for K classes, with an allowance for few images. 0 accepts any teacher. A teacher with weights = random is
    not checked. Of a detector it is the smallest AP, and null accepts any."""
    cache: TeacherCache = TeacherCache()
    """The teacher's outputs, stored on disk."""
    image_size: ImageSize | None = None
    """Height and width of the images that the teacher sees: those of the loader, resized on the device by antialiased
    bilinear interpolation. At most data.image_size, which is what null stands for."""
    feature_nodes: tuple[Text, ...] | None = None
    """Modules whose outputs are the feature levels, from fine to coarse. If null, the ends of the stages. For a
    detector, maps of its pyramid, "0" of stride 4 to "3" of stride 32 and, for methods that compare maps, "pool" of
    stride 64; if null, all."""
    ensemble: tuple[TeacherMember, ...] = ()
    """Further networks, each with model and weights and, if needed, model_args, weights_key, image_size and weight: the
    logits are the mean of all of them by their weights (1 where not set); features are those of the first network,
    teacher.model."""
    weight: Positive = 1.0
    """Weight of the logits of the first network in that mean."""

    @property
    def networks(self) -> "tuple[TeacherConfig | TeacherMember, ...]":
        """Return the settings of all its networks."""
        return (self, *self.ensemble)

    @property
    def label(self) -> str:
        """Return the names of all its networks."""
        return " + ".join(network.model for network in self.networks)

    @property
    def all_weights(self) -> str:
        """Return the weights of all its networks."""
        return ", ".join(network.weights or "trained first" for network in self.networks)

    @property
    def is_trained(self) -> bool:
        """Return whether the teacher is trained or fine-tuned before the student."""
        return self.training is not None and self.weights != "random"

    @model_validator(mode="after")
    def _key_of_a_file(self) -> "TeacherConfig":
        _require_weights("teacher", self.weights, self.weights_key)
        for number, member in enumerate(self.ensemble):
            _require_weights(f"teacher.ensemble[{number}]", member.weights, member.weights_key)
        return self

    @model_validator(mode="after")
    def _trained_before(self) -> "TeacherConfig":
        if self.ensemble and (self.is_trained or self.weights is None):
            raise ValueError(
                f"teacher.ensemble names {len(self.ensemble)} networks with teacher.weights = {self.weights!r} and "
                "teacher.training: networks that teach together are trained before; train each in a run of its own "
                "(distill.method = 'none') and give its student.safetensors as weights, without teacher.training"
            )
        if self.weight != 1 and not self.ensemble:
            raise ValueError(
                f"teacher.weight = {self.weight} without teacher.ensemble: it is the weight among several networks; "
                "name the others, or remove it"
            )
        return self


class StudentConfig(Section):
    """The network that is trained."""

    model: Text
    """torchvision/<name>, timm/<name>, cifar/<name>, hf/<name or folder> for Hugging Face, or <module>:<class> for your
    own, imported also from the current folder."""
    model_args: dict[str, Any] = Field(default={})
    """Further arguments of the network's class or function; num_classes is given to it."""
    weights: Text | None = None
    """Initial weights: a file, "pretrained" or an identifier; the classifier is a new one if they have other classes
    than the data. If null, random."""
    weights_key: Text | None = None
    """Key of the state dict in a weights file that holds several, as for the teacher."""
    image_size: ImageSize | None = None
    """Height and width of the images that the student sees: those of the loader, resized on the device by antialiased
    bilinear interpolation. At most data.image_size, which is what null stands for."""
    feature_nodes: tuple[Text, ...] | None = None
    """Modules whose outputs are the feature levels, from fine to coarse. If null, the ends of the stages. For a
    detector, maps of its pyramid, "0" of stride 4 to "3" of stride 32 and, for methods that compare maps, "pool" of
    stride 64; if null, all."""

    @model_validator(mode="after")
    def _key_of_a_file(self) -> "StudentConfig":
        _require_weights("student", self.weights, self.weights_key)
        return self


def _require_weights(role: str, weights: str | None, key: str | None) -> None:
    if key is not None and weights in (None, "random"):
        raise ValueError(
            f"{role}.weights_key = {key!r} with {role}.weights = {weights!r}: it is a key of a weights file; "
            f"set {role}.weights to the file, or remove the key"
        )


OWN_GRAPHS = ("reduce-overhead", "max-autotune")
"""Modes in which torch.compile captures CUDA graphs itself."""


class LossConfig(Section):
    """How the losses are computed."""

    impl: Literal["auto", "reference", "fused"] = "auto"
    """auto: fused kernels on a GPU, otherwise the PyTorch reference; fused: an error if it cannot run."""
    label_smoothing: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Label smoothing of the cross-entropy."""


class TrainConfig(Section):
    """The optimisation of the student."""

    total_epochs: PositiveInt
    """Number of passes over the training split."""
    max_steps: PositiveInt | None = None
    """Maximum number of optimiser steps; the schedule then ends there as well. If null, total_epochs decides."""
    global_batch_size: PositiveInt
    """Samples per optimiser step, over all processes and accumulation steps."""
    accumulation_steps: PositiveInt = 1
    """Micro-batches per optimiser step."""
    optimizer: Literal["sgd", "adamw", "fused_adamw", "cpu_adamw"] = "sgd"
    """sgd (with momentum) or adamw of torch; fused_adamw: DeepSpeed's, in one kernel; cpu_adamw: DeepSpeed's for
    optimiser states offloaded to the CPU. DeepSpeed's are compiled on first use."""
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
    """Epochs at which the step schedule lowers the learning rate."""
    milestone_steps: tuple[PositiveInt, ...] = ()
    """Optimiser steps at which the step schedule lowers the learning rate, in place of milestones."""
    gamma: Positive = 0.1
    """Factor applied at each milestone."""
    warmup_epochs: NonNegative = 0.0
    """Epochs of linear warm-up from zero."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimiser steps of linear warm-up from zero, in place of warmup_epochs."""
    clip_grad_norm: NonNegative = 0.0
    """Maximum norm of the gradient. 0 turns clipping off."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """bf16, fp16: autocast of the student's forward and backward pass; parameters and losses stay fp32. fp16 scales the
    loss and skips steps whose gradients overflow."""
    nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is inf or NaN. stop: the run ends and says where it happened; skip: the step is skipped
    and counted, at most ten in a row. Without ZeRO, skip makes the host wait for the device in every step."""
    activation_checkpointing: bool = False
    """Keep only the inputs of the student's blocks, and recompute the rest in the backward pass: less memory, a third
    more work."""
    compile: Literal["default", "reduce-overhead", "max-autotune"] | None = None
    """torch.compile mode of the student. If null, it runs eagerly. reduce-overhead and max-autotune replay CUDA graphs,
    which does not work with accumulation_steps above 1."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay of an exponential moving average of the student, which is then evaluated and exported. If null, off."""
    channels_last: bool = False
    """NHWC memory format, if it is safe (DeepSpeed ZeRO stage 0)."""
    cuda_graph: Literal["auto", "on", "off"] = "auto"
    """Capture the whole step in a CUDA graph and replay it: small networks are limited by launching kernels one by one.
    auto: if possible (one GPU, data in its memory, no ZeRO); on a GPU the log says whether and why not; on: an error if
    it is not possible."""

    @model_validator(mode="after")
    def _divisible(self) -> "TrainConfig":
        if self.global_batch_size % self.accumulation_steps:
            raise ValueError(
                f"train.global_batch_size ({self.global_batch_size}) must be divisible by train.accumulation_steps "
                f"({self.accumulation_steps})"
            )
        return self

    @model_validator(mode="after")
    def _counted_once(self) -> "TrainConfig":
        for in_epochs, in_steps in (("milestones", "milestone_steps"), ("warmup_epochs", "warmup_steps")):
            values = [getattr(self, name) for name in (in_epochs, in_steps)]
            if all(values):
                epochs, steps = (list(value) if isinstance(value, tuple) else value for value in values)
                raise ValueError(
                    f"train.{in_epochs} = {epochs} with train.{in_steps} = {steps}: they say the same in epochs and in "
                    "steps; remove one of them"
                )
        return self

    @model_validator(mode="after")
    def _keeps_outputs(self) -> "TrainConfig":
        if self.compile in OWN_GRAPHS and self.accumulation_steps > 1:
            raise ValueError(
                f"train.compile = {self.compile!r} replays CUDA graphs, in which a micro-batch overwrites the output "
                f"of the previous one, and train.accumulation_steps = {self.accumulation_steps}; set train.compile to "
                "'default'"
            )
        return self


if TYPE_CHECKING:
    MethodName = str
else:
    MethodName = Literal[*METHODS]


def _a_sum(names: tuple[str, ...]) -> tuple[str, ...]:
    if len(set(names)) < max(2, len(names)) or "none" in names:
        raise ValueError(
            f"distill.method = {list(names)}: a list names at least two methods, each once and not 'none'; "
            "a single method is given by its name"
        )
    return names


# Distinguished by type, so that an error is about the one that was meant.
OneMethod = Annotated[MethodName, Tag("one method")]
SeveralMethods = Annotated[tuple[MethodName, ...], AfterValidator(_a_sum), Tag("several methods")]
MethodField = Annotated[
    OneMethod | SeveralMethods,
    Discriminator(lambda value: "several methods" if isinstance(value, list | tuple) else "one method"),
]

METHOD_SECTIONS = tuple(name for name in METHODS if name != "none")
"""Methods with settings, in the section of ``distill`` with their name."""


class MethodChoice(Section):
    """The distillation method. Its settings are in the section with its name; a section for a method that the run does
    not use is an error."""

    method: MethodField = "unikd"
    """unikd: Eq. 7; kd: cross-entropy and softened KL; none: the student alone; for the others see docs/methods.md. A
    list of methods is their sum, with the cross-entropy counted once."""
    max_levels: PositiveInt = 4
    """Maximum number of feature levels, counted from the coarsest, for methods that use levels."""

    @property
    def methods(self) -> tuple[str, ...]:
        """Return the method, or those of the list."""
        return method_names(self.method)

    @property
    def label(self) -> str:
        """Return the method in a word: "kd", "kd+crd"."""
        return "+".join(self.methods)

    @property
    def settings(self) -> dict[str, Any]:
        """Return the settings of each method by its name; the defaults if it has no section."""
        return {name: getattr(self, name, None) or METHODS[name].settings_class() for name in self.methods}

    def unused_sections(self, methods: Iterable[str]) -> list[str]:
        """Return the methods that have a section but are not among these."""
        used = tuple(methods)  # what a file gives need not be hashable yet
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
                Field(default=None, description=f"Settings of method {name}. If null, its defaults."),
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
    same experiment always has the same folder, and no other experiment does."""
    nodes: PositiveInt | None = None
    """Number of nodes that the run must be started on. If null, any number."""
    timeout_minutes: Annotated[float, Field(gt=0.0, le=525_600.0)] = 10.0
    """How long processes wait for each other before giving up: longer than the slowest work of a single process, such
    as writing a checkpoint of a large student to a slow disk."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the weights, the order of the samples and the augmentation."""
    log_every_steps: PositiveInt = 50
    """Steps between two lines of metrics; the host reads from the device only at these steps."""
    checkpoint_every_steps: PositiveInt | None = None
    """Steps between two checkpoints, in addition to the one before every evaluation. If null, there are no others."""
    keep_checkpoints: PositiveInt = 2
    """Number of latest checkpoints that are kept, besides the student of the best evaluation."""
    async_checkpoints: bool = True
    """Write checkpoints in a thread while training continues; an error is then raised at the next one."""
    evaluate_every_epochs: PositiveInt = 1
    """Epochs between two evaluations on the validation split; the last epoch is always evaluated."""
    test_logits: bool = True
    """Write the logits of the final student, and of a given teacher, over the test split to test_logits.safetensors,
    two bytes each; `unikd report` draws distributions and correlations from them. Of detectors, detections.json and
    detections.png."""
    probe: bool = True
    """Compute τ² KL from the teacher to the student at τ = 4 on the validation split (probe_kl) at every evaluation, to
    compare methods whose own losses are not comparable. The teacher sees the split once; if its outputs are cached,
    there is no teacher to run, and no probe. Detectors have none."""
    show_head: bool = False
    """Also print the metrics of the method's head (head_accuracy, head_mean_std, head_variance) at every evaluation;
    they are always in metrics.jsonl."""
    trackers: tuple[Literal["tensorboard", "wandb", "mlflow"], ...] = ("tensorboard",)
    """Programs that show the course of runs beside metrics.jsonl: tensorboard, wandb, mlflow; see docs/training.md."""


class CompareConfig(Section):
    """Several runs in one folder, over several seeds, with one table at the end."""

    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    """Seeds; every run, including the teacher's training, is made once per seed."""
    runs: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Settings of each run by its label in the table: {"student + KD": {"distill.method": "kd"}, ...}."""


class Config(Section):
    """One experiment."""

    json_schema: Text | None = Field(default=None, alias="$schema")
    """Path of configs/schema.json, for editors; not read."""
    run: RunConfig = RunConfig()
    """Where the run writes, and how often."""
    data: DataSettings
    """The data set and how it is read."""
    teacher: TeacherConfig | None = None
    """The frozen network that the student learns from. May be null if distill.method = none."""
    student: StudentConfig
    """The network that is trained."""
    distill: DistillConfig = DistillConfig()
    """The distillation method."""
    loss: LossConfig = LossConfig()
    """How the losses are computed."""
    train: TrainConfig
    """The optimisation of the student."""
    compare: CompareConfig | None = None
    """Several runs with one table. If null, a single run."""
    deepspeed: dict[str, Any] = Field(default={})
    """Passed to DeepSpeed unchanged. What this schema already states (batch size, precision, clipping, optimiser) may
    not be repeated here."""

    @model_validator(mode="after")
    def _large_enough(self) -> "Config":
        shown = self.data.image_size
        further = () if self.teacher is None else self.teacher.ensemble
        members = [(f"teacher.ensemble[{number}]", member) for number, member in enumerate(further)]
        for role, section in (("teacher", self.teacher), ("student", self.student), *members):
            if section is not None and section.image_size is not None and section.image_size > shown:
                raise ValueError(
                    f"{role}.image_size = {section.image_size} is above data.image_size = {shown}: the loader's images "
                    f"are only made smaller; set data.image_size to {section.image_size} or more"
                )
        return self
