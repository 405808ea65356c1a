"""What a cache was made from: equal exactly if nothing differs, and every difference named."""

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unikd_fast.errors import CacheError, RunError
from unikd_fast.teacher.cache import CacheKey, hash_tensors

SCALARS = st.none() | st.booleans() | st.integers(-2, 2) | st.sampled_from([0.0, 1.0, 0.5]) | st.sampled_from(["", "a"])
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(["a", "b", "a.b"]), inner)
)
FIELDS = st.dictionaries(st.sampled_from(["a", "b", "a.b"]), VALUES, max_size=3)


@given(FIELDS, FIELDS)
@settings(max_examples=300, deadline=None)
def test_unequal_keys_have_named_differences(one: dict[str, Any], other: dict[str, Any]) -> None:
    left, right = CacheKey(one), CacheKey(other)
    if left.digest == right.digest:
        assert left == right and hash(left) == hash(right)
        left.require_same(right)
    else:
        assert left != right
        with pytest.raises(CacheError, match="in the cache"):
            left.require_same(right)


@given(FIELDS)
@settings(deadline=None)
def test_a_key_round_trips_through_json(fields: dict[str, Any]) -> None:
    assert CacheKey(CacheKey(fields).fields).digest == CacheKey(fields).digest


def test_keys_ignore_order_and_tuples() -> None:
    assert CacheKey({"a": 1, "b": {"c": (1, 2), "d": "ü"}}) == CacheKey({"b": {"d": "ü", "c": [1, 2]}, "a": 1})


def test_the_digest_is_stable_across_versions() -> None:
    """sha256 of {"a":[1,2.5],"b":null}, from coreutils' sha256sum."""
    digest = CacheKey({"b": None, "a": [1, 2.5]}).digest
    assert digest == "f66b2c50ccae61e3f2445d2439f42efc245581b18ed184ce5d3c22fb58eed9c4"


def test_every_differing_field_is_named_with_both_values() -> None:
    asked = CacheKey({"teacher": {"weights": "new", "fold": True}, "resolution": 224, "decoder": "dali"})
    found = CacheKey({"teacher": {"weights": "old", "fold": True}, "resolution": 224.0, "seed": [1, 2]})
    with pytest.raises(CacheError) as caught:
        asked.require_same(found)
    assert str(caught.value).splitlines() == [
        "the cache was built from something else:",
        '  decoder: absent in the cache, "dali" now',
        "  resolution: 224.0 in the cache, 224 now",
        "  seed: [1,2] in the cache, absent now",
        '  teacher.weights: "old" in the cache, "new" now',
        "build into another folder or delete this one",
    ]
    assert isinstance(caught.value, RunError) and caught.value.exit_code == 4


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"a": {"b": np.int64(1)}}, TypeError, r"a\.b must be JSON-serialisable, got int64; pass a number"),
        ({"a": [{3: 1}]}, TypeError, r"names must be strings, got 3 under a\.0"),
        ({"a": float("nan")}, ValueError, r"a must be finite, got nan"),
        ({"a": {1, 2}}, TypeError, r"a must be JSON-serialisable, got set"),
    ],
)
def test_values_json_cannot_hold_are_refused(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        CacheKey(fields)


def test_the_fields_of_a_key_are_copied() -> None:
    inner = {"crop": [1, 2]}
    key = CacheKey({"augmentation": inner})
    digest = key.digest
    inner["crop"].append(3)
    key.fields["augmentation"]["crop"].append(3)
    assert key.digest == digest and key.fields == {"augmentation": {"crop": [1, 2]}}


STATE = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "bias": torch.tensor([1.0, -0.0], dtype=torch.bfloat16),
    "count": torch.tensor(3),
    "empty": torch.empty(0, 4),
    "mask": torch.tensor([True, False]),
}


def test_hash_tensors_ignores_order_and_memory_layout() -> None:
    expected = hash_tensors(STATE)
    assert hash_tensors(dict(reversed(STATE.items()))) == expected
    strided = STATE["weight"].t().contiguous().t()
    assert not strided.is_contiguous()
    assert hash_tensors({**STATE, "weight": strided}) == expected
    assert hash_tensors({**STATE, "weight": torch.nn.Parameter(STATE["weight"])}) == expected
    pair = torch.view_as_complex(torch.ones(2, 2))
    assert hash_tensors({"z": pair.conj()}) == hash_tensors({"z": pair.conj().resolve_conj()})
    assert hash_tensors({"z": pair.conj()}) != hash_tensors({"z": pair})


@pytest.mark.parametrize(
    "change",
    [
        {"weight": torch.arange(6.0).reshape(3, 2)},
        {"weight": torch.arange(6.0).reshape(2, 3).int()},
        {"weight": torch.arange(6.0).reshape(2, 3).view(torch.int32)},
        {"weight": torch.arange(6.0).reshape(2, 3).nextafter(torch.tensor(9.0))},
        {"bias": torch.tensor([1.0, 0.0], dtype=torch.bfloat16)},
        {"empty": torch.empty(0, 5)},
        {"another": torch.empty(0)},
    ],
    ids=["shape", "values as int", "same bytes, other dtype", "last bit", "sign of zero", "empty shape", "a name more"],
)
def test_hash_tensors_covers_names_dtypes_shapes_and_bytes(change: dict[str, torch.Tensor]) -> None:
    assert hash_tensors({**STATE, **change}) != hash_tensors(STATE)


def test_swapped_names_change_the_hash() -> None:
    one, two = torch.zeros(2), torch.ones(2)
    assert hash_tensors({"a": one, "b": two}) != hash_tensors({"a": two, "b": one})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_hash_tensors_ignores_the_device() -> None:
    assert hash_tensors({name: tensor.cuda() for name, tensor in STATE.items()}) == hash_tensors(STATE)


@pytest.mark.parametrize(
    ("value", "got"),
    [(torch.eye(2).to_sparse(), "torch.sparse_coo"), (torch.empty(2, device="meta"), "meta"), (3, "int")],
)
def test_tensors_without_data_are_refused(value: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"hash_tensors: x must be a dense tensor with data, got .*{got}"):
        hash_tensors({"x": value})
