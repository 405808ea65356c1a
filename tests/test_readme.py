"""What the README shows must run."""

import re
from pathlib import Path

import torch

from unikd_fast.config import load_config
from unikd_fast.config.schema import Config

README = (Path(__file__).parents[1] / "README.md").read_text()


def test_the_snippet_trains_the_student_side() -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    snippet = next(block for block in blocks if "unikd_loss" in block)
    logits = torch.randn(4, 100, requires_grad=True)
    names = {
        "torch": torch,
        "student_features": [torch.randn(4, c, 32 // s, 32 // s) for c, s in ((16, 1), (32, 2), (64, 4))],
        "teacher_features": [torch.randn(4, c, 32 // s, 32 // s) for c, s in ((64, 1), (128, 2), (256, 4))],
        "student_logits": logits,
        "teacher_logits": torch.randn(4, 100),
        "labels": torch.arange(4),
    }
    exec(snippet, names)
    assert logits.grad is not None
    assert logits.grad.abs().sum() > 0
    fusion = names["student_fusion"]
    assert all(p.grad is not None for p in fusion.parameters())  # type: ignore[attr-defined]


def test_the_configuration_for_own_data_is_valid() -> None:
    block = next(b for b in re.findall(r"```json\n(.*?)```", README, flags=re.DOTALL) if "image_folder" in b)
    config = Config.model_validate_json(block)
    assert config.data.name == "image_folder"


def test_the_commands_name_configurations_that_exist_and_overrides_that_are_valid() -> None:
    commands = re.findall(r"launch_distill\.py --config (\S+\.json)((?:[^\n]*\\\n)*[^\n`#]*)", README)
    assert len(commands) >= 3
    for path, rest in commands:
        load_config(Path(__file__).parents[1] / path, re.findall(r"--set (\S+)", rest))
