"""Methods built from keywords: those of their settings, and those of the run around them."""

from dataclasses import fields
from types import SimpleNamespace
from typing import Any

from unikd_fast.methods import (
    AT,
    CRD,
    FLG,
    METHODS,
    OFD,
    WKD,
    Blockwise,
    FitNet,
    Hybrid,
    Method,
    ReviewKD,
    RunContext,
    UniKD,
    UniKDDev,
)

# What is given by place, by the name it has here.
_SHAPES = ("student_shapes", "teacher_shapes")
_WIDTHS = ("student_width", "teacher_width")
_BY_PLACE: dict[type, tuple[str, ...]] = {
    AT: _SHAPES,
    FitNet: _SHAPES,
    OFD: (*_SHAPES, "teacher_norms"),
    ReviewKD: (*_SHAPES, *_WIDTHS),
    FLG: (*_WIDTHS, "classifier_weight"),
    WKD: (*_SHAPES, *_WIDTHS, "classifier_weight"),
    CRD: (*_WIDTHS, "sample_ids", "sample_labels", "num_classes"),
    Blockwise: (*_SHAPES, "blocks"),
    UniKDDev: (*_SHAPES, *_WIDTHS, "num_classes"),
    UniKD: ("student_channels", "teacher_channels", "num_classes"),
}
_OF_THE_RUN = {field.name for field in fields(RunContext)} - {"student", "teacher", "teacher_blocks"}


class _Norms:
    """A network whose levels are given by these BatchNorms."""

    def __init__(self, norms: Any) -> None:
        self.norms = norms

    def get_submodule(self, name: str) -> Any:
        return self.norms[int(name)]


def build(method: type[Method[Any]], *given: Any, **options: Any) -> Any:
    """Build a method from what it is given of the networks and the data, and from keywords.

    Args:
        method: the class; of a Hybrid its parts are given.
        given: shapes, widths or channels of both networks and what else it takes, see `_BY_PLACE`.
        options: settings of the method, and fields of the RunContext.
    """
    if method is Hybrid:
        return Hybrid(*given, RunContext(**options))
    facts = dict(zip(_BY_PLACE.get(method, ()), given, strict=True))
    run = {name: options.pop(name) for name in list(options) if name in _OF_THE_RUN}
    run |= {name: facts[name] for name in facts if name in _OF_THE_RUN}
    if "classifier_weight" in facts:
        run.setdefault("device", facts["classifier_weight"].device)
    blocks = facts.get("blocks")
    context = RunContext(
        student=_network(facts, "student"),
        teacher=_network(facts, "teacher"),
        teacher_blocks=None if blocks is None else lambda: blocks,
        **run,
    )
    return method(method.settings_class(**options), context)


def _network(facts: dict[str, Any], role: str) -> Any:
    channels = facts.get(f"{role}_channels", ())
    shapes = facts.get(f"{role}_shapes", tuple((count, 1, 1) for count in channels))
    norms = facts.get("teacher_norms", ())
    return SimpleNamespace(
        level_shapes=shapes,
        level_names=tuple(f"level{place}" for place in range(len(norms))),
        embedding_width=facts.get(f"{role}_width"),
        classifier_weight=facts.get("classifier_weight"),
        norms_before_activation=tuple(str(place) for place in range(len(norms))),
        plain=_Norms(norms),
    )


def for_method(distill: dict[str, Any]) -> dict[str, Any]:
    """Return a `distill` section in which settings stand under the methods that have them.

    Args:
        distill: the section with settings on its top level, whichever method reads them; those that the method does
            not have are left out, and so are sections of other methods.
    """
    names = distill.get("method", "unikd")
    found = {key: value for key, value in distill.items() if key in ("method", "max_levels")}
    for name in [names] if isinstance(names, str) else names:
        known = {field.name for field in fields(METHODS[name].settings_class)}
        flat = {key: value for key, value in distill.items() if key in known}
        if flat or distill.get(name):
            found[name] = {**flat, **(distill.get(name) or {})}
    return found
