"""Strong augmentation: torchvision's operations under numbers of our own, the same in every loader."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2

from support.folder_images import SIZE, in_memory, loader, write_images
from unikd_fast.data.augmentation import AUGMENTATION_VERSION, Augmentation, ViewParameters, view_parameters
from unikd_fast.data.sets.image_folder import load_image_folder
from unikd_fast.data.splits import DataSplits
from unikd_fast.data.views import (
    POLICY_OPERATIONS,
    SIGNED,
    drawn_operations,
    erased_rectangle,
    jitter_factors,
    magnitude_of,
    strong_view,
    strong_views,
)

TRIVIAL = Augmentation(policy="trivial")
RAND = Augmentation(policy="rand")
JITTER = Augmentation(jitter=(0.4, 1.3, 0.2, 0.1))
ERASE = Augmentation(erase_probability=1.0)
EVERYTHING = Augmentation(
    crop="pad",
    padding=2,
    flip_probability=0.5,
    eval_resize=SIZE,
    jitter=(0.4, 0.4, 0.4, 0.1),
    policy="rand",
    rand_ops=3,
    erase_probability=0.5,
)
COUNT = 6000


def draw(augmentation: Augmentation, count: int = COUNT) -> ViewParameters:
    return view_parameters(augmentation, seed=1, epoch=2, sample_ids=np.arange(count))


def picture(height: int = 40, width: int = 56) -> Tensor:
    """Smooth shapes and some noise: every operation has something to change."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    waves = torch.stack([128 + 90 * torch.sin(rows / (3 + c)) * torch.cos(columns / (5 - c)) for c in range(3)])
    noise = torch.randint(-9, 10, (3, height, width), generator=torch.Generator().manual_seed(0))
    return (waves + noise).clamp(10, 240).to(torch.uint8)


@pytest.mark.parametrize(("policy", "theirs"), [("trivial", v2.TrivialAugmentWide), ("rand", v2.RandAugment)])
def test_operations_and_magnitudes_are_torchvisions(policy: str, theirs: type) -> None:
    """The tables, and the pixels of every operation at every magnitude either way."""
    oracle = theirs()
    assert list(POLICY_OPERATIONS) == list(oracle._AUGMENTATION_SPACE)
    image = picture()
    changed = set()
    for name, (table, signed) in oracle._AUGMENTATION_SPACE.items():
        assert signed == (name in SIGNED)
        for height, width in ((40, 56), (224, 224), (97, 331)):
            magnitudes = table(31, height, width)
            expected = [0.0] * 31 if magnitudes is None else [float(m) for m in magnitudes]
            assert [magnitude_of(policy, name, step, height, width) for step in range(31)] == expected
        for step in range(0, 31, 5):
            for sign in (1, -1) if signed else (1,):
                magnitude = sign * magnitude_of(policy, name, step, *image.shape[-2:])
                expected_image = oracle._apply_image_or_video_transform(
                    image, name, magnitude, interpolation=oracle.interpolation, fill=oracle._fill
                )
                assert torch.equal(POLICY_OPERATIONS[name](image, magnitude), expected_image), (name, step)
                changed |= {name} if not torch.equal(expected_image, image) else set()
    assert changed == set(POLICY_OPERATIONS) - {"Identity"}


def test_trivial_draws_operations_magnitudes_and_signs_evenly() -> None:
    views = draw(TRIVIAL)
    drawn = [drawn_operations(views, i, 224, 224) for i in range(COUNT)]
    assert {len(operations) for operations in drawn} == {1}
    names = [operations[0][0] for operations in drawn]
    counts = [names.count(name) for name in POLICY_OPERATIONS]
    assert stats.chisquare(counts).pvalue > 1e-3
    shares = [abs(m) / magnitude_of("trivial", name, 30, 224, 224) for [(name, m)] in drawn if name in SIGNED]
    steps = np.rint(np.array(shares) * 30).astype(int)
    assert stats.chisquare(np.bincount(steps, minlength=31)).pvalue > 1e-3
    signed = np.array([m for [(name, m)] in drawn if name in SIGNED and m])
    assert stats.binomtest(int((signed < 0).sum()), len(signed)).pvalue > 1e-3
    assert min(m for [(name, m)] in drawn if name not in SIGNED) >= 0


