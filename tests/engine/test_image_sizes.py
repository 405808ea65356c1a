"""Teacher and student at image sizes of their own: what each sees, and what is written about it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor
from torchvision.transforms.v2.functional import resize

from support.cached_runs import KD, STEPS, steps
from support.exported_runs import export
from support.real_runs import ALONE, cached_config, call, opened, run, train_here, write_config
from unikd_fast.config import ConfigError, load_config
from unikd_fast.config.load import config_hash, teacher_config
from unikd_fast.data.sets import open_data
from unikd_fast.data.settings import DataSettings
from unikd_fast.engine.cache import outputs_key
from unikd_fast.engine.describe import describe
from unikd_fast.models import StudentCard, build_model
from unikd_fast.models.features import resized

SHOWN, TEACHERS, STUDENTS = 16, 8, 12  # pixels
VIT = {
    "model": "timm/vit_tiny_patch16_224",
    "model_args": {"img_size": TEACHERS, "patch_size": 4, "embed_dim": 24, "num_heads": 3, "depth": 2},
    "image_size": TEACHERS,
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ViT of 8 pixels with logits of some size."""
    torch.manual_seed(0)
    network = build_model(VIT["model"], num_classes=10, model_args=VIT["model_args"], role="teacher")
    with torch.no_grad():
        network.head.weight.normal_()
    path = tmp_path_factory.mktemp("weights") / "vit.pth"
    torch.save(network.state_dict(), path)
    return path


def config_of(folder: Path, weights: Path, name: str, **sections: Any) -> Path:
    teacher = {**VIT, **sections.pop("teacher", {})}
    return cached_config(folder, weights, name=name, teacher=teacher, **sections)


def test_images_are_resized_in_fp32_as_torchvision_does() -> None:
    images = torch.randn(2, 3, SHOWN, SHOWN, generator=torch.Generator().manual_seed(0))
    assert resized(images, None) is images and resized(images, SHOWN) is images
    expected = resize(images, [TEACHERS, TEACHERS], antialias=True)
    assert torch.equal(resized(images, TEACHERS), expected)
    half = images.to(torch.bfloat16)
    assert torch.equal(resized(half, TEACHERS), resize(half.float(), [TEACHERS, TEACHERS]).to(torch.bfloat16))
    assert (resize(images, [TEACHERS, TEACHERS], antialias=False) - expected).abs().max() > 0.1


@torch.no_grad()
def test_each_network_sees_its_own_size(tmp_path: Path, weights: Path) -> None:
    path = config_of(
        tmp_path, weights, "own", cache={"mode": "off"}, student={"image_size": STUDENTS}, distill={"method": "unikd"}
    )
    built = opened(path)
    plain = build_model(VIT["model"], num_classes=10, model_args=VIT["model_args"], weights=str(weights)).eval()
    images = next(built.loader.train(0)).images
    assert images.shape[2:] == (SHOWN, SHOWN)
    assert built.teacher is not None
    small = resize(images, [TEACHERS, TEACHERS], antialias=True)
    torch.testing.assert_close(built.teacher(images).logits, plain(small), rtol=1e-4, atol=1e-4)  # order of summation
    student = built.student.eval()
    small = resize(images, [STUDENTS, STUDENTS], antialias=True)
    assert torch.equal(student(images).logits, student.plain(small))
    assert built.teacher.network.level_shapes == ((24, 2, 2),) * 2
    assert [level.shape[2] for level in student(images).levels] == [side for _, side, _ in student.level_shapes]
    same = opened(config_of(tmp_path, weights, "same", cache={"mode": "off"}, distill={"method": "unikd"}))
    assert list(same.student_module.state_dict()) == list(built.student_module.state_dict())


def test_cached_and_online_are_the_same(tmp_path: Path, weights: Path) -> None:
    """Apart from fp16, in which outputs are stored: half a unit of a number, of which a step averages 160."""
    runs = {}
    for mode in ("off", "read_write"):
        path = config_of(tmp_path, weights, mode, cache={"mode": mode, "recheck": 0.5}, distill=KD)
        runs[mode] = steps(train_here(load_config(path)))
    online, cached = runs["off"], runs["read_write"]
    assert len(online) == len(cached) == STEPS and online[0]["logit_kl"] > 0.5
    assert [each["logit_kl"] for each in cached] == pytest.approx([each["logit_kl"] for each in online], rel=2.0**-10)


