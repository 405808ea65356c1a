"""Several networks as one teacher: the mean of their logits, the features of the first."""

import copy

import pytest
import torch
from torch import Tensor, nn

from support.online_inputs import network
from unikd_fast.models import LogitsOnly, build_model
from unikd_fast.teacher import Ensemble, OnlineTeacher, fold_batch_norm, measure_fidelity
from unikd_fast.values import Features


class Untraceable(nn.Module):
    """A network with a BatchNorm whose forward torch.fx cannot trace."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.fc = nn.Linear(4, 10)

    def forward(self, images: Tensor) -> Tensor:
        if images.mean() > 1e9:
            return images
        return self.fc(self.body(images).mean((2, 3)))


def plain(seed: int, name: str = "cifar/resnet8") -> nn.Module:
    torch.manual_seed(seed)
    return LogitsOnly(build_model(name, num_classes=10).eval())


def test_logits_are_the_weighted_mean(images: Tensor) -> None:
    members = [network(), plain(1), plain(2, "cifar/wrn_16_1")]
    features = Ensemble(members, [1.0, 2.0, 5.0])(images)
    each = [member(images) for member in members]
    mean = (each[0].logits + 2 * each[1].logits + 5 * each[2].logits) / 8
    torch.testing.assert_close(features.logits, mean)  # sums of three in another order
    assert all(torch.equal(one, other) for one, other in zip(features.levels, each[0].levels, strict=True))
    equal = Ensemble(members[:2])(images).logits
    torch.testing.assert_close(equal, (each[0].logits + each[1].logits) / 2)


def test_each_sees_its_own_mean_and_deviation(images: Tensor) -> None:
    """Computed from the first's images, in any layout, and without changing them."""
    members, scale, shift = [plain(0), plain(1)], (2.0, 0.5, 3.0), (0.1, -0.2, 0.3)
    kept, ensemble = images.clone(), Ensemble(members, None, [None, (scale, shift)])
    own = images * torch.tensor(scale)[:, None, None] + torch.tensor(shift)[:, None, None]
    expected = (members[0](images).logits + members[1](own).logits) / 2
    for layout in (torch.contiguous_format, torch.channels_last):
        found = ensemble(images.to(memory_format=layout)).logits
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)  # convolutions of two layouts
    assert torch.equal(images, kept)


def test_each_is_folded_by_itself(images: Tensor) -> None:
    """One that cannot be traced keeps its norms, and the others lose theirs."""
    torch.manual_seed(3)
    ensemble = Ensemble([network(), LogitsOnly(Untraceable().eval()), plain(1)]).eval()
    before = ensemble(images).logits
    alone = fold_batch_norm(copy.deepcopy(ensemble.first))
    assert fold_batch_norm(ensemble) == 2 * alone > 0
    torch.testing.assert_close(ensemble(images).logits, before, rtol=1e-3, atol=1e-4)  # as one folded network


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_runs_as_an_online_teacher(images: Tensor, precision: str) -> None:
    """In half precision as close to fp32 as its members are: LOGIT_BOUND is 12.5 % of the logits in bf16."""
    ensemble = Ensemble([network(), plain(1)], [3.0, 1.0], [None, ((2.0,) * 3, (0.5,) * 3)])
    reference = copy.deepcopy(ensemble)
    teacher = OnlineTeacher(ensemble, precision=precision)
    found: Features = teacher(images)
    assert found.logits.dtype == torch.float32 and teacher.folded > 0
    assert {level.dtype for level in found.levels} == {teacher.dtype}
    fidelity = measure_fidelity(teacher, reference, [images])
    assert fidelity.relative_logit_error < (0.125 if precision == "bf16" else 1e-3)
    assert len(fidelity.feature_errors) == len(ensemble.level_names) == len(ensemble.level_shapes) > 0
    assert Ensemble([plain(0), plain(1)]).level_shapes == ()


def test_what_is_no_ensemble_is_refused() -> None:
    one, other = plain(0), plain(1)
    with pytest.raises(ValueError, match="at least two networks and a weight for each, got 1 networks and 1 weights"):
        Ensemble([one])
    with pytest.raises(ValueError, match="got 2 networks and 1 weights"):
        Ensemble([one, other], [1.0])
    for bad in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(
            ValueError, match=r"weights must be above 0, got \[1.0, .*leave out a network that has none"
        ):
            Ensemble([one, other], [1.0, bad])
