"""In which number format a teacher runs, how its weights get there, and how much rounding that explains."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# What torch.cpu.get_capabilities() calls the units that multiply bf16: x86 with AVX-512 or AMX, ARM.
_CPU_BF16_UNITS = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def resolve_precision(precision: str, device: torch.device | str) -> str:
    """The format that "auto" stands for: fp16 on a GPU, bf16 on a CPU with bf16 units, fp32 otherwise.

    fp16 before bf16, because it rounds eight times finer; where a network leaves its range, see `OnlineTeacher.settle`.

    Args:
        precision: "auto", "fp32", "bf16" or "fp16"; the last three are returned as they are.
        device: where the teacher runs.

    Raises:
        ValueError: another precision.

    Example:
        >>> resolve_precision("auto", "cuda")
        'fp16'
    """
    if precision in PRECISIONS:
        return precision
    if precision != "auto":
        raise ValueError(f"OnlineTeacher: precision must be one of auto, {', '.join(PRECISIONS)}, got {precision!r}")
    if torch.device(device).type == "cuda":
        return "fp16"
    return "bf16" if cpu_has_bf16() else "fp32"


def cpu_has_bf16() -> bool:
    """Whether this processor multiplies bf16 in hardware; without such units bf16 is slower than fp32.

    Example:
        >>> cpu_has_bf16()
        True
    """
    # Not in every release of PyTorch that we support; without it nothing is known, and fp32 is always right.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(unit, False) for unit in _CPU_BF16_UNITS)


def cast(network: nn.Module, dtype: torch.dtype) -> None:
    """Hold the weights of `network` in `dtype`, in place; BatchNorms that are left stay in fp32.

    A running variance may leave fp16's range, and BatchNorm takes half-precision images with fp32 statistics.

    Example:
        >>> cast(network, torch.bfloat16)
    """
    for module in network.modules():
        held = torch.float32 if isinstance(module, _BatchNorm) else dtype
        for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
            if tensor.is_floating_point():
                tensor.data = tensor.data.to(held)


def unit_rounding(precision: str, device: torch.device | str) -> float:
    """Relative rounding error that a stored value may carry in a precision.

    Half the spacing of bf16 (2^-8) and of fp16 (2^-11). For fp32 not the last bit counts but the order in which
    thousands of products are summed, and what depth makes of it: 2^-15, above what random ResNet-50s showed (5e-5 of
    the logits). On a GPU 2^-11, because convolutions run in TF32.

    Example:
        >>> unit_rounding("bf16", "cpu")
        0.00390625
    """
    if precision == "fp32" and torch.device(device).type == "cuda":
        return 2.0**-11
    return {"fp32": 2.0**-15, "bf16": 2.0**-8, "fp16": 2.0**-11}[precision]