def test_rand_draws_each_of_its_operations_evenly_and_apart() -> None:
    views = draw(replace(RAND, rand_ops=2, rand_magnitude=13))
    drawn = [drawn_operations(views, i, 64, 64) for i in range(COUNT)]
    names = list(POLICY_OPERATIONS)
    pairs = np.array([[names.index(name) for name, _ in operations] for operations in drawn])
    table = np.zeros((14, 14))
    np.add.at(table, (pairs[:, 0], pairs[:, 1]), 1)
    assert stats.chisquare(table.ravel()).pvalue > 1e-3  # pairs are even, so both are, and neither tells of the other
    magnitudes = {abs(m) for operations in drawn for name, m in operations if name == "Rotate"}
    assert magnitudes == {13.0}  # of 30 degrees in 30 steps
    signs = [m < 0 for operations in drawn for name, m in operations if name in SIGNED]
    assert stats.binomtest(sum(signs), len(signs)).pvalue > 1e-3


def test_operations_follow_one_another() -> None:
    views, image = draw(RAND, 40), picture()
    for i in range(40):
        expected = image
        for name, magnitude in drawn_operations(views, i, *image.shape[-2:]):
            expected = POLICY_OPERATIONS[name](expected, magnitude)
        assert torch.equal(strong_view(image, views, i), expected)


def test_jitter_is_torchvisions_under_our_factors() -> None:
    views, image, oracle = draw(JITTER, 30), picture(), v2.ColorJitter(*JITTER.jitter)
    for i in range(30):
        factors = jitter_factors(views, i)
        order = [change for change, _ in factors]
        names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
        given = {names[change]: factor for change, factor in factors}
        expected = oracle.transform(image, {"fn_idx": torch.tensor(order), **given})
        assert torch.equal(strong_view(image, views, i), expected)


def test_jitter_factors_fill_their_ranges_in_any_order() -> None:
    views = draw(JITTER)
    factors = [jitter_factors(views, i) for i in range(COUNT)]
    oracle = v2.ColorJitter(*JITTER.jitter)
    ranges = (oracle.brightness, oracle.contrast, oracle.saturation, oracle.hue)
    for change, (low, high) in enumerate(ranges):
        values = [dict(one)[change] for one in factors]
        assert stats.kstest(values, "uniform", (low, high - low)).pvalue > 1e-3
    between = np.corrcoef([[dict(one)[change] for one in factors] for change in range(4)])
    assert np.abs(between - np.eye(4)).max() < 4 / math.sqrt(COUNT)  # four standard deviations
    orders = [tuple(change for change, _ in one) for one in factors]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-3
    only_hue = draw(Augmentation(jitter=(0, 0, 0, 0.1)), 3)
    assert [change for change, _ in jitter_factors(only_hue, 0)] == [3]


@pytest.mark.parametrize(("height", "width"), [(224, 224), (20, 300)])
@pytest.mark.parametrize("ratio", [(0.3, 3.3), (0.3, 0.9)])
def test_erased_rectangles_are_distributed_as_torchvisions(height: int, width: int, ratio: tuple[float, float]) -> None:
    """Also where the image is long: many attempts fail, and some views keep all pixels."""
    views = draw(replace(ERASE, erase_scale=(0.1, 0.4), erase_ratio=ratio), 4000)
    ours = [erased_rectangle(views, i, height, width) for i in range(4000)]
    oracle, image = v2.RandomErasing(p=1, scale=(0.1, 0.4), ratio=ratio), torch.empty(3, height, width)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [oracle.make_params([image]) for _ in range(4000)]
    theirs = [None if d["v"] is None else (d["i"], d["j"], d["h"], d["w"]) for d in drawn]
    missing = [sum(one is None for one in rectangles) for rectangles in (ours, theirs)]
    assert stats.fisher_exact([missing, [4000 - m for m in missing]]).pvalue > 1e-3
    found = [np.array([one for one in rectangles if one]).T for rectangles in (ours, theirs)]
    quantities = {
        "area": lambda top, left, h, w: h * w,
        "ratio": lambda top, left, h, w: h / w,
        "top": lambda top, left, h, w: top / (height - h + 1),
        "left": lambda top, left, h, w: left / (width - w + 1),
    }
    for name, quantity in quantities.items():
        assert stats.ks_2samp(*(quantity(*one) for one in found)).pvalue > 1e-3, name


