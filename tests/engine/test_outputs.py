"""Test logits beside a run's result, and the probe that compares methods."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from support.real_runs import ALONE, opened, run, save_teacher, train_here, write_config
from unikd_fast.config import load_config
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.evaluate import BatchLogits, Probe, write_outputs
from unikd_fast.models import build_model
from unikd_fast.report.run_files import read_test_logits
from unikd_fast.values import Batch, Features


class Table(torch.nn.Module):
    """A network whose logits for an image are those of its first pixel's row."""

    def __init__(self, rows: torch.Tensor) -> None:
        super().__init__()
        self.rows, self.calls = rows, 0

    def forward(self, images: torch.Tensor) -> Features:
        self.calls += 1
        return Features((), self.rows[images[:, 0, 0, 0].long()])


def test_the_probe_is_the_softened_kl() -> None:
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    student = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    ids = [torch.tensor([3, 1, 0]), torch.tensor([4, 2])]
    batches = [Batch(i.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2), torch.zeros(len(i)).long(), i) for i in ids]
    teacher = Table(rows)
    probe = Probe(teacher, lambda: iter(batches), ALONE)
    outputs = [BatchLogits(i, student[i], torch.zeros(len(i)).long()) for i in ids]
    p, q = (x.double().div(4).log_softmax(1) for x in (rows, student))
    expected = 16 * (p.exp() * (p - q)).sum(1).mean().item()
    assert probe.measure(outputs) == pytest.approx(expected, rel=1e-6)
    assert probe.measure(outputs) == pytest.approx(expected, rel=1e-6)
    assert teacher.calls == 2


def test_the_probe_ignores_samples_not_shared() -> None:
    """Their images were skipped, in one evaluation and not in the other."""
    rows = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    student = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    ids = [torch.tensor([0, 1, 2]), torch.tensor([3])]
    batches = [Batch(i.float().view(-1, 1, 1, 1).expand(-1, 3, 2, 2), torch.zeros(len(i)).long(), i) for i in ids]
    probe = Probe(Table(rows), lambda: iter(batches), ALONE)
    p, q = (x.double().div(4).log_softmax(1) for x in (rows, student))
    for seen, common in (([[0, 2], [3, 4]], [0, 2, 3]), ([[0, 1, 2, 3]], [0, 1, 2, 3]), ([[4], [0, 2]], [0, 2])):
        outputs = [BatchLogits(torch.tensor(i), student[i], torch.zeros(len(i)).long()) for i in seen]
        expected = 16 * (p.exp() * (p - q)).sum(1)[common].mean().item()
        assert probe.measure(outputs) == pytest.approx(expected, abs=1e-6)  # fp32 against float64


def test_outputs_are_written_in_split_order(tmp_path: Path) -> None:
    class Two(Processes):
        def gather(self, value: BatchLogits) -> list[BatchLogits]:
            return [value, other]

    other = BatchLogits(torch.tensor([2, 0]), torch.tensor([[2.0, 0.0], [0.0, 0.5]]), torch.tensor([1, 0]))
    own = [BatchLogits(torch.tensor([3]), torch.tensor([[3.0, 1.0]]), torch.tensor([1]))]
    own.append(BatchLogits(torch.tensor([1]), torch.tensor([[1.0, 7.0]]), torch.tensor([0])))
    write_outputs(tmp_path / "new", own, Two(0, 1, 0, torch.device("cpu")), split="val")
    found = read_test_logits(tmp_path / "new")
    assert found is not None and found.split == "val"
    assert found.logits.tolist() == [[0.0, 0.5], [1.0, 7.0], [2.0, 0.0], [3.0, 1.0]]
    assert found.labels.tolist() == [0, 0, 1, 1]


@pytest.mark.slow
def test_a_run_saves_its_last_test_logits(tmp_path: Path) -> None:
    weights = save_teacher(tmp_path / "teacher.pth")
    sections = {
        "data": {"name": "digits", "image_size": 16, "train_samples": 96},
        "teacher": {"weights": str(weights)},
        "student": {"model": "cifar/resnet8"},
        "train": {"total_epochs": 2, "ema_decay": None},
    }
    config = write_config(tmp_path, name="run", **sections)
    done = run(config)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "run"
    found = read_test_logits(folder)
    assert found is not None
    result = json.loads((folder / "result.json").read_text())
    assert 100 * np.mean(found.logits.argmax(1) == found.labels) == pytest.approx(result["last"]["test"]["accuracy"])
    # The plain network, on the same images without any of the engine.
    network = build_model("cifar/resnet8", num_classes=10)
    network.load_state_dict(load_file(folder / "student.safetensors"))
    batches = list(opened(config).loader.evaluate("test"))
    with torch.no_grad():
        logits = torch.cat([network.eval()(batch.images) for batch in batches])
    order = torch.cat([batch.sample_ids for batch in batches]).argsort()
    torch.testing.assert_close(torch.from_numpy(found.logits).float(), logits[order], rtol=2e-3, atol=2e-3)  # fp16
    of_teacher = read_test_logits(folder / "teacher")
    assert of_teacher is not None and np.array_equal(of_teacher.labels, found.labels)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    probes = [record["probe_kl"] for record in records if record["kind"] == "evaluation"]
    assert len(probes) == 2 and all(probe > 0 for probe in probes)
    assert F.softmax(torch.from_numpy(of_teacher.logits).float(), 1).shape == (len(found.labels), 10)


@pytest.mark.slow
def test_logits_and_probe_are_optional(tmp_path: Path) -> None:
    config = write_config(tmp_path, name="run", run={"test_logits": False, "probe": False}, train={"max_steps": 2})
    folder = train_here(load_config(config))
    assert read_test_logits(folder) is None
    assert "probe_kl" not in (folder / "metrics.jsonl").read_text()
