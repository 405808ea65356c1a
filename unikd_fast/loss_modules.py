"""The losses of `unikd_fast.losses` as modules: settings fixed and checked once, tensors at each call."""

from torch import Tensor, nn

from unikd_fast.kernels._checks import (
    check_feature_reduction,
    check_label_smoothing,
    check_reduction,
    check_temperature,
    choose_impl,
)
from unikd_fast.losses import LossTerms, gaussian_kl, softmax_kl, unikd_loss
from unikd_fast.values import Gaussian


class SoftmaxKL(nn.Module):
    """`softmax_kl` with its settings fixed.

    Example:
        >>> SoftmaxKL(temperature=4.0)(torch.randn(8, 10), torch.randn(8, 10)).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        scale_by_t2: bool = True,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_temperature("SoftmaxKL", temperature)
        check_reduction("SoftmaxKL", reduction)
        choose_impl("SoftmaxKL", impl)
        self.temperature = temperature
        self.reduction = reduction
        self.scale_by_t2 = scale_by_t2
        self.impl = impl

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, ignore_mask: Tensor | None = None) -> Tensor:
        """Give L_L for logits (..., K)."""
        return softmax_kl(
            student_logits,
            teacher_logits,
            temperature=self.temperature,
            reduction=self.reduction,
            scale_by_t2=self.scale_by_t2,
            ignore_mask=ignore_mask,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, impl={self.impl!r}"


class GaussianKL(nn.Module):
    """`gaussian_kl` with its settings fixed.

    Example:
        >>> mean, log_var = torch.randn(8, 10), torch.zeros(8, 10)
        >>> GaussianKL()(mean, log_var, mean, log_var)
        tensor(0.)
    """

    def __init__(self, *, reduction: str = "batchmean", feature_reduction: str = "mean", impl: str = "auto") -> None:
        super().__init__()
        check_reduction("GaussianKL", reduction)
        check_feature_reduction("GaussianKL", feature_reduction)
        choose_impl("GaussianKL", impl)
        self.reduction = reduction
        self.feature_reduction = feature_reduction
        self.impl = impl

    def forward(
        self, student_mean: Tensor, student_log_var: Tensor, teacher_mean: Tensor, teacher_log_var: Tensor
    ) -> Tensor:
        """Give L_FL for parameters (..., K)."""
        return gaussian_kl(
            student_mean,
            student_log_var,
            teacher_mean,
            teacher_log_var,
            reduction=self.reduction,
            feature_reduction=self.feature_reduction,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, feature_reduction={self.feature_reduction!r}, impl={self.impl!r}"


class UniKDLoss(nn.Module):
    """`unikd_loss` with its settings fixed; the weights can be given anew at each call, for a ramp.

    Example:
        >>> pair = (torch.randn(8, 10), torch.zeros(8, 10))
        >>> terms = UniKDLoss(alpha=2.0)(torch.randn(8, 10), torch.randn(8, 10), torch.arange(8), pair, pair)
        >>> terms.feature_kl
        tensor(0.)
    """

    def __init__(
        self,
        *,
        alpha: float = 4.0,
        beta: float = 1.0,
        temperature: float = 4.0,
        scale_by_t2: bool = True,
        feature_reduction: str = "mean",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        impl: str = "auto",
    ) -> None:
        super().__init__()
        check_temperature("UniKDLoss", temperature)
        check_feature_reduction("UniKDLoss", feature_reduction)
        check_label_smoothing("UniKDLoss", label_smoothing)
        choose_impl("UniKDLoss", impl)
        self.alpha = alpha
        self.beta = beta
        self.temperature = temperature
        self.scale_by_t2 = scale_by_t2
        self.feature_reduction = feature_reduction
        self.label_smoothing = label_smoothing
        self.ignore_index = ignore_index
        self.impl = impl

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor,
        labels: Tensor,
        student: Gaussian | tuple[Tensor, Tensor],
        teacher: Gaussian | tuple[Tensor, Tensor],
        *,
        alpha: float | Tensor | None = None,
        beta: float | Tensor | None = None,
    ) -> LossTerms:
        """Give the terms of Eq. 7; `alpha` and `beta` replace the module's own for this call."""
        return unikd_loss(
            student_logits,
            teacher_logits,
            labels,
            student,
            teacher,
            alpha=self.alpha if alpha is None else alpha,
            beta=self.beta if beta is None else beta,
            temperature=self.temperature,
            scale_by_t2=self.scale_by_t2,
            feature_reduction=self.feature_reduction,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            impl=self.impl,
        )

    def extra_repr(self) -> str:
        return f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}, impl={self.impl!r}"
