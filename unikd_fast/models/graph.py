"""A network as torch.fx graphs, one for training and one for evaluation, and the shapes of their nodes."""

import inspect
import itertools
import linecache
import logging
import math
import operator
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from unikd_fast.models.checkpointing import Checkpointed

Forward = Callable[[nn.Module, Tensor], tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...], Tensor | None]]

_SERIAL = itertools.count()

IMAGES = 2
"""Number of images that networks are probed with; no other number matters to a network."""


def imported(*paths: str) -> tuple[Any, ...]:
    """Return those of some modules, classes and functions of libraries that are imported.

    No network holds the others, and importing torchvision and timm for nothing takes seconds.

    Example:
        >>> imported("timm.layers.DropPath")
        ()
    """
    found = []
    for path in paths:
        module, _, name = path.rpartition(".")
        if path in sys.modules:
            found.append(sys.modules[path])
        elif module in sys.modules:
            found.append(getattr(sys.modules[module], name))
    return tuple(found)


def _vision_ops() -> Iterator[type[nn.Module]]:
    """Yield what is kept whole: not plain sequences of layers (Conv2dNormActivation), whose activation matters."""
    for ops in imported("torchvision.ops"):
        for _, kind in inspect.getmembers(ops, inspect.isclass):
            if issubclass(kind, nn.Module) and not issubclass(kind, nn.Sequential):
                yield kind


_IN_PLACE = "in_place"  # in a node's meta: a sum that forward makes in place


class _Proxy(fx.Proxy):
    """Notes that a sum is made in place, which torch.fx records as any other."""

    def __iadd__(self, other: Any) -> Any:
        total = self + other
        if isinstance(total, fx.Proxy):
            total.node.meta[_IN_PLACE] = True
        return total


