"""One step of distillation. Read this first: everything else in the engine feeds it."""

from typing import Any

import torch
from torch import nn

from unikd_fast.engine.gradient_watch import GradientWatch
from unikd_fast.engine.out_of_memory import naming_part
from unikd_fast.engine.step_time import UNTIMED, StepClock
from unikd_fast.methods import Method
from unikd_fast.values import Batch, Loss, Target


def train_step(
    engine: Any,
    teacher: nn.Module | None,
    method: Method,
    batch: Batch,
    target: Target | None = None,
    *,
    update: bool,
    watch: GradientWatch | None = None,
    clock: StepClock = UNTIMED,
) -> Loss:
    """Forward, loss and backward of one micro-batch; with ``update`` the parameters are stepped.

    A function of tensors of fixed shape on the device: no host read, no data-dependent branch.

    Args:
        engine: the DeepSpeed engine around the StudentSide, or a LocalEngine.
        teacher: maps images to Features without gradients, or None for methods without a teacher.
        method: what to distil.
        batch: this process's micro-batch.
        target: the teacher's side of this batch where it is known already; then the teacher is not asked.
        update: True on the last micro-batch of an optimiser step.
        watch: looks at the gradients before that; None: nobody does.
        clock: is told when a part is done.
    """
    if target is None and teacher is not None:
        with naming_part("teacher"):
            with torch.no_grad():
                features = teacher(batch.images)
                second = None if batch.second is None else teacher(batch.second)
            target = method.target(features, second)
    clock.mark("teacher")
    with naming_part("student"):
        student = engine(batch.images) if batch.second is None else engine(batch.images, batch.second)
        clock.mark("student_forward")
        loss = method.loss(student, target, batch)
        clock.mark("loss")
        scale = None if watch is None else watch.scale
        engine.backward(loss.total if scale is None else scale.scaled(loss.total))
    clock.mark("backward")
    with naming_part("optimiser"):
        if update and watch is not None:
            watch.before_update()
        engine.step()  # DeepSpeed steps the optimiser on the last micro-batch only
    left_out = update and watch is not None and watch.after_update()
    method.train_head(loss, accumulation_steps=engine.gradient_accumulation_steps(), update=update, leave_out=left_out)
    clock.mark("optimiser")
    return loss
