"""Views: a function of the sample, distributed as torchvision's."""

import pickle
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from torchvision.transforms import RandomResizedCrop

from unikd_fast.data.augmentation import ATTEMPTS, AUGMENTATION_VERSION, Augmentation, ViewParameters, view_parameters

RESIZED = Augmentation(crop="resized", flip_probability=0.5)
PAD = Augmentation(crop="pad", padding=4, flip_probability=0.5)
STRONG = {"jitter": (0.4, 0.4, 0.4, 0.1), "policy": "rand", "erase_probability": 0.5}


def draw(
    augmentation: Augmentation, sample_ids: object, *, seed: int = 0, epoch: int = 0, stream: int = 0
) -> ViewParameters:
    return view_parameters(augmentation, seed=seed, epoch=epoch, sample_ids=sample_ids, stream=stream)


def torchvision_boxes(augmentation: Augmentation, height: int, width: int, count: int) -> np.ndarray:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        image = torch.empty(1, height, width)
        scale, ratio = list(augmentation.scale), list(augmentation.ratio)
        return np.array([RandomResizedCrop.get_params(image, scale, ratio) for _ in range(count)])


@pytest.mark.parametrize(
    ("augmentation", "height", "width"),
    [
        (RESIZED, 375, 500),
        (RESIZED, 32, 32),
        (Augmentation(crop="resized", scale=(0.3, 0.6), ratio=(0.5, 1.2)), 200, 150),
        (RESIZED, 60, 500),  # long: many attempts fail, and some views are the central one
    ],
    ids=["photo", "small", "narrow", "long"],
)
def test_resized_windows_are_distributed_as_torchvisions(augmentation: Augmentation, height: int, width: int) -> None:
    ours = draw(augmentation, np.arange(6000), seed=1).crop_boxes(height, width)
    theirs = torchvision_boxes(augmentation, height, width, 4000)
    quantities = {
        "area": lambda top, left, h, w: h * w,
        "ratio": lambda top, left, h, w: w / h,
        "top": lambda top, left, h, w: top / (height - h + 1),
        "left": lambda top, left, h, w: left / (width - w + 1),
    }
    for name, quantity in quantities.items():
        samples = [quantity(*boxes.T.astype(float)) for boxes in (ours, theirs)]
        assert stats.ks_2samp(*samples).pvalue > 1e-3, name


def test_the_distribution_test_can_fail() -> None:
    ours = draw(Augmentation(crop="resized", scale=(0.12, 1)), np.arange(6000), seed=1).crop_boxes(375, 500)
    theirs = torchvision_boxes(RESIZED, 375, 500, 4000)
    assert stats.ks_2samp(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3]).pvalue < 1e-3


@pytest.mark.parametrize(("height", "width"), [(4, 900), (900, 4), (7, 500)])
def test_the_central_window_is_torchvisions(height: int, width: int) -> None:
    whole = Augmentation(crop="resized", scale=(1.0, 1.0))  # no window of this area and ratio fits
    expected = torchvision_boxes(whole, height, width, 1)[0]
    assert draw(whole, [3]).crop_box(0, height, width) == tuple(expected)


@pytest.mark.parametrize("augmentation", [RESIZED, PAD, Augmentation()], ids=lambda a: a.crop)
@pytest.mark.parametrize(("height", "width"), [(1, 1), (3, 200), (32, 32), (375, 500)])
def test_windows_lie_within_the_image_and_rows_agree(augmentation: Augmentation, height: int, width: int) -> None:
    views = draw(augmentation, np.arange(300))
    boxes = views.crop_boxes(height, width)
    margin = 2 * (augmentation.padding or 0)
    assert (boxes[:, :2] >= 0).all()
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= np.array((height, width)) + margin).all()
    assert [views.crop_box(i, height, width) for i in range(300)] == list(map(tuple, boxes.tolist()))


def test_pad_offsets_cover_all_places_evenly() -> None:
    offsets = draw(PAD, np.arange(9 * 9 * 100)).offsets
    counts = np.bincount(offsets[:, 0] * 9 + offsets[:, 1], minlength=81)
    assert len(counts) == 81
    assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize("probability", [0.0, 0.3, 1.0])
def test_flips_come_with_their_probability(probability: float) -> None:
    share = draw(Augmentation(flip_probability=probability), np.arange(10_000)).flip.mean()
    assert share == pytest.approx(probability, abs=0.02 if 0 < probability < 1 else 0)


def test_flip_and_window_are_independent() -> None:
    views = draw(PAD, np.arange(20_000))
    assert abs(np.corrcoef(views.flip, views.offsets[:, 0])[0, 1]) < 0.03
    assert abs(np.corrcoef(views.offsets[:, 0], views.offsets[:, 1])[0, 1]) < 0.03


@pytest.mark.parametrize("augmentation", [RESIZED, PAD], ids=lambda a: a.crop)
def test_a_view_depends_on_seed_epoch_id_and_stream_alone(augmentation: Augmentation) -> None:
    ids = np.array([90, 4, 2**40, 17])
    together = draw(augmentation, ids, seed=5, epoch=6, stream=1)
    for i, sample_id in enumerate(ids):
        alone = draw(augmentation, [sample_id], seed=5, epoch=6, stream=1)
        assert alone.crop_box(0, 100, 140) == together.crop_box(i, 100, 140)
        assert alone.flip[0] == together.flip[i]


