"""A network as torch.fx graphs, one for training and one for evaluation, that run on the network itself.

A torch.fx.GraphModule copies the module hierarchy. Here the generated code gets the network as its `self`: parameters,
buffers, training flags and state-dict keys are the network's own, by construction and for good.
"""

import inspect
import itertools
import linecache
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torchvision
from timm.models import get_notrace_functions, get_notrace_modules
from torch import Tensor, fx, nn

from unikd_fast.models.checkpointing import Checkpointed

Forward = Callable[[nn.Module, Tensor], tuple[tuple[Tensor, ...], Tensor, tuple[Tensor, ...], Tensor | None]]

# Left whole but for mere sequences of layers (Conv2dNormActivation), whose activation is of interest.
_VISION_OPS = tuple(
    c
    for _, c in inspect.getmembers(torchvision.ops, inspect.isclass)
    if issubclass(c, nn.Module) and not issubclass(c, nn.Sequential)
)
_SERIAL = itertools.count()


class _OutputTracer(fx.Tracer):
    """Traces, and notes which node holds the output of each module and of each operation.

    Operations are named as in torchvision's feature extraction: the path of the module that calls them, the
    operation, and `_1`, `_2`, ... where that module calls it again (`layer1.0.relu_1`).
    """

    # What forward computes from buffers alone (relative position biases) is traced too: by default torch.fx computes it
    # once and freezes the result.
    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__(
            autowrap_modules=(math, torchvision.ops),
            autowrap_functions=tuple(get_notrace_functions()),
        )
        self.leaves = (Checkpointed, *_VISION_OPS, *get_notrace_modules())
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

    def create_proxy(self, kind: str, target: fx.node.Target, *args: Any, **kwargs: Any) -> fx.Proxy:
        proxy = super().create_proxy(kind, target, *args, **kwargs)
        if kind in ("call_function", "call_method"):
            operation = target if isinstance(target, str) else getattr(target, "__name__", str(target))
            self._note(f"{self._path}.{operation}".lstrip("."), proxy.node)
        return proxy

    def _note(self, name: str, node: fx.Node) -> None:
        key = name
        while key in self.outputs:  # a module may bear the name that a second call would get
            self._calls[name] += 1
            key = f"{name}_{self._calls[name]}"
        self.outputs[key] = node


@dataclass(frozen=True)
class Trace:
    """The graph of one mode and the nodes that module paths and operation names stand for."""

    graph: fx.Graph
    outputs: Mapping[str, fx.Node]  # in order of execution
    logits: fx.Node


def trace(model: nn.Module, *, training: bool) -> Trace:
    """Trace the forward pass of `model` in one mode; the model is left as it was.

    Args:
        model: takes (N, 3, H, W) images and returns (N, K) logits, or a tuple that starts with them.
        training: which mode.

    Raises:
        ValueError: torch.fx cannot follow the model's forward, or it returns no tensor.

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
            raise ValueError(
                f"extract_features: torch.fx cannot trace {type(model).__name__} ({type(error).__name__}: {error}); "
                "use a model whose forward does not branch on the values of tensors"
            ) from error
    # Otherwise a tensor that forward makes out of nothing would be frozen into the graph, on one device.
    constants = sorted(set(vars(model)) - attributes)
    if constants:
        for name in constants:
            delattr(model, name)
        raise ValueError(
            f"extract_features: the forward of {type(model).__name__} creates {len(constants)} tensor(s) that do not "
            "depend on its input, which torch.fx would freeze; register them as buffers of the model"
        )
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    # Networks with auxiliary heads return (logits, auxiliary logits, ...) in training mode, maybe as a named tuple.
    if isinstance(result, fx.Node) and isinstance(result.target, type) and issubclass(result.target, tuple):
        result = result.args
    logits = result[0] if isinstance(result, tuple | list) and result else result
    if not isinstance(logits, fx.Node):
        raise ValueError(f"extract_features: {type(model).__name__} must return logits (N, K), got {type(result)}")
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
    """Turn a trace into a function of (model, images) that returns (levels, logits, before activation, embedding).

    Args:
        model: gives the function its name in tracebacks.
        traced: its graph gets a new output.
        levels: the nodes to return.
        copied: those of them that are copied as soon as they are computed, because a later operation overwrites them.
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
    # Nothing is pruned: an auxiliary head keeps its BatchNorm statistics, as in the plain network.
    graph.output((tuple(returned), traced.logits, tuple(before_activation), embedding))
    graph.lint()
    return compiled_code(model, graph)


def compiled_code(model: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    """A graph as a function of the network and the graph's inputs; tracebacks show its lines.

    Args:
        model: gives the function its name in tracebacks.
        graph: of it, or a part.
    """
    code = graph.python_code(root_module="self")
    filename = f"<graph {next(_SERIAL)} of {type(model).__name__}>"
    linecache.cache[filename] = (len(code.src), None, code.src.splitlines(keepends=True), filename)
    namespace = dict(code.globals)
    exec(compile(code.src, filename, "exec"), namespace)
    return namespace["forward"]


@contextmanager
def in_mode(model: nn.Module, *, training: bool) -> Iterator[None]:
    """The model in one mode, and afterwards as it was."""
    # Module by module: frozen BatchNorm layers inside a training network keep their own flag.
    flags = [(module, module.training) for module in model.modules()]
    model.train(training)
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
