"""Drop-in for the loss inside timm's `LogitDistillationTask` (timm.task.distillation), and for the task's `forward`.

timm writes the loss into the method, so `patch("timm")` replaces the method: only the divergence is computed elsewhere.
"""

from typing import Any

import torch
from torch import Tensor

from unikd_fast.compat._kl_div import kl_div


def logit_distillation_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Return the `kd_loss` of timm's `LogitDistillationTask`.

        L = τ² / N Σ p ( ln p - ln q ),    p = softmax(z_t / τ),  q = softmax(z_s / τ)

    It computes in fp32 and returns it, where timm keeps the dtype of the logits outside of autocast.

    Args:
        student_logits: z_s (N, ..., K), divided by N alone.
        teacher_logits: z_t, the same shape.
        temperature: τ > 0.

    Raises:
        ValueError: what `softmax_kl` refuses.
    """
    return kl_div(student_logits, teacher_logits, temperature=temperature)


def logit_distillation_forward(self: Any, input: Tensor, target: Tensor) -> dict[str, Tensor]:
    """Return what `LogitDistillationTask.forward` gives: loss = w_task task_loss + w_distill kd_loss, and its parts.

    Args:
        self: the task: student (`trainable_module`), `teacher`, `criterion`, `temperature`, and the two weights.
        input: images (N, C, H, W), normalised for the student.
        target: labels (N,).

    Returns:
        "loss", "output" (the student's logits), "task_loss" and "kd_loss".
    """
    student_logits = self.trainable_module(input)
    task_loss = self.criterion(student_logits, target)
    with torch.no_grad():
        for_teacher = self.teacher.normalize_input(input, self.student_mean, self.student_std)
        teacher_logits = self.teacher(for_teacher.detach(), return_features=False)
    kd_loss = logit_distillation_loss(student_logits, teacher_logits, self.temperature)
    loss = self.task_loss_weight * task_loss + self.distill_loss_weight * kd_loss
    return {"loss": loss, "output": student_logits, "task_loss": task_loss, "kd_loss": kd_loss}
