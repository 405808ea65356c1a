"""Drop-in for the loss of torchdistill: `KDLoss` of torchdistill.losses.mid_level.

This module needs torch alone. To name the class in a YAML file, import `unikd_fast.compat.torchdistill_register` there.
"""

from typing import Any

from torch import Tensor, nn

from unikd_fast.compat._kl_div import kl_div

OutputsOfModules = dict[str, dict[str, Tensor]]


class KDLoss(nn.KLDivLoss):
    """torchdistill's `KDLoss`: α cross-entropy + β τ² divergence.

        L = α CE(z_s, y) + β τ² KL( softmax_1(z_t / τ) || softmax_1(z_s / τ) ),    β = 1 - α unless given

    Where alpha is None or 0, or there are no targets, it is the divergence alone, without τ² and β, as in torchdistill.
    The divergence is computed in fp32 and returned so, where torchdistill keeps the dtype of the logits; nothing is
    detached. torchdistill 1.1.5 raises TypeError for alpha=None without beta; here that is the divergence alone, too.

    Args:
        student_module_path, student_module_io: where the student's logits (N, K, ...) are.
        teacher_module_path, teacher_module_io: where the teacher's are.
        temperature: τ > 0.
        alpha: α.
        beta: β.
        reduction: reduction of both terms, as in `torch.nn.KLDivLoss` and `torch.nn.CrossEntropyLoss`; "batchmean"
            divides by N alone, and is "mean" for the cross-entropy. "none" gives the terms of the sum, in plain
            PyTorch.
        kwargs: for `torch.nn.CrossEntropyLoss`.

    Raises:
        ValueError: at the call, what `softmax_kl` refuses.
    """

    def __init__(
        self,
        student_module_path: str,
        student_module_io: str,
        teacher_module_path: str,
        teacher_module_io: str,
        temperature: float,
        alpha: float | None = None,
        beta: float | None = None,
        reduction: str = "batchmean",
        **kwargs: Any,
    ) -> None:
        super().__init__(reduction=reduction)
        self.student_module_path = student_module_path
        self.student_module_io = student_module_io
        self.teacher_module_path = teacher_module_path
        self.teacher_module_io = teacher_module_io
        self.temperature = temperature
        self.alpha = alpha
        self.beta = 1 - (alpha or 0) if beta is None else beta
        self.cross_entropy_loss = nn.CrossEntropyLoss(
            reduction="mean" if reduction == "batchmean" else reduction, **kwargs
        )

    def forward(  # type: ignore[override]
        self,
        student_io_dict: OutputsOfModules,
        teacher_io_dict: OutputsOfModules,
        targets: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Return the loss.

        Args:
            student_io_dict: inputs and outputs of the student's modules, by path and then by "input" or "output".
            teacher_io_dict: those of the teacher's.
            targets: (N, ...) labels.
            args, kwargs: not used.
        """
        student_logits = student_io_dict[self.student_module_path][self.student_module_io]
        teacher_logits = teacher_io_dict[self.teacher_module_path][self.teacher_module_io]
        soft_loss = kl_div(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            reduction=self.reduction,
            dim=1,
            scale_by_t2=bool(self.alpha) and targets is not None,
        )
        if not self.alpha or targets is None:
            return soft_loss
        return self.alpha * self.cross_entropy_loss(student_logits, targets) + self.beta * soft_loss
