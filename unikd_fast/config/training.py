"""The sections of the training: losses and optimisation."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from unikd_fast.config.section import NonNegative, Positive, PositiveInt, Section

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