class _OutputTracer(fx.Tracer):
    """Traces, and records which node holds the output of each module and operation.

    Operations are named as in torchvision's feature extraction: the path of the module that calls them, the operation,
    and `_1`, `_2`, ... if that module calls it again (`layer1.0.relu_1`).
    """

    # Also trace what forward computes from buffers alone (relative position biases): by default torch.fx computes it
    # once and freezes the result.
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        functions = [each for names in imported("timm.models.get_notrace_functions") for each in names()]
        modules = [each for names in imported("timm.models.get_notrace_modules") for each in names()]
        super().__init__(autowrap_modules=(math, *imported("torchvision.ops")), autowrap_functions=tuple(functions))
        self.leaves = (Checkpointed, *_vision_ops(), *modules)
        self.outputs: dict[str, fx.Node] = {}
        self._path = ""
        self._calls: Counter[str] = Counter()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, self.leaves) or super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        caller, self._path = self._path, self.path_of_module(m)
        path = self._path
        try:
            output = super().call_module(m, forward, args, kwargs)
        finally:
            self._path = caller
        if isinstance(output, fx.Proxy):
            self._note(path, output.node)
        return output

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_proxy(self, kind: str, target: fx.node.Target, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        if kind in ("call_function", "call_method"):
            operation = target if isinstance(target, str) else getattr(target, "__name__", str(target))
            self._note(f"{self._path}.{operation}".lstrip("."), proxy.node)
        return proxy

    def _note(self, name: str, node: fx.Node) -> None:
        key = name
        while key in self.outputs:  # a module may already have the name of a repeated call
            self._calls[name] += 1
            key = f"{name}_{self._calls[name]}"
        self.outputs[key] = node


class Untraceable(ValueError):
    """torch.fx cannot trace a network."""


@dataclass(frozen=True)
class Trace:
    """The graph of one mode, and the nodes by module path and operation name."""

    graph: fx.Graph
    outputs: Mapping[str, fx.Node]  # in execution order
    logits: fx.Node


def trace(model: nn.Module, *, training: bool) -> Trace:
    """Trace the forward pass of `model` in one mode; the model is left unchanged.

    Args:
        model: network that maps images (N, 3, H, W) to logits (N, K), or to a tuple starting with them.
        training: whether to trace in training mode.

    Raises:
        Untraceable: torch.fx cannot trace the model's forward, or it does not return a tensor.

    Example:
        >>> trace(torchvision.models.resnet18(), training=False).outputs["layer1"].name
        'layer1_1_relu_1'
    """
    tracer = _OutputTracer()
    attributes = set(vars(model))
    with in_mode(model, training=training):
        try:
            graph = tracer.trace(model)
        except Exception as error:
            said = str(error).partition("\n")[0].partition(". ")[0]
            raise Untraceable(
                f"torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {said})"
            ) from error
    # Otherwise a tensor that forward creates from nothing would be frozen into the graph, on one device.
    constants = sorted(set(vars(model)) - attributes)
    if constants:
        for name in constants:
            delattr(model, name)
        raise Untraceable(
            f"the forward of {type(model).__name__} creates {len(constants)} tensor(s) that do not depend on its "
            "input, which torch.fx would freeze"
        )
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    # Networks with auxiliary heads return (logits, auxiliary logits, ...) in training mode, perhaps as a named tuple.
    if isinstance(result, fx.Node) and isinstance(result.target, type) and issubclass(result.target, tuple):
        result = result.args
    logits = result[0] if isinstance(result, tuple | list) and result else result
    if not isinstance(logits, fx.Node):
        raise Untraceable(f"{type(model).__name__} returns {type(result).__name__} to torch.fx, and no tensor")
    return Trace(graph, tracer.outputs, logits)


def compile_forward(
    model: nn.Module,
    traced: Trace,
    levels: Sequence[fx.Node],
    copied: Sequence[fx.Node] = (),
    *,
    before_activation: Sequence[fx.Node] = (),
    embedding: fx.Node | None = None,
) -> Forward:
    """Compile a trace to a function of (model, images) that returns (levels, logits, before activation, embedding).

    Sums that forward makes in place (`out += identity`) are made in place where nothing else reads their first term.

    Args:
        model: network; names the function in tracebacks.
        traced: trace whose graph gets a new output.
        levels: nodes to return.
        copied: those levels that are copied as soon as they are computed, because a later operation overwrites them.
        before_activation, embedding: further nodes to return.

    Example:
        >>> traced = trace(model, training=False)
        >>> forward = compile_forward(model, traced, [traced.outputs["layer1"]])
        >>> (level,), logits, _, _ = forward(model, images)
    """
    graph = traced.graph
    returned = []
    for node in levels:
        if node in copied:
            with graph.inserting_after(node):
                node = graph.call_method("clone", (node,))
        returned.append(node)
    graph.erase_node(next(node for node in graph.nodes if node.op == "output"))
    # Nothing is pruned: an auxiliary head keeps updating its BatchNorm statistics, as in the plain network.
    graph.output((tuple(returned), traced.logits, tuple(before_activation), embedding))
    for node in graph.nodes:
        if node.meta.get(_IN_PLACE) and _may_be_overwritten(model, node.args[0]):
            node.target = operator.iadd
    graph.lint()
    return compiled_code(model, graph)


_UNSAVED = (nn.BatchNorm2d, nn.SyncBatchNorm, nn.Conv2d, nn.Linear)  # their gradients need no output


def _may_be_overwritten(model: nn.Module, node: Any) -> bool:
    """Return whether only one node reads this value, a new tensor that no gradient is computed from.

    What is returned has another reader, the output.
    """
    if not isinstance(node, fx.Node) or len(node.users) != 1:
        return False
    if node.op != "call_module":
        return node.target is operator.mul  # squeeze and excitation
    module = model.get_submodule(str(node.target))
    if isinstance(module, imported("torchvision.ops.StochasticDepth")):  # it may return its input
        return _may_be_overwritten(model, node.args[0])
    # Exactly these types: a subclass may have an activation in it, whose gradient is computed from its output.
    return type(module) in _UNSAVED or isinstance(module, imported("torchvision.ops.FrozenBatchNorm2d"))


def compiled_code(model: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    """Compile a graph to a function of the network and the graph's inputs; tracebacks show its lines.

    Args:
        model: network; names the function in tracebacks.
        graph: graph of the network, or a part of it.
    """
    code = graph.python_code(root_module="self")
    filename = f"<graph {next(_SERIAL)} of {type(model).__name__}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)
    return namespace["forward"]


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """Put the model in one mode, and restore its modes afterwards."""
    # Module by module: BatchNorm layers frozen inside a training network keep their own flag.
    flags = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag


@dataclass(frozen=True)
class NodeValue:
    """The value of a node for a batch: a tensor, or a tuple of tensors, and whether a later operation overwrites it."""

    shape: tuple[int, ...] | None  # None for a tuple
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
    """Return the shapes of all tensors in the graph for two square images, without computing anything.

    Args:
        model: network; its tensors are replaced by fake ones meanwhile, so it does not change.
        traced: trace in the same mode.
        image_size: side of the images in pixels.
        training: whether modules are in training mode while probing.

    Raises:
        Untraceable: the graph does not accept images of this size.

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
    """Return what forward computes from the shape of square images in eval mode: non-tensor values, for any batch size.

    Args:
        model, traced, image_size: as in `probe`.

    Example:
        >>> numbers(vgg8, traced, image_size=32)
        {getitem: 32}
    """
    two, three = (_probed(model, traced, image_size, training=False, batch=n).numbers for n in (2, 3))
    return {node: number for node, number in two.items() if number == three[node]}


def _probed(model: nn.Module, traced: Trace, image_size: int, training: bool, *, batch: int = IMAGES) -> _Prober:
    prober = _Prober(model, traced.graph)
    parameter = next(model.parameters(), None)
    device, dtype = ("cpu", torch.float32) if parameter is None else (parameter.device, parameter.dtype)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with in_mode(model, training=training), _fake_tensors(model, fake), torch.no_grad(), fake:
        try:
            prober.run(torch.empty(batch, 3, image_size, image_size, device=device, dtype=dtype))
        except Exception as error:
            raise Untraceable(
                f"{type(model).__name__} does not accept images of {image_size}x{image_size} pixels "
                f"({type(error).__name__}: {str(error).partition(chr(10))[0]}); pass the size it was built for"
            ) from error
    return prober


@contextmanager
def _fake_tensors(model: nn.Module, fake: FakeTensorMode) -> Iterator[None]:
    # In training mode BatchNorm would count a step: FakeTensorMode alone writes into its real counter.
    holders: list[Any] = [holder for module in model.modules() for holder in (module._parameters, module._buffers)]
    originals = [dict(holder) for holder in holders]
    # It logs a traceback of what we catch: a network that takes images of one size alone.
    logger = logging.getLogger(FakeTensorMode.__module__)
    disabled, logger.disabled = logger.disabled, True
    try:
        for holder in holders:
            for name, tensor in holder.items():
                if tensor is not None:
                    holder[name] = fake.from_tensor(tensor)
        yield
    finally:
        logger.disabled = disabled
        for holder, original in zip(holders, originals, strict=True):
            holder.update(original)
