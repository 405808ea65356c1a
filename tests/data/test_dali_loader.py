"""The loader that decodes with DALI: the PIL loader's samples, windows and, within a level, pixels."""

import io
import logging
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from generated_images import write_jpegs
from PIL import Image
from torch import Tensor

pytest.importorskip("nvidia.dali")

from unikd_fast.data import dali_views
from unikd_fast.data.augmentation import Augmentation, view_parameters
from unikd_fast.data.dali_pipeline import view_pipeline
from unikd_fast.data.dali_probe import _try_in_a_process, choose_decoding
from unikd_fast.data.dali_views import cut_view
from unikd_fast.data.decode import DecodeRequest
from unikd_fast.data.image_feed import ImageFeed, ReadViews, read_image
from unikd_fast.data.image_folder import load_image_folder
from unikd_fast.data.loader import Loader, _say_once, build_loader
from unikd_fast.data.splits import INDEX_DTYPE, DataSplits, ImageFiles, PackedImages
from unikd_fast.data.strong import strong_view
from unikd_fast.data.view_windows import ViewWindow, Windows
from unikd_fast.values import Batch

SIZE, SHORT = 96, 110
RESIZED = Augmentation(crop="resized", flip_probability=0.5, eval_resize=SHORT)
CROPS = [
    Augmentation(flip_probability=0.5, eval_resize=SHORT),
    Augmentation(crop="pad", padding=9, flip_probability=0.5, eval_resize=SHORT),
    RESIZED,
]
crops = pytest.mark.parametrize("augmentation", CROPS, ids=lambda a: a.crop)


@pytest.fixture(scope="module")
def splits(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    return load_image_folder(write_jpegs(tmp_path_factory.mktemp("jpegs"), {"train": 240, "val": 61}), SIZE)


def make(splits: DataSplits, augmentation: Augmentation = RESIZED, **changes: Any) -> Loader:
    shared = {"kind": "dali", "seed": 3, "global_batch_size": 40, "device": "cpu", "workers": 0}
    return build_loader(splits, augmentation=augmentation, **{**shared, **changes})


def levels(images: Tensor, splits: DataSplits) -> Tensor:
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (splits.mean, splits.std))
    return ((images * std + mean) * 255).round().to(torch.uint8)


def assert_same(batches: list[Batch], expected: list[Batch]) -> None:
    for batch, other in zip(batches, expected, strict=True):
        for part, other_part in zip(batch, other, strict=True):
            assert (part is None and other_part is None) or torch.equal(part, other_part)


def assert_close(batches: list[Batch], expected: list[Batch], splits: DataSplits) -> None:
    """The decoded pixels are the same. Resized, they may be rounded apart by a level, since torch's weights have 16
    bits and PIL's 22; in each of two directions, so seldom by two."""
    differences = []
    for batch, other in zip(batches, expected, strict=True):
        assert torch.equal(batch.labels, other.labels)
        assert torch.equal(batch.sample_ids, other.sample_ids)
        for images, others in ((batch.images, other.images), (batch.second, other.second)):
            assert (images is None) == (others is None)
            if images is not None and others is not None:
                differences.append((levels(images, splits).int() - levels(others, splits).int()).abs().flatten())
    difference = torch.cat(differences)
    assert difference.max() <= 2
    assert (difference == 2).float().mean() <= 1e-5
    assert difference.float().mean() <= 0.02


def by_id(batches: list[Batch]) -> dict[int, Tensor]:
    return {int(i): image for batch in batches for image, i in zip(batch.images, batch.sample_ids, strict=True)}


@crops
def test_agrees_with_the_pil_loader(splits: DataSplits, augmentation: Augmentation) -> None:
    ours, theirs = make(splits, augmentation), make(splits, augmentation, kind="torchvision", workers=2)
    assert_close(list(ours.train(2, stream=1)), list(theirs.train(2, stream=1)), splits)
    assert_close(list(ours.train(2, 5, view_epoch=1)), list(theirs.train(2, 5, view_epoch=1)), splits)


