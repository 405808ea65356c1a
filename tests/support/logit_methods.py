"""What the tests of methods on logits share: logits, the comparison with a formula in float64, a method from a
configuration, a short run."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from support.loss_inputs import randn
from support.numerics import relative_error
from support.real_runs import cached_config, train_here, train_records
from unikd_fast.config import load_config
from unikd_fast.config.schema import DistillConfig
from unikd_fast.methods import Method, RunContext, build_method
from unikd_fast.values import Batch, Loss

N, K = 8, 5
LABELS = torch.tensor([3, 0, 4, 4, 1, 2, 0, 3])
SOFT_LABELS = torch.nn.functional.one_hot(LABELS, K) * 0.7 + torch.nn.functional.one_hot(LABELS.flip(0), K) * 0.3

Found = tuple[Tensor, dict[str, Tensor]]


def logits(seed: int, dtype: torch.dtype = torch.float64, *, grad: bool = False) -> Tensor:
    """(N, K) of a size that networks have."""
    return (3 * randn(N, K, seed=seed)).to(dtype).requires_grad_(grad)


def batch_of(labels: Tensor) -> Batch:
    return Batch(torch.zeros(len(labels), 3, 1, 1), labels, torch.arange(len(labels)))


BATCH = batch_of(LABELS)


def softmax(z: Tensor, temperature: float = 1.0) -> Tensor:
    e = (z / temperature).exp()
    return e / e.sum(-1, keepdim=True)


def standardised(z: Tensor) -> Tensor:
    """Each row by itself; the deviation over K - 1."""
    centred = z - z.sum(-1, keepdim=True) / z.shape[-1]
    return centred / ((centred**2).sum(-1, keepdim=True) / (z.shape[-1] - 1)).sqrt().add(1e-7)


def kl(p: Tensor, q: Tensor) -> Tensor:
    """Σ p ln(p / q) of each row."""
    return (p * (p / q).log()).sum(-1)


def cross_entropy(z: Tensor, labels: Tensor = LABELS) -> Tensor:
    log_q = softmax(z).log()
    if labels.is_floating_point():
        return -(labels * log_q).sum(-1).mean()
    return -torch.stack([row[label] for row, label in zip(log_q, labels.tolist(), strict=True)]).mean()


def as_found(loss: Loss) -> Found:
    return loss.total, loss.terms


# How a method may be run. Autocast must change nothing: losses are fp32 whatever it says.
HOW = [
    pytest.param(torch.float64, "reference", False, id="float64"),
    pytest.param(torch.float32, "reference", True, id="autocast"),
    pytest.param(torch.float16, "reference", False, id="float16"),
    pytest.param(torch.float32, "fused", False, id="fused"),
    pytest.param(torch.bfloat16, "fused", False, id="fused bfloat16"),
]


def assert_is_the_formula(
    method: Callable[..., Found],
    formula: Callable[..., Found],
    inputs: Sequence[Tensor],
    *,
    autocast: bool = False,
    more: Sequence[Tensor] = (),
) -> None:
    """Total, terms and the total's gradients, against the formula in float64 on the very same numbers.

    Args:
        method, formula: called with the inputs.
        inputs: leaves that require a gradient are compared by it, in fp32 to a few hundred roundings.
        autocast: run the method under autocast.
        more: further leaves of both, in the dtype of the arithmetic.
    """
    doubles = [x.detach().double().requires_grad_(x.requires_grad) for x in inputs]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        total, terms = method(*inputs)
    expected_total, expected_terms = formula(*doubles)
    exact = 1e-12 if inputs[0].dtype == torch.float64 else 2e-5
    assert total.dtype == torch.promote_types(inputs[0].dtype, torch.float32)
    assert list(terms) == list(expected_terms)
    for name, value in expected_terms.items():
        assert not terms[name].requires_grad, name
        assert relative_error(terms[name], value) < exact, name
    assert relative_error(total, expected_total) < exact
    wanted, expected_wanted = ([x for x in leaves if x.requires_grad] for leaves in (inputs, doubles))
    found = torch.autograd.grad(total, [*wanted, *more])
    expected = torch.autograd.grad(expected_total, [*expected_wanted, *more])
    for index, (ours, theirs) in enumerate(zip(found, expected, strict=True)):
        assert theirs.abs().sum() > 0, f"gradient {index} says nothing"
        assert relative_error(ours, theirs) < exact + torch.finfo(ours.dtype).eps, f"gradient {index}"


def built(name: str, section: dict[str, Any] | None, **context: Any) -> Method[Any]:
    """A method of a configuration with this section of its own."""
    chosen = DistillConfig.model_validate({"method": name, name: section})
    return build_method(chosen.settings, RunContext(label_smoothing=0.1, impl="reference", **context))


def trained(folder: Path, weights: Path, method: str | list[str], **sections: Any) -> list[dict[str, float]]:
    """The training records of a dozen steps on digits, of cifar/resnet8 by another with weights of its own."""
    distill, train = sections.pop("distill", {}), sections.pop("train", {})
    cache = sections.pop("cache", {"mode": "off"})
    config = cached_config(
        folder,
        weights,
        cache=cache,
        distill={"method": method, **distill},
        train={"total_epochs": 2, "learning_rate": 0.02, **train},
        **sections,
    )
    return [record for record in train_records(train_here(load_config(config))) if record["kind"] == "train"]


def falls(records: list[dict[str, float]], term: str) -> bool:
    """From the first third of the steps to the last."""
    values, third = [record[term] for record in records], len(records) // 3
    return sum(values[-third:]) < 0.9 * sum(values[:third])
