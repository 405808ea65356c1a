"""Whether a cache says what the teacher says: stored outputs against outputs computed again."""

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import Codec
from unikd_fast.teacher.fidelity import LOGIT_BOUND
from unikd_fast.teacher.precision import unit_rounding
from unikd_fast.values import Gaussian, QuantizedLogits, TopKLogits

# What storing alone may change where two computations of one number fall on both sides of a rounding: one unit of fp16,
# or one level of 255 in a few classes.
_STORED = {"fp16": 2.0**-10, "top_k": 2.0**-10, "uint8": 2.0**-7}


class Recheck(NamedTuple):
    """Stored outputs against the teacher's, in units of their own size."""

    views: int
    worst: float  # the largest difference of any view
    bound: float  # what rounding explains


def output_differences(
    codec: Codec, records: NDArray[np.uint8], logits: Tensor, gaussian: Gaussian | None = None
) -> Tensor:
    """How far each stored output is from one computed again.

    Both are compared as stored, so the codec's own loss does not count: centred logits, relative to their size; for
    top_k the log-probabilities of the classes kept; the Gaussian's mean, relative to its size, and its log-variance.
    The largest of these counts.

    Args:
        codec: that packed the records.
        records: (N, record_bytes), as read.
        logits: (N, K), computed again.
        gaussian: (N, K) each, if the codec holds one.

    Returns:
        (N,) fp64 on the CPU; NaN or inf where a value is not finite.

    Example:
        >>> float(output_differences(codec, codec.encode(logits), logits).max())
        0.0
    """
    stored, stored_gaussian = codec.decode(records)
    again, again_gaussian = codec.decode(codec.encode(logits, gaussian))
    exact = logits.detach().cpu().double()
    size = _size(exact - exact.mean(1, keepdim=True))
    if isinstance(stored, TopKLogits):
        # The classes may differ where two logits are nearly equal: the new ones are taken at the stored classes.
        kept = exact.half().double().gather(1, stored.indices.long())
        assert isinstance(again, TopKLogits)
        found = stored.values.double() - stored.log_sum_exp.double()[:, None]
        worst = _norm(found - (kept - again.log_sum_exp.double()[:, None])) / size
    else:
        assert not isinstance(again, TopKLogits)
        change = _dense(stored) - _dense(again)
        worst = _norm(change - change.mean(1, keepdim=True)) / size
    if stored_gaussian is not None and again_gaussian is not None:
        means, logs = (
            (left.double(), right.double()) for left, right in zip(stored_gaussian, again_gaussian, strict=True)
        )
        of_mean = _norm(means[0] - means[1]) / _size(means[1])
        of_variance = (logs[0] - logs[1]).square().mean(1).sqrt()
        worst = torch.maximum(worst, torch.maximum(of_mean, of_variance))  # NaN wins
    return worst


def check_outputs(
    differences: Tensor, codec: Codec, *, precision: str, device: torch.device | str, names: list[str], cache: str
) -> Recheck:
    """Refuse a cache whose outputs are not the teacher's.

    Args:
        differences: (N,) from `output_differences`.
        codec: that packed the records.
        precision: of the teacher.
        device: where it computed.
        names: what to call each of the N views.
        cache: what to call the cache.

    Raises:
        CacheError: a view differs by more than rounding explains; names it, both values and the remedy.

    Example:
        >>> check_outputs(torch.zeros(1), codec, precision="bf16", device="cpu", names=["sample 7"], cache="caches/a")
        Recheck(views=1, worst=0.0, bound=0.1259765625)
    """
    bound = LOGIT_BOUND * unit_rounding(precision, device) + _STORED[codec.kind]
    wrong = ~(differences <= bound)
    if bool(wrong.any()):
        first = int(wrong.nonzero()[0])
        raise CacheError(
            f"{cache} does not hold what the teacher says: {int(wrong.sum())} of {len(differences)} outputs computed "
            f"again differ, {names[first]} by {float(differences[first]):.2g} of its size, and rounding explains at "
            f"most {bound:.2g}; something that the key does not name has changed (image files, libraries, the "
            "processor): delete the folder and build the cache again, or choose another with --set "
            "teacher.cache.dir=..."
        )
    return Recheck(len(differences), float(differences.max()), bound)


def _norm(rows: Tensor) -> Tensor:
    return rows.norm(dim=1)


def _size(rows: Tensor) -> Tensor:
    """As `_norm`, to divide by."""
    return _norm(rows).clamp_min(torch.finfo(torch.float64).tiny)


def _dense(logits: Tensor | QuantizedLogits) -> Tensor:
    if isinstance(logits, Tensor):
        return logits.double()
    return logits.values.double() * logits.scale.double()[:, None] + logits.offset.double()[:, None]
