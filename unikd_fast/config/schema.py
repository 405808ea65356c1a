"""The schema of a configuration file. One class a section, one docstring a field; unknown keys are errors.

Fields that the UniKD paper leaves open carry our default and are listed in the README ("What the paper leaves open").
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

PositiveInt = Annotated[int, Field(ge=1)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
Positive = Annotated[float, Field(gt=0.0)]
HueShift = Annotated[float, Field(ge=0.0, le=0.5)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


class RunConfig(Section):
    """Where a run writes and how often."""

    dir: str = "runs/{name}-{hash}"
    """Run folder. {name} is the configuration file's name, {hash} a digest of the resolved configuration, so that the
    same experiment always meets its own folder and another one never does."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the weights, the order of the samples and the augmentation."""
    log_every_steps: PositiveInt = 50
    """Steps between two lines of metrics; also the only steps at which the host reads from the device."""
    checkpoint_every_steps: PositiveInt | None = None
    """Steps between two checkpoints, besides the one before every evaluation."""
    evaluate_every_epochs: PositiveInt = 1
    """Epochs between two evaluations on the validation split; the last epoch is always evaluated."""
    tensorboard: bool = True
    """Write TensorBoard events beside metrics.jsonl."""


class AugmentationConfig(Section):
    """How a training view is made of an image. null fields take the data set's usual recipe."""

    crop: Literal["none", "pad", "resized"] | None = None
    """none; pad: zero padding and a random crop back to size; resized: a random area and aspect ratio, resized."""
    padding: Annotated[int, Field(ge=0)] | None = None
    """Pixels of zero padding on each side for crop = pad."""
    scale: tuple[Positive, Positive] = (0.08, 1.0)
    """Range of the crop's share of the image's area for crop = resized."""
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Range of the crop's width over height for crop = resized."""
    flip_probability: Fraction | None = None
    """Probability of a horizontal flip."""
    eval_resize: PositiveInt | None = None
    """Short side in pixels before the centre crop of an evaluation image; null: image_size * 8 / 7."""
    jitter: tuple[NonNegative, NonNegative, NonNegative, HueShift] = (0.0, 0.0, 0.0, 0.0)
    """Strengths of random brightness, contrast, saturation and hue, as torchvision's ColorJitter has them; 0: off."""
    policy: Literal["none", "trivial", "rand"] = "none"
    """Strong augmentation after crop and flip. trivial: one operation of any magnitude, torchvision's
    TrivialAugmentWide; rand: rand_ops operations of rand_magnitude, its RandAugment."""
    rand_ops: Annotated[int, Field(ge=1, le=16)] = 2
    """Operations of policy = rand, one after the other."""
    rand_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Magnitude of policy = rand, from 0 to 30."""
    erase_probability: Fraction = 0.0
    """Probability of erasing a rectangle to black."""
    erase_scale: tuple[Positive, Positive] = (0.02, 0.33)
    """Range of the erased share of the view's area."""
    erase_ratio: tuple[Positive, Positive] = (0.3, 3.3)
    """Range of the erased rectangle's height over its width."""


class MixingConfig(Section):
    """Training samples mixed in pairs within a micro-batch, and their labels likewise. The teacher sees them mixed too;
    evaluation never does."""

    mixup_alpha: NonNegative = 0.0
    """Mixup with shares drawn from Beta(alpha, alpha); 0: off."""
    cutmix_alpha: NonNegative = 0.0
    """CutMix with shares drawn from Beta(alpha, alpha); 0: off."""
    probability: Fraction = 1.0
    """Probability that a micro-batch is mixed."""
    switch_probability: Fraction = 0.5
    """Probability that it is by CutMix, where both are on."""


