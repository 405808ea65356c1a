"""Inputs of the public losses."""

import torch
from torch import Tensor

from unikd_fast import Gaussian

N, K = 6, 5
# Two float64 computations of the same number in a different order: a few hundred roundings of 1.1e-16.
EXACT = {"rtol": 1e-12, "atol": 1e-13}


def randn(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64, grad: bool = False) -> Tensor:
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(dtype).requires_grad_(grad)


def arguments(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Gaussian, Gaussian]:
    student, teacher, *parameters = (randn(N, K, seed=seed, dtype=dtype) for seed in range(6))
    return student, teacher, torch.tensor([0, 4, 2, -100, 1, 3]), Gaussian(*parameters[:2]), Gaussian(*parameters[2:])
