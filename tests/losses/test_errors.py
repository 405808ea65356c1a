"""What the public losses refuse, and in which words."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from support.loss_inputs import K, N, arguments, randn
from support.numerics import relative_error
from unikd_fast import channel_wise_kl, gaussian_kl, softmax_kl, unikd_loss


def changed(position: int, value: Any) -> list[Any]:
    inputs: list[Any] = list(arguments())
    inputs[position] = value
    return inputs


def logits(*shape: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Tensor:
    return torch.zeros(*shape, dtype=dtype, device=device)


class TestErrors:
    """Function, what was wrong, both values, remedy. Devices are told apart with the meta device."""

    @pytest.mark.parametrize(
        ("call", "error", "message"),
        [
            (
                lambda: softmax_kl(logits(32, 1000), logits(32, 100)),
                ValueError,
                r"softmax_kl: student and teacher logits must have one shape, got \(32, 1000\) and \(32, 100\)",
            ),
            (
                lambda: softmax_kl(logits(2, 3, dtype=torch.int64), logits(2, 3)),
                TypeError,
                "student logits must be floating point, got torch.int64",
            ),
            (
                lambda: softmax_kl(logits(2, 3), logits(2, 3, device="meta")),
                ValueError,
                "must be on one device, got cpu and meta",
            ),
            (
                lambda: channel_wise_kl(logits(2, 3, 4), logits(2, 3, 5)),
                ValueError,
                r"channel_wise_kl: student and teacher maps must have one shape, got \(2, 3, 4\) and \(2, 3, 5\); resi",
            ),
            (
                lambda: channel_wise_kl(logits(2, 3), logits(2, 3)),
                ValueError,
                r"channel_wise_kl: maps must be \(N, C, ...\) with at least one position, got \(2, 3\) and \(2, 3\)",
            ),
            (lambda: channel_wise_kl(logits(2, 3, 0), logits(2, 3, 0)), ValueError, "at least one position"),
            (
                lambda: channel_wise_kl(logits(2, 3, 4), logits(2, 3, 4, dtype=torch.int32)),
                TypeError,
                "channel_wise_kl: teacher maps must be floating point, got torch.int32",
            ),
            (
                lambda: channel_wise_kl(logits(2, 3, 4), logits(2, 3, 4, device="meta")),
                ValueError,
                "channel_wise_kl: student and teacher maps must be on one device, got cpu and meta",
            ),
            (lambda: softmax_kl(logits(2, 0), logits(2, 0)), ValueError, r"at least one class, got \(2, 0\)"),
            (lambda: softmax_kl(logits(2, 3), logits(2, 3), temperature=0), ValueError, "finite and above 0, got 0"),
            (
                lambda: softmax_kl(logits(2, 3), logits(2, 3), temperature=float("nan")),
                ValueError,
                "finite and above 0, got nan",
            ),
            (
                lambda: softmax_kl(logits(2, 3), logits(2, 3), temperature=torch.tensor(2.0)),
                TypeError,
                "temperature must be a number, got a tensor",
            ),
            (
                lambda: softmax_kl(logits(2, 3), logits(2, 3), reduction="average"),
                ValueError,
                "reduction must be one of batchmean, mean, sum, none, got 'average'",
            ),
            (
                lambda: softmax_kl(logits(2, 3), logits(2, 3), impl="triton"),
                ValueError,
                "impl must be one of auto, reference, fused, got 'triton'",
            ),
            (
                lambda: softmax_kl(logits(2, 3, device="meta"), logits(2, 3, device="meta"), impl="fused"),
                RuntimeError,
                "softmax_kl: impl='fused' needs a GPU, got tensors on meta; move them to one or use impl='auto'",
            ),
            (
                lambda: softmax_kl(logits(2, 3), logits(2, 3), ignore_mask=torch.ones(2)),
                TypeError,
                "ignore_mask must be bool, got torch.float32",
            ),
            (
                lambda: softmax_kl(logits(2, 3), logits(2, 3), ignore_mask=torch.ones(3, dtype=torch.bool)),
                ValueError,
                r"ignore_mask must have one entry per row of the logits, got \(3,\) for logits \(2, 3\)",
            ),
            (
                lambda: gaussian_kl(logits(2, 3), logits(2, 1), logits(2, 3), logits(2, 3)),
                ValueError,
                r"gaussian_kl: student mean and log_var must have one shape, got \(2, 3\) and \(2, 1\)",
            ),
            (
                lambda: gaussian_kl(logits(2, 3), logits(2, 3), logits(2, 4), logits(2, 4)),
                ValueError,
                r"student and teacher means must have one shape, got \(2, 3\) and \(2, 4\)",
            ),
            (
                lambda: unikd_loss(*changed(2, torch.zeros(N))),
                TypeError,
                "unikd_loss: labels must be integers, got torch.float32",
            ),
            (
                lambda: unikd_loss(*changed(2, torch.zeros(N + 1, dtype=torch.int64))),
                ValueError,
                r"labels must have one entry per row of the logits, got \(7,\) for logits \(6, 5\)",
            ),
            (
                lambda: unikd_loss(*changed(2, torch.full((N,), K))),
                ValueError,
                r"labels must lie in \[0, 5\) or be ignore_index -100, got 5; check that the network has",
            ),
            (
                lambda: unikd_loss(*arguments(), ignore_index=-1),
                ValueError,
                r"labels must lie in \[0, 5\) or be ignore_index -1, got -100",
            ),
            (
                lambda: unikd_loss(*changed(4, (logits(N, K),) * 3)),
                ValueError,
                r"teacher must be a pair \(mean, log_var\), got 3 items",
            ),
            (
                lambda: unikd_loss(*arguments(), label_smoothing=1.5),
                ValueError,
                r"label_smoothing must lie in \[0, 1\], got 1.5",
            ),
        ],
    )
    def test_messages(self, call: Callable[[], Tensor], error: type[Exception], message: str) -> None:
        with pytest.raises(error, match=message):
            call()

    def test_mixed_precision_of_student_and_teacher(self) -> None:
        student, teacher = randn(N, K, seed=1), randn(N, K, seed=2)
        mixed = softmax_kl(student.float(), teacher.bfloat16())
        # The teacher is rounded to 8 bits; the loss moves by the rounding of the logits times the gradient, not more.
        assert relative_error(mixed, softmax_kl(student, teacher.bfloat16().double())) < 1e-6
