"""The front door for Python: distillation inside one's own training loop."""

import copy
import inspect
import itertools
import logging
import math
import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from difflib import get_close_matches
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn

from unikd_fast.engine.networks import StudentModule, with_features
from unikd_fast.methods import METHODS, OF_IMAGES, Method, RunContext, build_method, needs_of
from unikd_fast.models import FeatureExtractor, LogitsOnly
from unikd_fast.models.blocks import split_at_levels
from unikd_fast.models.graph import in_mode
from unikd_fast.teacher import Ensemble, OnlineTeacher
from unikd_fast.values import NO_LABEL, Batch, Features, Loss

_logger = logging.getLogger("unikd_fast")

_STEPS_PER_EPOCH = 1000  # of a loop whose length is not known: `fit_teacher` takes 1,000 batches, ramps count epochs
_USUAL_EPOCHS = 250


class Distiller(nn.Module):
    """A teacher and a student with a distillation method, as a loss for one's own training loop.

    It is a module that holds the student and what the method trains beside it, so AMP, gradient accumulation,
    DistributedDataParallel, torch.compile and trainers take it like any other; ``state_dict`` is what to save. The
    teacher is not part of it: a frozen copy of it runs in half precision where the processor has units for it.

    Args:
        teacher: trained network that maps images (N, 3, H, W) to logits (N, K), to a tuple that starts with them, or to
            an object or dictionary that has ``logits``. It is copied and left as it is. Of several, a list, the logits
            are the weighted mean, and features are those of the first.
        student: network of the same kind, which is trained in place.
        teacher_weights: weight of each of several teachers. If None, all are the same.
        method: name of a method, or a list, which is their sum; see docs/methods.md.
        image_size: H and W of the images.
        epochs: number of epochs that will be trained, which limits warm-ups to 8 % of them, and at whose end wkd's
            weights are 0. If None, 250.
        label_smoothing: label smoothing of the cross-entropy.
        feature_nodes: names of the modules whose outputs are the levels, by "teacher" and "student". If None, the ends
            of the stages.
        settings: settings of the method, such as ``alpha=4.0`` of unikd; of several methods a dictionary for each by
            its name.

    Raises:
        ValueError: a network has no logits, or lacks what the method needs; a setting is unknown or out of range; the
            method cannot be used in a loop.

    Example:
        >>> distiller = Distiller(teacher, student, method="unikd", epochs=30)
        >>> distiller.fit_teacher(loader)
        >>> optimizer = torch.optim.SGD(distiller.parameters(), lr=0.05, momentum=0.9)
        >>> loss = distiller(images, labels, epoch=0.0)
        >>> loss.total.backward()
    """

    def __init__(
        self,
        teacher: nn.Module | Sequence[nn.Module],
        student: nn.Module,
        *,
        teacher_weights: Sequence[float] | None = None,
        method: str | Sequence[str] = "unikd",
        image_size: int = 224,
        epochs: float | None = None,
        label_smoothing: float = 0.0,
        feature_nodes: Mapping[str, Sequence[str]] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        chosen = _settings(method, settings)
        self.needs = needs_of(chosen)
        _refuse(list(chosen), self.needs.teacher_batch_statistics)
        if epochs is not None and not epochs > 0:
            raise ValueError(f"Distiller: epochs must be above 0, got {epochs}; None stands for {_USUAL_EPOCHS}")
        nodes = feature_nodes or {}
        if spare := sorted(nodes.keys() - {"student", "teacher"}):
            raise ValueError(f"Distiller: feature_nodes has {spare[0]!r}; its keys are 'student' and 'teacher'")
        teachers = [teacher] if isinstance(teacher, nn.Module) else list(teacher)
        if not teachers:
            raise ValueError("Distiller: the list of teachers is empty; give one network or more")
        first, *others = teachers
        networks: dict[str, FeatureExtractor | LogitsOnly] = {}
        for role, network in (("student", student), ("teacher", copy.deepcopy(first))):
            networks[role] = with_features(
                network,
                role,
                self.needs,
                image_size=image_size,
                nodes=nodes.get(role),
            )
        members = [networks["teacher"], *(LogitsOnly(copy.deepcopy(other)) for other in others)]
        ours = _classes(networks["student"], image_size)
        for member in members:
            if (theirs := _classes(member, image_size)) != ours:
                raise ValueError(
                    f"Distiller: the student has {ours} classes and the teacher {theirs}; fine-tune the teacher on the "
                    "student's classes, or give the student the teacher's"
                )
        if self.needs.two_classes and ours < 2:
            raise ValueError(
                f"Distiller: method = {method!r} weighs classes against each other and needs at least 2, got {ours}; "
                "use another method, such as unikd or kd"
            )
        whole: nn.Module = Ensemble(members, teacher_weights) if others or teacher_weights is not None else members[0]
        device = _device(student)
        extractors = {role: each if isinstance(each, FeatureExtractor) else None for role, each in networks.items()}
        blocks = extractors["teacher"]
        whole.to(device)
        context = RunContext(
            student=extractors["student"],
            teacher=extractors["teacher"],
            teacher_blocks=None if blocks is None else lambda: split_at_levels(blocks),
            num_classes=ours,
            device=device,
            total_steps=int(_STEPS_PER_EPOCH * (_USUAL_EPOCHS if epochs is None else epochs)),
            steps_per_epoch=_STEPS_PER_EPOCH,
            label_smoothing=label_smoothing,
        )
        self.method: Method[Any] = build_method(chosen, context)
        if self.method.head is not None and not self.method.head.fixed and self.method.companion is None:
            raise ValueError(
                "Distiller: teacher_head = 'anchored' trains the teacher's head with an optimiser of its own; set it "
                "to 'prefit' and call fit_teacher, or use unikd train"
            )
        self.module = StudentModule(networks["student"], self.method.adapter, self.method.companion).to(device)
        self.head = None if self.method.fixed_head is None else self.method.fixed_head.module
        if self.head is not None:
            self.head.requires_grad_(False)  # DistributedDataParallel would wait for its gradients
        # Not a submodule: it is neither trained nor saved, and stays in eval mode and in its own precision.
        self._teacher = [OnlineTeacher(whole.eval(), channels_last=device.type == "cuda")]
        self._settled = False
        as_asked = any(getattr(own, "head_steps", None) for own in chosen.values())
        self._training_epochs = None if as_asked else epochs
        self._fitted = self.head is None
        self.method.set_progress(float("inf"))

    @property
    def teacher(self) -> OnlineTeacher:
        """Return the frozen teacher as it runs."""
        return self._teacher[0]

    @property
    def student(self) -> nn.Module:
        """Return the network that is trained: the one that was given, or in a copy of the Distiller its copy."""
        return self.module.network.get_submodule("plain")

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        """Yield what is to be trained: the student and what the method trains beside it."""
        return self.module.parameters(recurse)

    def fit_teacher(self, loader: Iterable[Any], *, steps: int | None = None) -> None:
        """Fit the method's head to the teacher, if it has one; call it once, before training, on all processes.

        Args:
            loader: batches of training images: tensors (N, 3, H, W), tuples that start with one, or dictionaries with
                "images", "image" or "pixel_values". It is read again as often as needed.
            steps: number of batches. If None, ``head_steps`` of the method, by default 1,000 and at most as many as the
                training has, where ``epochs`` and the length of the loader say that.

        Raises:
            ValueError: the loader is empty, or a batch has no images.
        """
        head = self.method.head
        if head is None or self._fitted:
            return
        if steps is not None:
            if operator.index(steps) < 1:
                raise ValueError(f"Distiller.fit_teacher: steps must be 1 or more, got {steps}")
            head.steps = steps
        elif self._training_epochs is not None and isinstance(loader, Sized):
            head.steps = max(1, min(head.steps, math.ceil(self._training_epochs * len(loader))))
        _logger.info("the teacher's head is fitted first, on %d batches", head.steps)
        head.module.requires_grad_(True).train()
        with torch.enable_grad():
            self.method.prepare(self._features(loader))
        if dist.is_initialized() and dist.get_world_size() > 1:
            for tensor in (*head.module.parameters(), *head.module.buffers()):
                dist.broadcast(tensor.detach(), 0)  # running statistics are each process's own
        self._fitted = True

    def forward(
        self,
        images: Tensor,
        labels: Tensor | None = None,
        *,
        epoch: float | None = None,
        second: Tensor | None = None,
    ) -> Loss:
        """Return the loss of a batch and its terms, in fp32, also under autocast.

        Args:
            images: images (N, 3, H, W), preprocessed for both networks.
            labels: classes (N,), with -100 for samples without one, or class weights (N, K) as mixup makes them. If
                None, no sample has one and there is no cross-entropy.
            epoch: epochs trained so far, for warm-ups; may be fractional. If None, the weights are those after them,
                and those of wkd do not fall.
            second: another view of the images, for methods that compare two (mlkd).

        Raises:
            ValueError: the method needs labels, a class a sample or a second view, or `fit_teacher` was not called.
        """
        if not self._fitted:
            raise ValueError(
                "Distiller: the method's head is not fitted to the teacher; call fit_teacher(loader) before training"
            )
        if self.needs.second_view and second is None:
            raise ValueError("Distiller: the method compares two views of an image; pass the other one as second=...")
        if labels is None:
            if self.needs.labels:
                raise ValueError(
                    f"Distiller: {type(self.method).__name__} needs labels; pass them, or use a method that needs "
                    "none, such as unikd or kd"
                )
            labels = torch.full((len(images),), NO_LABEL, device=images.device)
        if self.needs.hard_labels and labels.is_floating_point():
            raise ValueError(
                f"Distiller: {type(self.method).__name__} needs one class a sample, got {labels.dtype} labels of shape "
                f"{tuple(labels.shape)}; pass class indices as int64, or use a method that takes weights, such as kd"
            )
        if epoch is not None:
            self.method.set_progress(epoch)
        self._settle(images)
        with torch.no_grad():
            features = self.teacher(images)
            other = self.teacher(second) if second is not None and self.needs.second_view else None
        target = self.method.target(features, other)
        student = self.module(images, second if self.needs.second_view else None)
        with torch.autocast(images.device.type, enabled=False):
            return self.method.loss(student, target, Batch(images, labels, labels.new_zeros(len(images))))

    def get_extra_state(self) -> Tensor:
        """Return whether the head is fitted, as a 0-d tensor: files of tensors alone (safetensors) hold it too."""
        return torch.tensor(self._fitted)

    def set_extra_state(self, state: Tensor) -> None:
        """Restore what `get_extra_state` returned."""
        head = self.method.fixed_head
        self._fitted = bool(state)
        if head is not None and self._fitted:
            head.fix()

    def train(self, mode: bool = True) -> Self:
        """Set the mode of what is trained; the fitted head stays in eval mode."""
        super().train(mode)
        if self.head is not None and self._fitted:
            self.head.eval()
        return self

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        device = _device(self.module)
        self.teacher.to(device)
        self.method.to(device)
        return self

    def _settle(self, images: Tensor) -> None:
        """Leave fp16 on the first batch if its range is not sufficient, on all processes alike."""
        if not self._settled and self.teacher.precision == "fp16":
            finite = torch.tensor(float(self.teacher.is_finite([images])), device=images.device)
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(finite, dist.ReduceOp.MIN)
            self.teacher.settle(bool(finite))
        self._settled = True

    def _features(self, loader: Iterable[Any]) -> Iterator[Features]:
        device = _device(self.module)
        for read in itertools.count():
            empty = True
            for batch in loader:
                empty = False
                images = _images(batch).to(device)
                self._settle(images)
                yield self.teacher(images)
            if empty:
                what = "can be read only once, and has too few batches" if read else "yields no batches"
                raise ValueError(
                    f"Distiller.fit_teacher: the loader {what}; give one that can be read again, such as a DataLoader"
                )


def _settings(method: str | Sequence[str], given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings by name of the method, validated.

    Raises:
        ValueError: a method or setting is unknown, or a value is out of range.
    """
    names = [method] if isinstance(method, str) else list(method)
    if not names or len(set(names)) < len(names):
        raise ValueError(f"Distiller: method = {names}; name at least one method, and each once")
    for name in names:
        if name not in METHODS:
            near = get_close_matches(name, METHODS, n=3, cutoff=0.4)
            raise ValueError(f"Distiller: no method {name!r}; nearest: {', '.join(near or METHODS)}")
    one = len(names) == 1
    spare = [] if one else sorted(key for key in given if key not in names or not isinstance(given[key], Mapping))
    if spare:
        raise ValueError(
            f"Distiller: {spare[0]} = {given[spare[0]]!r}: settings of several methods are dictionaries by their "
            f"names, {', '.join(f'{name}={{...}}' for name in names)}"
        )
    return {name: _validated(name, given if one else given.get(name, {})) for name in names}


def _validated(name: str, given: Mapping[str, Any]) -> Any:
    from pydantic import TypeAdapter, ValidationError

    kind = METHODS[name].settings_class
    known = list(inspect.signature(kind).parameters)
    for key in given:
        if key not in known:
            near = get_close_matches(key, known, n=3, cutoff=0.4)
            raise ValueError(f"Distiller: {name} has no setting {key!r}; nearest: {', '.join(near or known)}")
    try:
        return TypeAdapter(kind).validate_python(dict(given))
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(map(str, first["loc"]))
        raise ValueError(f"Distiller: {key} = {first['input']!r} of {name} is not valid: {first['msg']}") from None


def _refuse(names: Sequence[str], batch_statistics: bool) -> None:
    if "crd" in names:
        raise ValueError(
            "Distiller: crd compares with features of all other samples, which it keeps by sample; use unikd train"
        )
    if "none" in names:
        raise ValueError("Distiller: method 'none' learns from no teacher; use the cross-entropy")
    if of_detectors := [name for name in names if name not in OF_IMAGES]:
        raise ValueError(
            f"Distiller: {of_detectors[0]} compares the maps of detectors near objects, and a Distiller is for "
            "classification; use unikd train with a detection data set"
        )
    if batch_statistics:
        raise ValueError("Distiller: teacher_batch_statistics = True needs the engine; use unikd train")


def _images(batch: Any) -> Tensor:
    found = batch
    if isinstance(batch, Mapping):
        found = next((batch[key] for key in ("images", "image", "pixel_values") if key in batch), None)
    elif isinstance(batch, tuple | list) and batch:
        found = batch[0]
    if not isinstance(found, Tensor):
        raise ValueError(
            "Distiller.fit_teacher: a batch must be images (N, 3, H, W), a tuple that starts with them, or a "
            f"dictionary with images, image or pixel_values, got {type(batch).__name__}"
        )
    return found


def _device(module: nn.Module) -> torch.device:
    parameter = next(module.parameters(), None)
    return torch.device("cpu") if parameter is None else parameter.device


@torch.no_grad()
def _classes(network: FeatureExtractor | LogitsOnly, image_size: int) -> int:
    if isinstance(network, FeatureExtractor):  # found when it was built
        return network.num_classes
    images = torch.zeros(2, 3, image_size, image_size, device=_device(network))
    with in_mode(network, training=False):
        logits: Tensor = network(images).logits
    if logits.dim() != 2:
        raise ValueError(f"Distiller: a network must return logits (N, K), got {tuple(logits.shape)} for two images")
    return logits.shape[1]
