"""The exponential average of the student (train.ema_decay), taken on the device in a few launches a step."""

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn


class StudentAverage(AveragedModel):
    """Average weights and floating-point buffers, and copy the others, such as BatchNorm's count of batches.

    torch's own update copies its count to the device in every step, and takes four launches for each integer buffer.
    Here the count stays on the host.

    Args:
        student: whose average this is; begins as a copy of it.
        decay: share of the average that is kept in a step.
    """

    def __init__(self, student: nn.Module, decay: float) -> None:
        super().__init__(student, use_buffers=True)
        self._mix = get_ema_multi_avg_fn(decay)
        self._begun = False  # in this process

    def update_parameters(self, model: nn.Module) -> None:
        """Take in the weights of a step."""
        self.mix(model)
        self.count()

    @torch.no_grad()
    def mix(self, model: nn.Module) -> None:
        """Do what a step asks of the device: the first one copies."""
        begun = self._begun or bool(self.n_averaged)
        groups: dict[tuple[torch.dtype, bool], tuple[list[Tensor], list[Tensor]]] = {}
        # Found anew each time: at ZeRO stage 3 a parameter has its weights elsewhere in every step.
        for own, other in zip(_tensors(self.module), _tensors(model), strict=True):
            ours, theirs = groups.setdefault((own.dtype, begun and own.is_floating_point()), ([], []))
            ours.append(own)
            theirs.append(other)
        for (_, averaged), (ours, theirs) in groups.items():
            if averaged:
                self._mix(ours, theirs, 0)
            else:
                torch._foreach_copy_(ours, theirs)

    def count(self) -> None:
        """Count a step, on the host."""
        self.n_averaged += 1
        self._begun = True


def _tensors(module: nn.Module) -> list[Tensor]:
    return [tensor.detach() for tensor in (*module.parameters(), *module.buffers())]
