"""Teacher and student as configured, and their first forward pass."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unikd_fast.config import Config, ConfigError
from unikd_fast.config.load import single_teachers
from unikd_fast.data.roots import named_as_configured
from unikd_fast.data.splits import DataSplits
from unikd_fast.engine.inputs import affine_between, network_size, teacher_constants
from unikd_fast.errors import lacks_memory
from unikd_fast.given import find, is_given
from unikd_fast.methods import Needs
from unikd_fast.models import FeatureExtractor, LogitsOnly, bare_model, build_model, checkpoint_blocks, extract_features
from unikd_fast.models.graph import in_mode
from unikd_fast.models.hooks import NoLogits
from unikd_fast.teacher import Ensemble
from unikd_fast.values import Features, StudentOutput

T = TypeVar("T")
TeacherNetwork = FeatureExtractor | LogitsOnly | Ensemble

# What the messages of functions begin with, and the keys that a user knows.
_KEYS = {"build_model": "model", "extract_features": "model", "load_weights": "weights"}


def check_forward(
    run: Callable[[Tensor], T],
    modes: Mapping[nn.Module, bool],
    *,
    what: str,
    image_size: int,
    key: str = "data.image_size",
    batch: int = 2,
    device: torch.device | str = "cpu",
) -> T:
    """Run networks once on images (N, 3, H, W) of zeros, without gradients, and return their outputs.

    N is 2, or 1 if a micro-batch has one sample; no other size matters to a network. Parameters, buffers, modes and
    random state are restored afterwards.

    Args:
        run: function that calls the networks.
        modes: networks that it runs, and whether each is in training mode meanwhile.
        what: key and value that the networks come from.
        image_size: H and W.
        key: key that decides on the size, for the message.
        batch: samples of a micro-batch.
        device: device of the networks.

    Raises:
        ConfigError: the networks do not accept images of this size, or a single sample in training.
    """

    def attempt(count: int) -> T:
        images = torch.zeros(count, 3, image_size, image_size, device=device)
        with _unchanged(modes, torch.device(device)), torch.no_grad():
            return run(images)

    count = min(batch, 2)
    try:
        return attempt(count)
    except Exception as error:
        if lacks_memory(error):
            raise
        if isinstance(error, NoLogits):
            raise ConfigError(f"{what}: {error}") from error
        said = f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        size = f"{image_size}x{image_size}"
        if count == 1 and any(modes.values()) and _succeeds(lambda: attempt(2)):
            raise ConfigError(
                f"{what} cannot be trained on micro-batches of 1 image of {size} ({said}): BatchNorm "
                "needs more than one sample a process; raise train.global_batch_size or lower train.accumulation_steps"
            ) from error
        larger = "" if key == "data.image_size" else ", and data.image_size to at least that"
        raise ConfigError(
            f"{what} does not take images of {size} ({said}); set {key} to the size it was built for{larger}"
        ) from error


def _succeeds(attempt: Callable[[], object]) -> bool:
    try:
        attempt()
    except Exception:
        return False
    return True


@contextmanager
def _unchanged(modes: Mapping[nn.Module, bool], device: torch.device) -> Iterator[None]:
    """Put networks into these modes, and restore them and the random state afterwards."""
    holders = [module._buffers for network in modes for module in network.modules()]
    names = [dict(holder) for holder in holders]  # a forward may put another tensor in a buffer's place
    values = [(buffer, buffer.clone()) for holder in holders for buffer in holder.values() if buffer is not None]
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng([device] if device.type == "cuda" else []))
        for network, training in modes.items():
            stack.enter_context(in_mode(network, training=training))
        try:
            yield
        finally:
            for holder, buffers in zip(holders, names, strict=True):
                holder.update(buffers)
            for buffer, value in values:
                buffer.copy_(value)


class StudentModule(nn.Module):
    """The student with what the method trains alongside it.

    Args:
        network: maps images (N, 3, H, W) to Features.
        adapter: maps Features to any pytree of tensors. If None, there is none.
        companion: further trained parameters, used by the loss alone. If None, there are none.
        autocast: dtype that operations are cast to. If None, nothing is cast, or the engine casts.
    """

    def __init__(
        self,
        network: nn.Module,
        adapter: nn.Module | None,
        companion: nn.Module | None,
        *,
        autocast: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.network, self.adapter, self.companion = network, adapter, companion
        self._autocast = autocast

    def forward(self, images: Tensor, second: Tensor | None = None) -> StudentOutput:
        """Run the student on images (N, 3, H, W), and then on a second view of them: BatchNorm sees each separately."""
        if self._autocast is None:
            return self._forward(images, second)
        with torch.autocast(images.device.type, self._autocast):
            return self._forward(images, second)

    def _forward(self, images: Tensor, second: Tensor | None) -> StudentOutput:
        features: Features = self.network(images)
        adapted = None if self.adapter is None else self.adapter(features)
        if second is None:
            return StudentOutput(features.logits, adapted)
        of_second: Features = self.network(second)
        adapt = getattr(self.adapter, "second", None)
        return StudentOutput(features.logits, adapted, of_second.logits, None if adapt is None else adapt(of_second))


def build_network(
    config: Config, role: str, splits: DataSplits, *, needs: Needs, with_weights: bool = True, batch: int | None = None
) -> FeatureExtractor | LogitsOnly:
    """Build teacher or student; it returns its logits and the features that are needed.

    Args:
        config: configuration of the run.
        role: "student" or "teacher".
        splits: data set.
        needs: what the method needs of the network.
        with_weights: whether to load its weights; without them only its shapes are of use.
        batch: samples of a micro-batch that it is trained on. If None, it is not trained.

    Raises:
        ConfigError: the network does not accept the data's images, or so few of them; see `check_forward`.
    """
    section = config.student if role == "student" else config.teacher
    assert section is not None
    key, classes = section.weights_key, splits.num_classes
    what = f"{role}.model = {section.model}"
    naming = nullcontext() if section.weights is None else named_as_configured(role, section.weights)
    with _named_first(role, what), naming as weights:
        if is_given(weights):
            # Not to(torch.float32), which takes the real part of complex tensors.
            model = copy.deepcopy(find(weights, f"{role}.weights")).cpu().float()
        elif with_weights:
            model = build_model(
                section.model,
                num_classes=classes,
                model_args=section.model_args,
                weights=weights,
                weights_key=key,
                new_classifier=role == "student" or (config.teacher is not None and config.teacher.is_trained),
                role=role,
            )
        else:
            model = bare_model(
                section.model, num_classes=classes, model_args=section.model_args, weights=weights, role=role
            )
    if role == "teacher" and needs.teacher_batch_statistics:
        _drop_running_statistics(model)
    if role == "student" and config.train.activation_checkpointing:
        checkpoint_blocks(model)
    size = network_size(config, role)
    _check_logits(LogitsOnly(model), what, splits, batch, image_size=size, key=f"{role}.image_size")
    nodes, most = section.feature_nodes, config.distill.max_levels
    with _named_first(role, what):
        network = with_features(model, role, needs, image_size=size, nodes=nodes, max_levels=most)
    network.resize_to = None if size == splits.image_size else size
    return network


@contextmanager
def _named_first(role: str, what: str) -> Iterator[None]:
    """Begin messages of the functions of `models`, which a configuration does not name, with key and value."""
    try:
        yield
    except (ValueError, FileNotFoundError, ConnectionError) as error:
        function, _, said = str(error).partition(": ")
        if function not in _KEYS:
            raise
        key = what if _KEYS[function] == "model" else f"{role}.{_KEYS[function]}"
        raise type(error)(said if said.startswith(f"{role}.") else f"{key}: {said}") from error


def with_features(
    model: nn.Module,
    role: str,
    needs: Needs,
    *,
    image_size: int,
    nodes: Sequence[str] | None = None,
    max_levels: int = 4,
) -> FeatureExtractor | LogitsOnly:
    """Return a network that returns its logits and the features that a method needs of it.

    Args:
        model: network that maps images to logits, see `LogitsOnly`.
        role: "student" or "teacher".
        needs: what the method needs.
        image_size, nodes, max_levels: see `extract_features`.

    Raises:
        ValueError: the network lacks what is needed, or is a TorchScript module.
    """
    if isinstance(model, torch.jit.ScriptModule):  # neither hooks nor copies that can be frozen
        raise ValueError(
            f"the {role} is a TorchScript module, which cannot be distilled; give the network it was made of"
        )
    before_activation = needs.before_activation_of(role)
    levels = needs.levels or before_activation
    if not levels and not needs.embedding:
        return LogitsOnly(model)
    return extract_features(
        model,
        image_size=image_size,
        max_levels=max_levels,
        nodes=nodes,
        levels=levels,
        before_activation=before_activation,
        embedding=needs.embedding,
    )


def _drop_running_statistics(model: nn.Module) -> None:
    """Drop the running statistics of BatchNorms, so that they normalise by the batch in eval mode too."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean = module.running_var = module.num_batches_tracked = None


