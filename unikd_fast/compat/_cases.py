"""The random inputs a drop-in and its original are compared on: shapes, settings, and how each loss is called."""

import os
from collections.abc import Callable, Mapping
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

Loss = Callable[..., Any]


class Case(NamedTuple):
    """One way to call a loss on a student's and a teacher's inputs; `call` takes the loss and the two."""

    description: str
    shape: tuple[int, ...]
    call: Callable[[Loss, Tensor, Tensor], Tensor]
    prepare_student: Callable[[Tensor], Tensor] | None = None  # from random logits to what the loss takes
    prepare_teacher: Callable[[Tensor], Tensor] | None = None
    constant_teacher: bool = False  # where the original's gradient for the teacher is NaN


_ROWS: tuple[tuple[int, ...], ...] = ((64, 100), (32, 1000))
_MAPS: tuple[tuple[int, ...], ...] = (*_ROWS, (4, 19, 6, 5))
_FUSED_ROWS = 64
_FUSED: tuple[tuple[int, ...], ...] = ((_FUSED_ROWS + 100, 32), (_FUSED_ROWS + 1000, 32))
_TOKENS: tuple[tuple[int, ...], ...] = ((4, 9, 257),)


def _labels(logits: Tensor, rows: tuple[int, ...]) -> Tensor:
    count = torch.Size(rows).numel()
    return torch.arange(count, device=logits.device).reshape(rows) * 7 % logits.shape[1]


def _some_ignored(shape: tuple[int, ...], device: torch.device) -> Tensor:
    labels = torch.arange(torch.Size(shape).numel(), device=device)
    return labels.masked_fill(labels % 3 == 1, -100).reshape(shape)


def _kd(settings: tuple[Any, ...], loss: Loss, s: Tensor, t: Tensor) -> Tensor:
    return loss(s, t, *settings)


def _dkd(settings: tuple[Any, ...], loss: Loss, s: Tensor, t: Tensor) -> Tensor:
    return loss(s, t, _labels(s, s.shape[:1]), *settings)


def _module(settings: dict[str, Any], loss: Loss, s: Tensor, t: Tensor) -> Tensor:
    return loss(**settings)(s, t)


def _torchdistill(targets: bool, settings: dict[str, Any], loss: Loss, s: Tensor, t: Tensor) -> Tensor:
    criterion = loss("fc", "output", "head", "input", **settings)
    labels = _labels(s, (s.shape[0], *s.shape[2:])) if targets else None
    return criterion({"fc": {"output": s}}, {"head": {"input": t}}, labels)


def _timm(temperature: float, loss: Loss, s: Tensor, t: Tensor) -> Tensor:
    class Teacher:
        def normalize_input(self, images: Tensor, mean: Tensor | None, std: Tensor | None) -> Tensor:
            return images

        def __call__(self, images: Tensor, return_features: bool) -> Tensor:
            return t.clone()  # under no_grad a constant, unlike t itself

    task = SimpleNamespace(
        trainable_module=lambda images: s,
        teacher=Teacher(),
        student_mean=None,
        student_std=None,
        criterion=F.cross_entropy,
        temperature=temperature,
        task_loss_weight=0.3,
        distill_loss_weight=0.7,
    )
    terms = loss(task, s, _labels(s, s.shape[:1]))
    return torch.stack([terms["loss"], terms["kd_loss"]])


def _deit(settings: tuple[Any, ...], loss: Loss, s: Tensor, t: Tensor) -> Tensor:
    criterion = loss(F.cross_entropy, lambda images: t.clone(), *settings)
    return criterion(s, (s, s.flip(0)), _labels(s, s.shape[:1]))


def _liger_kl(settings: dict[str, Any], loss: Loss, s: Tensor, t: Tensor) -> Tensor:
    return loss(eps=_liger_eps(1e-10), **settings)(s, t)


def _liger_jsd(beta: float, labelled: bool, loss: Loss, s: Tensor, t: Tensor) -> Tensor:
    return loss(beta)(s, t, _some_ignored(s.shape[:1], s.device) if labelled else None)


def _liger_fused_jsd(beta: float, labelled: bool, temperature: float, loss: Loss, s: Tensor, t: Tensor) -> Tensor:
    """Return the loss of hidden states and weights, which lie below each other so that both get a gradient."""
    labels = _some_ignored((_FUSED_ROWS,), s.device) if labelled else None
    (hidden, weight), (teacher, teacher_weight) = ((x[:_FUSED_ROWS], x[_FUSED_ROWS:] / 16) for x in (s, t))
    return loss(beta, temperature=temperature)(hidden, weight, teacher, teacher_weight, labels)


def _liger_eps(eps: float) -> float:
    """Return eps with the method `to`, which Liger 0.8.5's kernel calls and Triton's interpreter does not provide."""

    class Eps(float):
        def to(self, dtype: Any) -> float:
            return self

    return Eps(eps) if os.environ.get("TRITON_INTERPRET") == "1" else eps


def _trl(labelled: bool, settings: dict[str, Any], loss: Loss, s: Tensor, t: Tensor) -> Tensor:
    return loss(s, t, _some_ignored(s.shape[:-1], s.device) if labelled else None, **settings)


def _over(
    shapes: tuple[tuple[int, ...], ...],
    calls: Mapping[str, Callable[[Loss, Tensor, Tensor], Tensor]],
    prepare_student: Callable[[Tensor], Tensor] | None = None,
    prepare_teacher: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Case, ...]:
    return tuple(
        Case(name, shape, call, prepare_student, prepare_teacher) for shape in shapes for name, call in calls.items()
    )


