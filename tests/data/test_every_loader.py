"""What holds for all loaders and all forms of a data set: who gets which sample, under which view, and after a stop."""

import hashlib
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from support.loaders import build_loader
from support.processes import finished
from support.same_images import LABELS, SHORT, SIZE, TRAIN, VAL, write_every_form
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.dali import dali_problem
from unikd_fast.data.loader import Loader
from unikd_fast.data.sampler import EpochSampler
from unikd_fast.data.splits import DataSplits
from unikd_fast.values import Batch

FIRST = Augmentation(crop="pad", padding=4, flip_probability=0.5, eval_resize=SHORT)
SECOND = Augmentation(crop="pad", padding=2, policy="trivial", erase_probability=0.5, eval_resize=SHORT)
SEED, EPOCH = 5, 3
WAYS = [
    ("device", "memory"),
    *((kind, form) for kind in ("torchvision", "dali") for form in ("folder", "arrow")),
]
needs_dali = pytest.mark.skipif(dali_problem() is not None, reason="DALI does not work here")
ways = pytest.mark.parametrize(
    ("kind", "form"),
    [pytest.param(*way, marks=needs_dali if way[0] == "dali" else (), id="-".join(way)) for way in WAYS],
)


class Shown(NamedTuple):
    """What a loader gave for a sample."""

    image: Tensor
    second: Tensor
    label: int


@pytest.fixture(scope="module")
def forms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, DataSplits]:
    return write_every_form(tmp_path_factory.mktemp("forms"))


@pytest.fixture(scope="module")
def expected(forms: dict[str, DataSplits]) -> dict[str, dict[int, Shown]]:
    """By kind, all samples as one batch of them all shows them; DALI's pixels are up to two levels from PIL's."""
    kinds = {"device": "memory", **({"dali": "folder"} if dali_problem() is None else {})}
    found = {kind: by_id(make(forms[form], kind, TRAIN).train(EPOCH)) for kind, form in kinds.items()}
    return {**found, "torchvision": found["device"]}


def make(splits: DataSplits, kind: str, global_batch_size: int, **changes: Any) -> Loader:
    shared = {"augmentation": FIRST, "second": SECOND, "seed": SEED, "device": "cpu", "workers": 0}
    return build_loader(splits, kind=kind, global_batch_size=global_batch_size, **{**shared, **changes})  # type: ignore[arg-type]


def by_id(batches: Any) -> dict[int, Shown]:
    """Map each id to what is shown of it; an id may come once."""
    found: dict[int, Shown] = {}
    for images, labels, sample_ids, second in batches:
        for row, sample_id in enumerate(sample_ids.tolist()):
            assert sample_id not in found
            found[sample_id] = Shown(images[row], second[row], int(labels[row]))
    return found


def assert_shown(found: dict[int, Shown], expected: dict[int, Shown]) -> None:
    for sample_id, (image, second, label) in found.items():
        assert torch.equal(image, expected[sample_id].image)
        assert torch.equal(second, expected[sample_id].second)
        assert label == LABELS[sample_id]


def ids(batches: list[Batch]) -> list[int]:
    return [sample_id for batch in batches for sample_id in batch.sample_ids.tolist()]


@needs_dali
def test_the_pixels_of_all_loaders_are_near(expected: dict[str, dict[int, Shown]]) -> None:
    """So their windows and flips are the same: a shift by one pixel makes dozens of levels."""
    ours, theirs = ([shown[i].image for i in range(TRAIN)] for shown in (expected["dali"], expected["device"]))
    difference = (torch.stack(ours) - torch.stack(theirs)).abs() * 0.225 * 255
    assert difference.max() < 2.1
    shifted = (torch.stack(ours) - torch.stack(theirs).roll(1, -1)).abs() * 0.225 * 255
    assert shifted.amax(dim=(1, 2, 3)).min() > 30


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@ways
@pytest.mark.parametrize("workers", [0, 2])
def test_a_gpu_gets_the_pixels_of_the_cpu(
    forms: dict[str, DataSplits], expected: dict[str, dict[int, Shown]], kind: str, form: str, workers: int
) -> None:
    """Within a level of 256 where the GPU makes the views, two with its own decoder; the rest is copied."""
    loader = make(forms[form], kind, 12, workers=workers, device="cuda")
    for _ in range(2):  # a copy that is not waited for would show the batch after it
        shown = by_id(loader.train(EPOCH))
        assert len(shown) == 24
        for sample_id, (image, second, label) in shown.items():
            assert image.is_cuda and label == LABELS[sample_id]
            for found, known in ((image, expected[kind][sample_id].image), (second, expected[kind][sample_id].second)):
                assert (found.cpu() - known).abs().max() * 0.23 * 255 < (2.1 if kind == "dali" else 1.01)


