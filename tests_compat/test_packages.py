"""The drop-ins against the packages themselves: `make test-compat` installs them."""

from importlib import import_module
from importlib.util import find_spec
from typing import Any

import pytest
import torch

from unikd_fast.compat import patch
from unikd_fast.compat._difference import difference, measure
from unikd_fast.compat.presets import PRESETS, load

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INSTALLABLE = [name for name, preset in PRESETS.items() if preset.distribution]
TARGETS = [(name, target) for name in INSTALLABLE for target in PRESETS[name].targets]

# Relative to the largest entry. fp64: rounding. fp32 against a kernel that has no fp64: rounding of a thousand classes.
TOLERANCE = {True: 1e-12, False: 1e-5}


@pytest.mark.parametrize("name", INSTALLABLE)
def test_the_package_is_there(name: str) -> None:
    assert find_spec(PRESETS[name].package), f"run make test-compat, which installs {PRESETS[name].distribution}"


@pytest.mark.parametrize(("name", "target"), TARGETS, ids=lambda x: getattr(x, "replacement", x))
def test_value_and_gradients_are_the_packages_own(name: str, target: Any) -> None:
    ours, theirs = load(target.replacement), load(target.places[0])
    dtype = torch.float64 if target.in_fp64 else torch.float32
    for case in target.cases:
        for seed in range(3):
            settings: dict[str, Any] = {"rounded_to": dtype, "computed_in": dtype, "device": DEVICE, "seed": seed}
            one = difference(measure(ours, case, **settings), measure(theirs, case, **settings))
            assert max(one.relative_value, one.relative_gradient) < TOLERANCE[target.in_fp64], (
                f"{case.description}, {case.shape}: {one}"
            )


@pytest.mark.parametrize("name", INSTALLABLE)
def test_patch_and_undo(name: str) -> None:
    targets = PRESETS[name].targets
    originals = [load(target.places[0]) for target in targets]
    with patch(name, device=DEVICE) as done:
        for target in targets:
            assert load(target.places[0]) is load(target.replacement)
            assert target.places[0] in done.replaced
    assert [load(target.places[0]) for target in targets] == originals


def test_the_names_users_import_are_replaced() -> None:
    torchdistill_names = import_module("torchdistill.losses.registry").MIDDLE_LEVEL_LOSS_DICT
    liger = import_module("liger_kernel.transformers")
    assert liger.LigerJSD.__module__ == "liger_kernel.transformers.jsd"
    with patch("torchdistill", device=DEVICE), patch("liger", device=DEVICE):
        assert torchdistill_names["KDLoss"].__module__ == "unikd_fast.compat.torchdistill"
        assert liger.LigerJSD.__module__ == liger.LigerKLDIVLoss.__module__ == "unikd_fast.compat.liger"
        assert liger.LigerFusedLinearJSD.__module__ == "unikd_fast.compat.liger"
    assert torchdistill_names["KDLoss"].__module__ == "torchdistill.losses.mid_level"


def test_model_optimizer_of_another_release_is_refused() -> None:
    with pytest.raises(ValueError, match=r"takes .*'mean'.* and its drop-in .*'batchmean'.*another release or fork"):
        patch("modelopt_flattened", device=DEVICE)


def test_torchdistill_builds_the_loss_from_yaml() -> None:
    import_dependencies = import_module("torchdistill.common.main_util").import_dependencies
    get_mid_level_loss = import_module("torchdistill.losses.registry").get_mid_level_loss
    import_dependencies([{"name": "unikd_fast.compat.torchdistill_register"}])
    arguments = {
        "student_module_path": "fc",
        "student_module_io": "output",
        "teacher_module_path": "fc",
        "teacher_module_io": "output",
        "temperature": 4.0,
        "alpha": 0.5,
    }
    io = {"fc": {"output": torch.randn(4, 10)}}, {"fc": {"output": torch.randn(4, 10)}}, torch.arange(4)
    ours, theirs = (get_mid_level_loss({"key": key, "kwargs": arguments}) for key in ("UniKDFastKDLoss", "KDLoss"))
    assert type(ours).__module__ == "unikd_fast.compat.torchdistill"
    assert type(theirs).__module__ == "torchdistill.losses.mid_level"
    torch.testing.assert_close(ours(*io), theirs(*io))


def test_timms_own_task_trains_with_the_drop_in() -> None:
    """The whole task of timm, its teacher and normalisation included, not a stand-in for it."""
    task_class = import_module("timm.task").LogitDistillationTask
    create_model = import_module("timm").create_model
    torch.manual_seed(0)
    student, teacher = (create_model("test_vit", num_classes=10) for _ in range(2))
    task = task_class(student, teacher, torch.nn.CrossEntropyLoss(), task_loss_weight=0.3, temperature=4.0)
    size = student.pretrained_cfg["input_size"]
    images, labels = torch.randn(4, *size), torch.arange(4)

    def gradients() -> tuple[torch.Tensor, torch.Tensor]:
        student.zero_grad()
        loss = task(images, labels)["loss"]
        loss.backward()
        return loss.detach(), student.get_classifier().weight.grad.clone()

    before = gradients()
    with patch("timm", device=DEVICE):
        torch.testing.assert_close(gradients(), before)