_log_softmax = partial(F.log_softmax, dim=-1)
_softmax = partial(F.softmax, dim=-1)
_TEMPERATURES = (1.0, 4.0)
_DKD_SETTINGS = ((1.0, 8.0, 4.0), (0.5, 2.0, 1.0))
_REDUCTIONS = ("batchmean", "mean", "sum", "none")

KD = _over(_MAPS, {f"τ = {t:g}": partial(_kd, (t,)) for t in _TEMPERATURES})
DKD = tuple(
    case._replace(constant_teacher=True)
    for case in _over(_ROWS, {f"α, β, τ = {x}": partial(_dkd, x) for x in _DKD_SETTINGS})
)
STANDARDIZED_KD = _over(
    _MAPS, {f"τ = {t:g}, {stand}": partial(_kd, (t, stand)) for t in _TEMPERATURES for stand in (True, False)}
)
STANDARDIZED_DKD = tuple(
    case._replace(constant_teacher=True)
    for case in _over(
        _ROWS, {f"α, β, τ = {x}, {stand}": partial(_dkd, (*x, stand)) for x in _DKD_SETTINGS for stand in (True, False)}
    )
)
DISTILL_KL = _over(_MAPS, {f"τ = {t:g}": partial(_module, {"T": t}) for t in _TEMPERATURES})
TORCHDISTILL = _over(
    _MAPS,
    {
        "alpha": partial(_torchdistill, True, {"temperature": 4.0, "alpha": 0.3}),
        "alpha, beta, mean": partial(
            _torchdistill, True, {"temperature": 2.0, "alpha": 0.3, "beta": 2.0, "reduction": "mean"}
        ),
        "sum, label_smoothing": partial(
            _torchdistill, True, {"temperature": 2.0, "alpha": 0.3, "reduction": "sum", "label_smoothing": 0.1}
        ),
        "no targets": partial(_torchdistill, False, {"temperature": 4.0, "alpha": 0.3}),
        "alpha 0": partial(_torchdistill, True, {"temperature": 4.0, "alpha": 0}),
        "alpha None": partial(_torchdistill, True, {"temperature": 4.0, "alpha": None, "beta": 0.5}),
        "no targets, none": partial(_torchdistill, False, {"temperature": 4.0, "alpha": 0, "reduction": "none"}),
    },
)
MMRAZOR = _over(
    _MAPS,
    {
        **{f"tau = 4, {r}": partial(_module, {"tau": 4.0, "reduction": r}) for r in _REDUCTIONS},
        "loss_weight": partial(_module, {"loss_weight": 3.0}),
        "teacher_detach = False": partial(_module, {"tau": 2.0, "teacher_detach": False}),
    },
)
CHANNEL_WISE = _over(
    (_MAPS[-1],),
    {f"tau, loss_weight = {t:g}, {w:g}": partial(_module, {"tau": t, "loss_weight": w}) for t, w in ((1, 3), (4, 1))},
)
TIMM = _over(_ROWS, {f"τ = {t:g}": partial(_timm, t) for t in _TEMPERATURES})
MODELOPT = _over(
    (*_ROWS, *_TOKENS),
    {
        "defaults": partial(_module, {}),
        **{f"τ = 4, {r}": partial(_module, {"temperature": 4.0, "reduction": r}) for r in _REDUCTIONS},
    },
)
DEIT = _over(
    _ROWS,
    {
        "soft, τ = 3": partial(_deit, ("soft", 0.5, 3.0)),
        "soft, τ = 1": partial(_deit, ("soft", 0.9, 1.0)),
        "hard": partial(_deit, ("hard", 0.5, 1.0)),
    },
)
LIGER_KL = (
    *_over(_ROWS, {r: partial(_liger_kl, {"reduction": r}) for r in _REDUCTIONS}, _log_softmax, _softmax),
    *_over(_ROWS, {"defaults": partial(_liger_kl, {})}, _log_softmax, _softmax),
    *_over(
        _ROWS,
        {"log_target": partial(_liger_kl, {"reduction": "batchmean", "log_target": True})},
        _log_softmax,
        _log_softmax,
    ),
)
LIGER_JSD = _over(
    _ROWS,
    {
        f"β = {beta:g}{', shift_labels' * labelled}": partial(_liger_jsd, beta, labelled)
        for beta in (0.0, 0.1, 0.5, 1.0)
        for labelled in (False, True)
    },
    _log_softmax,
    _log_softmax,
)
LIGER_FUSED_JSD = _over(
    _FUSED,
    {
        f"β = {beta:g}, τ = {temperature:g}{', shift_labels' * labelled}": partial(
            _liger_fused_jsd, beta, labelled, temperature
        )
        for beta, temperature in ((0.0, 1.0), (0.1, 2.0), (0.5, 1.0), (1.0, 2.0))
        for labelled in (False, True)
    },
)
TRL = _over(
    (*_TOKENS, (2, 5, 1000)),
    {
        **{f"β = {b:g}": partial(_trl, False, {"beta": b}) for b in (0.0, 0.1, 0.5, 1.0)},
        **{f"β = {b:g}, labels": partial(_trl, True, {"beta": b, "temperature": 2.0}) for b in (0.0, 0.5, 1.0)},
        "labels, num_items_in_batch": partial(_trl, True, {"num_items_in_batch": 50}),
        **{f"labels, {r}": partial(_trl, True, {"reduction": r}) for r in ("sum", "mean", "none")},
        **{f"no labels, {r}": partial(_trl, False, {"reduction": r}) for r in ("sum", "mean", "none")},
    },
)
