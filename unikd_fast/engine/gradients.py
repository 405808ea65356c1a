"""Gradients before the update: those that are not finite are detected, named and skipped; the loss scale of fp16."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from unikd_fast.errors import NonFiniteLoss

_LARGEST = 2.0**24  # of fp32's integers; a gradient that needs more is zero for all purposes


class LossScale:
    """A power of two by which the loss is multiplied, adapted to the gradients (Micikevicius et al. 2018, 3.2).

    Args:
        value: initial value.
        growth_interval: number of updates without an overflow after which it is doubled.
    """

    def __init__(self, value: float = 2.0**16, growth_interval: int = 2000) -> None:
        self.value, self.growth_interval = value, growth_interval
        self._good_steps = 0
        self._zero: Any = None

    def attach(self, engine: Any) -> None:
        """Make an engine with ZeRO use this scale: its optimiser scales the loss and unscales the gradients."""
        self._zero = engine.optimizer if engine.zero_optimization() else None
        if self._zero is not None:
            self._zero.override_loss_scale(self.value)

    def scaled(self, loss: Tensor) -> Tensor:
        """Return what to differentiate: the scaled loss, or with ZeRO the loss itself, which DeepSpeed scales."""
        return loss if self._zero is not None else loss * self.value

    def unscale_(self, gradients: list[Tensor]) -> None:
        """Divide gradients of a scaled loss in place; a power of two changes only their exponents."""
        torch._foreach_mul_(gradients, 1.0 / self.value)

    def update(self, overflowed: bool) -> None:
        """Adapt the scale after a step.

        Args:
            overflowed: whether the gradients were not finite.
        """
        if overflowed:
            self.value, self._good_steps = self.value / 2, 0
        elif self._good_steps + 1 >= self.growth_interval:
            self.value, self._good_steps = min(2 * self.value, _LARGEST), 0
        else:
            self._good_steps += 1
        if self._zero is not None:
            self._zero.override_loss_scale(self.value)

    def state_dict(self) -> dict[str, Any]:
        return {"value": self.value, "good_steps": self._good_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.value, self._good_steps = state["value"], state["good_steps"]


_SKIPPED_AT_MOST = 10  # steps in a row


class GradientWatch:
    """Checks the gradients of each optimiser step between its backward pass and its update.

    At ZeRO stage 0 they are those of all processes together. At higher stages, where no process has them whole, they
    are this process's own, and DeepSpeed itself skips an update if they are not finite.

    Args:
        engine: LocalEngine, or DeepSpeed's engine.
        skip: whether a step whose gradients are not finite changes nothing, neither parameters nor buffers. The host
            then waits for the device in every step.
        scale: loss scale; then such steps are skipped in any case, and lower it. If None, the loss is not scaled.
    """

    def __init__(self, engine: Any, *, skip: bool, scale: LossScale | None = None) -> None:
        self._engine = engine
        self._skip = skip = skip or scale is not None
        self.scale = scale
        if scale is not None:
            scale.attach(engine)
        named = [(name, p) for name, p in engine.module.named_parameters() if p.requires_grad]
        self.names = [name for name, _ in named]
        self._parameters: list[nn.Parameter] = [parameter for _, parameter in named]
        self._sharded = bool(engine.zero_optimization())
        device = self._parameters[0].device
        self._seen: dict[int, Tensor] = {}  # with ZeRO: the largest entry of a parameter's gradients since the update
        self.norms = torch.zeros(len(named), device=device)
        """(P,) largest entries of the first gradients that were not finite; zeros if there were none."""
        self._found = torch.zeros((), dtype=torch.bool, device=device)
        self.finite = torch.ones((), dtype=torch.bool, device=device)
        """Whether the gradients of the latest step were finite, 0-d."""
        self.skipped_steps = 0
        self.skipped_in_a_row = 0
        buffers = list(engine.module.buffers()) if skip else []
        # One list a data type: what is copied together must have one.
        kinds = dict.fromkeys(buffer.dtype for buffer in buffers)
        self._buffers = [[buffer for buffer in buffers if buffer.dtype == kind] for kind in kinds]
        self._before = [[buffer.clone() for buffer in group] for group in self._buffers]
        if self._sharded:
            for place, parameter in enumerate(self._parameters):
                parameter.register_hook(self._noting(place))

    def _noting(self, place: int) -> Any:
        def note(gradient: Tensor) -> None:
            # One at a time: DeepSpeed takes a gradient apart as soon as it is there.
            largest = torch.linalg.vector_norm(gradient.detach(), math.inf, dtype=torch.float32)
            before = self._seen.get(place)
            self._seen[place] = largest if before is None else torch.maximum(before, largest)

        return note

    @torch.no_grad()
    def before_update(self) -> None:
        """Check the gradients, after the backward pass of a step's last micro-batch."""
        if self._sharded:
            zero = torch.zeros_like(self.finite, dtype=torch.float32)
            norms = torch.stack([self._seen.get(place, zero) for place in range(len(self.names))])
            self._seen.clear()
        else:
            gradients = [p.grad if p.grad is not None else p.new_zeros(1) for p in self._parameters]
            if self.scale is not None:
                self.scale.unscale_(gradients)
            norms = largest_entries(gradients)
        # In place: a captured step finds them where they were.
        self.finite.copy_(norms.isfinite().all())
        self.norms.copy_(torch.where(self.finite | self._found, self.norms, norms))
        self._found.logical_or_(~self.finite)
        self._kept_out = self._skip and not self._sharded and not self.finite.item()
        if self._kept_out:
            # For this step only: an update by zeros would still change the momentum and decay the weights.
            self._engine.optimizer.step = _no_update

    @torch.no_grad()
    def after_update(self) -> bool:
        """Return whether the update of a step was skipped, the same on all processes.

        If it was, BatchNorm's running statistics are restored to those before the step.
        """
        if not self._skip:
            return False
        left_out = bool(self._engine.optimizer.overflow) if self._sharded else self._kept_out
        if self._kept_out:
            del self._engine.optimizer.step
        if self.scale is not None:
            self.scale.update(left_out)
        self.skipped_steps += left_out
        self.skipped_in_a_row = self.skipped_in_a_row + 1 if left_out else 0
        source, target = (self._before, self._buffers) if left_out else (self._buffers, self._before)
        for kept, changed in zip(source, target, strict=True):
            torch._foreach_copy_(changed, kept)
        return left_out

    def figures(self) -> dict[str, float]:
        """Return metrics for the log: the number of skipped steps, if any, and the loss scale of fp16."""
        skipped: dict[str, float] = {"skipped_steps": self.skipped_steps} if self.skipped_steps else {}
        return skipped if self.scale is None else {**skipped, "loss_scale": self.scale.value}

    def require_progress(self, describe_first: Callable[[], str]) -> None:
        """Check, after a step, that training has not stalled; all processes must call it.

        Args:
            describe_first: function that describes the first of the skipped steps.

        Raises:
            NonFiniteLoss: too many steps in a row were skipped.
        """
        if self.skipped_in_a_row < _SKIPPED_AT_MOST:
            return
        if self.scale is None:
            raise NonFiniteLoss(
                f"{self.skipped_in_a_row} steps in a row were skipped (train.nonfinite = skip); the first: "
                f"{describe_first()}"
            )
        if self.scale.value < 1.0:
            raise NonFiniteLoss(
                f"the gradients of {self.skipped_in_a_row} steps in a row overflowed fp16, the last with a loss scale "
                f"of {2 * self.scale.value:g}; set train.precision = bf16; {self.worst()}"
            )

    def worst(self, count: int = 5) -> str:
        """Return which parameters first had gradients that were not finite, and the largest; empty if none had."""
        if not self._found:
            return ""
        norms = self.norms.tolist()
        order = sorted(range(len(norms)), key=lambda i: (not math.isnan(norms[i]), -norms[i]))  # NaN, inf, large
        shown = ", ".join(f"{self.names[i]} {norms[i]:.3g}" for i in order[:count])
        bad = sum(not math.isfinite(norm) for norm in norms)
        return f"{bad} of {len(norms)} parameters have gradients that are not finite; largest entries: {shown}"


def largest_entries(tensors: list[Tensor]) -> Tensor:
    """Return the largest absolute value in each tensor, (P,) in fp32; NaN for a tensor that holds one.

    Example:
        >>> largest_entries([torch.tensor([1.0, -2.0])])
        tensor([2.])
    """
    if tensors[0].device.type != "cpu" or any(map(torch.is_complex, tensors)):
        return torch.stack(torch._foreach_norm(tensors, math.inf)).float()
    # A CPU's norm takes an entry at a time, and 20 times as long: 1 to 2 % of a step of a MobileNet.
    low, high = (torch.stack(bound).float().abs() for bound in zip(*map(torch.aminmax, tensors), strict=True))
    return torch.maximum(low, high)


def _no_update(*_: Any, **__: Any) -> None:
    pass
