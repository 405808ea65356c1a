"""The formulas of the codebases in float64, one row after the other, from probabilities: an oracle, not an example."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

# The oracle divides probabilities and the losses subtract logarithms: a thousand roundings of 1.1e-16.
CLOSE = {"rtol": 1e-11, "atol": 1e-13}


def probabilities(row: Tensor, temperature: float) -> Tensor:
    weights = torch.exp(row / temperature)
    return weights / weights.sum()


def kl(p: Tensor, q: Tensor) -> Tensor:
    return sum((a * torch.log(a / b) for a, b in zip(p, q, strict=True)), torch.zeros((), dtype=torch.float64))


def standardized(row: Tensor) -> Tensor:
    mean = row.sum() / row.numel()
    variance = ((row - mean) ** 2).sum() / (row.numel() - 1)
    return (row - mean) / (1e-7 + variance.sqrt())


def rows_along(x: Tensor, dim: int) -> Iterator[Tensor]:
    """Every vector of `x` along an axis."""
    flat = x.movedim(dim, -1).reshape(-1, x.shape[dim])
    return iter(flat.unbind(0))


def kl_of_rows(student: Tensor, teacher: Tensor, temperature: float, dim: int) -> Tensor:
    """KL of each row, (rows,), without a factor."""
    pairs = zip(rows_along(student, dim), rows_along(teacher, dim), strict=True)
    return torch.stack([kl(probabilities(t, temperature), probabilities(s, temperature)) for s, t in pairs])


def dkd(student: Tensor, teacher: Tensor, labels: Tensor, alpha: float, beta: float, temperature: float) -> Tensor:
    total = torch.zeros((), dtype=torch.float64)
    for s, t, y in zip(student, teacher, labels.tolist(), strict=True):
        p, q = probabilities(t, temperature), probabilities(s, temperature)
        others = [k for k in range(len(p)) if k != y]
        tckd = kl(torch.stack([p[y], 1 - p[y]]), torch.stack([q[y], 1 - q[y]]))
        nckd = kl(p[others] / p[others].sum(), q[others] / q[others].sum())
        total = total + alpha * tckd + beta * nckd
    return total * temperature**2 / len(labels)


def jsd(p: Tensor, q: Tensor, beta: float) -> Tensor:
    """Teacher p, student q, element by element; its limits are the forward KL at β = 0 and the reverse one at 1."""
    if beta == 0:
        return p * torch.log(p / q)
    if beta == 1:
        return q * torch.log(q / p)
    m = beta * p + (1 - beta) * q
    return beta * p * torch.log(p / m) + (1 - beta) * q * torch.log(q / m)


def jsd_terms(student: Tensor, teacher: Tensor, beta: float, temperature: float) -> Tensor:
    """(rows, K) for logits (..., K)."""
    pairs = zip(rows_along(student, -1), rows_along(teacher, -1), strict=True)
    return torch.stack([jsd(probabilities(t, temperature), probabilities(s, temperature), beta) for s, t in pairs])


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean over the rows of (N, K)."""
    rows = [-torch.log(probabilities(row, 1.0)[y]) for row, y in zip(logits, labels.tolist(), strict=True)]
    return torch.stack(rows).mean()


def assert_same(ours: Callable[..., Tensor], oracle: Callable[..., Tensor], *inputs: Tensor) -> None:
    """Compare values and the gradients of all inputs, by a random weighting of the outputs."""
    results: list[list[Any]] = []
    for function in (ours, oracle):
        leaves = [x.detach().requires_grad_() for x in inputs]
        value = function(*leaves)
        upstream = torch.randn(value.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        gradients = torch.autograd.grad(value, leaves, upstream, allow_unused=True)
        results.append([value.detach(), *gradients])
    for mine, theirs in zip(*results, strict=True):
        assert (mine is None) == (theirs is None), "only one of the two has a gradient"
        if theirs is not None:
            torch.testing.assert_close(mine, theirs, **CLOSE)
            assert math.isfinite(theirs.sum().item()) and theirs.abs().max() > 0, "the oracle checks nothing"