@pytest.mark.parametrize(("height", "width"), [(1, 1), (2, 9), (32, 32), (224, 100)])
def test_erased_rectangles_are_inside_and_have_the_stated_area(height: int, width: int) -> None:
    views = draw(replace(ERASE, erase_scale=(0.1, 0.2), erase_ratio=(0.5, 2.0)), 500)
    found = [erased_rectangle(views, i, height, width) for i in range(500)]
    assert height < 32 or all(one is not None and one[2] * one[3] > 0 for one in found)
    for one in found:
        if one is not None:
            top, left, h, w = one
            assert 0 <= top <= top + h <= height
            assert 0 <= left <= left + w <= width
            # Sides are rounded to whole pixels, by half of one at most.
            assert max(h - 0.5, 0) * max(w - 0.5, 0) <= 0.2 * height * width
            assert (h + 0.5) * (w + 0.5) >= 0.1 * height * width


def test_erasing_makes_the_rectangle_black_and_leaves_the_rest() -> None:
    image, views = picture(), draw(ERASE, 50)
    for i in range(50):
        erased = strong_view(image, views, i)
        rectangle = erased_rectangle(views, i, 40, 56)
        assert rectangle is not None
        top, left, h, w = rectangle
        black = torch.zeros(40, 56, dtype=torch.bool)
        black[top : top + h, left : left + w] = True
        assert torch.equal(erased, image.masked_fill(black, 0))
        assert (image != 0).all()


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_erasing_comes_with_its_probability(probability: float) -> None:
    views = draw(Augmentation(policy="trivial", erase_probability=probability))
    share = np.mean([erased_rectangle(views, i, 64, 64) is not None for i in range(COUNT)])
    # Four standard deviations of a share of 6000 draws.
    assert abs(share - probability) <= 4 * math.sqrt(probability * (1 - probability) / COUNT)


def test_views_stay_what_they_were() -> None:
    """Those of version 1: caches of a teacher's outputs and checkpoints half way through an epoch rest on them."""
    assert AUGMENTATION_VERSION == 1
    address = {"seed": 5, "epoch": 6, "sample_ids": [18], "stream": 1}
    views = view_parameters(replace(EVERYTHING, rand_ops=2, erase_probability=1.0), **address)
    factors = [(1, 0.8892304), (2, 0.9036695), (3, -0.0567421), (0, 0.7203373)]
    assert [change for change, _ in jitter_factors(views, 0)] == [change for change, _ in factors]
    assert dict(jitter_factors(views, 0)) == pytest.approx(dict(factors), abs=1e-7)  # the digits written here
    found = drawn_operations(views, 0, 64, 64)
    assert [name for name, _ in found] == ["Sharpness", "ShearY"]
    assert [magnitude for _, magnitude in found] == pytest.approx([0.27, -0.09], abs=1e-7)  # of fp32
    assert erased_rectangle(views, 0, 64, 64) == (12, 8, 23, 13)
    ((name, magnitude),) = drawn_operations(view_parameters(TRIVIAL, **address), 0, 64, 64)
    assert (name, magnitude) == ("Sharpness", pytest.approx(0.66, abs=1e-7))


def test_nothing_strong_is_the_images_themselves() -> None:
    images = torch.stack([picture()] * 2)
    assert strong_views(images, draw(Augmentation(crop="resized", flip_probability=1.0), 2)) is images


@pytest.mark.parametrize("channels_last", [False, True])
def test_keeps_dtype_layout_and_the_images_it_is_given(channels_last: bool) -> None:
    layout = torch.channels_last if channels_last else torch.contiguous_format
    images = torch.stack([picture(32, 32)] * 20).contiguous(memory_format=layout)
    before = images.clone()
    changed = strong_views(images, draw(EVERYTHING, 20))
    assert changed.dtype == torch.uint8
    assert changed.is_contiguous(memory_format=layout)
    assert torch.equal(images, before)
    assert torch.equal(changed, strong_views(before.contiguous(), draw(EVERYTHING, 20)))