class DataConfig(Section):
    """The data set and how it is read."""

    name: Literal["digits", "cifar100", "image_folder", "imagenet", "packed", "webdataset", "synthetic"]
    """digits ships with scikit-learn; cifar100, image folders, packed stores (unikd-data pack) and the tar files of
    webdataset are read from root; synthetic is generated."""
    root: str | None = None
    """Folder of the data set; environment variables are written ${IMAGENET_ROOT}."""
    loader: Literal["auto", "device", "dali", "torchvision"] = "auto"
    """device: tensors that live on the device, augmented by gathers; dali: files decoded by NVIDIA DALI, on the GPU if
    there is one; torchvision: files decoded by PIL in worker processes; auto: device for data held in memory, for files
    dali where it works and else torchvision."""
    image_size: PositiveInt = 224
    """Height and width in pixels of the images that the networks see."""
    num_classes: PositiveInt | None = None
    """Number of classes of synthetic data and webdataset; checked against what is found on disk for the others."""
    train_samples: PositiveInt | None = None
    """Use a class-balanced subset of this many training samples; null: all."""
    val_samples: Annotated[int, Field(ge=0)] = 0
    """Held out of cifar100's training split for validation; 0: validate on the test split, as the literature does."""
    synthetic_samples: PositiveInt = 256
    """Training images of synthetic data."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the few-sample subset and of synthetic images; fixed while run.seed changes, so all runs see one set."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Decoding processes per training process of the torchvision loader."""
    dali_threads: PositiveInt = 2
    """Decoding threads per training process of the dali loader; as many read files and, without a GPU, resize."""
    dali_prefetch: PositiveInt = 2
    """Micro-batches that the dali loader decodes at a time, ahead of training."""
    bad_images: Literal["error", "skip"] = "error"
    """Files that cannot be decoded. error: the run ends and names the file; skip: it is logged, in training the next
    good sample of its micro-batch takes its place, and evaluation goes without it."""
    max_bad_share: Fraction = 0.001
    """Largest share of the samples of an epoch, or of an evaluated split, that bad_images = skip may skip."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """How a training view is cut from an image."""
    mixing: MixingConfig = MixingConfig()
    """Mixup and CutMix."""


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
    dir: str = "caches/{name}-{method}-seed{seed}"
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

    model: str
    """torchvision/<name>, timm/<name> or cifar/<name>."""
    weights: str | None = None
    """A file, a torchvision or timm weight identifier, or "random" to allow a teacher that knows nothing (smoke runs,
    benchmarks). null needs teacher.training."""
    training: TeacherTraining | None = None
    """Train the teacher in this run before the student, when weights is null."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the teacher's weights and features. auto: on a GPU fp16, or bf16 where fp16 overflows on training
    images; on a CPU bf16 if it has bf16 units, otherwise fp32."""
    fold_batch_norm: bool = True
    """Fold BatchNorm into the convolutions before it, in fp32, wherever that is exact."""
    compile: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] | None = None
    """Mode of torch.compile for the teacher; null: eager. Needs a compiler: Triton on a GPU, C++ on a CPU."""
    fidelity: TeacherFidelity = TeacherFidelity()
    """Comparison of the teacher with itself in fp32, before training."""
    cache: TeacherCache = TeacherCache()
    """The teacher's outputs, stored on disk."""
    feature_nodes: tuple[str, ...] | None = None
    """Modules whose outputs are the feature levels, fine to coarse; null: the end of each stage."""


class StudentConfig(Section):
    """The network that is trained."""

    model: str
    """torchvision/<name>, timm/<name> or cifar/<name>."""
    weights: str | None = None
    """Weights to start from: a file or an identifier; null: random."""
    feature_nodes: tuple[str, ...] | None = None
    """Modules whose outputs are the feature levels, fine to coarse; null: the end of each stage."""


class DistillConfig(Section):
    """The distillation method and what the paper leaves open about it."""

    method: Literal["unikd", "kd", "none"] = "unikd"
    """unikd: Eq. 7; kd: cross-entropy and softened KL; none: the student alone."""
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
    """How AFF is pooled, with the same result; auto: collapsed where that is exact (spatial gates, no batch norm in
    training mode); collapsed raises where it is not; stagewise forms the maps."""
    fusion_impl: Literal["auto", "reference", "fused"] = "auto"
    """auto: AFF's kernels on a GPU, plain PyTorch otherwise; fused raises where they cannot run."""
    gate: Literal["spatial", "channel"] = "spatial"
    """One gate map for all channels, or one per channel."""
    upsample: Literal["nearest", "bilinear"] = "nearest"
    """Upsampling of the coarser level."""
    norm: Literal["batch"] | None = None
    """Normalisation after the 1x1 expanders."""
    fdp_norm: Literal["layer", "none"] = "layer"
    """Normalisation of the pooled vector before FDP."""
    variance_floor: Positive = 0.1
    """Lower bound of FDP's variances."""
    max_levels: PositiveInt = 4
    """Feature levels used at most, counted from the coarsest."""


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
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """sgd (momentum) or adamw."""
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
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the student's forward and backward; parameters and losses stay fp32."""
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Evaluate and export an exponential moving average of the student; null: off."""
    channels_last: bool = False
    """NHWC memory format, where it is safe (DeepSpeed ZeRO stage 0)."""

    @model_validator(mode="after")
    def _divisible(self) -> "TrainConfig":
        if self.global_batch_size % self.accumulation_steps:
            raise ValueError(
                f"train.global_batch_size ({self.global_batch_size}) must be divisible by train.accumulation_steps "
                f"({self.accumulation_steps})"
            )
        return self


class CompareConfig(Section):
    """Several runs in one folder, over several seeds, with one table at the end."""

    seeds: Annotated[tuple[int, ...], Field(min_length=1)]
    """Seeds; every run, the teacher's training included, is made once per seed."""
    runs: Annotated[dict[str, dict[str, Any]], Field(min_length=1)]
    """Label in the table -> settings of that run, {"distill.method": "kd", ...}."""


class Config(Section):
    """One experiment."""

    json_schema: str | None = Field(default=None, alias="$schema")
    """Path of the exported JSON schema, for editors."""
    run: RunConfig = RunConfig()
    """Where the run writes and how often."""
    data: DataConfig
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
    deepspeed: dict[str, Any] = {}
    """Passed to DeepSpeed as it is. What this schema already states (batch size, precision, clipping, optimiser) may
    not be repeated here."""