def _check_logits(
    network: LogitsOnly, what: str, splits: DataSplits, batch: int | None, *, image_size: int, key: str
) -> None:
    """Refuse a network that cannot be evaluated on these images, or with ``batch`` that cannot be trained on them."""
    settings: dict[str, Any] = {"what": what, "image_size": image_size, "key": key}
    logits = check_forward(network, {network: False}, **settings).logits
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (2, splits.num_classes):
        raise ConfigError(
            f"{what} must return logits (2, {splits.num_classes}) for two images of this data, got {shape}; use a "
            "model or weights for this data"
        )
    if batch is not None:
        check_forward(network, {network: True}, **settings, batch=batch)


def require_teacher_weights(config: Config) -> None:
    """Refuse a teacher without weights: random ones must be asked for.

    Raises:
        ConfigError: it has none.
    """
    assert config.teacher is not None
    if config.teacher.weights is None:
        raise ConfigError(
            f"teacher.weights is not set, so teacher {config.teacher.model} would be untrained; give a file or an "
            "identifier, add teacher.training to train it first, or allow random weights with --set "
            "teacher.weights=random"
        )


def build_teacher_network(
    config: Config, splits: DataSplits, *, needs: Needs, with_weights: bool = True, batch: int | None = None
) -> TeacherNetwork:
    """Build the teacher as `build_network` does; random weights must be requested, and are those of the seed."""
    require_teacher_weights(config)
    assert config.teacher is not None
    torch.manual_seed(config.run.seed + 1)
    first, *others = single_teachers(config)
    network = build_network(first, "teacher", splits, needs=needs, with_weights=with_weights, batch=batch)
    if not others:
        return network
    members: list[nn.Module] = [network]
    for number, single in enumerate(others):
        try:
            members.append(build_network(single, "teacher", splits, needs=Needs(), with_weights=with_weights))
        except (ValueError, OSError) as error:
            said = str(error)
            said = said.removeprefix("teacher") if said.startswith("teacher.") else f": {said}"
            raise ConfigError(f"teacher.ensemble[{number}]{said}") from error
    weights = [network.weight for network in config.teacher.networks]
    if not with_weights:  # nor perhaps the files that say how images are made
        return Ensemble(members, weights)
    constants = [teacher_constants(single, splits) for single in (first, *others)]
    return Ensemble(members, weights, [affine_between(constants[0], own) for own in constants])


def first_network(network: TeacherNetwork) -> FeatureExtractor | LogitsOnly:
    """Return the network whose features a method sees: the teacher itself, or the first of several."""
    return cast(LogitsOnly, network.first) if isinstance(network, Ensemble) else network
