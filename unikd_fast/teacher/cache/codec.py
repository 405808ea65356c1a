"""Conversion of a teacher's outputs for one view of one sample to the bytes of a record, and back."""

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unikd_fast.errors import CacheError
from unikd_fast.losses import quantize_logits, top_k_logits
from unikd_fast.values import Gaussian, QuantizedLogits, TopKLogits

KINDS = ("fp16", "uint8", "top_k")
MAX_CLASSES = 2**31
"""Class indices are int32."""

_ALIGNMENT = 8


class _Part(NamedTuple):
    """A run of numbers of one type in every record."""

    name: str
    dtype: torch.dtype
    columns: int

    @property
    def bytes(self) -> int:
        return self.columns * self.dtype.itemsize


@dataclass(frozen=True)
class Codec:
    """Packs logits (N, K), and optionally a Gaussian over the classes, into N records of equal size.

        fp16     logits as fp16                                                          2 K bytes
            uint8    one byte per class, a scale and an offset                               K + 8 bytes
        top_k    the k largest logits of the fp16 row, their classes, the log-sum-exp    6 k + 4 bytes; for τ = 1 only
            gaussian mean and log-variance as fp16                                           another 4 K bytes

    The log-sum-exp of top_k is that of the logits rounded to fp16, so the stored probabilities sum to at most one.
    Records are padded to a multiple of eight bytes.

    Args:
        kind: kind of record, "fp16", "uint8" or "top_k".
        num_classes: K.
        top_k: k, only for kind "top_k".
        gaussian: whether records also hold a Gaussian.

    Raises:
        ValueError: the kind is unknown, K is outside [1, 2^31], k outside [1, K], or k given for another kind.

    Example:
        >>> codec = Codec("fp16", num_classes=1000)
        >>> records = codec.encode(logits)  # (N, 2000) bytes
        >>> logits, gaussian = codec.decode(records)
    """

    kind: str
    num_classes: int
    top_k: int | None = None
    gaussian: bool = False

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"Codec: kind must be one of {', '.join(KINDS)}, got {self.kind!r}")
        if not 1 <= self.num_classes <= MAX_CLASSES:
            raise ValueError(
                f"Codec: num_classes must lie in [1, {MAX_CLASSES}], got {self.num_classes}; class indices are int32"
            )
        if self.kind != "top_k" and self.top_k is not None:
            raise ValueError(f"Codec: top_k is for kind 'top_k', got {self.top_k} with {self.kind!r}; leave it out")
        if self.kind == "top_k" and (self.top_k is None or not 1 <= self.top_k <= self.num_classes):
            raise ValueError(f"Codec: top_k must lie in [1, {self.num_classes}], got {self.top_k}")

    @property
    def settings(self) -> dict[str, Any]:
        """Return the arguments that construct this codec."""
        return asdict(self)

    @property
    def record_bytes(self) -> int:
        """Return the size of a record in bytes."""
        return -(-sum(part.bytes for part in self._parts()) // _ALIGNMENT) * _ALIGNMENT

    @torch.no_grad()
    def encode(self, logits: Tensor, gaussian: Gaussian | None = None) -> NDArray[np.uint8]:
        """Pack a batch, computing where the logits are and copying to the host once.

        Args:
            logits: logits (N, K), floating point.
            gaussian: mean and log_var (N, K), required if and only if the codec has a Gaussian.

        Returns:
            Records (N, record_bytes).

        Raises:
            CacheError: a value is inf or NaN, or overflows in fp16; the message gives the largest value and the remedy.
            ValueError: the shape is not (N, K), or a Gaussian is missing or unexpected.
        """
        if (gaussian is not None) != self.gaussian:
            given, held = ("no Gaussian", "one") if self.gaussian else ("a Gaussian", "none")
            raise ValueError(f"Codec.encode: got {given}, but records of this codec hold {held}; see Codec.gaussian")
        self._check_shape("logits", logits)
        numbers = self._encode_logits(logits)
        if gaussian is not None:
            for name, value in zip(Gaussian._fields, gaussian, strict=True):
                self._check_shape(name, value)
                if len(value) != len(logits):
                    raise ValueError(f"Codec.encode: logits have {len(logits)} rows and {name} has {len(value)} rows")
                numbers[name] = _to_half(value, name, "check the teacher's head, or cache without it")
        packed = torch.zeros((len(logits), self.record_bytes), dtype=torch.uint8, device=logits.device)
        start = 0
        for part in self._parts():
            values = numbers[part.name].reshape(len(logits), part.columns).contiguous()
            assert values.dtype == part.dtype
            packed[:, start : start + part.bytes] = values.view(torch.uint8)
            start += part.bytes
        array: NDArray[np.uint8] = packed.cpu().numpy()
        return array

    def decode(
        self, records: NDArray[np.uint8], device: torch.device | str = "cpu"
    ) -> tuple[Tensor | QuantizedLogits | TopKLogits, Gaussian | None]:
        """Return what `encode` stored; one copy to the device, of which the results are views.

        Args:
            records: (N, record_bytes).
            device: device of the tensors; on the CPU they share the memory of `records` if that is aligned.

        Returns:
            Logits in a form the losses take, (N, K) in fp16, QuantizedLogits or TopKLogits; and the Gaussian in fp16,
            or None.

        Raises:
            ValueError: the shape or dtype is wrong.
        """
        if records.dtype != np.uint8 or records.ndim != 2 or records.shape[1] != self.record_bytes:
            raise ValueError(
                f"Codec.decode: records must be (N, {self.record_bytes}) uint8, got {records.shape} {records.dtype}"
            )
        tensor = _as_tensor(records)
        if torch.device(device).type != "cpu":  # copying from pinned memory does not block the host
            tensor = tensor.pin_memory()
        packed = tensor.to(device, non_blocking=True)
        numbers: dict[str, Tensor] = {}
        start = 0
        for part in self._parts():
            numbers[part.name] = packed[:, start : start + part.bytes].view(part.dtype)
            start += part.bytes
        gaussian = Gaussian(numbers["mean"], numbers["log_var"]) if self.gaussian else None
        if self.kind == "fp16":
            return numbers["logits"], gaussian
        if self.kind == "uint8":
            return QuantizedLogits(numbers["values"], numbers["scale"][:, 0], numbers["offset"][:, 0]), gaussian
        return TopKLogits(numbers["values"], numbers["indices"], numbers["log_sum_exp"][:, 0]), gaussian

    def _parts(self) -> list[_Part]:
        # Widest numbers first, so that every part starts at a multiple of its width and can be read in place.
        if self.kind == "fp16":
            parts = [_Part("logits", torch.float16, self.num_classes)]
        elif self.kind == "uint8":
            parts = [_Part(name, torch.float32, 1) for name in ("scale", "offset")]
            parts.append(_Part("values", torch.uint8, self.num_classes))
        else:
            assert self.top_k is not None
            parts = [
                _Part("log_sum_exp", torch.float32, 1),
                _Part("indices", torch.int32, self.top_k),
                _Part("values", torch.float16, self.top_k),
            ]
        if self.gaussian:
            parts += [_Part(name, torch.float16, self.num_classes) for name in Gaussian._fields]
        return sorted(parts, key=lambda part: -part.dtype.itemsize)

    def _encode_logits(self, logits: Tensor) -> dict[str, Tensor]:
        if self.kind == "fp16":
            return {"logits": _to_half(logits, "logits", "store them as uint8")}
        if self.kind == "top_k":
            assert self.top_k is not None
            return top_k_logits(_to_half(logits, "logits", "store them as uint8"), self.top_k)._asdict()
        _require_finite(logits, "logits")
        numbers = quantize_logits(logits)._asdict()
        if not bool(numbers["scale"].isfinite().all()):
            raise CacheError(
                f"Codec.encode: a row of logits exceeds the range of fp32, up to {float(logits.abs().max()):.6g}; "
                "check the teacher's weights"
            )
        return numbers

    def _check_shape(self, name: str, value: Tensor) -> None:
        if value.ndim != 2 or value.shape[1] != self.num_classes or not value.is_floating_point():
            raise ValueError(
                f"Codec.encode: {name} must be floats of shape (N, {self.num_classes}), got {tuple(value.shape)} "
                f"{value.dtype}"
            )


def _to_half(values: Tensor, name: str, remedy: str) -> Tensor:
    half = values.detach().to(torch.float16)
    if bool(half.isfinite().all()):
        return half
    _require_finite(values, name)
    row = int((~half.isfinite()).any(dim=1).nonzero()[0])
    raise CacheError(
        f"Codec.encode: {name} reach {float(values.abs().max()):.6g} (the first in row {row}), fp16 ends at 65504; "
        f"{remedy}"
    )


def _require_finite(values: Tensor, name: str) -> None:
    finite = values.isfinite()
    if not bool(finite.all()):
        largest = float(values.masked_fill(~finite, 0.0).abs().max())
        row = int((~finite).any(dim=1).nonzero()[0])
        raise CacheError(
            f"Codec.encode: {name} are inf or NaN (the first in row {row}), the largest finite one is {largest:.6g}; "
            "run the teacher in bf16 or fp32"
        )


def _as_tensor(records: NDArray[np.uint8]) -> Tensor:
    if len(records) == 0:
        return torch.empty(records.shape, dtype=torch.uint8)  # numpy's strides could not be viewed
    # torch.from_numpy warns about read-only memory, and a view as wider numbers needs rows at multiples of their width.
    stride, column = records.strides
    aligned = column == 1 and stride > 0 and stride % _ALIGNMENT == 0 and records.ctypes.data % _ALIGNMENT == 0
    return torch.from_numpy(records if aligned and records.flags.writeable else records.copy(order="C"))
