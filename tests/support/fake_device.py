"""A device that is none: its tensors hold their numbers on the CPU, and whatever would make the host wait is noted."""

import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

_READS = {"_local_scalar_dense", "nonzero", "is_nonzero", "equal", "item", "_unique2", "masked_select", "lift_fresh"}


def host_reads(calls: list[tuple[str, str]]) -> list[str]:
    """Of the operations those that make the host wait for the device, or give a tensor numbers of the host."""
    return [name for name, _ in calls if name.split(".")[1] in _READS]


DEVICE = torch.device("lazy", 0)
"""A type that torch knows, that nothing here uses, and whose backward pass needs no threads of a device."""


class OnDevice(Tensor):
    """A tensor that says it is on the device."""

    elem: Tensor

    @staticmethod
    def __new__(cls, elem: Tensor) -> "OnDevice":
        return Tensor._make_wrapper_subclass(
            cls,
            elem.size(),
            strides=elem.stride(),
            storage_offset=elem.storage_offset(),
            dtype=elem.dtype,
            device=DEVICE,
            requires_grad=elem.requires_grad,
        )

    def __init__(self, elem: Tensor) -> None:
        self.elem = elem

    def tolist(self) -> Any:
        """Its numbers; torch's own takes no subclass."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        return _call(func, args, kwargs or {})


class FakeDevice(TorchDispatchMode):
    """While it is entered, tensors can be on DEVICE.

    Attributes:
        waits: what made the host wait in the latest `watch`, and where: reads of a tensor, and copies from memory that
            is not pinned, for which CUDA waits as well.
        launches: all operations on the device in it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.launches: list[str] = []
        self._pinned: list[Tensor] = []
        self._watching = False

    def note(self, what: str) -> None:
        if self._watching:
            at = [
                f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack() if "unikd" in frame.filename
            ]
            self.waits.append(f"{what} at {', '.join(at[-3:])}")

    @contextmanager
    def watch(self) -> Iterator[None]:
        self._watching, self.waits, self.launches = True, [], []
        try:
            yield
        finally:
            self._watching = False

    def pin(self, tensor: Tensor, *_: Any) -> Tensor:
        """In place of Tensor.pin_memory, which needs a device."""
        copy = tensor.clone()
        self._pinned.append(copy)
        return copy

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        device = kwargs.get("device")
        name = str(func)
        if any(isinstance(tensor, OnDevice) for tensor in tensors) or (device and device.type == DEVICE.type):
            if self._watching:
                self.launches.append(name)
            if func.namespace == "aten" and host_reads([(name, "")]):
                self.note(name)
            elif name.startswith("aten._to_copy"):
                self._note_copy(name, args[0], device or args[0].device, kwargs.get("non_blocking"))
            elif name.startswith("aten.copy_"):
                self._note_copy(name, args[1], args[0].device, (*args, False)[2] or kwargs.get("non_blocking"))
            elif name.startswith("aten.index") and any(
                isinstance(index, Tensor) and (index.dtype == torch.bool or not isinstance(index, OnDevice))
                for index in tree_leaves(args[1])
            ):
                self.note(f"{name} by a mask or by an index of the host")
            elif any(tensor.dim() and not isinstance(tensor, OnDevice) for tensor in tensors):
                raise RuntimeError(f"{name}: tensors on two devices")
        return _call(func, args, kwargs)

    def _note_copy(self, name: str, source: Tensor, target: torch.device, non_blocking: Any) -> None:
        if source.device.type == target.type:
            return
        storage = source.untyped_storage()._cdata if not isinstance(source, OnDevice) else None
        pinned = any(storage == own.untyped_storage()._cdata for own in self._pinned)
        if not non_blocking or (target.type == DEVICE.type and not pinned):
            self.note(f"{name} {source.device.type} -> {target.type}")


def _call(func: Any, args: Any, kwargs: Any) -> Any:
    """The operation on the CPU; its results are on the device if it is asked for there, or an argument is."""
    device = kwargs.get("device")
    given = any(isinstance(leaf, OnDevice) for leaf in tree_leaves((args, kwargs)))
    on_device = given if device is None else device.type == DEVICE.type
    own_args, own_kwargs = tree_map(_inside, (args, kwargs))
    result = func(*own_args, **own_kwargs)
    if not on_device:
        return result
    wrapped = tree_map(lambda leaf: OnDevice(leaf) if type(leaf) is Tensor else leaf, result)
    return return_and_correct_aliasing(func, args, kwargs, wrapped) if given else wrapped


def _inside(leaf: Any) -> Any:
    if isinstance(leaf, OnDevice):
        return leaf.elem
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf


@contextmanager
def fake_device() -> Iterator[FakeDevice]:
    """Within it torch and DeepSpeed take DEVICE for a device like a GPU."""
    mode, autocast = FakeDevice(), torch.autocast
    accelerator = pytest.importorskip("deepspeed").accelerator.get_accelerator()
    foreach = _foreach_utils._get_foreach_kernels_supported_devices

    def on_cpu(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return autocast("cpu" if device_type == DEVICE.type else device_type, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patched, ExitStack() as stack:
        patched.setattr(torch, "autocast", on_cpu)
        # DeepSpeed's stage 3 leaves its own there, which asks for the autocast of a device that has none.
        patched.setattr(torch.nn.functional, "linear", torch._C._nn.linear)
        patched.setattr(Tensor, "pin_memory", lambda tensor, *_: mode.pin(tensor))
        patched.setattr(_foreach_utils, "_get_foreach_kernels_supported_devices", lambda: [*foreach(), DEVICE.type])
        patched.setattr(accelerator, "synchronize", lambda *_: mode.note("synchronize"))
        patched.setattr(accelerator, "device_name", lambda index=None: DEVICE.type)
        patched.setattr(accelerator, "current_device_name", lambda: str(DEVICE))
        before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, before)
        yield stack.enter_context(mode)
