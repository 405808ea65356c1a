"""The schema of a configuration file. One class a section, one docstring a field; unknown keys are errors.

Fields that the UniKD paper leaves open carry our default and are listed in the README ("What the paper leaves open").
"""

from typing import Annotated, Any

from pydantic import Field

from unikd_fast.config.data import AugmentationConfig, DataConfig, MixingConfig
from unikd_fast.config.distill import DistillConfig
from unikd_fast.config.networks import StudentConfig, TeacherCache, TeacherConfig, TeacherFidelity, TeacherTraining
from unikd_fast.config.section import Positive, PositiveInt, Section, Text
from unikd_fast.config.training import LossConfig, TrainConfig

# Every section is to be had here, wherever it stands.
__all__ = [
    "AugmentationConfig",
    "CompareConfig",
    "Config",
    "DataConfig",
    "DistillConfig",
    "LossConfig",
    "MixingConfig",
    "RunConfig",
    "StudentConfig",
    "TeacherCache",
    "TeacherConfig",
    "TeacherFidelity",
    "TeacherTraining",
    "TrainConfig",
]


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
    test_logits.safetensors, two bytes each: what unikd-report draws distributions and correlations of."""
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
    deepspeed: dict[str, Any] = Field(default={})
    """Passed to DeepSpeed as it is. What this schema already states (batch size, precision, clipping, optimiser) may
    not be repeated here."""
