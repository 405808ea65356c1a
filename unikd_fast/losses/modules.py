"""The losses as modules: settings are fixed and checked once, tensors are passed at each call."""

from typing import Any

from torch import Tensor, nn

from unikd_fast.kernels import _checks as checks
from unikd_fast.losses.functional import (
    GaussianPair,
    LossTerms,
    channel_wise_kl,
    dkd_loss,
    gaussian_kl,
    linear_softmax_kl,
    softmax_kl,
    unikd_loss,
)
from unikd_fast.values import QuantizedLogits, TopKLogits


class _Loss(nn.Module):
    """A loss whose settings are checked once and passed to the function at each call."""

    def __init__(self, **settings: Any) -> None:
        super().__init__()
        name = type(self).__name__
        for setting, check in (
            ("temperature", checks.check_temperature),
            ("reduction", checks.check_reduction),
            ("feature_reduction", checks.check_feature_reduction),
            ("label_smoothing", checks.check_label_smoothing),
            ("impl", checks.check_impl),
        ):
            if setting in settings:
                check(name, settings[setting])
        if "divergence" in settings:
            checks.check_divergence(name, settings["divergence"], settings["beta"])
        self.settings = settings

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self.settings.items())


class SoftmaxKL(_Loss):
    """`softmax_kl` with fixed settings.

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
        divergence: str = "forward",
        beta: float = 0.5,
        standardized: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(
            temperature=temperature,
            reduction=reduction,
            scale_by_t2=scale_by_t2,
            divergence=divergence,
            beta=beta,
            standardized=standardized,
            impl=impl,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | QuantizedLogits | TopKLogits,
        ignore_mask: Tensor | None = None,
    ) -> Tensor:
        """Return L_L for logits (..., K)."""
        return softmax_kl(student_logits, teacher_logits, ignore_mask=ignore_mask, **self.settings)


class ChannelWiseKL(_Loss):
    """`channel_wise_kl` with fixed settings.

    Example:
        >>> ChannelWiseKL(temperature=4.0)(torch.randn(2, 19, 8, 8), torch.randn(2, 19, 8, 8)).shape
        torch.Size([])
    """

    def __init__(self, *, temperature: float = 1.0, impl: str = "auto") -> None:
        super().__init__(temperature=temperature, impl=impl)

    def forward(self, student_maps: Tensor, teacher_maps: Tensor) -> Tensor:
        """Return the loss for maps (N, C, ...)."""
        return channel_wise_kl(student_maps, teacher_maps, **self.settings)


class LinearSoftmaxKL(_Loss):
    """`linear_softmax_kl` with fixed settings.

    Example:
        >>> head, hidden, teacher_logits = torch.nn.Linear(4, 10, bias=False), torch.randn(8, 4), torch.randn(8, 10)
        >>> LinearSoftmaxKL(temperature=2.0)(hidden, head.weight, teacher_logits).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        ce_weight: float = 1.0,
        temperature: float = 1.0,
        reduction: str = "batchmean",
        scale_by_t2: bool = True,
        ignore_index: int = -100,
        divergence: str = "forward",
        beta: float = 0.5,
        impl: str = "auto",
    ) -> None:
        super().__init__(
            ce_weight=ce_weight,
            temperature=temperature,
            reduction=reduction,
            scale_by_t2=scale_by_t2,
            ignore_index=ignore_index,
            divergence=divergence,
            beta=beta,
            impl=impl,
        )

    def forward(
        self,
        student_hidden: Tensor,
        student_weight: Tensor,
        teacher: Tensor | QuantizedLogits,
        teacher_weight: Tensor | None = None,
        labels: Tensor | None = None,
        *,
        student_bias: Tensor | None = None,
        teacher_bias: Tensor | None = None,
        ignore_mask: Tensor | None = None,
    ) -> Tensor:
        """Return the loss for hidden states (..., D) and weights (K, D)."""
        return linear_softmax_kl(
            student_hidden,
            student_weight,
            teacher,
            teacher_weight,
            labels,
            student_bias=student_bias,
            teacher_bias=teacher_bias,
            ignore_mask=ignore_mask,
            **self.settings,
        )


class DKDLoss(_Loss):
    """`dkd_loss` with fixed settings; the weights can be overridden at each call, for a ramp.

    Example:
        >>> DKDLoss(beta=2.0)(torch.randn(8, 10), torch.randn(8, 10), torch.arange(8)).shape
        torch.Size([])
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        reduction: str = "batchmean",
        ignore_index: int = -100,
        standardized: bool = False,
        impl: str = "auto",
    ) -> None:
        super().__init__(
            alpha=alpha,
            beta=beta,
            temperature=temperature,
            reduction=reduction,
            ignore_index=ignore_index,
            standardized=standardized,
            impl=impl,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | QuantizedLogits,
        labels: Tensor,
        *,
        alpha: float | Tensor | None = None,
        beta: float | Tensor | None = None,
    ) -> Tensor:
        """Return α TCKD + β NCKD for logits (..., K)."""
        return dkd_loss(student_logits, teacher_logits, labels, **_replaced(self.settings, alpha, beta))


class GaussianKL(_Loss):
    """`gaussian_kl` with fixed settings.

    Example:
        >>> mean, log_var = torch.randn(8, 10), torch.zeros(8, 10)
        >>> GaussianKL()(mean, log_var, mean, log_var)
        tensor(0.)
    """

    def __init__(self, *, reduction: str = "batchmean", feature_reduction: str = "mean", impl: str = "auto") -> None:
        super().__init__(reduction=reduction, feature_reduction=feature_reduction, impl=impl)

    def forward(
        self, student_mean: Tensor, student_log_var: Tensor, teacher_mean: Tensor, teacher_log_var: Tensor
    ) -> Tensor:
        """Return L_FL for parameters (..., K)."""
        return gaussian_kl(student_mean, student_log_var, teacher_mean, teacher_log_var, **self.settings)


class UniKDLoss(_Loss):
    """`unikd_loss` with fixed settings; the weights can be overridden at each call, for a ramp.

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
        ce_weight: float = 1.0,
        temperature: float = 4.0,
        scale_by_t2: bool = True,
        feature_reduction: str = "mean",
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        impl: str = "auto",
    ) -> None:
        super().__init__(
            alpha=alpha,
            beta=beta,
            ce_weight=ce_weight,
            temperature=temperature,
            scale_by_t2=scale_by_t2,
            feature_reduction=feature_reduction,
            label_smoothing=label_smoothing,
            ignore_index=ignore_index,
            impl=impl,
        )

    def forward(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | QuantizedLogits | TopKLogits,
        labels: Tensor,
        student: GaussianPair | None = None,
        teacher: GaussianPair | None = None,
        *,
        alpha: float | Tensor | None = None,
        beta: float | Tensor | None = None,
        anchor: GaussianPair | None = None,
    ) -> LossTerms:
        """Return the terms of Eq. 7; `alpha` and `beta` override the module's own for this call."""
        settings = _replaced(self.settings, alpha, beta)
        return unikd_loss(student_logits, teacher_logits, labels, student, teacher, anchor=anchor, **settings)


def _replaced(settings: dict[str, Any], alpha: float | Tensor | None, beta: float | Tensor | None) -> dict[str, Any]:
    given = {name: value for name, value in (("alpha", alpha), ("beta", beta)) if value is not None}
    return settings | given