@pytest.mark.parametrize("other", [{"seed": 1}, {"epoch": 1}, {"stream": 1}], ids=str)
def test_other_seeds_epochs_and_streams_give_other_views(other: dict[str, int]) -> None:
    boxes = draw(RESIZED, np.arange(100)).crop_boxes(100, 140)
    assert (boxes != draw(RESIZED, np.arange(100), **other).crop_boxes(100, 140)).any(axis=1).mean() > 0.95


@pytest.mark.parametrize(
    ("augmentation", "size", "boxes"),
    [
        (RESIZED, (375, 500), [(88, 87, 273, 296), (18, 62, 296, 318), (34, 10, 272, 257)]),
        (PAD, (32, 32), [(3, 2, 32, 32), (8, 1, 32, 32), (7, 0, 32, 32)]),
        (Augmentation(flip_probability=0.5), (9, 7), [(0, 0, 9, 7)] * 3),
    ],
    ids=["resized", "pad", "none"],
)
@pytest.mark.parametrize("strong", [{}, STRONG], ids=["plain", "strong"])
def test_windows_and_flips_stay_what_they_were(
    augmentation: Augmentation, size: tuple[int, int], boxes: list[tuple[int, ...]], strong: dict
) -> None:
    """Those of version 1: caches of a teacher's outputs and checkpoints half way through an epoch rest on them."""
    assert AUGMENTATION_VERSION == 1
    views = draw(replace(augmentation, **strong), [0, 17, 2**40], seed=5, epoch=6, stream=1)
    assert list(map(tuple, views.crop_boxes(*size).tolist())) == boxes
    assert views.flip.tolist() == [False, False, True]


@pytest.mark.parametrize("augmentation", [RESIZED, PAD, Augmentation()], ids=lambda a: a.crop)
def test_strong_numbers_do_not_depend_on_the_crop(augmentation: Augmentation) -> None:
    plain = draw(augmentation, np.arange(5))
    assert plain.strong.shape == (5, 0)
    assert plain.attempts.shape == (5, ATTEMPTS if augmentation.crop == "resized" else 0, 4)
    one = draw(replace(augmentation, policy="trivial"), np.arange(5)).strong
    three = draw(replace(augmentation, policy="rand", rand_ops=3), np.arange(5)).strong
    assert np.array_equal(three[:, : one.shape[1]], one)
    assert np.array_equal(one, draw(Augmentation(policy="trivial"), np.arange(5)).strong)
    assert three.shape[1] == one.shape[1] + 6


def test_views_travel_to_other_processes() -> None:
    views = draw(RESIZED, [1, 2])
    assert np.array_equal(pickle.loads(pickle.dumps(views)).crop_boxes(50, 60), views.crop_boxes(50, 60))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"crop": "centre"}, "crop must be one of .* got 'centre'"),
        ({"padding": -1}, "padding .* got -1"),
        ({"scale": (0.5, 0.2)}, "scale .* got"),
        ({"scale": (0.0, 1.0)}, "scale .* got"),
        ({"ratio": (0.0, 1.0)}, "ratio .* got"),
        ({"flip_probability": 1.5}, "flip_probability .* got 1.5"),
        ({"eval_resize": 0}, "eval_resize .* got 0"),
        ({"jitter": (0.1, 0.1, 0.1)}, "jitter must be four .* got"),
        ({"jitter": (-0.1, 0, 0, 0)}, "jitter must be four .* got"),
        ({"jitter": (0, 0, 0, 0.6)}, "that of hue at most 0.5, got"),
        ({"policy": "auto"}, "policy must be one of .* got 'auto'"),
        ({"rand_ops": 0}, r"rand_ops must be in \[1, 16\], got 0"),
        ({"rand_ops": 17}, r"rand_ops must be in \[1, 16\], got 17"),
        ({"rand_magnitude": 31}, r"rand_magnitude must be in \[0, 30\], got 31"),
        ({"erase_probability": -0.1}, "erase_probability .* got -0.1"),
        ({"erase_scale": (0.0, 0.3)}, "erase_scale .* got"),
        ({"erase_scale": (0.4, 0.3)}, "erase_scale .* got"),
        ({"erase_ratio": (2.0, 1.0)}, "erase_ratio .* got"),
    ],
)
def test_refuses_fields_out_of_range(fields: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Augmentation(**fields)


def test_short_side_follows_the_image_size() -> None:
    assert Augmentation().short_side(224) == 256
    assert Augmentation(eval_resize=232).short_side(224) == 232
    with pytest.raises(ValueError, match="eval_resize 200 is below the image size 224"):
        Augmentation(eval_resize=200).short_side(224)


def test_reserved_streams_are_refused() -> None:
    with pytest.raises(ValueError, match="stream must be in"):
        draw(RESIZED, [0], stream=0xFF00)
