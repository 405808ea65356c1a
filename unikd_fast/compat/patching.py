"""Replaces losses of an installed codebase with the drop-ins, if they agree."""

import inspect
import sys
from collections.abc import MutableMapping
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType, TracebackType
from typing import Any, NamedTuple

import torch

from unikd_fast.compat._difference import Difference, difference, largest, measure
from unikd_fast.compat.presets import PRESETS, Preset, Target, load


class _Found(NamedTuple):
    """A target in the installed package."""

    place: str  # module:name
    owner: Any  # the module, or the class of a method
    name: str
    original: Any
    replacement: Any


class Patch:
    """The result of `patch`; undone by `undo`, or at the end of a `with` block.

    Attributes:
        preset: name given to `patch`.
        version: version of the installed package, "unknown" if pip does not know it.
        replaced: every name that was bound to the original, as "module:name", sorted.
        difference: largest difference over the inputs: value and gradient, absolute and relative.
        tolerance: bound on the relative differences.
    """

    def __init__(
        self, preset: str, found: list[_Found], package_version: str, measured: Difference, tolerance: float
    ) -> None:
        self.preset = preset
        self.version = package_version
        self.difference = measured
        self.tolerance = tolerance
        self._package = PRESETS[preset].package
        self._found = found
        self.replaced = sorted(name for one in found for name in _rebind(self._package, one, back=False))

    def undo(self) -> None:
        """Bind the originals again, also where a drop-in was picked up since; calling it twice does nothing."""
        for one in self._found:
            _rebind(self._package, one, back=True)
        self._found = []

    def __enter__(self) -> "Patch":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()

    def __str__(self) -> str:
        return (
            f"{self.preset} {self.version}: replaced {', '.join(self.replaced)}; largest relative difference "
            f"{self.difference.relative_value:.1e} in value, {self.difference.relative_gradient:.1e} in gradient "
            f"(tolerance {self.tolerance:.0e})"
        )


def patch(preset: str, *, tolerance: float = 1e-4, device: str | None = None) -> Patch:
    """Replace the losses of an installed codebase with the drop-ins, everywhere in the codebase.

    The original and the drop-in are first compared in fp32 on random inputs; nothing is replaced unless all of them
    agree. Names bound outside the package (`from mdistiller.distillers.KD import kd_loss` in your own script) and
    objects created earlier keep the original: patch first.

    Args:
        preset: key of `unikd_fast.compat.presets.PRESETS`, such as "mdistiller".
        tolerance: bound on the largest difference of a value, and of a gradient, relative to the largest entry. fp32
            rounding gives 1e-6 to 1e-5; another reduction or factor gives more than 1e-1.
        device: device for the comparison. If None, a GPU if there is one.

    Returns:
        A report, which prints as one line, can be undone with `undo()`, and is a context manager.

    Raises:
        ValueError: the preset is unknown, or a signature, value or gradient differs from the drop-in's.
        ModuleNotFoundError: the package is not installed.
        AttributeError: it lacks what the drop-in replaces.
        RuntimeError: it is already patched, or its loss cannot run on the device.

    Example:
        >>> with patch("torchdistill") as done:  # doctest: +SKIP
        ...     print(done)
    """
    if preset not in PRESETS:
        raise ValueError(f"patch: preset must be one of {', '.join(PRESETS)}, got {preset!r}")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    wanted = PRESETS[preset]
    found = [_find(wanted, target) for target in wanted.targets]
    for one in found:
        if one.original is one.replacement:
            raise RuntimeError(f"patch: {one.place} is patched already; call undo() on the earlier patch first")
        _check_signature(one)
    measured = [_compare(one, target, tolerance, device) for one, target in zip(found, wanted.targets, strict=True)]
    return Patch(preset, found, installed_version(wanted), largest(measured), tolerance)


def installed_version(preset: Preset) -> str:
    for name in (preset.distribution or preset.package, preset.package):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return str(getattr(import_module(preset.package), "__version__", "unknown"))