@pytest.mark.parametrize("eval_resize", [SIZE, SHORT, 301])
def test_evaluation_agrees_with_the_pil_loader(splits: DataSplits, eval_resize: int) -> None:
    ours, theirs = (
        make(splits, Augmentation(eval_resize=eval_resize), kind=kind, workers=2) for kind in ("dali", "torchvision")
    )
    batches = list(ours.evaluate("val"))
    assert [len(batch.labels) for batch in batches] == [40, 21]
    assert_close(batches, list(theirs.evaluate("val")), splits)


def test_second_views_agree_with_the_pil_loader(splits: DataSplits) -> None:
    second = CROPS[1]
    ours, theirs = (make(splits, RESIZED, second=second, kind=kind, workers=2) for kind in ("dali", "torchvision"))
    assert_close(list(ours.train(1)), list(theirs.train(1)), splits)


def test_strong_views_are_made_of_the_same_pixels(splits: DataSplits) -> None:
    strong = Augmentation(crop="resized", flip_probability=0.5, policy="trivial", erase_probability=0.5)
    batch, weak = (next(make(splits, augmentation).train(0)) for augmentation in (strong, RESIZED))
    numbers = view_parameters(strong, seed=3, epoch=0, sample_ids=batch.sample_ids.numpy())
    for i, (image, weak_image) in enumerate(zip(batch.images, weak.images, strict=True)):
        assert torch.equal(levels(image, splits), strong_view(levels(weak_image, splits), numbers, i))


@pytest.mark.parametrize(
    "changes", [{"dali_threads": 1}, {"dali_threads": 5}, {"dali_prefetch": 1}, {"dali_prefetch": 7}]
)
def test_threads_and_prefetch_change_nothing(splits: DataSplits, changes: dict[str, int]) -> None:
    assert_same(list(make(splits, **changes).train(1)), list(make(splits).train(1)))
    assert_same(list(make(splits, **changes).evaluate("test")), list(make(splits).evaluate("test")))


@crops
@pytest.mark.parametrize("batch_size", [1, 7, 240])
def test_pixels_do_not_depend_on_the_batch(splits: DataSplits, augmentation: Augmentation, batch_size: int) -> None:
    few = DataSplits(
        splits.train if batch_size > 1 else splits.train.select(np.arange(0, 240, 9)),
        *(splits.val, splits.val, 3, None, splits.mean, splits.std, SIZE),
    )
    expected = by_id(list(make(splits, augmentation, global_batch_size=240).train(4)))
    shown = by_id(list(make(few, augmentation, global_batch_size=batch_size).train(4)))
    assert len(shown) == len(few.train) // batch_size * batch_size
    assert all(torch.equal(image, expected[i]) for i, image in shown.items())


@pytest.mark.parametrize(("world_size", "accumulation_steps"), [(2, 1), (1, 4), (2, 2)])
def test_a_step_has_the_same_pixels_for_any_division(
    splits: DataSplits, world_size: int, accumulation_steps: int
) -> None:
    division = {"world_size": world_size, "accumulation_steps": accumulation_steps}
    ranks = [list(make(splits, rank=rank, **division).train(1)) for rank in range(world_size)]
    for step, expected in enumerate(make(splits).train(1)):
        parts = [
            ranks[rank][step * accumulation_steps + micro_step]
            for micro_step in range(accumulation_steps)
            for rank in range(world_size)
        ]
        assert torch.equal(torch.cat([part.images for part in parts]), expected.images)
        assert torch.equal(torch.cat([part.sample_ids for part in parts]), expected.sample_ids)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
