"""Runs between networks of Hugging Face, from their folders to an exported student that predicts."""

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from support.exported_runs import export
from support.folder_images import write_images
from support.hugging_face import convnext, saved, saved_vit
from support.real_runs import ALONE, call, run, write_config
from unikd_fast.config import load_config
from unikd_fast.engine.build import build_experiment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Images of three classes, a ViT teacher of them, and a ConvNeXt of others whose processor is another."""
    folder = tmp_path_factory.mktemp("hugging_face")
    write_images(folder / "images", {"train": 12, "val": 6})
    saved_vit(folder / "vit", classes=3)
    torch.manual_seed(1)
    means = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
    saved(folder / "convnext", convnext(), "ConvNext", size={"shortest_edge": 32}, crop_pct=0.8, **means)
    return folder


def config_of(folder: Path, out: Path, **student: object) -> Path:
    return write_config(
        out,
        run={"probe": False},
        data={
            "name": "image_folder",
            "root": str(folder / "images"),
            "num_classes": 3,
            "loader": "torchvision",
            "workers": 0,
            "augmentation": {"crop": "resized"},
        },
        teacher={"model": f"hf/{folder / 'vit'}", "weights": "pretrained"},
        student={"model": f"hf/{folder / 'convnext'}", "weights": "pretrained", **student},
        distill={"teacher_head": "prefit", "head_steps": 2},
        train={"global_batch_size": 6, "accumulation_steps": 1, "total_epochs": 1, "learning_rate": 0.001},
    )


@pytest.mark.long
def test_a_run_follows_its_processors_and_its_files_predict(folder: Path, tmp_path: Path) -> None:
    done = run(config_of(folder, tmp_path))
    assert done.returncode == 0, done.stderr
    assert "0.485/0.456/0.406, std 0.229/0.224/0.225, bicubic, short side 40 before the central crop" in done.stderr
    assert "renormalised for the teacher to mean 0.5/0.5/0.5" in done.stderr
    assert "was trained with bilinear, both sides 32 before the central crop" in done.stderr
    assert "a new classifier for 3 classes" in done.stderr
    sources = [tmp_path / "tiny"]
    for ending in ("safetensors", "pt", "onnx"):
        sources.append(tmp_path / f"student.{ending}")
        assert export(sources[0], sources[-1], "--checkpoint", "best") == 0
    photos = sorted((folder / "images" / "val").rglob("*.png"))
    found = []
    for source in sources:
        done = call("predict", source, *photos, "--json")
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line)["classes"] for line in done.stdout.splitlines()]
        found.append(torch.tensor([[each["probability"] for each in sorted(line, key=str)] for line in lines]))
    for each in found[1:]:  # ONNX and TorchScript sum in another order, and six decimals are written
        torch.testing.assert_close(each, found[0], rtol=0, atol=1e-4)


def test_a_missing_folder_and_a_teacher_of_other_classes(folder: Path, tmp_path: Path) -> None:
    for setting, said in [
        (f"student.model=hf/{tmp_path}/absent", "there is no such folder"),
        (f"teacher.model=hf/{folder}/convnext", "set teacher.training to fine-tune it with a new classifier"),
    ]:
        config = config_of(folder, tmp_path)
        done = run(config, "--set", setting, "--set", f"run.dir={tmp_path}/{setting[:7]}")
        assert done.returncode == 2 and said in done.stderr and "Traceback" not in done.stderr, done.stderr


@torch.no_grad()
def test_the_teacher_sees_what_its_processor_makes(folder: Path, tmp_path: Path) -> None:
    """A student from scratch follows its teacher; bf16 or fp16 would round."""
    config = load_config(config_of(folder, tmp_path, weights=None), ["teacher.precision=fp32"])
    built = build_experiment(config, ALONE)
    assert built.teacher is not None
    logits = torch.cat([built.teacher(batch.images).logits for batch in built.loader.evaluate("val")])
    processor = AutoImageProcessor.from_pretrained(folder / "vit")
    network = AutoModelForImageClassification.from_pretrained(folder / "vit").eval()
    photos = sorted((folder / "images" / "val").rglob("*.png"))
    inputs = processor(images=[Image.open(path) for path in photos], return_tensors="pt")
    # Pillow and torch round a resized pixel a level apart at most, which is 1/128 here.
    torch.testing.assert_close(logits, network(**inputs).logits, rtol=0, atol=2e-3)
