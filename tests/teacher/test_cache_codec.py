"""Packing a teacher's outputs: what comes back, what is refused."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from unikd_fast.errors import CacheError
from unikd_fast.losses import quantize_logits, softmax_kl, top_k_logits
from unikd_fast.teacher.cache import Codec
from unikd_fast.values import Gaussian, QuantizedLogits, TopKLogits


def random_logits(rows: int, classes: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(rows, classes, generator=generator) * 8).to(dtype)


def expected(codec: Codec, logits: Tensor) -> Any:
    if codec.kind == "fp16":
        return logits.half()
    if codec.kind == "uint8":
        return quantize_logits(logits)
    assert codec.top_k is not None
    return top_k_logits(logits.half(), codec.top_k)


def assert_same(found: Any, wanted: Any) -> None:
    assert type(found) is type(wanted)
    pairs = [(found, wanted)] if isinstance(wanted, Tensor) else zip(found, wanted, strict=True)
    for left, right in pairs:
        assert left.dtype == right.dtype and left.shape == right.shape
        assert torch.equal(left, right)


@st.composite
def codecs(draw: st.DrawFn) -> Codec:
    classes = draw(st.integers(1, 40))
    kind = draw(st.sampled_from(["fp16", "uint8", "top_k"]))
    top_k = draw(st.integers(1, classes)) if kind == "top_k" else None
    return Codec(kind, classes, top_k, gaussian=draw(st.booleans()))


@given(codecs(), st.integers(0, 5), st.data())
@settings(max_examples=300, deadline=None)
def test_round_trip(codec: Codec, rows: int, data: st.DataObject) -> None:
    """Every number comes back as the plain function of the same name gives it, bit for bit."""
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    numbers = st.lists(
        st.floats(-60000, 60000, width=16), min_size=rows * codec.num_classes, max_size=rows * codec.num_classes
    )
    logits, mean, log_var = (
        torch.tensor(data.draw(numbers), dtype=dtype).reshape(rows, codec.num_classes) for _ in range(3)
    )
    gaussian = Gaussian(mean, log_var) if codec.gaussian else None
    records = codec.encode(logits, gaussian)
    assert records.shape == (rows, codec.record_bytes) and records.dtype == np.uint8
    found, found_gaussian = codec.decode(records)
    assert_same(found, expected(codec, logits))
    if gaussian is None:
        assert found_gaussian is None
    else:
        assert_same(found_gaussian, Gaussian(mean.half(), log_var.half()))


@pytest.mark.parametrize(
    ("codec", "size"),
    [
        (Codec("fp16", 1000), 2000),
        (Codec("uint8", 1000), 1008),
        (Codec("top_k", 1000, top_k=10), 64),
        (Codec("fp16", 1000, gaussian=True), 6000),
        (Codec("uint8", 1001), 1016),  # padded
    ],
    ids=lambda value: value.kind if isinstance(value, Codec) else str(value),
)
def test_record_sizes(codec: Codec, size: int) -> None:
    assert codec.record_bytes == size


@pytest.mark.parametrize("kind", ["fp16", "uint8", "top_k"])
def test_round_trip_with_imagenet_21k_classes(kind: str) -> None:
    codec = Codec(kind, 21841, top_k=100 if kind == "top_k" else None, gaussian=True)
    logits = random_logits(3, 21841)
    logits[1, 21840] = 200.0  # an index beyond int16
    gaussian = Gaussian(random_logits(3, 21841, 1), random_logits(3, 21841, 2))
    found, found_gaussian = codec.decode(codec.encode(logits, gaussian))
    assert_same(found, expected(codec, logits))
    assert_same(found_gaussian, Gaussian(gaussian.mean.half(), gaussian.log_var.half()))
    if isinstance(found, TopKLogits):
        assert found.indices[1, 0] == 21840


def test_top_k_probabilities_sum_to_at_most_one() -> None:
    """The log-sum-exp belongs to the rounded logits: with that of the fp32 ones, rounding up would give p > 1."""
    logits = torch.zeros(4000, 10)
    logits[:, 3] = torch.linspace(12.0, 40.0, 4000)
    codec = Codec("top_k", 10, top_k=2)
    found, _ = codec.decode(codec.encode(logits))
    assert isinstance(found, TopKLogits)
    mass = (found.values.double() - found.log_sum_exp.double()[:, None]).exp().sum(dim=1)
    assert mass.max() <= 1 + 4e-6  # the log-sum-exp is fp32: half a unit at 40 is 1.9e-6
    of_fp32 = (logits[:, 3].half().double() - logits.double().logsumexp(dim=1)).exp()
    assert of_fp32.max() > 1.01


@pytest.mark.parametrize("kind", ["fp16", "uint8"])
def test_losses_accept_decoded_outputs(kind: str) -> None:
    codec = Codec(kind, 37, gaussian=True)
    student, teacher = random_logits(5, 37, 1), random_logits(5, 37, 2)
    found, _ = codec.decode(codec.encode(teacher, Gaussian(teacher, teacher)))
    assert not isinstance(found, TopKLogits)
    direct = expected(codec, teacher)
    assert softmax_kl(student, found, temperature=2.0) == softmax_kl(student, direct, temperature=2.0)


@pytest.mark.parametrize("codec", [Codec("fp16", 9), Codec("uint8", 9, gaussian=True), Codec("top_k", 9, top_k=4)])
def test_records_decode_from_any_memory_layout(codec: Codec) -> None:
    logits = random_logits(6, 9)
    records = codec.encode(logits, Gaussian(logits, logits) if codec.gaussian else None)
    wide = np.zeros((6, codec.record_bytes + 5), np.uint8)
    wide[:, 3:-2] = records
    read_only = records.copy()
    read_only.flags.writeable = False
    arrangements: list[NDArray[np.uint8]] = [wide[:, 3:-2], read_only, records[::-1][::-1], np.asfortranarray(records)]
    for arrangement in arrangements:
        assert_same(codec.decode(arrangement)[0], expected(codec, logits))
    assert_same(codec.decode(records[::-1])[0], expected(codec, logits.flip(0)))


def test_decoding_on_the_cpu_does_not_copy() -> None:
    codec = Codec("uint8", 16, gaussian=True)
    records = codec.encode(random_logits(4, 16), Gaussian(random_logits(4, 16), random_logits(4, 16)))
    found, gaussian = codec.decode(records)
    assert isinstance(found, QuantizedLogits) and gaussian is not None
    start, stop = records.ctypes.data, records.ctypes.data + records.nbytes
    assert all(start <= tensor.data_ptr() < stop for tensor in (*found, *gaussian))


def test_encoding_takes_strided_logits() -> None:
    codec = Codec("fp16", 5)
    strided = random_logits(5, 4).t().requires_grad_()
    assert_same(codec.decode(codec.encode(strided))[0], strided.detach().half())


@pytest.mark.parametrize("kind", ["fp16", "top_k"])
def test_logits_beyond_fp16_are_refused(kind: str) -> None:
    codec = Codec(kind, 10, top_k=2 if kind == "top_k" else None)
    logits = random_logits(4, 10)
    logits[2, 5] = -65519.0  # rounds to -65504
    codec.encode(logits)
    logits[2, 5], logits[3, 1] = -65520.0, 70000.0
    with pytest.raises(CacheError, match=r"logits reach 70000 \(the first in row 2\), fp16 ends at 65504; .*uint8"):
        codec.encode(logits)
    eight_bits, _ = Codec("uint8", 10).decode(Codec("uint8", 10).encode(logits))
    assert_same(eight_bits, quantize_logits(logits))


@pytest.mark.parametrize("kind", ["fp16", "uint8", "top_k"])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
def test_inf_and_nan_are_refused(kind: str, value: float) -> None:
    codec = Codec(kind, 10, top_k=2 if kind == "top_k" else None)
    logits = torch.full((4, 10), -3.5, dtype=torch.float16)
    logits[1, 9] = value
    with pytest.raises(
        CacheError, match=r"logits are inf or NaN \(the first in row 1\), the largest finite one is 3.5; "
    ):
        codec.encode(logits)


@pytest.mark.parametrize("name", ["mean", "log_var"])
@pytest.mark.parametrize(("value", "message"), [(1e6, "reach 1e.06"), (float("nan"), "are inf or NaN")])
def test_a_gaussian_that_overflows_fp16_is_refused(name: str, value: float, message: str) -> None:
    logits = random_logits(4, 10)
    gaussian = Gaussian(logits.clone(), logits.clone())
    getattr(gaussian, name)[3, 3] = value
    with pytest.raises(CacheError, match=rf"{name} {message} \(the first in row 3\)"):
        Codec("uint8", 10, gaussian=True).encode(logits, gaussian)


def test_a_row_that_exceeds_the_range_of_fp32_is_refused() -> None:
    logits = torch.tensor([[3e38, -3e38]])
    with pytest.raises(CacheError, match=r"exceeds the range of fp32, up to 3e\+38"):
        Codec("uint8", 2).encode(logits)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp8", 10), "kind must be one of fp16, uint8, top_k, got 'fp8'"),
        (("fp16", 0), "num_classes must lie in .*, got 0"),
        (("top_k", 2**31 + 1, 5), "num_classes must lie in .1, 2147483648., got 2147483649; class indices are int32"),
        (("top_k", 10), "top_k must lie in .1, 10., got None"),
        (("top_k", 10, 11), "top_k must lie in .1, 10., got 11"),
        (("uint8", 10, 3), "top_k is for kind 'top_k', got 3 with 'uint8'"),
    ],
)
def test_invalid_settings_are_refused(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codec(*arguments)


def test_settings_reconstruct_the_codec() -> None:
    codec = Codec("top_k", 10, 3, gaussian=True)
    assert Codec(**codec.settings) == codec


@pytest.mark.parametrize(
    ("gaussian", "logits", "given", "message"),
    [
        (False, torch.zeros(2, 9), None, r"logits must be floats of shape \(N, 10\), got \(2, 9\)"),
        (False, torch.zeros(10), None, r"logits must be floats of shape \(N, 10\), got \(10,\)"),
        (False, torch.zeros(2, 10).long(), None, r"got \(2, 10\) torch.int64"),
        (True, torch.zeros(2, 10), None, "got no Gaussian, but records of this codec hold one"),
        (False, torch.zeros(2, 10), Gaussian(torch.zeros(2, 10), torch.zeros(2, 10)), "got a Gaussian, .* hold none"),
        (True, torch.zeros(2, 10), Gaussian(torch.zeros(2, 10), torch.zeros(2, 9)), "log_var must be floats of shape"),
        (True, torch.zeros(2, 10), Gaussian(torch.zeros(3, 10), torch.zeros(2, 10)), "3 rows"),
    ],
)
def test_wrong_shapes_are_refused(gaussian: bool, logits: Tensor, given: Gaussian | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Codec("fp16", 10, gaussian=gaussian).encode(logits, given)


def test_records_of_another_codec_are_refused() -> None:
    with pytest.raises(ValueError, match=r"records must be \(N, 24\) uint8, got \(3, 16\) uint8"):
        Codec("fp16", 10).decode(np.zeros((3, 16), np.uint8))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", ["fp16", "uint8", "top_k"])
def test_a_gpu_packs_and_unpacks_the_same_bytes(kind: str) -> None:
    codec = Codec(kind, 101, top_k=7 if kind == "top_k" else None, gaussian=True)
    logits = random_logits(6, 101)
    gaussian = Gaussian(random_logits(6, 101, 1), random_logits(6, 101, 2))
    records = codec.encode(logits.cuda(), Gaussian(gaussian.mean.cuda(), gaussian.log_var.cuda()))
    found, _ = codec.decode(records, "cuda")
    tensors = [found] if isinstance(found, Tensor) else list(found)
    assert all(tensor.is_cuda for tensor in tensors)
    if kind != "top_k":  # a log-sum-exp is summed in another order there
        assert np.array_equal(records, codec.encode(logits, gaussian))
