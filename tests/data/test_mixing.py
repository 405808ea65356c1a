"""Mixup and CutMix: labels follow the pixels, and any resumed or divided run mixes alike."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2

from support.build_method import build
from support.loaders import build_loader
from unikd_fast.config import ConfigError, load_config
from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.mixing import Mix, MixedLoader, Mixing, apply_mix, draw_mix
from unikd_fast.data.splits import DataSplits, TensorImages
from unikd_fast.methods import KD, StudentAlone, UniKD
from unikd_fast.values import Batch, Gaussian, StudentOutput, Target

SIZE, CLASSES = 12, 5
MIXUP, CUTMIX = Mixing(mixup_alpha=0.4), Mixing(cutmix_alpha=1.0)
BOTH = Mixing(mixup_alpha=0.4, cutmix_alpha=1.0, probability=0.8)
CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture(scope="module")
def splits() -> DataSplits:
    """Sample i has the grey level 4 i + 3 everywhere, so that every pixel tells whose it is."""

    def flat(count: int) -> TensorImages:
        levels = torch.arange(count, dtype=torch.uint8) * 4 + 3
        return TensorImages(levels[:, None, None, None].expand(-1, 3, SIZE, SIZE).clone(), np.arange(count) % CLASSES)

    val = flat(11)
    return DataSplits(flat(53), val, val, CLASSES, None, (0.5,) * 3, (0.25,) * 3, SIZE)


def mixed(splits: DataSplits, mixing: Mixing = BOTH, *, seed: int = 3, **changes: int) -> MixedLoader:
    loader = build_loader(
        splits, augmentation=Augmentation(), seed=seed, device="cpu", **{"global_batch_size": 12, **changes}
    )
    division = {k: v for k, v in changes.items() if k in ("accumulation_steps", "rank", "world_size")}
    return MixedLoader(loader, mixing, splits.num_classes, seed=seed, **division)


def draws(mixing: Mixing, count: int = 3000, samples: int = 8, height: int = 60, width: int = 40) -> list[Mix]:
    return [draw_mix(mixing, samples, height, width, seed=0, epoch=step // 100, step=step) for step in range(count)]


def assert_same(batches: Iterable[Batch], expected: Iterable[Batch]) -> None:
    for batch, other in zip(batches, expected, strict=True):
        for part, other_part in zip(batch[:3], other[:3], strict=True):
            assert torch.equal(part, other_part)


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_mixup_shares_are_beta(alpha: float) -> None:
    found = draws(Mixing(mixup_alpha=alpha))
    assert {mix.box for mix in found} == {None}
    assert stats.kstest([mix.share for mix in found], stats.beta(alpha, alpha).cdf).pvalue > 1e-3


def test_the_distribution_test_can_fail() -> None:
    shares = [mix.share for mix in draws(Mixing(mixup_alpha=0.25))]
    assert stats.kstest(shares, stats.beta(0.2, 0.2).cdf).pvalue < 1e-3


@pytest.mark.parametrize("alpha", [0.5, 1.0])
def test_cutmix_boxes_are_distributed_as_torchvisions(alpha: float) -> None:
    found = draws(Mixing(cutmix_alpha=alpha))
    oracle, image = v2.CutMix(alpha=alpha, num_classes=2), torch.empty(1, 3, 60, 40)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = [oracle.make_params([image]) for _ in range(3000)]
    ours = np.array([(*mix.box, mix.share) for mix in found if mix.box is not None])
    theirs = np.array([(y1, x1, y2 - y1, x2 - x1, d["lam_adjusted"]) for d in drawn for x1, y1, x2, y2 in [d["box"]]])
    assert len(ours) == 3000
    for column in range(5):
        assert stats.ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    top, left, height, width = ours.T[:4]
    assert min(top.min(), left.min(), height.min(), width.min()) >= 0
    assert (top + height).max() <= 60
    assert (left + width).max() <= 40


def test_all_pairings_are_as_likely_whatever_the_share() -> None:
    found = draws(MIXUP, samples=4)
    for half in (0, 1):
        orders = [tuple(mix.partners.tolist()) for mix in found if round(mix.share) == half]
        counts = [orders.count(order) for order in itertools.permutations(range(4))]
        assert sum(counts) == len(orders) > 1000
        assert stats.chisquare(counts).pvalue > 1e-3


@pytest.mark.parametrize(("probability", "switch"), [(0.6, 0.25), (1.0, 1.0), (1.0, 0.0), (0.0, 0.5)])
def test_kinds_come_with_their_probability(probability: float, switch: float) -> None:
    both = Mixing(mixup_alpha=1.0, cutmix_alpha=1.0, probability=probability, switch_probability=switch)
    found = [mix for mix in draws(both) if not np.array_equal(mix.partners, np.arange(8))]
    cut = sum(mix.box is not None for mix in found)
    shares = [mix.share for mix in found if mix.box is None]
    if shares:  # uniform for α = 1, so what decided on mixing and on the kind was no part of it
        assert stats.kstest(shares, "uniform").pvalue > 1e-3
    # Four standard deviations of a share of 3000 draws. One permutation of 40320 is that of no mixing.
    assert abs(len(found) / 3000 - probability) <= 4 * (probability * (1 - probability) / 3000) ** 0.5
    assert abs(cut - switch * len(found)) <= 4 * (switch * (1 - switch) * len(found)) ** 0.5


def test_cutmix_labels_are_the_share_of_the_pixels(splits: DataSplits) -> None:
    """Exactly: the levels say whose each pixel is, and their number over all pixels is the weight of its class."""
    shares = set()
    for epoch in range(30):
        batch = next(mixed(splits, CUTMIX, global_batch_size=53).train(epoch))
        levels = ((batch.images[:, 0] * 0.25 + 0.5) * 255).round().long()
        owners = (levels - 3) // 4
        assert torch.equal(owners * 4 + 3, levels)
        pixels = torch.nn.functional.one_hot(owners % CLASSES, CLASSES).sum((1, 2))  # (N, K)
        assert torch.equal(batch.labels, (pixels.double() / SIZE**2).float())
        for image, sample_id in zip(owners, batch.sample_ids, strict=True):
            assert len(image[image != sample_id].unique()) <= 1
            shares.add(int((image == sample_id).sum()))
    assert len(shares) > 15


def test_mixup_mixes_images_and_labels_by_one_share(splits: DataSplits) -> None:
    plain = mixed(splits, Mixing()).train(2)
    mixes = mixed(splits, MIXUP).train(2)
    for step, (batch, before) in enumerate(zip(mixes, plain, strict=True)):
        mix = draw_mix(MIXUP, 12, SIZE, SIZE, seed=3, epoch=2, step=step)
        other = before.images[mix.partners].double()
        expected = before.images.double() * mix.share + other * (1 - mix.share)
        # Two products and a sum in fp32 of numbers within ±2.
        assert torch.allclose(batch.images.double(), expected, rtol=0, atol=4 * 2**-23)
        labels = before.labels.double() * mix.share + before.labels[mix.partners].double() * (1 - mix.share)
        assert torch.allclose(batch.labels.double(), labels, rtol=0, atol=2**-23)
        assert (before.labels.sum(1) == 1).all()
        assert torch.equal(batch.sample_ids, before.sample_ids)
        assert 0 < mix.share < 1


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX, BOTH, Mixing()], ids=["mixup", "cutmix", "both", "off"])
def test_labels_are_weights_that_sum_to_one(splits: DataSplits, mixing: Mixing) -> None:
    """Whether a batch is mixed or not, so that a compiled step sees one shape and dtype."""
    for epoch in range(4):
        for batch in mixed(splits, mixing).train(epoch):
            assert (batch.labels.shape, batch.labels.dtype) == ((12, CLASSES), torch.float32)
            assert (batch.labels >= 0).all()
            # Two weights of one class are each rounded once, and their sum once.
            assert (batch.labels.sum(1) - 1).abs().max() <= 2**-23


@pytest.mark.parametrize("accumulation_steps", [1, 2])
@pytest.mark.parametrize("start", [0, 1, 3, 4])
def test_resumes_at_any_step(splits: DataSplits, start: int, accumulation_steps: int) -> None:
    through = list(mixed(splits, accumulation_steps=accumulation_steps).train(5))
    resumed = mixed(splits, accumulation_steps=accumulation_steps).train(5, start)
    assert_same(resumed, through[start * accumulation_steps :])


def test_mixing_does_not_depend_on_ranks_and_accumulation(splits: DataSplits) -> None:
    alone = list(mixed(splits, accumulation_steps=6).train(1))
    for world_size, accumulation_steps in ((2, 3), (3, 2), (6, 1)):
        ranks = [
            list(mixed(splits, rank=rank, world_size=world_size, accumulation_steps=accumulation_steps).train(1))
            for rank in range(world_size)
        ]
        assert_same([batch for together in zip(*ranks, strict=True) for batch in together], alone)


@pytest.mark.parametrize(
    "other", [{"seed": 1}, {"epoch": 1}, {"step": 1}, {"place": 1}, {"stream": 1}, {"step": 2**16}], ids=str
)
def test_every_part_of_the_address_matters(other: dict[str, int]) -> None:
    address = {"seed": 0, "epoch": 0, "step": 0}
    first, second = (draw_mix(MIXUP, 8, 9, 9, **{**address, **change}) for change in ({}, other))
    assert first.share != second.share
    assert not np.array_equal(first.partners, second.partners)


def test_another_stream_is_mixed_otherwise(splits: DataSplits) -> None:
    for batch, other in zip(mixed(splits, MIXUP).train(0), mixed(splits, MIXUP).train(0, stream=1), strict=True):
        assert torch.equal(batch.sample_ids, other.sample_ids)
        assert not torch.equal(batch.labels, other.labels)


def test_more_samples_leave_the_share_as_it_is() -> None:
    few, many = (draw_mix(BOTH, count, 9, 9, seed=0, epoch=0, step=1) for count in (4, 50))
    assert (few.share, few.box) == (many.share, many.box)


def test_evaluation_and_views_are_never_mixed(splits: DataSplits) -> None:
    inner = build_loader(splits, augmentation=Augmentation(), seed=3, device="cpu", global_batch_size=12)
    loader = mixed(splits, CUTMIX)
    for split in ("val", "test"):
        assert_same(loader.evaluate(split), inner.evaluate(split))  # type: ignore[arg-type]
    requests = [(np.array([3, 1]), 0)]
    assert_same(loader.views(requests), inner.views(requests))
    assert (loader.steps_per_epoch, loader.pixels, loader.schedule.micro_batch_size) == (4, inner.pixels, 12)


def test_global_random_numbers_are_left_alone(splits: DataSplits) -> None:
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    list(mixed(splits).train(0))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@pytest.mark.parametrize("mixing", [MIXUP, CUTMIX], ids=["mixup", "cutmix"])
def test_both_views_of_a_sample_are_mixed_alike(mixing: Mixing) -> None:
    images = torch.rand(6, 3, 9, 9, generator=torch.Generator().manual_seed(0))
    mix = draw_mix(mixing, 6, 9, 9, seed=0, epoch=0, step=0)
    batch = apply_mix(Batch(images, torch.arange(6) % 3, torch.arange(6), images * 2), mix, 3)
    assert batch.second is not None
    assert torch.equal(batch.second, batch.images * 2)  # doubling is exact
    assert not torch.equal(batch.images, images)


def test_keeps_layout_and_the_batch_it_is_given() -> None:
    images = torch.rand(6, 3, 9, 9).to(memory_format=torch.channels_last)
    before = images.clone()
    for mixing in (MIXUP, CUTMIX):
        mix = draw_mix(mixing, 6, 9, 9, seed=0, epoch=0, step=0)
        found = apply_mix(Batch(images, torch.arange(6), torch.arange(6)), mix, 6).images
        assert found.is_contiguous(memory_format=torch.channels_last)
        assert torch.equal(images, before)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("name", ["none", "kd", "unikd"])
def test_every_methods_loss_is_that_of_both_labels(name: str, smoothing: float) -> None:
    """L_CE is linear in the target, so soft labels give λ L_CE(own) + (1 - λ) L_CE(other)."""
    logits = torch.randn(6, CLASSES, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    own, partners = torch.arange(6) % CLASSES, np.array([2, 5, 1, 0, 4, 3])
    share, other = 0.625, own[partners]  # the share and its complement are exact in fp32
    batch = Batch(torch.zeros(6, 3, 2, 2), own, torch.arange(6))
    soft = apply_mix(batch, Mix(partners, share, None), CLASSES).labels
    teacher = logits.roll(1, 0)
    gaussian = Gaussian(teacher, torch.zeros_like(teacher))

    def cross_entropy(labels: Tensor) -> Tensor:
        batch = Batch(torch.zeros(6, 3, 1, 1), labels, torch.arange(6))
        if name == "none":
            return build(StudentAlone, label_smoothing=smoothing).loss(StudentOutput(logits), None, batch).terms["ce"]
        if name == "kd":
            return build(KD, label_smoothing=smoothing).loss(StudentOutput(logits), Target(teacher), batch).terms["ce"]
        method = build(UniKD, [4], [6], CLASSES, width=4, label_smoothing=smoothing)
        return method.loss(StudentOutput(logits, torch.ones(6, 4)), Target(teacher, gaussian), batch).terms["ce"]

    expected = share * cross_entropy(own) + (1 - share) * cross_entropy(other)
    # fp64 throughout, of a sum of 30 numbers of size 1.
    assert torch.allclose(cross_entropy(soft), expected, rtol=0, atol=1e-14)
    assert not torch.allclose(cross_entropy(soft), cross_entropy(own), atol=1e-3)


def test_refuses_fields_out_of_range() -> None:
    for name, value in (("mixup_alpha", -1.0), ("cutmix_alpha", float("inf")), ("probability", 1.5)):
        with pytest.raises(ValueError, match=f"Mixing: {name} must be .* got {value}"):
            Mixing(**{name: value})


def test_refuses_micro_batches_of_one(splits: DataSplits) -> None:
    with pytest.raises(ValueError, match="within a micro-batch, and this one has 1; enlarge the global batch"):
        mixed(splits, global_batch_size=4, accumulation_steps=4)


def test_a_cache_of_outputs_is_refused_with_the_reason() -> None:
    single = ["compare=null", "distill.method=kd", "distill.kd.ce_weight=0.1"]
    caching = [*single, "teacher.cache.mode=read_write"]
    for key in ("mixup_alpha", "cutmix_alpha"):
        with pytest.raises(ConfigError, match=f"{key} = 0.2.*by sample, and a mixed image belongs to two; set"):
            load_config(CONFIGS / "digits.json", [*caching, f"data.mixing.{key}=0.2"])
        load_config(CONFIGS / "digits.json", [*single, f"data.mixing.{key}=0.2"])
        load_config(CONFIGS / "digits.json", [*caching, f"data.mixing.{key}=0.2", "data.mixing.probability=0"])
