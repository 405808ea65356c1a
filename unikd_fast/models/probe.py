"""What the nodes of a graph give, by shapes alone: nothing is computed, and nothing of the network changes."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unikd_fast.models.graph import Trace, in_mode


@dataclass(frozen=True)
class NodeValue:
    """What one node gives for a batch: a tensor, or a tuple of tensors, and whether a later operation overwrites it."""

    shape: tuple[int, ...] | None  # None: a tuple
    overwritten: bool


class _Prober(fx.Interpreter):
    """Runs a graph node by node and keeps the tensors."""

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        super().__init__(model, garbage_collect_values=False, graph=graph)
        self.versions: dict[fx.Node, tuple[Tensor, int]] = {}
        self.tuples: list[fx.Node] = []
        self.numbers: dict[fx.Node, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if isinstance(value, Tensor):
            self.versions[n] = (value, value._version)
        elif isinstance(value, tuple | list) and any(isinstance(part, Tensor) for part in value):
            self.tuples.append(n)
        elif isinstance(value, int | float | tuple | list | torch.dtype | torch.device):
            self.numbers[n] = value
        return value


def probe(model: nn.Module, traced: Trace, *, image_size: int, training: bool = False) -> dict[fx.Node, NodeValue]:
    """Shapes of all tensors in the graph for two square images, without computing anything.

    Args:
        model: its tensors are exchanged for fake ones meanwhile, so that nothing of it changes.
        traced: of the same mode.
        image_size: side of the images in pixels.
        training: mode of the modules while probing.

    Raises:
        ValueError: the model does not take images of this size.

    Example:
        >>> probe(model, traced, image_size=224)[traced.logits].shape
        (2, 1000)
    """
    prober = _probed(model, traced, image_size, training)
    values = {node: NodeValue(None, False) for node in prober.tuples}
    for node, (tensor, version) in prober.versions.items():
        values[node] = NodeValue(tuple(tensor.shape), tensor._version != version)
    return values


def numbers(model: nn.Module, traced: Trace, *, image_size: int) -> dict[fx.Node, Any]:
    """What forward computes from the shape of square images in eval mode: all that is no tensor, for any batch size.

    Args:
        model, traced, image_size: as for `probe`.

    Example:
        >>> numbers(vgg8, traced, image_size=32)
        {getitem: 32}
    """
    two, three = (_probed(model, traced, image_size, training=False, batch=n).numbers for n in (2, 3))
    return {node: number for node, number in two.items() if number == three[node]}


def _probed(model: nn.Module, traced: Trace, image_size: int, training: bool, *, batch: int = 2) -> _Prober:
    prober = _Prober(model, traced.graph)
    parameter = next(model.parameters(), None)
    device, dtype = ("cpu", torch.float32) if parameter is None else (parameter.device, parameter.dtype)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with in_mode(model, training=training), _fake_tensors(model, fake), torch.no_grad(), fake:
        try:
            prober.run(torch.empty(batch, 3, image_size, image_size, device=device, dtype=dtype))
        except Exception as error:
            raise ValueError(
                f"extract_features: {type(model).__name__} does not take images of {image_size}x{image_size} pixels "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); pass the size it was built for"
            ) from error
    return prober


@contextmanager
def _fake_tensors(model: nn.Module, fake: FakeTensorMode) -> Iterator[None]:
    # In training mode BatchNorm would count a step: under FakeTensorMode alone it writes into its real counter.
    holders: list[Any] = [holder for module in model.modules() for holder in (module._parameters, module._buffers)]
    originals = [dict(holder) for holder in holders]
    try:
        for holder in holders:
            for name, tensor in holder.items():
                if tensor is not None:
                    holder[name] = fake.from_tensor(tensor)
        yield
    finally:
        for holder, original in zip(holders, originals, strict=True):
            holder.update(original)
