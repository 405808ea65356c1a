"""Outputs of a network's modules by hooks, for networks that torch.fx cannot trace."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, fx, nn

from unikd_fast.models.graph import IMAGES, in_mode


class NoLogits(ValueError):
    """A network's output has no logits."""


def logits_of(output: Any, model: nn.Module) -> Tensor:
    """Return the logits in a network's output: a tensor, the first of a tuple, or what is called `logits`.

    Args:
        output: output of the network.
        model: network, for the message.

    Raises:
        NoLogits: there are none.
    """
    if isinstance(output, Tensor | fx.Proxy):  # the latter while torch.fx traces
        return cast(Tensor, output)
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if isinstance(found, Tensor | fx.Proxy):
        return cast(Tensor, found)
    names = f" with {list(output)}" if isinstance(output, Mapping) else ""
    raise NoLogits(
        f"{type(model).__name__} returns {type(output).__name__}{names}, which has no logits; return a tensor (N, K), "
        "a tuple that starts with one, or an object or dictionary with logits"
    )


class Logits(nn.Module):
    """Runs a network and returns its logits alone.

    Args:
        plain: network whose output has logits, see `logits_of`.
    """

    def __init__(self, plain: nn.Module) -> None:
        super().__init__()
        self.plain = plain

    def forward(self, images: Tensor) -> Tensor:
        return logits_of(self.plain(images), self.plain)


class Outputs(NamedTuple):
    """What modules return for two images."""

    shapes: dict[str, tuple[int, ...] | None]  # by name, in the order in which they end; None without a tensor
    logits: tuple[int, ...]
    classifier: str | None  # linear layer that computes the logits


@torch.no_grad()
def record_outputs(model: nn.Module, *, image_size: int) -> Outputs:
    """Run a network once in eval mode on two square images of zeros, and record what its modules return.

    Raises:
        ValueError: it does not accept images of this size; `NoLogits` without logits.
    """
    shapes: dict[str, tuple[int, ...] | None] = {}
    linear: dict[str, Tensor] = {}

    def record(name: str, module: nn.Module, output: Any) -> None:
        tensor = _tensor(output, IMAGES)
        shapes[name] = None if tensor is None else tuple(tensor.shape)
        if isinstance(module, nn.Linear) and tensor is not None:
            linear[name] = tensor

    parameter = next(model.parameters(), None)
    device, dtype = ("cpu", torch.float32) if parameter is None else (parameter.device, parameter.dtype)
    images = torch.zeros(IMAGES, 3, image_size, image_size, device=device, dtype=dtype)
    hooks = [
        module.register_forward_hook(lambda module, _, output, name=name: record(name, module, output))
        for name, module in model.named_modules()
        if name
    ]
    try:
        with in_mode(model, training=False):
            output = model(images)
    except Exception as error:
        raise ValueError(
            f"extract_features: {type(model).__name__} does not accept images of {image_size}x{image_size} pixels "
            f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); pass the size it was built for"
        ) from error
    finally:
        for hook in hooks:
            hook.remove()
    logits = logits_of(output, model)
    classifier = next((name for name, tensor in linear.items() if tensor is logits), None)
    return Outputs(shapes, tuple(logits.shape), classifier)


class HookedForward:
    """Runs a network and returns (levels, logits, (), embedding), as `compile_forward` does for a graph.

    The hooks are there for the time of a call alone, so that copies of the network need none.

    Args:
        names: modules whose outputs are the levels; the last one counts if one is called several times.
        classifier: linear layer whose input is the embedding. If None, it is not returned.
    """

    def __init__(self, names: Sequence[str], classifier: str | None) -> None:
        self._names, self._classifier = tuple(names), classifier

    def __call__(
        self, model: nn.Module, images: Tensor
    ) -> tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...], Tensor | None]:
        found: dict[str, Tensor] = {}

        def keep(name: str, output: Any) -> None:
            if (tensor := _tensor(output, len(images))) is not None:
                found[name] = tensor

        hooks = [
            model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: keep(name, output))
            for name in self._names
        ]
        if self._classifier is not None:
            linear = model.get_submodule(self._classifier)
            hooks.append(
                linear.register_forward_pre_hook(lambda _, given, named: keep("", given or named), with_kwargs=True)
            )
        try:
            output = model(images)
        finally:
            for hook in hooks:
                hook.remove()
        missing = [name for name in self._names if name not in found]
        if missing:
            mode = "training" if model.training else "eval"
            raise ValueError(
                f"{type(model).__name__} does not run {', '.join(missing)} in {mode} mode, whose outputs are levels; "
                "name others with feature_nodes"
            )
        return tuple(found[name] for name in self._names), logits_of(output, model), (), found.get("")


def _tensor(output: Any, count: int) -> Tensor | None:
    """Return the tensor in a module's output: itself, or the first of a tuple or mapping, which may be nested.

    Of several tensors (TNT returns pixels of patches first) it is the first that has a row for each of `count` images.
    """
    found = list(_tensors(output))
    return next((tensor for tensor in found if tensor.dim() > 0 and len(tensor) == count), found[0] if found else None)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | tuple | list):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)