def test_the_cache_is_keyed_on_the_teachers_size(tmp_path: Path, weights: Path) -> None:
    def key(name: str, **teacher: Any) -> dict[str, Any]:
        args = {**VIT["model_args"], "dynamic_img_size": True}
        built = opened(config_of(tmp_path, weights, name, teacher={"model_args": args, **teacher}))
        assert built.cache is not None and built.cache.network is not None
        found: dict[str, Any] = outputs_key(built, built.cache.network)["teacher"]
        return found

    own, other, shown, null = (
        key(str(size), image_size=size, cache={"mode": "read_write", "dir": str(tmp_path / f"{size}")})
        for size in (TEACHERS, STUDENTS, SHOWN, None)
    )
    assert (own["image_size"], other["image_size"]) == (TEACHERS, STUDENTS)
    assert shown == null and "image_size" not in null


def test_sizes_above_the_datas_are_refused(tmp_path: Path, weights: Path) -> None:
    for role in ("teacher", "student"):
        with pytest.raises(
            ConfigError, match=rf"{role}\.image_size = 24 is above data\.image_size = 16: .* to 24 or more"
        ):
            load_config(config_of(tmp_path, weights, role), [f"{role}.image_size=24"])


def test_a_fixed_size_is_refused_and_the_remedy_works(tmp_path: Path, weights: Path) -> None:
    path = config_of(tmp_path, weights, "fixed", teacher={"image_size": None}, cache={"mode": "off"})
    with pytest.raises(
        ConfigError, match=r"does not take images of 16x16 .*set teacher\.image_size to the size it was"
    ):
        opened(path)
    text = describe(load_config(path, [f"teacher.image_size={TEACHERS}"]), ALONE)
    assert "images resized to 8 x 8" in text


def test_a_teacher_trained_here_is_trained_at_its_size(tmp_path: Path, weights: Path) -> None:
    path = config_of(tmp_path, weights, "trained", teacher={"training": {}})
    config = load_config(path)
    assert teacher_config(config).student.image_size == TEACHERS
    assert config_hash(load_config(path, ["student.image_size=null"])) == config_hash(config)
    assert config_hash(load_config(path, ["student.image_size=12"])) != config_hash(config)


def test_files_and_predictions_are_of_the_students_size(tmp_path: Path) -> None:
    path = write_config(
        tmp_path,
        data={"name": "digits", "image_size": SHOWN, "num_classes": None, "train_samples": 32, "augmentation": {}},
        teacher={"weights": "random"},
        student={"model": "cifar/resnet8", "image_size": STUDENTS},
        distill=KD,
        train={"total_epochs": 1, "ema_decay": None},
    )
    done = run(path)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "tiny"
    card = StudentCard.read(folder / "checkpoints" / "best.safetensors")
    assert card is not None
    assert (card.preprocessing.image_size, card.preprocessing.short_side(STUDENTS)) == (STUDENTS, STUDENTS)
    split = open_data(DataSettings(name="digits", image_size=SHOWN)).test
    for place in range(3):
        Image.fromarray(split.images[place].permute(1, 2, 0).numpy()).save(tmp_path / f"{place}.png")
    built = opened(path)
    built.student.plain.load_state_dict(load_file(folder / "checkpoints" / "best.safetensors"))
    images = torch.cat([batch.images for batch in built.loader.evaluate("test")])[:3]
    with torch.no_grad():
        expected = built.student.eval()(images).logits.softmax(1)
    assert export(folder, tmp_path / "student.onnx", "--checkpoint", "best") == 0
    for source in (folder, tmp_path / "student.onnx"):
        done = call("predict", source, *(tmp_path / f"{place}.png" for place in range(3)), "--json", "--top", "10")
        assert done.returncode == 0, done.stderr
        # Files are resized in whole levels of 255.
        torch.testing.assert_close(_probabilities(done.stdout), expected, rtol=0, atol=5e-3)


def _probabilities(text: str) -> Tensor:
    rows = []
    for line in text.splitlines():
        by_class = {int(each["class"]): each["probability"] for each in json.loads(line)["classes"]}
        rows.append([by_class[place] for place in range(10)])
    return torch.tensor(rows)