def test_evaluation_takes_every_sample_once_in_order(splits: DataSplits, world_size: int) -> None:
    few = DataSplits(
        splits.train,
        *(splits.val.select(np.arange(5)), splits.val.select(np.arange(50)), 3),
        *(None, splits.mean, splits.std, SIZE),
    )
    for split, count in (("val", 5), ("test", 50)):
        ranks = [list(make(few, rank=rank, world_size=world_size).evaluate(split)) for rank in range(world_size)]  # type: ignore[arg-type]
        assert torch.cat([batch.sample_ids for batches in ranks for batch in batches]).tolist() == list(range(count))
        assert all(ranks) != (world_size == 8 and split == "val")  # 5 samples do not reach 8 ranks


def test_resumes_at_any_step(splits: DataSplits) -> None:
    through = list(make(splits, accumulation_steps=2).train(1))
    resuming = make(splits, accumulation_steps=2)
    for start in (1, 5, 0, 3):
        assert_same([next(resuming.train(1, start))], through[2 * start : 2 * start + 1])
    assert_same(list(resuming.train(1, 4)), through[8:])
    assert list(resuming.train(1, 6)) == []
    with pytest.raises(ValueError, match=r"start_step must be in \[0, 6\], got 7"):
        resuming.train(1, 7)


def test_iterators_do_not_disturb_each_other(splits: DataSplits) -> None:
    one = make(splits)
    first, second, evaluation = one.train(0), one.train(1), one.evaluate("val")
    batches = [[next(iterator) for iterator in (first, second, evaluation)] for _ in range(2)]
    rest = [list(first), list(second), list(evaluation)]
    expected = [list(make(splits).train(0)), list(make(splits).train(1)), list(make(splits).evaluate("val"))]
    for i in range(3):
        assert_same([batch[i] for batch in batches] + rest[i], expected[i])


def test_views_are_those_of_training_in_batches_of_any_size(splits: DataSplits) -> None:
    expected = by_id(list(make(splits).train(4, view_epoch=1)))
    positions = np.array(list(expected))
    sizes = (3, 1, 50, 2, 100)
    starts = np.cumsum((0, *sizes))
    requests = [(positions[start : start + size], 1) for start, size in zip(starts, sizes, strict=False)]
    shown = list(make(splits).views(iter(requests)))
    assert [batch.sample_ids.tolist() for batch in shown] == [rows.tolist() for rows, _ in requests]
    assert all(torch.equal(image, expected[i]) for i, image in by_id(shown).items())


def test_batches_are_the_callers_to_keep(splits: DataSplits) -> None:
    """DALI's memory is under none of them, neither while its pipeline goes on nor after it ended."""
    kept, copies = [], []
    for batch in make(splits, dali_prefetch=3).train(0):
        kept.append(batch)
        copies.append(Batch(*(None if part is None else part.clone() for part in batch)))
    assert_same(kept, copies)


def test_packed_raw_images_agree_with_pils(splits: DataSplits, tmp_path: Path) -> None:
    assert isinstance(splits.train, ImageFiles)
    sides = [(30, 200), (120, 110), (96, 96), (33, 21)]
    generator = np.random.default_rng(0)
    images = [generator.integers(0, 256, (*side, 3), np.uint8).tobytes() for side in sides]
    (tmp_path / "shard").write_bytes(b"".join(images))
    offsets = np.cumsum([0, *map(len, images)])
    index = np.array([(offsets[i], len(images[i]), 0, 0, *sides[i]) for i in range(4)], INDEX_DTYPE)
    packed = PackedImages((str(tmp_path / "shard"),), index, np.arange(4), checked=False)
    data = DataSplits(packed, packed, packed, 4, None, splits.mean, splits.std, SIZE)
    ours, theirs = (make(data, kind=kind, global_batch_size=4) for kind in ("dali", "torchvision"))
    assert_close(list(ours.train(0)), list(theirs.train(0)), data)
    assert_close(list(ours.evaluate("val")), list(theirs.evaluate("val")), data)


def test_layout_is_as_asked(splits: DataSplits) -> None:
    for channels_last in (False, True):
        batch = next(make(splits, channels_last=channels_last).train(0))
        layout = torch.channels_last if channels_last else torch.contiguous_format
        assert batch.images.is_contiguous(memory_format=layout)
        assert batch.images.dtype == torch.float32
        assert torch.equal(batch.images, next(make(splits).train(0)).images)


