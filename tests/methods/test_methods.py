"""Methods: the loss they state, what their gradients reach, and what trains the teacher's head."""

from collections.abc import Iterator

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from support.build_method import build as build_method
from unikd_fast.config.schema import DistillConfig
from unikd_fast.methods import DKD, KD, METHODS, StudentAlone, UniKD
from unikd_fast.values import Batch, Features, StudentOutput, Target

CLASSES = 7
STUDENT, TEACHER = (4, 6), (5, 8, 10)


def features(channels: tuple[int, ...], n: int = 12, *, seed: int = 0) -> tuple[Features, Tensor]:
    """Levels that carry the class, so that a head can learn to read it, and logits that state it."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, CLASSES, (n,), generator=generator)
    levels = []
    for index, channel in enumerate(channels):
        size = 2 ** (len(channels) - index)
        codes = torch.randn(CLASSES, channel, generator=torch.Generator().manual_seed(99 + index))
        noise = 0.3 * torch.randn(n, channel, size, size, generator=generator)
        levels.append(codes[labels][:, :, None, None] + noise)
    logits = 4.0 * F.one_hot(labels, CLASSES) + 0.3 * torch.randn(n, CLASSES, generator=generator)
    return Features(tuple(levels), logits), labels


def stream() -> Iterator[Features]:
    seed = 1
    while True:
        yield features(TEACHER, 24, seed=seed)[0]
        seed += 1


def build(**options: object) -> UniKD:
    torch.manual_seed(0)
    return build_method(UniKD, STUDENT, TEACHER, CLASSES, width=16, **options)  # type: ignore[arg-type]


def batch_of(labels: Tensor) -> Batch:
    return Batch(torch.zeros(len(labels), 3, 1, 1), labels, torch.arange(len(labels)))


def student_output(method: UniKD) -> tuple[StudentOutput, Batch]:
    student, labels = features(STUDENT, seed=5)
    logits = student.logits.clone().requires_grad_()
    return StudentOutput(logits, method.adapter(student)), batch_of(labels)


def test_student_alone_is_cross_entropy() -> None:
    student, labels = features(STUDENT)
    loss = build_method(StudentAlone).loss(StudentOutput(student.logits), None, batch_of(labels))
    torch.testing.assert_close(loss.total, F.cross_entropy(student.logits, labels))
    assert loss.terms == {"ce": loss.total}


def test_kd_matches_the_literature() -> None:
    student, labels = features(STUDENT)
    teacher = features(TEACHER, seed=3)[0].logits
    method = build_method(KD, ce_weight=0.1, beta=0.9, temperature=4.0)
    loss = method.loss(StudentOutput(student.logits), Target(teacher), batch_of(labels))
    soft = F.kl_div((student.logits / 4).log_softmax(1), (teacher / 4).softmax(1), reduction="batchmean") * 16
    hard = F.cross_entropy(student.logits, labels)
    torch.testing.assert_close(loss.total, 0.1 * hard + 0.9 * soft)
    torch.testing.assert_close(loss.terms, {"ce": hard, "logit_kl": soft})
    assert tuple(loss.terms) == method.term_names


@pytest.mark.parametrize(
    ("classes", "asked", "form"),
    [
        (2048, "auto", "projected"),
        (2049, "auto", "direct"),
        (2049, "projected", "projected"),
        (7, "direct", "direct"),
    ],
)
def test_many_classes_use_the_direct_form_and_log_it(
    caplog: pytest.LogCaptureFixture, classes: int, asked: str, form: str
) -> None:
    caplog.set_level("INFO", "unikd_fast")
    method = build_method(UniKD, STUDENT, TEACHER, classes, width=16, fdp=asked)
    assert (method.distribution.projection is not None) == (form == "projected")
    assert method.head.settings["fdp"] == form
    chosen = "distill.unikd.fdp = auto: the direct form, two layers 16 -> 2,049, for more than 2,048 classes"
    assert (chosen in caplog.text) == (asked == "auto" and form == "direct")


@pytest.mark.parametrize("fdp", ["projected", "direct"])
def test_prefit_fits_the_head_then_freezes_it(fdp: str) -> None:
    method = build(fdp=fdp, teacher_head="prefit", head_steps=500)
    method.head.optimizer.param_groups[0]["lr"] = 1e-2
    teacher, labels = features(TEACHER, 200, seed=0)
    before = method.head.indicators(teacher, labels)
    method.prepare(stream())
    after = method.head.indicators(teacher, labels)
    assert before["head_accuracy"] < 0.5
    assert after["head_accuracy"] > 0.9
    assert after["head_mean_std"] > 0.5
    target = method.target(teacher)
    assert target.gaussian is not None
    assert not target.gaussian.mean.requires_grad
    assert not any(p.requires_grad for p in method.head.module.parameters())


def test_prepare_takes_exactly_the_batches_it_needs() -> None:
    method = build(teacher_head="prefit", head_steps=3)
    batches = stream()
    method.prepare(batches)
    assert torch.equal(next(batches).logits, features(TEACHER, 24, seed=4)[0].logits)


@pytest.mark.parametrize("fdp", ["projected", "direct"])
@pytest.mark.parametrize("teacher_head", ["prefit", "anchored"])
def test_the_student_loss_does_not_train_the_head(teacher_head: str, fdp: str) -> None:
    method = build(fdp=fdp, teacher_head=teacher_head)
    output, batch = student_output(method)
    loss = method.loss(output, method.target(features(TEACHER, seed=5)[0]), batch)
    loss.total.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in method.adapter.parameters())
    assert all(p.grad is None for p in method.head.module.parameters())
    assert method.companion is None


@pytest.mark.parametrize("fdp", ["projected", "direct"])
def test_the_literal_head_is_trained_by_the_total_loss(fdp: str) -> None:
    method = build(fdp=fdp, teacher_head="literal")
    output, batch = student_output(method)
    loss = method.loss(output, method.target(features(TEACHER, seed=5)[0]), batch)
    loss.total.backward()
    assert method.companion is method.head.module
    assert all(p.grad is not None for p in method.head.module.parameters())


def test_anchored_trains_only_the_head_and_accumulates() -> None:
    # Without the norm, whose statistics are those of each half.
    method, whole = (build(teacher_head="anchored", norm=None) for _ in range(2))
    teacher = features(TEACHER, 12, seed=5)[0]
    halves = [Features(tuple(f[i : i + 6] for f in teacher.levels), teacher.logits[i : i + 6]) for i in (0, 6)]
    output, batch = student_output(method)
    start = {name: p.clone() for name, p in method.head.module.named_parameters()}
    for index, half in enumerate(halves):
        part = StudentOutput(output.logits[:6], output.adapted[:6])
        loss = method.loss(part, method.target(half), Batch(*(x[:6] for x in batch[:3])))
        assert tuple(loss.terms) == method.term_names
        method.head.train(loss.terms, accumulation_steps=2, update=index == 1, leave_out=False)
    output, batch = student_output(whole)
    terms = whole.loss(output, whole.target(teacher), batch).terms
    whole.head.train(terms, accumulation_steps=1, update=True, leave_out=False)
    moved = False
    for (name, a), b in zip(method.head.module.named_parameters(), whole.head.module.parameters(), strict=True):
        # AdamW's first step is the sign of the gradient: a wrong scale would not show, a wrong sum would.
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        moved |= bool((a != start[name]).any())
    assert moved
    assert all(p.grad is None for p in method.adapter.parameters())


def test_a_skipped_step_leaves_the_anchored_head_unchanged() -> None:
    method = build(teacher_head="anchored", norm="batch")
    found = []
    for index, factor in enumerate((1.0, float("nan"), 1.0)):
        student, batch = student_output(method)
        teacher = features(TEACHER, seed=20 + index)[0]
        spoilt = Features(tuple(level * factor for level in teacher.levels), teacher.logits)
        loss = method.loss(student, method.target(spoilt), batch)
        method.head.train(loss.terms, accumulation_steps=1, update=True, leave_out=index == 1)
        found.append({name: tensor.clone() for name, tensor in method.head.module.state_dict().items()})
    assert any("running_mean" in name for name in found[0])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    assert all(tensor.isfinite().all() for tensor in found[2].values())
    assert not any(torch.equal(found[1][name], found[2][name]) for name in found[0] if "running" in name)


def test_alpha_ramps_linearly_in_place() -> None:
    method = build(alpha=4.0, alpha_ramp_epochs=2.0)
    tensor = method.alpha.value
    seen = []
    for epochs in (0.0, 0.5, 1.0, 2.0, 5.0):
        method.set_progress(epochs)
        seen.append(tensor.item())
    assert seen == [0.0, 1.0, 2.0, 4.0, 4.0]
    output, batch = student_output(method)
    target = method.target(features(TEACHER, seed=5)[0])
    method.set_progress(0.5)
    loss = method.loss(output, target, batch)
    terms = loss.terms
    assert tuple(terms) == method.term_names
    torch.testing.assert_close(loss.total, terms["ce"] + 1.0 * terms["feature_kl"] + terms["logit_kl"])


def test_the_ablation_uses_only_the_coarsest_level() -> None:
    method = build(fusion="last", norm=None)
    student, _ = features(STUDENT, seed=5)
    changed = student._replace(levels=(torch.zeros_like(student.levels[0]), student.levels[1]))
    torch.testing.assert_close(method.adapter(student), method.adapter(changed))
    pooled = method.adapter.fusion.expanders[0](student.levels[1]).mean((2, 3))
    torch.testing.assert_close(method.adapter(student), pooled)


def test_state_is_restored_and_a_prefit_head_stays_frozen() -> None:
    method, other = build(teacher_head="prefit", head_steps=2), build(teacher_head="prefit")
    method.prepare(stream())
    other.head.load_state_dict(method.head.state_dict())
    teacher = features(TEACHER, seed=5)[0]
    a, b = method.target(teacher).gaussian, other.target(teacher).gaussian
    assert a is not None
    assert b is not None
    assert torch.equal(a.mean, b.mean)
    assert not any(p.requires_grad for p in other.head.module.parameters())


LITERATURE: dict[str, dict[str, object]] = {
    "unikd": {"beta": 1.0, "temperature": 4.0},
    "unikd_dev": {"ce_weight": 1.0, "feature_weight": 1.0, "head_weight": 1.0, "temperature": 1.0},
    "kd": {"ce_weight": 0.1, "beta": 0.9, "temperature": 4.0},
    "dkd": {"ce_weight": 1.0, "alpha": 1.0, "beta": 8.0, "temperature": 4.0},
    "nkd": {"ce_weight": 1.0, "gamma": 1.5, "temperature": 1.0},
    "mlkd": {"ce_weight": 0.1, "weight": 0.9, "temperatures": (3.0, 4.0, 5.0), "first_view_temperatures": (2.0, 6.0)},
    "flg": {"ce_weight": 1.0, "beta": 1.0, "gamma": 1.0, "temperature": 4.0},
    "wkd": {
        **{"ce_weight": 1.0, "logit_weight": 200.0, "target_weight": 1.0, "temperature": 8.0, "sharpness": 1.0},
        **{"epsilon": 0.05, "iterations": 10, "feature_weight": 0.08, "mean_ratio": 8.0, "grid": 1},
    },
    "fitnet": {"weight": 100.0},
    "fgfi": {"weight": 0.01},
    "at": {"weight": 1000.0},
    "ofd": {"weight": 1e-3},
    "reviewkd": {"weight": 1.0},
    "crd": {"weight": 0.8, "negatives": 16384, "temperature": 0.07, "momentum": 0.5},
    "blockwise": {"task_weight": 1.0, "distill_weight": 1.0, "cross_weight": 1.0, "temperature": 4.0},
    "none": {},
}


@pytest.mark.parametrize("name", METHODS)
def test_default_settings_are_the_literatures(name: str) -> None:
    settings = DistillConfig(method=name).settings[name]
    assert {key: getattr(settings, key) for key in LITERATURE[name]} == LITERATURE[name]


def test_a_ramp_is_limited_to_a_share_of_the_run() -> None:
    for epochs, steps, expected in ((None, 1000, 8.0), (None, 10_000, 20.0), (30.0, 1000, 30.0), (0.0, 1000, 0.0)):
        method = build_method(DKD, ramp_epochs=epochs, total_steps=steps, steps_per_epoch=10)
        assert method.ramp.epochs == expected


def test_a_method_uses_the_runs_smoothing_and_losses() -> None:
    method = build_method(KD, label_smoothing=0.1, impl="reference")
    student, labels = features(STUDENT)
    teacher = features(TEACHER, seed=3)[0].logits
    loss = method.loss(StudentOutput(student.logits), Target(teacher), batch_of(labels))
    smoothed = F.cross_entropy(student.logits, labels, label_smoothing=0.1)
    torch.testing.assert_close(loss.terms["ce"], smoothed)
    assert method.impl == "reference"


@pytest.mark.parametrize(
    ("name", "section", "place"),
    [
        ("unikd", {"teacher_head": "fixed"}, ("unikd", "teacher_head")),
        ("unikd", {"fusion": "first"}, ("unikd", "fusion")),
        ("unikd", {"fdp": "small"}, ("unikd", "fdp")),
        ("crd", {"positives": "any"}, ("crd", "positives")),
        ("crd", {"negatives": 0}, ("crd", "negatives")),
        ("crd", {"negatives": 2**18 + 1}, ("crd", "negatives")),
        ("crd", {"momentum": 1.0}, ("crd", "momentum")),
        ("crd", {"temperature": 0.0}, ("crd", "temperature")),
        ("crd", {"temperature": float("inf")}, ("crd", "temperature")),
        ("mlkd", {"temperatures": []}, ("mlkd", "temperatures")),
        ("mlkd", {"temperatures": [4.0, 0.0]}, ("mlkd", "temperatures", 1)),
        ("mlkd", {"first_view_temperatures": [-1.0]}, ("mlkd", "first_view_temperatures", 0)),
        ("fitnet", {"level": -1}, ("fitnet", "level")),
        ("wkd", {"epsilon": 0.01}, ("wkd", "epsilon")),
        ("wkd", {"iterations": 0}, ("wkd", "iterations")),
    ],
)
def test_settings_out_of_range_are_refused(name: str, section: dict[str, object], place: tuple[object, ...]) -> None:
    with pytest.raises(ValidationError) as caught:
        DistillConfig.model_validate({"method": name, name: section})
    assert [tuple(part for part in error["loc"] if part in place) for error in caught.value.errors()] == [place]
