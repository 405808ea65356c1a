"""The banks of CRD: draws that repeat and are of the right classes, and a state that goes on bit for bit."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from support.build_method import build as build_method
from support.crd_inputs import CLASSES, IDS, LABELS, SAMPLES, STUDENT, TEACHER, WIDTH, build, step
from unikd_fast.data.philox import philox_4x32 as philox_of_numpy
from unikd_fast.methods import CRD
from unikd_fast.methods.crd import Banks, bank_bytes, philox_4x32, uniform_integers


def test_random_words_match_the_data_generator() -> None:
    counter = np.random.default_rng(1).integers(0, 2**32, (50, 4), dtype=np.uint32)
    seed = 0xFEDCBA9876543210
    found = philox_4x32(tuple(torch.from_numpy(counter.astype(np.int64)).unbind(1)), seed)  # type: ignore[arg-type]
    expected = philox_of_numpy(counter, (seed & 0xFFFFFFFF, seed >> 32)).astype(np.int64)
    assert torch.equal(found, torch.from_numpy(expected))


def test_integers_are_uniform_per_step_stream_and_row() -> None:
    ids, below = torch.arange(3), torch.tensor([1, 10, 7])
    step = torch.tensor(2**33 + 5)
    found = uniform_integers(3, step, ids, 0, 20_001, below)
    assert found.shape == (3, 20_001) and not found[0].any()
    for row in (1, 2):
        counts = torch.bincount(found[row], minlength=int(below[row])).double()
        assert len(counts) == below[row]
        share = 20_001 / int(below[row])
        # χ² of at most nine degrees of freedom: below 28 but once in a thousand seeds, and the seed is fixed.
        assert ((counts - share) ** 2 / share).sum() < 28
    assert torch.equal(uniform_integers(3, step, ids.flip(0), 0, 7, below.flip(0)), found[:, :7].flip(0))
    for other in (
        uniform_integers(3, step - 2**33, ids, 0, 50, below),
        uniform_integers(3, step + 1, ids, 0, 50, below),
        uniform_integers(3, step, ids, 1, 50, below),
        uniform_integers(4, step, ids, 0, 50, below),
        uniform_integers(3, step, ids + 3, 0, 50, below),
    ):
        assert not torch.equal(other[1:], found[1:, :50])


def classes_by_row(banks: Banks) -> Tensor:
    found = torch.empty(SAMPLES, dtype=torch.int64)
    found[banks.rows(IDS)] = LABELS
    return found


def test_negatives_cover_all_samples_of_other_classes() -> None:
    banks = build().banks
    assert torch.equal(banks.rows(IDS).sort().values, torch.arange(SAMPLES))
    places = torch.tensor([0, 1, 17, 3])
    rows, labels, classes = banks.rows(IDS[places]), LABELS[places], classes_by_row(build().banks)
    drawn = banks.negatives(rows, labels, 4000)
    positives = torch.stack(
        [banks.same_class(rows, labels) for _ in range(200) if banks.step.add_(1) is not None], dim=1
    )
    for i, label in enumerate(labels.tolist()):
        others = (classes != label).nonzero()[:, 0]
        counts = torch.bincount(drawn[i], minlength=SAMPLES)
        assert torch.equal(counts.nonzero()[:, 0], others)
        share = 4000 / len(others)
        assert (counts[others] - share).abs().max() < 5 * share**0.5
        assert set(positives[i].tolist()) == set((classes == label).nonzero()[:, 0].tolist())


def test_draws_depend_on_the_step_but_not_on_the_batch() -> None:
    banks = build().banks
    rows, labels = banks.rows(IDS), LABELS
    drawn = banks.negatives(rows, labels, 10)
    some = torch.tensor([7, 3, 30])
    assert torch.equal(banks.negatives(rows[some], labels[some], 10), drawn[some])
    banks.remember(rows[:1], torch.ones(1, WIDTH), torch.ones(1, WIDTH), momentum=0.5)
    assert not torch.equal(banks.negatives(rows, labels, 10), drawn)
    assert not torch.equal(build(8).banks.negatives(rows, labels, 10), drawn)


def test_repeated_and_non_finite_samples_in_the_banks() -> None:
    banks = build().banks
    before = banks.student.clone()
    rows = torch.tensor([4, 9, 4, 11])
    new = F.normalize(torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(1)), dim=1)
    new[3, 0] = float("nan")
    banks.remember(rows, new, new.nan_to_num(), momentum=0.25)
    expected = before.clone()
    expected[4] = F.normalize(0.25 * before[4] + 0.75 * new[0], dim=0)
    expected[9] = F.normalize(0.25 * before[9] + 0.75 * new[1], dim=0)
    torch.testing.assert_close(banks.student, expected)
    assert not torch.equal(banks.teacher[11], build().banks.teacher[11])
    assert banks.step == 1


def test_a_restored_method_continues_bit_for_bit() -> None:
    method = build()
    for seed in range(3):
        step(method, seed)
    state = {"banks": {k: v.clone() if isinstance(v, Tensor) else v for k, v in method.state_dict()["banks"].items()}}
    state |= {"log_z": method.log_z.clone(), "knows_z": True}  # type: ignore[dict-item]
    assert state.keys() == method.state_dict().keys()
    torch.manual_seed(99)
    other = build_method(CRD, STUDENT, TEACHER, IDS, LABELS, CLASSES, width=WIDTH, negatives=23)
    other.adapter.load_state_dict(method.adapter.state_dict())
    other.teacher_embed.load_state_dict(method.teacher_embed.state_dict())
    other.load_state_dict(state)
    for seed in (3, 4):
        found, expected = step(other, seed), step(method, seed)
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_a_state_of_other_data_is_refused() -> None:
    method = build()
    with pytest.raises(ValueError, match=r"are \(40, 7\), the checkpoint's \(40, 5\); .* distill\.crd\.width"):
        build(width=7).load_state_dict(method.state_dict())
    for ids, labels in ((IDS + 1, LABELS), (IDS, LABELS.roll(1))):
        other = build_method(CRD, STUDENT, TEACHER, ids, labels, CLASSES, width=WIDTH)
        with pytest.raises(ValueError, match=r"40 samples, or their classes, are not those"):
            other.load_state_dict(method.state_dict())


def test_samples_without_negatives_are_refused() -> None:
    with pytest.raises(ValueError, match=r"40 samples of 1 class; train on at least two"):
        build_method(CRD, STUDENT, TEACHER, IDS, torch.zeros_like(LABELS), CLASSES)
    with pytest.raises(ValueError, match=r"got 40 ids \(20 of them distinct\) and 40 classes"):
        build_method(CRD, STUDENT, TEACHER, IDS[:20].repeat(2), LABELS, CLASSES)


def test_banks_that_do_not_fit_are_refused_with_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bank_bytes(1_281_167, 128) == 2 * 1_281_167 * 128 * 4
    room = bank_bytes(SAMPLES, WIDTH) + 2**29
    monkeypatch.setattr("unikd_fast.methods.crd._memory_bytes", lambda device: room)
    build()
    monkeypatch.setattr("unikd_fast.methods.crd._memory_bytes", lambda device: room - 1)
    with pytest.raises(ValueError, match=r"2 x 40 x 5 x 4 bytes = 0\.00 GiB, and a step up to 0\.50 GiB, but cpu has"):
        build()
