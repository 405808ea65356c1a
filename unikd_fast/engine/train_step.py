"""One step of distillation. Read this first: everything else in the engine feeds it."""

from typing import Any

import torch
from torch import nn

from unikd_fast.losses import LossTerms
from unikd_fast.methods import Method
from unikd_fast.values import Batch, Target


def train_step(
    engine: Any,
    teacher: nn.Module | None,
    method: Method,
    batch: Batch,
    target: Target | None = None,
    *,
    update: bool,
) -> LossTerms:
    """Forward, loss and backward of one micro-batch; with ``update`` the parameters are stepped.

    A function of tensors of fixed shape on the device: no host read, no data-dependent branch.

    Args:
        engine: the DeepSpeed engine around the StudentSide.
        teacher: maps images to Features without gradients, or None for methods without a teacher.
        method: what to distil.
        batch: this process's micro-batch.
        target: the teacher's side of this batch where it is known already; then the teacher is not asked.
        update: True on the last micro-batch of an optimiser step.
    """
    if target is None and teacher is not None:
        with torch.no_grad():
            features = teacher(batch.images)
        target = method.target(features)
    student = engine(batch.images)
    terms = method.loss(student, target, batch.labels)
    engine.backward(terms.total)
    method.train_head(terms, accumulation_steps=engine.gradient_accumulation_steps(), update=update)
    engine.step()  # DeepSpeed steps the optimiser on the last micro-batch only
    return terms