@ways
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_an_epoch_gives_each_id_to_one_rank_once(
    forms: dict[str, DataSplits], expected: dict[str, dict[int, Shown]], kind: str, form: str, world_size: int
) -> None:
    """The five samples that two batches of 12 leave over sit out, the same on all; more ranks than a class has."""
    assert np.bincount(LABELS).min() < 2
    loaders = [make(forms[form], kind, 12, rank=rank, world_size=world_size) for rank in range(world_size)]
    ranks = [list(loader.train(EPOCH)) for loader in loaders]
    assert {loader.steps_per_epoch for loader in loaders} == {2}
    assert [len(batches) for batches in ranks] == [2] * world_size
    shown = by_id(batch for batches in ranks for batch in batches)
    assert len(shown) == 24
    assert_shown(shown, expected[kind])
    sampler = EpochSampler(TRAIN, 12, seed=SEED)
    for step in range(2):
        dealt = torch.cat([batches[step].sample_ids for batches in ranks])
        assert dealt.tolist() == sampler.global_batch(EPOCH, step).tolist()


@ways
@pytest.mark.parametrize(("batch_size", "helpers"), [(1, 2), (7, 1), (TRAIN, 2)])
def test_a_view_depends_on_neither_batch_size_nor_helpers(
    forms: dict[str, DataSplits],
    expected: dict[str, dict[int, Shown]],
    kind: str,
    form: str,
    batch_size: int,
    helpers: int,
) -> None:
    loader = make(forms[form], kind, batch_size, workers=helpers, dali_threads=helpers)
    shown = by_id(loader.train(EPOCH))
    assert len(shown) == TRAIN // batch_size * batch_size
    assert_shown(shown, expected[kind])


@ways
@pytest.mark.parametrize(
    ("before", "after"),
    [((1, 1), (3, 1)), ((2, 1), (1, 2)), ((3, 2), (2, 1)), ((2, 3), (6, 1))],
    ids=lambda division: f"{division[0]}x{division[1]}",
)
def test_an_epoch_continues_with_any_number_of_ranks(
    forms: dict[str, DataSplits],
    expected: dict[str, dict[int, Shown]],
    kind: str,
    form: str,
    before: tuple[int, int],
    after: tuple[int, int],
) -> None:
    """Of world size and accumulation steps; 4 steps of 6 samples."""

    def ranks_of(division: tuple[int, int], start: int) -> list[list[Batch]]:
        size, steps = division
        return [
            list(make(forms[form], kind, 6, rank=rank, world_size=size, accumulation_steps=steps).train(EPOCH, start))
            for rank in range(size)
        ]

    begun = ranks_of(before, 0)
    for stop in range(5):
        done = [batch for batches in begun for batch in batches[: stop * before[1]]]
        rest = [batch for batches in ranks_of(after, stop) for batch in batches]
        assert len(ids(done)) == 6 * stop
        shown = by_id([*done, *rest])
        assert len(shown) == 24
        assert_shown(shown, expected[kind])


@ways
@pytest.mark.parametrize(("world_size", "accumulation_steps"), [(1, 1), (2, 3), (3, 1), (4, 1), (12, 1)])
def test_evaluation_takes_each_sample_once_and_pads_nothing(
    forms: dict[str, DataSplits], kind: str, form: str, world_size: int, accumulation_steps: int
) -> None:
    """Also where there are fewer samples than ranks."""
    division = {"world_size": world_size, "accumulation_steps": accumulation_steps}
    ranks = [list(make(forms[form], kind, 12, rank=rank, **division).evaluate("val")) for rank in range(world_size)]
    together = [batch for batches in ranks for batch in batches]
    assert ids(together) == list(range(VAL))
    assert torch.cat([batch.labels for batch in together]).tolist() == forms[form].val.labels.tolist()
    assert all(ranks) == (world_size <= VAL)
    assert max(len(batch.labels) for batch in together) <= 12 // world_size // accumulation_steps
    (whole,) = make(forms[form], kind, 12).evaluate("val")
    assert torch.equal(torch.cat([batch.images for batch in together]), whole.images)


def epoch_hashes(forms: dict[str, DataSplits]) -> list[str]:
    """A hash of all that an epoch and an evaluation give, for each way of loading them that works here."""
    found = []
    for kind, form in WAYS:
        if kind != "dali" or dali_problem() is None:
            loader = make(forms[form], kind, 6, workers=2, augmentation=Augmentation(crop="resized"))
            digest = hashlib.sha256()
            for batch in (*loader.train(EPOCH), *loader.evaluate("val")):
                for part in batch:
                    digest.update(b"" if part is None else part.numpy().tobytes())
            found.append(f"{kind} {form} {digest.hexdigest()}")
    return found


@pytest.mark.long
def test_another_process_shows_the_same(forms: dict[str, DataSplits], tmp_path: Path) -> None:
    """Of its own copy of the images."""
    program = """
import sys
from pathlib import Path
sys.path[:0] = [sys.argv[1], str(Path(sys.argv[1]).parent)]
from support.same_images import write_every_form
from test_every_loader import epoch_hashes
print(*epoch_hashes(write_every_form(Path(sys.argv[2]))), sep="\\n")
"""
    code, said, errors = finished(program, Path(__file__).parent, tmp_path)
    assert code == 0, errors
    assert said.splitlines() == epoch_hashes(forms)


def test_the_forms_hold_the_same_samples(forms: dict[str, DataSplits]) -> None:
    for splits in forms.values():
        assert splits.train.labels.tolist() == LABELS
        assert splits.train.sample_ids.tolist() == list(range(TRAIN))
        assert (len(splits.val), splits.num_classes, splits.image_size) == (VAL, 3, SIZE)
