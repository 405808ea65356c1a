"""CRD on a few samples, and a step of it."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from support.build_method import build as build_method
from unikd_fast.methods import CRD
from unikd_fast.values import Batch, Features, StudentOutput

CLASSES, SAMPLES, STUDENT, TEACHER, WIDTH = 4, 40, 6, 9, 5
# Ids of a subset: neither dense nor in order. Class 3 has one sample, class 2 none.
IDS = torch.tensor(np.random.default_rng(0).permutation(1000)[:SAMPLES])
LABELS = torch.tensor([0, 1, 1, 0, 1] * 8).index_fill_(0, torch.tensor([17]), 3)


def build(seed: int = 0, **options: Any) -> CRD:
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"width": WIDTH, "negatives": 23, **options}
    return build_method(CRD, STUDENT, TEACHER, IDS, LABELS, CLASSES, **settings)


def batch_of(places: Tensor) -> Batch:
    return Batch(torch.zeros(len(places), 3, 1, 1), LABELS[places], IDS[places])


def embeddings(seed: int, n: int = 8, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """Of student and teacher, and the student's logits."""
    generator = torch.Generator().manual_seed(seed)
    shapes = (n, STUDENT), (n, TEACHER), (n, CLASSES)
    return tuple(torch.randn(*shape, generator=generator).to(dtype) for shape in shapes)  # type: ignore[return-value]


def places_of(seed: int, n: int = 8) -> Tensor:
    return torch.randperm(SAMPLES, generator=torch.Generator().manual_seed(seed))[:n]


def step(method: CRD, seed: int, *, places: Tensor | None = None, part: slice = slice(None)) -> dict[str, Tensor]:
    """A step of the method: its total, its term, and the gradients of all it has and was given."""
    student, teacher, logits = (x[part] for x in embeddings(seed))
    student, logits = student.clone().requires_grad_(), logits.clone().requires_grad_()
    places = places_of(seed) if places is None else places
    method.adapter.zero_grad()
    method.teacher_embed.zero_grad()
    adapted = method.adapter(Features((), logits, embedding=student))
    target = method.target(Features((), torch.zeros(len(teacher), CLASSES), embedding=teacher))
    loss = method.loss(StudentOutput(logits, adapted), target, batch_of(places[part]))
    loss.total.backward()
    parameters = {f"student {name}": p.grad for name, p in method.adapter.named_parameters()}
    parameters |= {f"teacher {name}": p.grad for name, p in method.teacher_embed.named_parameters()}
    found = {"total": loss.total, "crd": loss.terms["crd"], "ce": loss.terms["ce"]}
    return {**found, "features": student.grad, "logits": logits.grad, **parameters}  # type: ignore[dict-item]
