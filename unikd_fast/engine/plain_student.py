"""The student's network as the run built it, without the weights it started from, and with those of a checkpoint."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass

from torch import Tensor, nn

from unikd_fast.config import ConfigError
from unikd_fast.data.roots import expand_weights
from unikd_fast.models import Preprocessing, bare_model

_USUAL_CLASSES = 1000


@dataclass(frozen=True)
class PlainStudent:
    """A plain network in fp32, in eval mode, on the CPU.

    Attributes:
        name: as in a configuration, "torchvision/resnet18".
        num_classes: K.
        network: with its weights; the checkpoint's tensors, bit for bit.
        fresh: builds it once more, with random ones.
        preprocessing: of its images, where that is known.
    """

    name: str
    num_classes: int
    network: nn.Module
    fresh: Callable[[], nn.Module]
    preprocessing: Preprocessing | None = None


def load_student(
    name: str, started_from: str | None, tensors: Mapping[str, Tensor], *, num_classes: int | None
) -> PlainStudent:
    """Builds a student and loads its tensors strictly; their shapes say how many classes it has.

    Args:
        name: of the network.
        started_from: student.weights of its run. Published weights are not loaded, but may come with another input size
            or a normalisation of their own.
        tensors: its state.
        num_classes: a first guess; the data set may know it better than the configuration.

    Raises:
        ConfigError: there is no such network, or the tensors are not its state.

    Example:
        >>> load_student("torchvision/resnet18", None, load_file("student.safetensors"), num_classes=None).num_classes
        100
    """
    guess = num_classes or _USUAL_CLASSES
    network = _build(name, started_from, tensors, guess)
    classes = _classes(network, tensors, guess)
    if classes != guess:
        network = _build(name, started_from, tensors, classes)
    expected = network.state_dict()
    other = [key for key in expected if key in tensors and tensors[key].dtype != expected[key].dtype]
    try:
        network.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise ConfigError(f"the weights are not those of student.model = {name!r}: {error}") from error
    if other:
        raise ConfigError(
            f"the weights are not those of student.model = {name!r}: {other[0]} is {tensors[other[0]].dtype} instead "
            f"of {expected[other[0]].dtype}, and so are {len(other) - 1} more"
        )

    def fresh() -> nn.Module:
        return _for_use(_build(name, started_from, network.state_dict(), classes))

    return PlainStudent(name, classes, _for_use(network), fresh)


def _for_use(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)


def _classes(network: nn.Module, tensors: Mapping[str, Tensor], guess: int) -> int:
    """The number that stands in the tensors where a network of ``guess`` classes has that one."""
    sizes: set[int] = set()
    for name, expected in network.state_dict().items():
        if name in tensors and tensors[name].ndim == expected.ndim:
            pairs = zip(expected.shape, tensors[name].shape, strict=True)
            sizes |= {found for ours, found in pairs if ours == guess != found}
    return sizes.pop() if len(sizes) == 1 else guess


def _build(name: str, started_from: str | None, tensors: Mapping[str, Tensor], num_classes: int) -> nn.Module:
    weights = started_from
    if weights is not None:
        with suppress(ValueError):  # a variable that is not set where the student is exported
            weights = expand_weights("student", weights)
    try:
        return bare_model(name, num_classes=num_classes, weights=weights, state=tensors, role="student")
    except ValueError as error:
        raise ConfigError(str(error)) from error
