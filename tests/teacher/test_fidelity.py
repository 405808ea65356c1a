"""The fidelity check: right teachers pass in every precision, wrong ones do not, ties decide nothing."""

import copy
import math
import re

import pytest
import torch
from torch import Tensor, nn

from unikd_fast.models import build_model, extract_features
from unikd_fast.teacher import Fidelity, OnlineTeacher, check_fidelity, measure_fidelity, pool_fidelity
from unikd_fast.teacher.fidelity import LOGIT_BOUND, TIE_BOUND
from unikd_fast.teacher.online import unit_rounding
from unikd_fast.values import Features


@pytest.fixture(scope="module")
def images() -> Tensor:
    """Images of ten kinds, so that the classes of an image lie apart as with a trained teacher."""
    torch.manual_seed(2)
    kinds = torch.randn(10, 3, 32, 32)
    return kinds.repeat(7, 1, 1, 1)[:64] + 0.2 * torch.randn(64, 3, 32, 32)


@pytest.fixture(scope="module")
def trained(images: Tensor) -> nn.Module:
    """A network that has learned the kinds: random ones have no margins."""
    torch.manual_seed(0)
    network = extract_features(build_model("cifar/resnet8", num_classes=10), image_size=32)
    labels = torch.arange(64) % 10
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9)
    for _ in range(25):
        loss = nn.functional.cross_entropy(network.train()(images).logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network.eval()


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_an_unchanged_teacher_passes_in_every_precision(precision: str, trained: nn.Module, images: Tensor) -> None:
    teacher = OnlineTeacher(copy.deepcopy(trained), precision=precision)
    found = measure_fidelity(teacher, trained, images.split(16))
    check_fidelity(found, teacher)
    assert found.images == 64
    assert len(found.feature_errors) == 3
    # A tenth of what is allowed at most; and not nothing, or the reference was folded as well.
    assert 0 < found.relative_logit_error < 0.3 * LOGIT_BOUND * unit_rounding(precision, "cpu")
    assert all(0 < error < 0.1 for error in found.feature_errors)


def test_fidelity_does_not_depend_on_batching(trained: nn.Module, images: Tensor) -> None:
    teacher = OnlineTeacher(copy.deepcopy(trained), precision="bf16")
    whole, parts = (measure_fidelity(teacher, trained, images.split(size)) for size in (64, 9))
    assert whole.relative_logit_error == pytest.approx(parts.relative_logit_error, rel=0.05)
    assert whole.feature_errors == pytest.approx(parts.feature_errors, rel=0.05)


@pytest.mark.parametrize("share", [1.0, 0.3])
def test_perturbed_weights_are_caught(share: float, trained: nn.Module, images: Tensor) -> None:
    broken = copy.deepcopy(trained)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in broken.parameters():
            parameter += share * parameter.std().nan_to_num() * torch.randn_like(parameter)
    teacher = OnlineTeacher(broken, precision="bf16")
    found = measure_fidelity(teacher, trained, [images])
    with pytest.raises(ValueError, match=r"teacher in bf16, 9 BatchNorms folded.*64 training images.*precision=fp32"):
        check_fidelity(found, teacher)


def test_a_non_finite_value_is_named_with_its_level(trained: nn.Module, images: Tensor) -> None:
    broken = copy.deepcopy(trained)
    with torch.no_grad():
        next(m for m in broken.plain.layer3.modules() if isinstance(m, nn.Conv2d)).weight[0] = 1e6
    teacher = OnlineTeacher(broken, precision="fp16", fold=False)
    found = measure_fidelity(teacher, copy.deepcopy(broken).float(), [images])
    with pytest.raises(ValueError, match=r"level 2, the logits not finite .* teacher.precision=bf16 or --set teacher"):
        check_fidelity(found, teacher)


class Table(nn.Module):
    """Logits that are the images' first values, plus an offset of one class."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.offset = nn.Parameter(torch.tensor(offset))

    def forward(self, images: Tensor) -> Features:
        logits = images[:, 0, 0, :].clone()
        logits[:, 1] += self.offset
        return Features((), logits)


def rows(*leads: float) -> Tensor:
    """Images whose logits are 1, 1 - lead, -1, -1: an RMS of about 1 around the mean."""
    logits = torch.tensor([[1.0, 1.0 - lead, -1.0, -1.0] for lead in leads])
    return logits[:, None, None, :].expand(-1, 3, 1, 4)


def test_near_ties_depend_only_on_the_reference() -> None:
    bound = TIE_BOUND * unit_rounding("fp32", "cpu")
    images = rows(0.5 * bound, 0.5 * bound, 2 * bound, 1.0)
    teacher = OnlineTeacher(Table(offset=4 * bound), precision="fp32")  # puts the first three the other way round
    found = measure_fidelity(teacher, Table(), [images])
    assert found.near_ties == 2
    assert found.top1_agreement == 0.75
    # The same flips by a grosser error are still two ties: the teacher's error widens nothing, and is seen by itself.
    gross = OnlineTeacher(Table(offset=0.9), precision="fp32")
    found = measure_fidelity(gross, Table(), [images])
    assert (found.near_ties, found.top1_agreement) == (2, 0.75)
    with pytest.raises(ValueError, match="rounding explains at most"):
        check_fidelity(found, gross)


def test_logits_are_compared_up_to_a_shift() -> None:
    class Shifted(Table):
        def forward(self, images: Tensor) -> Features:
            features = super().forward(images)
            return Features((), features.logits + 100)

    found = measure_fidelity(OnlineTeacher(Shifted(), precision="fp32"), Table(), [rows(0.5, 1.0)])
    assert found.relative_logit_error < 1e-5


def test_agreement_counts_images_on_small_samples() -> None:
    teacher = OnlineTeacher(Table(), precision="fp32")
    base = Fidelity(1e-6, 1.0, (), 200, 0)
    check_fidelity(base._replace(top1_agreement=199 / 200), teacher)  # 0.995 itself is allowed
    with pytest.raises(ValueError, match=r"2 of 200 training images.*0\.9900.*min_agreement is 0\.995"):
        check_fidelity(base._replace(top1_agreement=198 / 200), teacher)
    check_fidelity(base._replace(top1_agreement=198 / 200), teacher, min_agreement=0.99)


def test_pooling_takes_worst_error_and_mean_agreement() -> None:
    a, b = Fidelity(0.1, 1.0, (0.3, 0.1), 30, 1), Fidelity(0.2, 0.5, (0.2, 0.2), 10, 2)
    assert pool_fidelity([a, b]) == Fidelity(0.2, 0.875, (0.3, 0.2), 40, 3)
    bad = pool_fidelity([a, b._replace(relative_logit_error=math.nan)])
    assert math.isnan(bad.relative_logit_error)


def test_remedies_name_existing_settings(trained: nn.Module) -> None:
    from unikd_fast.config.explain import all_keys
    from unikd_fast.config.schema import Config

    teacher = OnlineTeacher(copy.deepcopy(trained), precision="fp16", compile_mode="default")
    with pytest.raises(ValueError, match="teacher") as error:
        check_fidelity(Fidelity(0.5, 1.0, (), 8, 0), teacher)
    named = set(re.findall(r"--set ([a-z_.]+)=", str(error.value)))
    assert named == {"teacher.precision", "teacher.compile", "teacher.fold_batch_norm"}
    assert named <= set(all_keys(Config))


def test_no_images_is_an_error() -> None:
    with pytest.raises(ValueError, match="no images"):
        measure_fidelity(OnlineTeacher(Table(), precision="fp32"), Table(), [])
