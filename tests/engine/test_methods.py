"""From a configuration to a method: it gets what it needs of networks and data, and the engine asks nothing else."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from support.real_runs import ALONE, CACHED, config_of, train_here, train_records, write_config
from unikd_fast.config import ConfigError, load_config
from unikd_fast.config.schema import DistillConfig
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.describe import describe
from unikd_fast.engine.networks import StudentModule
from unikd_fast.engine.step import train_step
from unikd_fast.methods import (
    KD,
    METHODS,
    Hybrid,
    Method,
    Needs,
    RunContext,
    StudentAlone,
    UniKD,
    build_method,
    needs_of,
)
from unikd_fast.methods.kd import KDSettings
from unikd_fast.models import LogitsOnly, build_model
from unikd_fast.values import Batch, Features, Loss, StudentOutput, Target


class Everything(Method[KDSettings]):
    """Uses all that can be asked for, and checks that it is there."""

    needs = Needs(levels=True, before_activation=True, embedding=True, second_view=True, teacher_network=True)
    term_names = ("ce", "levels", "embedding", "second", "stones")

    settings_class = KDSettings

    def __init__(self, settings: KDSettings, context: RunContext) -> None:
        super().__init__(settings, context)
        self.adapter = Adapter(context)
        assert context.teacher_blocks is not None
        self.blocks = context.teacher_blocks()
        self.norms = [(norm.num_features, bool((norm.weight == 1).all())) for norm in context.teacher_norms]
        self.context = context
        self.ids: list[Tensor] = []

    def target(self, teacher: Features, second: Features | None = None) -> Target:
        extra = {"before": teacher.before_activation, "embedding": teacher.embedding}
        return super().target(teacher, second)._replace(extra=extra)

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        assert student.second_logits is not None and target.second_logits is not None and batch.second is not None
        self.ids.append(batch.sample_ids)
        stone = student.adapted["levels"][0]
        for block in self.blocks:
            stone = block(stone)
        mean = nn.functional.mse_loss
        pairs = zip(student.adapted["levels"], target.extra["before"], strict=True)
        terms = {
            "ce": nn.functional.cross_entropy(student.logits, batch.labels),
            "levels": torch.stack([mean(a, b) for a, b in pairs]).mean(),
            "embedding": mean(student.adapted["embedding"], target.extra["embedding"]),
            "second": mean(student.second_logits, target.second_logits),
            "stones": mean(stone, target.logits),
        }
        return Loss(torch.stack(list(terms.values())).sum(), {name: term.detach() for name, term in terms.items()})


class Adapter(nn.Module):
    def __init__(self, context: RunContext) -> None:
        super().__init__()
        pairs = zip(context.student_shapes, context.teacher_shapes, strict=True)
        self.levels = nn.ModuleList(nn.Conv2d(a[0], b[0], 1) for a, b in pairs)
        self.embedding = nn.Linear(context.student_width, context.teacher_width)

    def forward(self, features: Features) -> dict[str, Any]:
        assert features.embedding is not None
        levels = zip(self.levels, features.before_activation, strict=True)
        return {
            "levels": tuple(layer(level) for layer, level in levels),
            "embedding": self.embedding(features.embedding),
        }


def built(path: Path) -> Experiment:
    return build_experiment(load_config(path), ALONE)


STAGES = [0, pytest.param(3, marks=pytest.mark.slow)]


@pytest.mark.parametrize("stage", STAGES)
def test_a_method_gets_all_it_needs(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, stage: int) -> None:
    monkeypatch.setitem(METHODS, "kd", Everything)
    config = config_of(
        tmp_path,
        weights,
        "everything",
        distill={"method": "kd"},
        train={"accumulation_steps": 2, "total_epochs": 3, "learning_rate": 0.01},
        deepspeed={"zero_optimization": {"stage": stage}},
    )
    records = [record for record in train_records(train_here(load_config(config))) if record["kind"] == "train"]
    assert [key for key in records[0] if key in ("total", *Everything.term_names)] == ["total", *Everything.term_names]
    for record in records:
        assert record["total"] == pytest.approx(sum(record[name] for name in Everything.term_names), rel=1e-5)
    first, last = records[0], records[-1]
    assert all(last[name] < first[name] for name in ("levels", "embedding", "second", "stones"))
    method = built(config).method
    assert isinstance(method, Everything)
    context = method.context
    assert context.num_classes == 10
    assert context.sample_ids is not None and context.sample_labels is not None
    assert len(context.sample_ids) == len(context.sample_labels) == 96
    assert tuple(context.classifier_weight.shape) == (10, 64)
    channels = [shape[0] for shape in context.teacher_shapes]
    assert channels == [shape[0] for shape in context.student_shapes] == [16, 32, 64]
    assert method.norms == [(count, True) for count in channels]
    with pytest.raises(AssertionError, match="when the method is built"):
        context.teacher_norms  # noqa: B018


def test_both_networks_see_both_views(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "kd", Everything)
    experiment = built(config_of(tmp_path, weights, "views", distill={"method": "kd"}))
    method, teacher = experiment.method, experiment.teacher
    assert isinstance(method, Everything) and teacher is not None
    batch, _ = next(experiment.micro_batches(0))
    assert batch.second is not None
    assert not torch.equal(batch.images, batch.second)
    given: list[tuple[StudentOutput, Target]] = []
    whole = method.loss

    def noted(student: StudentOutput, target: Target | None, of: Batch) -> Loss:
        assert of is batch and target is not None
        given.append((student, target))
        return whole(student, target, of)

    monkeypatch.setattr(method, "loss", noted)
    reference = copy.deepcopy(experiment.student)
    engine: Any = SimpleNamespace(
        backward=lambda loss: loss.backward(), step=lambda: None, gradient_accumulation_steps=lambda: 1
    )
    train_step(_Called(experiment.student_module, engine), teacher, method, batch, update=True)
    ((student, target),) = given
    assert torch.equal(student.logits, reference(batch.images).logits)
    assert student.second_logits is not None and target.second_logits is not None
    assert torch.equal(student.second_logits, reference(batch.second).logits)
    assert torch.equal(target.logits, teacher(batch.images).logits)
    assert torch.equal(target.second_logits, teacher(batch.second).logits)
    assert torch.equal(method.ids[0], batch.sample_ids)


class _Called:
    """An engine around a module, without DeepSpeed."""

    def __init__(self, side: nn.Module, engine: Any) -> None:
        self.side, self.backward, self.step = side, engine.backward, engine.step
        self.gradient_accumulation_steps = engine.gradient_accumulation_steps

    def __call__(self, *views: Tensor) -> StudentOutput:
        return self.side(*views)


def test_batch_norm_sees_each_view_by_itself() -> None:
    torch.manual_seed(0)
    network = LogitsOnly(build_model("cifar/resnet8", num_classes=10)).train()
    one_after_the_other, together = copy.deepcopy(network), copy.deepcopy(network)
    weak, strong = torch.randn(8, 3, 16, 16), 3 * torch.randn(8, 3, 16, 16) + 1
    found = StudentModule(network, None, None)(weak, strong)
    assert torch.equal(found.logits, one_after_the_other(weak).logits)
    assert torch.equal(found.second_logits, one_after_the_other(strong).logits)
    for (name, buffer), other in zip(network.named_buffers(), one_after_the_other.buffers(), strict=True):
        assert torch.equal(buffer, other), name
    both = together(torch.cat([weak, strong])).logits
    assert not torch.allclose(both[:8], found.logits, atol=1e-3)
    (found.logits.sum() + found.second_logits.sum()).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
    assert StudentModule(network, None, None)(weak).second_logits is None


def test_second_views_are_read_only_if_needed(tmp_path: Path, weights: Path) -> None:
    config = config_of(tmp_path, weights, "plain", distill={"method": "kd"})
    batch, _ = next(built(config).micro_batches(0))
    assert batch.second is None


def test_the_default_second_view(tmp_path: Path) -> None:
    weak = load_config(write_config(tmp_path))
    strong, first = weak.data.second_augmentation, weak.data.first_augmentation
    assert (strong.crop, strong.padding, strong.flip_probability) == (first.crop, first.padding, first.flip_probability)
    assert (strong.policy, strong.rand_ops, strong.rand_magnitude, strong.erase_probability) == ("rand", 2, 10, 1.0)
    assert strong.erase_scale == (0.25, 0.25)
    told = load_config(write_config(tmp_path, data={"second_view": {"policy": "trivial", "crop": "none"}}))
    assert told.data.second_augmentation.policy == "trivial"
    assert (told.data.second_augmentation.crop, told.data.first_augmentation.crop) == ("none", "pad")


NEEDS = {
    "levels": "the teacher's feature levels",
    "before_activation": "its features before activation",
    "embedding": "its embeddings",
    "second_view": "its logits for a second view",
    "teacher_network": "the teacher's own blocks",
}


@pytest.mark.parametrize("need", NEEDS)
def test_methods_that_need_more_cannot_be_cached(
    tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch, need: str
) -> None:
    class Needing(KD):
        @classmethod
        def needs_of(cls, settings: KDSettings) -> Needs:
            return Needs(**{need: True})

    monkeypatch.setitem(METHODS, "kd", Needing)
    config = config_of(tmp_path, weights, "needing", distill={"method": "kd"}, cache={"mode": "read_write"})
    with pytest.raises(ConfigError) as caught:
        built(config)
    assert f"cannot be cached: Needing needs {NEEDS[need]}" in str(caught.value)
    assert "set teacher.cache.mode = 'off'" in str(caught.value)
    # Levels of 16 x 16 x 16, 32 x 8 x 8 and 64 x 4 x 4, of 96 samples, two bytes each.
    assert ("1.31 MiB a view" in str(caught.value)) == (need in ("levels", "before_activation"))
    assert not (tmp_path / "outputs").exists()


def test_hard_labels_exclude_mixing(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Hard(KD):
        @classmethod
        def needs_of(cls, settings: KDSettings) -> Needs:
            return Needs(hard_labels=True)

    mixing = {**CACHED["data"], "mixing": {"mixup_alpha": 0.2}}
    config = config_of(tmp_path, weights, "mixed", distill={"method": "kd"}, data=mixing)
    assert built(config).method.needs == Needs()
    monkeypatch.setitem(METHODS, "kd", Hard)
    with pytest.raises(ConfigError, match=r"mixup_alpha = 0\.2 .* 'kd', which needs one class a sample"):
        built(config)


@pytest.mark.parametrize(
    "distill",
    [
        {"method": "dkd"},
        {"method": "nkd"},
        {"method": ["kd", "dkd"]},
        {"method": "kd", "kd": {"standardized": True}},
        {"method": "mlkd", "mlkd": {"standardized": True}},
    ],
    ids=lambda distill: str(distill["method"]),
)
def test_one_class_is_refused(tmp_path: Path, distill: dict[str, Any]) -> None:
    """By the methods whose losses refuse it; the others train."""
    config = load_config(write_config(tmp_path, data={"num_classes": 1}, distill=distill))
    message = r"method = .*(kd|dkd)' weighs classes against each other .* at least 2, got 1 in data\.name = 'synthetic'"
    with pytest.raises(ConfigError, match=message):
        build_experiment(config, ALONE)


def test_a_name_is_a_method_and_a_list_their_sum(tmp_path: Path, weights: Path) -> None:
    assert set(METHODS) == set(DistillConfig.model_json_schema()["properties"]["method"]["oneOf"][0]["enum"])
    assert needs_of(DistillConfig(method="none").settings) == Needs(teacher=False, labels=True)
    assert needs_of(DistillConfig(method=("kd", "unikd")).settings) == Needs(levels=True, pooled=True)
    both = {"method": ["kd", "unikd"], "kd": {"beta": 2.0}}
    found = built(config_of(tmp_path, weights, "sum", distill=both)).method
    assert isinstance(found, Hybrid)
    kd, unikd = found.parts.values()
    assert isinstance(kd, KD) and isinstance(unikd, UniKD)
    assert (kd.settings.beta, kd.ce_weight, unikd.ce_weight) == (2.0, 0.0, 0.0)
    alone = build_method(DistillConfig(method="none").settings, RunContext(label_smoothing=0.1))
    assert isinstance(alone, StudentAlone) and alone.label_smoothing == 0.1


def test_a_dry_run_runs_both_views(tmp_path: Path, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "kd", Everything)
    text = describe(load_config(config_of(tmp_path, weights, "dry", distill={"method": "kd"})), ALONE)
    own = sum(a * b + b for a, b in ((16, 16), (32, 32), (64, 64), (64, 64)))
    assert f"method    kd: {own:,} parameters beside the student's" in text
