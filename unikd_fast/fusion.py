"""Adaptive Features Fusion (AFF), section 3.1 of the UniKD paper, as a module: F_R by stages, its average collapsed.

Batch normalisation next to a 1x1 convolution E is folded into it, so that no normalised map is formed, even in
training:

    after E:    γ (W F + b - μ) / sqrt(σ² + ε) + β,    μ, σ² of E(F)
    before E:   W (F - μ) / sqrt(σ² + ε) + b,          μ, σ² of F

The exception are batch statistics before E, whose gradient is computed with that of the features
(`reference_readings`). In training the statistics are those of the batch, and the running statistics are updated as in
torch's modules.
"""

import itertools
import logging
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unikd_fast.kernels._checks import choose_impl
from unikd_fast.kernels.reference_fusion import blend, blend_top_down, expand
from unikd_fast.kernels.reference_moments import ChannelStatistics, channel_moments, projected_moments
from unikd_fast.kernels.reference_pooled import pool_collapsed

_logger = logging.getLogger("unikd_fast")

_GATE_STD = 0.25
"""Standard deviation of the weights of new gates, whose logits then vary by a quarter of the features."""


class AdaptiveFeatureFusion(nn.Module):
    """Fuses the feature levels of one network, coarse to fine: each gate weighs a level against the coarser ones.

        R_L = E_L(F_L)
        g_l = sigmoid( conv3x3( E_l(F_l) ⊕ Up(R_{l+1}) ) )                   l = L-1 .. 1
        R_l = g_l ⊙ E_l(F_l) + (1 - g_l) ⊙ Up(R_{l+1}),    F_R = R_1         (Eq. 4)

    `forward` returns F_R and `pooled` its global average, which is all that UniKD uses. Where the average can be
    collapsed it costs a fraction: the features are projected and averaged, and no D-channel map is formed. Teacher and
    student have one AFF each. The parameters, and so the state dict, do not depend on the path.

    A gate's kernel is its weight divided by the root of the number of its inputs, 18 D: the 3x3 convolution of Eq. 4,
    trained at a rate that suits it. With the kernel itself as the parameter a step of any optimiser moves a gate's
    logit by as much as it has inputs, a thousand times what it moves one weight: gates closed for good within an
    epoch, some of them on the finest level alone (docs/defaults.md).

    Args:
        in_channels: C_l of each level, fine to coarse.
        width: D, the fused width.
        gate: "spatial" for one map per gate, broadcast over D, or "channel" for D maps, always in plain PyTorch.
        upsample: Up, "nearest" or "bilinear" (align_corners=False), to the size of the finer level.
        norm: batch normalisation next to E: "input" before it, without scale and shift, or "batch" after it. If None,
            E is a 1x1 convolution alone, as in the paper.
        path: how `pooled` is computed: "auto" collapses it where that is exact, "collapsed" raises where it is not,
            "stagewise" never collapses it.
        impl: "auto" uses the kernels on a GPU and plain PyTorch elsewhere, "reference" always plain PyTorch; "fused"
            uses the kernels or raises. It applies to both paths; the expanders are always PyTorch's.

    Raises:
        ValueError: If an argument is not valid, or path="collapsed" or impl="fused" with gate="channel".

    Example:
        >>> fusion = AdaptiveFeatureFusion([64, 128, 256], 32)
        >>> features = [torch.randn(2, 64, 32, 32), torch.randn(2, 128, 16, 16), torch.randn(2, 256, 8, 8)]
        >>> fusion(features).shape, fusion.pooled(features).shape
        (torch.Size([2, 32, 32, 32]), torch.Size([2, 32]))
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        width: int,
        *,
        gate: str = "spatial",
        upsample: str = "nearest",
        norm: str | None = None,
        path: str = "auto",
        impl: str = "auto",
    ) -> None:
        super().__init__()
        if not in_channels or min(*in_channels, width) < 1:
            raise ValueError(
                f"AdaptiveFeatureFusion: there must be at least one level and every size must be at least 1, got "
                f"in_channels {tuple(in_channels)} and width {width}"
            )
        _check_option("gate", gate, ("spatial", "channel"))
        _check_option("upsample", upsample, ("nearest", "bilinear"))
        _check_option("norm", norm, (None, "batch", "input"))
        _check_option("path", path, ("auto", "collapsed", "stagewise"))
        _check_option("impl", impl, ("auto", "reference", "fused"))
        if impl == "fused" and gate == "channel":
            raise ValueError(
                "AdaptiveFeatureFusion: impl='fused' needs gate='spatial', got gate='channel', which has no kernel; "
                "use impl='auto'"
            )
        self.in_channels, self.width = tuple(in_channels), width
        self.gate, self.upsample, self.norm, self.path, self.impl = gate, upsample, norm, path, impl
        maps = 1 if gate == "spatial" else width
        self.expanders = nn.ModuleList(nn.Conv2d(channels, width, 1) for channels in in_channels)
        self.norms = nn.ModuleList(_norm_of(norm, channels, width) for channels in in_channels if norm)
        self.gates = nn.ModuleList(nn.Conv2d(2 * width, maps, 3, padding=1) for _ in in_channels[1:])
        self.reset_parameters()
        if path == "collapsed" and gate == "channel":
            raise ValueError(
                "AdaptiveFeatureFusion: path='collapsed' needs gate='spatial', got gate='channel': a gate per channel "
                "cannot be pulled out of the projections; use path='auto'"
            )
        # Logged here and not at the first call, which may be inside a compiled graph.
        _logger.debug("AdaptiveFeatureFusion of %s to %d: %s", self.in_channels, width, self._path_and_reason())

    def reset_parameters(self) -> None:
        """Initialise the parameters: expanders that keep the scale of the features, gates near 1/2 for any D."""
        for expander in _convolutions(self.expanders):
            nn.init.kaiming_uniform_(expander.weight, a=1)
        for gate in _convolutions(self.gates):
            nn.init.normal_(gate.weight, std=_GATE_STD)
        for convolution in (*_convolutions(self.expanders), *_convolutions(self.gates)):
            assert convolution.bias is not None
            nn.init.zeros_(convolution.bias)
        for norm in _batch_norms(self.norms):
            norm.reset_parameters()

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Return F_R (Eq. 4), computed stage by stage.

        Args:
            features: L tensors (N, C_l, H_l, W_l), fine to coarse, with any ratio of sizes, 1 included.

        Returns:
            (N, D, H_1, W_1) in the dtype of the features, or of autocast if it is enabled.

        Raises:
            ValueError: If the features do not match the module or each other.
        """
        return self._stagewise(features, pool=False)

    def pooled(self, features: Sequence[Tensor]) -> Tensor:
        """Return the mean of F_R over H_1 x W_1, collapsed where that is exact: with spatial gates.

        Batch normalisation needs no map either: in training its statistics are those of the batch, per channel before
        E, from the features' covariance after it (`projected_moments`).

        Args:
            features: L tensors (N, C_l, H_l, W_l), fine to coarse, with any ratio of sizes, 1 included.

        Returns:
            (N, D) in fp32 (fp64 for fp64 features), whatever the features' dtype and autocast: what follows is small
            and needs the precision. If collapsed or computed by the kernels, it is differentiable once.

        Raises:
            ValueError: If the features do not match, or path="collapsed" with SyncBatchNorm in training mode or with
                some norms in training mode and some not.
        """
        if self._collapses():
            self._check(features)
            statistics = None
            if self.norm == "input" and self.norms[0].training:
                pairs = zip(_batch_norms(self.norms), features, strict=True)
                statistics = [_batch_statistics(norm, feature) for norm, feature in pairs]
            parameters = (*self._folded_expanders(features), self.gate_kernels, _biases(self.gates))
            if self._fuses(features):
                from unikd_fast.kernels.pooled_fusion import fused_pool

                return fused_pool(features, *parameters, upsample=self.upsample, statistics=statistics)
            return pool_collapsed(features, *parameters, upsample=self.upsample, statistics=statistics)
        if self.path == "collapsed":
            raise ValueError(
                "AdaptiveFeatureFusion: path='collapsed' needs batch statistics of this process at all levels or at "
                "none, got SyncBatchNorm in training mode, whose statistics span all processes, or some norms in eval "
                "mode; use path='auto' or .eval()"
            )
        return self._stagewise(features, pool=True)

    @property
    def gate_kernels(self) -> list[Tensor]:
        """Kernels of the gates' convolutions in Eq. 4, fine to coarse: L - 1 of (1 or D, 2 D, 3, 3)."""
        scale = (9 * 2 * self.width) ** -0.5
        return [gate.weight * scale for gate in _convolutions(self.gates)]

    def extra_repr(self) -> str:
        names = ("gate", "upsample", "norm", "path", "impl")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def _collapses(self) -> bool:
        shared = any(norm.training and not isinstance(norm, nn.BatchNorm2d) for norm in self.norms)
        mixed = any(norm.training != self.norms[0].training for norm in self.norms)
        return self.path != "stagewise" and self.gate == "spatial" and not shared and not mixed

    def _stagewise(self, features: Sequence[Tensor], *, pool: bool) -> Tensor:
        self._check(features)
        weights, biases = _weights(self.expanders), _biases(self.expanders)
        if self.norm == "input":
            features = [norm(x) for norm, x in zip(self.norms, features, strict=True)]
        expanded = [expand(*level) for level in zip(features, weights, biases, strict=True)]
        if self.norm == "batch":
            expanded = [norm(x) for norm, x in zip(self.norms, expanded, strict=True)]
        stage = blend
        if self._fuses(features):
            from unikd_fast.kernels.feature_fusion import fused_blend

            stage = fused_blend
        gates = self.gate_kernels, _biases(self.gates)
        return blend_top_down(expanded, *gates, upsample=self.upsample, pool=pool, stage=stage)

    def _fuses(self, features: Sequence[Tensor]) -> bool:
        return self.gate == "spatial" and choose_impl("AdaptiveFeatureFusion", self.impl, *features) == "fused"

    def _path_and_reason(self) -> str:
        if self.path == "stagewise":
            return "pooled() runs stage-wise, as requested"
        if self.gate == "channel":
            return "pooled() runs stage-wise: a gate per channel has no collapsed form"
        if self.norm:
            return "pooled() runs collapsed: exact with spatial gates; batch norm is folded into E"
        return "pooled() runs collapsed: exact with spatial gates"

    def _folded_expanders(self, features: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Return E_l with its batch normalisation folded in, except for batch statistics before E_l."""
        weights, biases = _weights(self.expanders), _biases(self.expanders)
        for level, norm in enumerate(_batch_norms(self.norms)):
            given = weights[level], biases[level]
            if self.norm == "batch":
                weights[level], biases[level] = _fold_after(norm, features[level], *given)
            elif not norm.training:
                weights[level], biases[level] = _fold_before(norm, *given)
        return weights, biases

    def _check(self, features: Sequence[Tensor]) -> None:
        shapes = [tuple(feature.shape) for feature in features]
        if len(shapes) != len(self.in_channels):
            raise ValueError(
                f"AdaptiveFeatureFusion: expected one feature per entry of in_channels, {len(self.in_channels)}, got "
                f"{len(shapes)}; build it with the channels of the network"
            )
        if any(len(shape) != 4 for shape in shapes):
            raise ValueError(f"AdaptiveFeatureFusion: features must be (N, C, H, W), got {shapes}; unflatten tokens")
        if tuple(shape[1] for shape in shapes) != self.in_channels:
            raise ValueError(
                f"AdaptiveFeatureFusion: features must have in_channels {self.in_channels}, fine to coarse, got "
                f"{tuple(shape[1] for shape in shapes)}; build it with the channels of the network"
            )
        if any(shape[0] != shapes[0][0] for shape in shapes):  # a set would make the batch size a constant of a graph
            raise ValueError(f"AdaptiveFeatureFusion: features must have one batch size, got {shapes}")
        for fine, coarse in itertools.pairwise(shapes):
            if fine[2] < coarse[2] or fine[3] < coarse[3]:
                raise ValueError(
                    f"AdaptiveFeatureFusion: features must go from fine to coarse, got {fine[2:]} before {coarse[2:]}; "
                    f"pass the early stages first"
                )


def _check_option(name: str, value: str | None, allowed: tuple[str | None, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"AdaptiveFeatureFusion: {name} must be one of {allowed}, got {value!r}")


def _norm_of(norm: str, channels: int, width: int) -> nn.BatchNorm2d:
    # Before E a scale and shift would be redundant with E's.
    return nn.BatchNorm2d(channels, affine=False) if norm == "input" else nn.BatchNorm2d(width)


def _convolutions(modules: Iterable[nn.Module]) -> list[nn.Conv2d]:
    return [module for module in modules if isinstance(module, nn.Conv2d)]


def _weights(modules: Iterable[nn.Module]) -> list[Tensor]:
    return [m.weight for m in _convolutions(modules)]


def _biases(modules: Iterable[nn.Module]) -> list[Tensor]:
    return [m.bias for m in _convolutions(modules) if m.bias is not None]


def _fold_after(norm: _BatchNorm, feature: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of a convolution that computes ``norm(F.conv2d(feature, weight, bias))``.

    Args:
        norm: batch normalisation of D channels. In training mode its running statistics are updated.
        feature: (N, C, H, W), used in training mode only.
        weight: (D, C, 1, 1).
        bias: (D,).

    Returns:
        (D, C, 1, 1) and (D,), differentiable in all arguments.

    Raises:
        ValueError: If there is one pixel in training mode, which has no variance.
    """
    mean, variance = _running_moments(norm)
    if norm.training:
        mean, variance = projected_moments(feature, weight, bias)
        _update_running(norm, mean, variance, feature)
    scale = norm.weight * torch.rsqrt(variance + norm.eps)
    return weight * scale[:, None, None, None], (bias - mean) * scale + norm.bias


def _fold_before(norm: _BatchNorm, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight and bias of a convolution that computes ``F.conv2d(norm(feature), weight, bias)`` in eval mode.

    Args:
        norm: batch normalisation of C channels without parameters, which E makes redundant.
        weight: (D, C, 1, 1).
        bias: (D,).
    """
    mean, variance = _running_moments(norm)
    weight = weight * torch.rsqrt(variance + norm.eps)[:, None, None]
    return weight, bias - (weight.flatten(1) * mean).sum(1)  # no product of matrices, which autocast would round


def _batch_statistics(norm: _BatchNorm, feature: Tensor) -> ChannelStatistics:
    """Return the statistics that `norm` applies to `feature` (N, C, H, W) in training; update its running statistics.

    Raises:
        ValueError: If there is one pixel, which has no variance.
    """
    mean, variance = channel_moments(feature)
    _update_running(norm, mean, variance, feature)
    return ChannelStatistics(mean, torch.rsqrt(variance + norm.eps), norm.eps)


def _batch_norms(modules: Iterable[nn.Module]) -> list[_BatchNorm]:
    """Return the modules typed; conversion to SyncBatchNorm leaves another subclass here."""
    return [module for module in modules if isinstance(module, _BatchNorm)]


def _running_moments(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the running mean and variance."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


@torch.no_grad()
def _update_running(norm: _BatchNorm, mean: Tensor, variance: Tensor, feature: Tensor) -> None:
    """Update the running statistics as batch normalisation does in training, with the unbiased variance."""
    running_mean, running_var = _running_moments(norm)
    assert norm.num_batches_tracked is not None
    assert norm.momentum is not None
    count = feature.numel() // feature.shape[1]
    norm.num_batches_tracked.add_(1)
    running_mean.lerp_(mean.to(running_mean.dtype), norm.momentum)
    running_var.lerp_((variance * (count / (count - 1))).to(running_var.dtype), norm.momentum)