def _find(preset: Preset, target: Target) -> _Found:
    missing = ""
    for place in target.places:
        module, _, path = place.partition(":")
        try:
            owner: Any = import_module(module)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{module}.".startswith(f"{error.name}."):
                raise
            if error.name == preset.package:
                hint = f"pip install {preset.distribution}" if preset.distribution else "put its checkout on PYTHONPATH"
                raise ModuleNotFoundError(
                    f"patch: needs the package {preset.package!r}, which is not installed; {hint}", name=error.name
                ) from None
            missing = missing or f"module {error.name}"
            continue
        *classes, name = path.split(".")
        try:
            for part in classes:
                owner = getattr(owner, part)
            original = inspect.getattr_static(owner, name)
        except AttributeError:
            missing = missing or f"{path} in {module}"
            continue
        replacement = load(target.replacement)
        if isinstance(original, staticmethod):
            original, replacement = original.__func__, replacement
        return _Found(place, owner, name, original, replacement)
    raise AttributeError(
        f"patch: {preset.package} {installed_version(preset)} has no {missing}, expected {' or '.join(target.places)}; "
        f"this release has moved it: call the drop-in {target.replacement} yourself"
    )


def _check_signature(found: _Found) -> None:
    """Raise ValueError if the original's arguments are not the first ones of the drop-in."""
    pairs = [(found.original, found.replacement)]
    if inspect.isclass(found.original):
        forward, own_forward = (inspect.getattr_static(x, "forward") for x in (found.original, found.replacement))
        pairs.append((forward, own_forward))
    for theirs, ours in pairs:
        expected, got = _parameters(ours), _parameters(theirs)
        if expected[: len(got)] != got:
            raise ValueError(
                f"patch: {found.place} takes {inspect.signature(theirs)} and its drop-in "
                f"{inspect.signature(ours)}; this is another release or fork, see the presets for its own"
            )


def _parameters(function: Any) -> list[tuple[Any, ...]]:
    return [(x.name, x.kind, x.default) for x in inspect.signature(function).parameters.values()]


def _compare(found: _Found, target: Target, tolerance: float, device: str) -> Difference:
    measured = []
    for case in target.cases:
        settings: dict[str, Any] = {"rounded_to": torch.float32, "computed_in": torch.float32, "device": device}
        try:
            theirs = measure(found.original, case, **settings)
        except Exception as error:
            raise RuntimeError(
                f"patch: {found.place} failed on {device} for {case.description}, shape {case.shape}, so nothing could "
                f"be compared; pass the device it runs on"
            ) from error
        one = difference(measure(found.replacement, case, **settings), theirs)
        if not max(one.relative_value, one.relative_gradient) <= tolerance:
            raise ValueError(
                f"patch: {found.place} differs from {target.replacement} by {one.relative_value:.1e} in value and "
                f"{one.relative_gradient:.1e} in gradient (tolerance {tolerance:.0e}) for {case.description}, shape "
                f"{case.shape}; nothing was replaced. Is this another release or fork?"
            )
        measured.append(one)
    return largest(measured)


def _rebind(package: str, found: _Found, *, back: bool) -> list[str]:
    """Swap the two in every loaded module of the package: attributes, dictionaries, MMEngine's registries."""
    old, new = (found.replacement, found.original) if back else (found.original, found.replacement)
    if not isinstance(found.owner, ModuleType):
        is_static = isinstance(inspect.getattr_static(found.owner, found.name), staticmethod)
        setattr(found.owner, found.name, staticmethod(new) if is_static else new)
        return [found.place]
    places = []
    for module_name, module in list(sys.modules.items()):
        if module_name != package and not module_name.startswith(f"{package}."):
            continue
        for name, value in list(vars(module).items()):
            if value is old:
                setattr(module, name, new)
                places.append(f"{module_name}:{name}")
                continue
            table = value if isinstance(value, dict) else inspect.getattr_static(value, "_module_dict", None)
            if isinstance(table, MutableMapping) and name != "__builtins__":
                for key in [key for key, entry in table.items() if entry is old]:
                    table[key] = new
                    places.append(f"{module_name}:{name}[{key!r}]")
    return places
