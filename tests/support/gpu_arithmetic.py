"""Triton's interpreter with the fp32 arithmetic of an NVIDIA GPU, for tests on a machine that has none.

    TRITON_INTERPRET=1 PYTHONPATH=tests pytest -p support.gpu_arithmetic --gpu-arithmetic-seed 1 tests/kernels

Interpreted, a kernel has numpy's arithmetic, where nearly every operation is correctly rounded. Compiled, Triton emits

    tl.exp(x)   ex2.approx of the rounded product x log2(e), 2 ulp        a / b        div.full, 2 ulp
    tl.exp2(x)  ex2.approx.ftz, 2 ulp                                     tl.sqrt(x)   sqrt.approx.ftz, 1 ulp
    tl.log(x)   libdevice's logf, 1 ulp                                   a * b + c    one fma, if c meets the product

The errors fill what these instructions guarantee, and depend on the operands and the seed alone: as on a GPU the same
numbers give the same bits. ex2(0) = 1 and a quotient by a power of two are exact there.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

Array = np.ndarray[Any, Any]
LOG2_E = np.float32(1.4426950408889634)
SMALLEST_NORMAL = np.finfo(np.float32).tiny


def _draw(seed: int, *operands: Array) -> Array:
    """Number in [-1, 1) for each element, a hash of the operands' bits and the seed."""
    bits = np.full((1,), seed, np.uint32)
    for x in operands:
        bits = bits ^ np.ascontiguousarray(x, np.float32).view(np.uint32)
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            bits = (bits ^ (bits >> np.uint32(shift))) * np.uint32(factor)
        bits = bits ^ (bits >> np.uint32(16))
    return bits.astype(np.float64) * 2.0**-31 - 1.0


def _off_by(ulps: float, exact: Array, seed: int, *operands: Array) -> Array:
    """Round to fp32 with an error below `ulps`, half of one being that of the rounding."""
    rounded = exact.astype(np.float32)
    moved = exact + (ulps - 0.5) * _draw(seed, *operands).reshape(exact.shape) * np.spacing(np.abs(rounded))
    return np.where(np.isfinite(rounded) & (rounded != 0), moved.astype(np.float32), rounded)


def _flushed(x: Array) -> Array:
    return np.where(np.abs(x) < SMALLEST_NORMAL, np.float32(0) * x, x)


def _unary(name: str, compute: Callable[[Array], Array]) -> Callable[..., TensorHandle]:
    """Method of the builder that computes fp32 by `compute` and the rest as before."""
    before = getattr(InterpreterBuilder, name)

    def method(self: InterpreterBuilder, x: TensorHandle) -> TensorHandle:
        if x.data.dtype != np.float32:
            return before(self, x)
        with np.errstate(all="ignore"):
            return TensorHandle(compute(x.data).astype(np.float32), x.dtype.scalar)

    return method


def _binary(name: str, compute: Callable[[TensorHandle, TensorHandle], TensorHandle]) -> Callable[..., TensorHandle]:
    before = getattr(InterpreterBuilder, name)

    def method(self: InterpreterBuilder, a: TensorHandle, b: TensorHandle) -> TensorHandle:
        if a.data.dtype != np.float32 or b.data.dtype != np.float32:
            return before(self, a, b)
        with np.errstate(all="ignore"):
            return compute(a, b)

    return method


def _multiply(a: TensorHandle, b: TensorHandle) -> TensorHandle:
    """The rounded product, which remembers the exact one for a sum that it may meet."""
    exact = a.data.astype(np.float64) * b.data.astype(np.float64)
    handle = TensorHandle(exact.astype(np.float32), a.dtype.scalar)
    handle.exact = exact
    return handle


def _contracted(operation: Callable[[Array, Array], Array]) -> Callable[[TensorHandle, TensorHandle], TensorHandle]:
    def compute(a: TensorHandle, b: TensorHandle) -> TensorHandle:
        left, right = a.data.astype(np.float64), b.data.astype(np.float64)
        if hasattr(a, "exact"):
            left = a.exact
        elif hasattr(b, "exact"):
            right = b.exact
        return TensorHandle(operation(left, right).astype(np.float32), a.dtype.scalar)

    return compute


def _methods(seed: int) -> dict[str, Callable[..., TensorHandle]]:
    def exp2(x: Array) -> Array:
        return np.where(x == 0, np.float32(1), _off_by(2, np.exp2(x.astype(np.float64)), seed, x))

    def divide(a: TensorHandle, b: TensorHandle) -> TensorHandle:
        exact = a.data.astype(np.float64) / b.data.astype(np.float64)
        of_power = np.abs(np.frexp(b.data)[0]) == 0.5
        quotient = np.where(of_power, exact, _off_by(2, exact, seed, *np.broadcast_arrays(a.data, b.data)))
        return TensorHandle(quotient.astype(np.float32), a.dtype.scalar)

    unary = {
        "create_exp": lambda x: exp2(x * LOG2_E),
        "create_exp2": lambda x: _flushed(exp2(_flushed(x))),
        "create_sqrt": lambda x: _flushed(_off_by(1, np.sqrt(_flushed(x).astype(np.float64)), seed, x)),
        "create_log": lambda x: _off_by(1, np.log(x.astype(np.float64)), seed, x),
    }
    binary = {
        "create_fdiv": divide,
        "create_fmul": _multiply,
        "create_fadd": _contracted(np.add),
        "create_fsub": _contracted(np.subtract),
    }
    return {name: _unary(name, f) for name, f in unary.items()} | {name: _binary(name, f) for name, f in binary.items()}


@contextmanager
def gpu_arithmetic(seed: int = 0) -> Iterator[None]:
    """Interpret kernels with a GPU's arithmetic inside the block."""
    with patch.multiple(InterpreterBuilder, **_methods(seed)):
        yield


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--gpu-arithmetic-seed", type=int, default=0, help="draws other errors within the guarantees")


def pytest_configure(config: pytest.Config) -> None:
    """Take it for all tests, where this file is given as a plugin."""
    if os.environ.get("TRITON_INTERPRET") != "1":  # as Triton is loaded, which is before any conftest
        raise pytest.UsageError("-p support.gpu_arithmetic interprets kernels: set TRITON_INTERPRET=1")
    stack = ExitStack()
    stack.enter_context(gpu_arithmetic(config.getoption("--gpu-arithmetic-seed")))
    config.add_cleanup(stack.close)