def test_global_random_numbers_are_left_alone(splits: DataSplits) -> None:
    torch_state, numpy_state, python_state = torch.get_rng_state(), np.random.get_state(), random.getstate()  # noqa: NPY002
    list(make(splits).train(0))
    list(make(splits).evaluate("val"))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert all(np.array_equal(now, then) for now, then in zip(np.random.get_state(), numpy_state, strict=True))  # noqa: NPY002
    assert random.getstate() == python_state


def encoded(splits: DataSplits, augmentation: Augmentation, second: Augmentation | None = None) -> list[ReadViews]:
    assert isinstance(splits.train, ImageFiles)
    ids = np.arange(40)
    views, other = (
        None if a is None else view_parameters(a, seed=3, epoch=0, sample_ids=ids, stream=stream)
        for stream, a in enumerate((augmentation, second))
    )
    request = DecodeRequest(splits.train.images(ids), splits.train.labels[ids], ids, views, other)
    with ThreadPoolExecutor(1) as threads:
        batch = ImageFeed(iter([request]), Windows(SIZE, SHORT), threads, ahead=1, for_pil=set()).next_batch()
    assert batch is not None
    return list(batch.images.values())


@crops
@pytest.mark.parametrize("second", [None, CROPS[1]], ids=["one view", "two views"])
def test_the_graph_for_gpus_gives_the_same_views_where_the_cpu_runs_it(
    splits: DataSplits, augmentation: Augmentation, second: Augmentation | None
) -> None:
    images = encoded(splits, augmentation, second)
    number = 1 if second is None else 2
    by_parts, whole = (
        [
            torch.from_dlpack(views.as_tensor()).permute(0, 3, 1, 2).clone()
            for views in view_pipeline(
                iter([images]).__next__,
                batch_size=40,
                views=number,
                image_size=SIZE,
                padded="pad" in (augmentation.crop, second and second.crop),
                by_parts=by_parts,
                device_id=None,
                threads=2,
                prefetch=1,
            ).run()
        ]
        for by_parts in (True, False)
    )
    assert len(by_parts) == number
    for view in range(number):
        assert torch.equal(by_parts[view], whole[view])
        for shown, image in zip(whole[view], images, strict=True):
            stored = read_whole(image)
            expected = cut_view(stored, image.windows[view], SIZE)
            difference = (shown.int() - expected.int()).abs()
            # Where a window is made smaller, DALI's filter repeats the border: at most an eighth of 255 a side.
            assert difference[:, 1:-1, 1:-1].max() <= 1
            assert difference.max() <= 1 or augmentation.crop == "resized"
            assert difference.max() <= 64


def read_whole(image: ReadViews) -> Tensor:
    if image.is_decoded:
        return torch.from_numpy(image.decoded_part().copy())
    pixels = np.asarray(Image.open(io.BytesIO(image.content.tobytes())).convert("RGB"))
    top, left, height, width = image.part
    return torch.from_numpy(pixels[top : top + height, left : left + width].copy())


def test_only_the_part_that_is_shown_is_decoded(splits: DataSplits) -> None:
    assert isinstance(splits.train, ImageFiles)
    images = encoded(splits, RESIZED)
    for stored, image in zip(splits.train.images(range(40)), images, strict=True):
        whole = read_image(stored)
        (window,) = image.windows
        assert window.box == (0, 0, *image.part[2:])
        assert image.part.height * image.part.width <= whole.height * whole.width
    assert sum(image.part.height for image in images) < 0.8 * sum(
        read_image(stored).height for stored in splits.train.images(range(40))
    )