def test_a_view_is_the_same_in_any_company() -> None:
    images = torch.stack([picture(32, 32)] * 30)
    together = strong_views(images, draw(EVERYTHING, 30))
    assert len({image.numpy().tobytes() for image in together}) == 30
    for i in (0, 7, 29):
        alone = view_parameters(EVERYTHING, seed=1, epoch=2, sample_ids=[i])
        assert torch.equal(strong_views(images[:1], alone)[0], together[i])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> DataSplits:
    root = write_images(tmp_path_factory.mktemp("images"), {"train": 26, "val": 6}, fixed_size=SIZE)
    return load_image_folder(root, SIZE)


def by_id(batches: object) -> dict[int, Tensor]:
    return {int(i): image for batch in batches for image, _, i in zip(*batch[:3], strict=True)}  # type: ignore[attr-defined]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
@pytest.mark.parametrize("policy", ["rand", "trivial"])
def test_both_loaders_show_the_same_pixels(files: DataSplits, policy: str, workers: int) -> None:
    augmentation = replace(EVERYTHING, policy=policy)
    decoded = list(loader(files, augmentation, workers=workers).train(3, stream=1))
    resident = list(loader(in_memory(files), augmentation).train(3, stream=1))
    plain = by_id(
        loader(files, Augmentation(crop="pad", padding=2, flip_probability=0.5, eval_resize=SIZE)).train(3, stream=1)
    )
    for batch, other in zip(decoded, resident, strict=True):
        assert torch.equal(batch.sample_ids, other.sample_ids)
        assert torch.equal(batch.images, other.images)
    assert sum(torch.equal(image, plain[i]) for i, image in by_id(decoded).items()) < 5  # of 24


@pytest.mark.parametrize("kind", ["files", "memory"])
@pytest.mark.parametrize(("world_size", "accumulation_steps"), [(2, 1), (4, 2)])
def test_any_division_of_the_work_shows_the_same_views(
    files: DataSplits, kind: str, world_size: int, accumulation_steps: int
) -> None:
    splits = files if kind == "files" else in_memory(files)
    whole = by_id(loader(splits, EVERYTHING).train(1))
    division = {"world_size": world_size, "accumulation_steps": accumulation_steps}
    ranks = [by_id(loader(splits, EVERYTHING, rank=rank, **division).train(1)) for rank in range(world_size)]
    parts = {i: image for rank in ranks for i, image in rank.items()}
    assert set(parts) == set(whole)
    assert all(torch.equal(image, whole[i]) for i, image in parts.items())


@pytest.mark.parametrize("kind", ["files", "memory"])
def test_resumes_and_shows_views_and_leaves_evaluation_alone(files: DataSplits, kind: str) -> None:
    splits = files if kind == "files" else in_memory(files)
    through, resumed = list(loader(splits, EVERYTHING).train(1)), list(loader(splits, EVERYTHING).train(1, 2))
    assert torch.equal(resumed[0].images, through[2].images)
    positions = through[0].sample_ids.numpy()  # of a whole split, so ids are positions
    (shown,) = loader(splits, EVERYTHING).views([(positions, 1)])
    assert torch.equal(shown.images, through[0].images)
    plain = Augmentation(eval_resize=SIZE)
    for batch, other in zip(
        loader(splits, EVERYTHING).evaluate("val"), loader(splits, plain).evaluate("val"), strict=True
    ):
        assert torch.equal(batch.images, other.images)


@pytest.mark.parametrize("kind", ["files", "memory"])
def test_says_who_makes_strong_pixels(files: DataSplits, kind: str) -> None:
    splits = files if kind == "files" else in_memory(files)
    release = ".".join(torchvision.__version__.split(".")[:2])
    assert loader(splits, TRIVIAL).pixels["strong"] == f"torchvision {release}"
    assert "strong" not in loader(splits, Augmentation(crop="pad")).pixels
