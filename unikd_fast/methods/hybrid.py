"""Several methods at once: their terms are summed, and the cross-entropy is counted once."""

from collections import Counter
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import nn

from unikd_fast.kernels import reference
from unikd_fast.methods.context import RunContext
from unikd_fast.methods.method import Method, Needs, NoSettings
from unikd_fast.values import Batch, Features, Loss, StudentOutput, Target


class Hybrid(Method[NoSettings]):
    """L = L_CE + Σ_m (L_m - w_m L_CE), where w_m is the method's own weight of the cross-entropy.

    The cross-entropy is that of the first view's logits. Each part gets its own adapted features and `Target.extra`;
    terms and metrics keep their names, prefixed by the part's name if two parts have the same.

    Args:
        parts: methods by name; their ``ce_weight`` is set to 0.
        context: what the run knows.

    Raises:
        ValueError: there are fewer than two parts, one needs no teacher, or two have a head.
    """

    def __init__(self, parts: Mapping[str, Method[Any]], context: RunContext) -> None:
        super().__init__(NoSettings(), context)
        if len(parts) < 2:
            raise ValueError(f"Hybrid: a hybrid needs at least two methods, got {list(parts)}; use the method itself")
        for name, part in parts.items():
            if not part.needs.teacher:
                raise ValueError(f"Hybrid: {name} learns from no teacher and adds nothing to a hybrid; leave it out")
            part.ce_weight = 0.0
        heads = {name: part.head for name, part in parts.items() if part.head is not None}
        if len(heads) > 1:
            raise ValueError(f"Hybrid: only one part may have a head on the teacher's features, got {list(heads)}")
        self.parts = dict(parts)
        self.needs = reduce(Needs.union, (part.needs for part in parts.values()))
        own = {name: [term for term in part.term_names if term != "ce"] for name, part in parts.items()}
        self._public = _without_clashes(own)
        for name, head in heads.items():
            self.head = head
            head.term = self._public[name].get(head.term, head.term)
        adapters = {name: part.adapter for name, part in parts.items() if part.adapter is not None}
        companions = {name: part.companion for name, part in parts.items() if part.companion is not None}
        if adapters:
            self.adapter = _Adapters(adapters)
        if companions:
            self.companion = nn.ModuleDict(companions)

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("ce", *(public for names in self._public.values() for public in names.values()))

    def prepare(self, batches: Iterable[Features]) -> None:
        batches = iter(batches)  # each part continues where the previous one stopped
        for part in self.parts.values():
            part.prepare(batches)

    def set_progress(self, epochs: float) -> None:
        for part in self.parts.values():
            part.set_progress(epochs)

    def target(self, teacher: Features, second: Features | None = None) -> Target:
        found = {name: part.target(teacher, second) for name, part in self.parts.items()}
        gaussians = [target.gaussian for target in found.values() if target.gaussian is not None]
        assert len(gaussians) <= 1, "a target holds one Gaussian, as does a cache"
        extra = {name: target.extra for name, target in found.items() if target.extra is not None}
        whole = super().target(teacher, second)
        return whole._replace(gaussian=gaussians[0] if gaussians else None, extra=extra or None)

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        ce = reference.cross_entropy(student.logits, batch.labels, label_smoothing=self.label_smoothing)
        total, terms = ce, {"ce": ce.detach()}
        for name, part in self.parts.items():
            extra = None if target.extra is None else target.extra.get(name)
            found = part.loss(_own(student, name), target._replace(extra=extra), batch)
            total = total + found.total
            terms |= {public: found.terms[term] for term, public in self._public[name].items()}
        return Loss(total, terms)

    def inside(self, student: StudentOutput) -> Any:
        return [part.inside(_own(student, name)) for name, part in self.parts.items()]

    def device_bytes(self, batch: int) -> int:
        return sum(part.device_bytes(batch) for part in self.parts.values())

    @property
    def uncacheable(self) -> str | None:
        return "; ".join(filter(None, (part.uncacheable for part in self.parts.values()))) or None

    @property
    def uncapturable(self) -> str | None:
        return "; ".join(filter(None, (part.uncapturable for part in self.parts.values()))) or None

    def to(self, device: torch.device) -> None:
        for part in self.parts.values():
            part.to(device)

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


class _Adapters(nn.Module):
    """Maps the student's Features to a dictionary of each part's adapter output."""

    def __init__(self, adapters: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(adapters)

    def forward(self, features: Features) -> dict[str, Any]:
        return {name: adapter(features) for name, adapter in self.parts.items()}

    def second(self, features: Features) -> dict[str, Any]:
        """Return the output for the second view of those that have one."""
        adapts = {name: getattr(adapter, "second", None) for name, adapter in self.parts.items()}
        return {name: adapt(features) for name, adapt in adapts.items() if adapt is not None}


def _own(student: StudentOutput, name: str) -> StudentOutput:
    """Return the output with what the adapter of this part made."""
    adapted, second = (None if each is None else each.get(name) for each in (student.adapted, student.second_adapted))
    return student._replace(adapted=adapted, second_adapted=second)


def _without_clashes(own: Mapping[str, list[str]]) -> dict[str, dict[str, str]]:
    """Return public names for each part's own names, prefixed by the part if another part has the same."""
    count = Counter(name for names in own.values() for name in names)
    return {part: {name: name if count[name] == 1 else f"{part}_{name}" for name in own[part]} for part in own}