def test_says_who_makes_the_pixels(splits: DataSplits) -> None:
    import nvidia.dali

    said = make(splits).pixels
    assert said["decoder"].startswith(f"dali {nvidia.dali.__version__} cpu, nvimgcodec 0.")
    assert said["resize"] == f"torch {'.'.join(torch.__version__.split('.')[:2])}, bilinear, antialiased"
    assert "strong" not in said
    assert "torchvision" in make(splits, Augmentation(policy="rand")).pixels["strong"]


def test_auto_takes_dali_for_files_and_says_so_once(splits: DataSplits, caplog: pytest.LogCaptureFixture) -> None:
    _say_once.cache_clear()
    with caplog.at_level(logging.INFO, "unikd_fast"):
        loaders = [make(splits, kind="auto") for _ in range(2)]
    assert [type(one).__name__ for one in loaders] == ["DaliLoader"] * 2
    assert [record.message for record in caplog.records] == ["data.loader: image files are decoded by DALI"]


@pytest.mark.slow
def test_without_dali_auto_takes_pil_and_says_why(splits: DataSplits) -> None:
    program = """
import logging, sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.startswith("nvidia.dali"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Refuse())
logging.basicConfig(level=logging.INFO)
from pathlib import Path
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.image_folder import load_image_folder
from unikd_fast.data.loader import build_loader
shared = dict(augmentation=Augmentation(), seed=0, global_batch_size=8, device="cpu", workers=0)
splits = load_image_folder(Path(sys.argv[1]), 96)
print(type(build_loader(splits, **shared)).__name__)
build_loader(splits, kind="dali", **shared)
"""
    assert isinstance(splits.train, ImageFiles)
    root = Path(splits.train.paths[0]).parents[2]
    run = subprocess.run([sys.executable, "-c", program, str(root)], capture_output=True, text=True)
    assert run.stdout == "FolderLoader\n"
    assert run.stderr.count("decoded by PIL in worker processes (torchvision), because DALI does not work: Module") == 1
    assert "ValueError: build_loader: kind 'dali' does not work on this machine: ModuleNotFoundError" in run.stderr
    assert "dali12" in run.stderr


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to decode on")
@pytest.mark.parametrize("way", ["gpu", "gpu_parts"])
def test_a_trial_on_a_gpu_that_is_not_there_is_told(way: Any) -> None:
    problem = _try_in_a_process(way, 0)
    assert problem is not None
    assert "a trial ended with status 1: " in problem
    assert "CUDA" in problem


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@crops
def test_on_a_gpu_views_are_near_the_pil_loaders(splits: DataSplits, augmentation: Augmentation) -> None:
    """Never run yet. The mean, since DALI's decoder on a GPU smooths chroma differently and borders differ."""
    assert choose_decoding(torch.device("cuda")) in ("gpu", "gpu_parts")
    ours = make(splits, augmentation, device="cuda", second=CROPS[1])
    theirs = make(splits, augmentation, kind="torchvision", workers=2, second=CROPS[1])
    for batch, other in zip(ours.train(1), theirs.train(1), strict=True):
        assert torch.equal(batch.sample_ids.cpu(), other.sample_ids)
        assert torch.equal(batch.labels.cpu(), other.labels)
        for images, others in ((batch.images, other.images), (batch.second, other.second)):
            assert images is not None and others is not None
            difference = (levels(images.cpu(), splits).float() - levels(others, splits).float()).abs()
            assert difference.mean(dim=(1, 2, 3)).max() <= 8
    first = [batch.images.cpu() for batch in ours.train(0)]
    assert all(torch.equal(a, b.images.cpu()) for a, b in zip(first, ours.train(0), strict=True))


def test_the_loaders_threads_leave_the_cores_to_the_training(
    splits: DataSplits, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch runs no team of OpenMP's in them, and this thread keeps its own."""
    found: list[int] = []
    whole = dali_views.cut_view

    def noting(image: Tensor, window: ViewWindow, image_size: int) -> Tensor:
        found.append(torch.get_num_threads())
        return whole(image, window, image_size)

    monkeypatch.setattr(dali_views, "cut_view", noting)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        list(make(splits).train(0))
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert set(found) == {1}
