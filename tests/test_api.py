"""Distiller: a method in a loop of one's own, with any two networks."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from unikd_fast import Distiller, softmax_kl
from unikd_fast.models import build_model, extract_features

CLASSES, SIZE = 5, 16


class Stages(nn.Module):
    """A small convolutional network of two stages."""

    def __init__(self, width: int, classes: int = CLASSES) -> None:
        super().__init__()
        self.one = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, width, 1)
        )
        self.two = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
        self.head = nn.Linear(2 * width, classes)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.two(self.one(images)).mean((2, 3)))


def batches(count: int, seed: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Images whose class is in the mean of a channel."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        labels = torch.randint(CLASSES, (32,), generator=generator)
        images = torch.randn(32, 3, SIZE, SIZE, generator=generator)
        images[:, 0] += labels[:, None, None] - 2.0
        yield images, labels


@pytest.fixture(scope="module")
def teacher() -> nn.Module:
    torch.manual_seed(0)
    network = Stages(16)
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for images, labels in batches(80):
        optimizer.zero_grad()
        F.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.train()


def distiller(teacher: Any, method: Any = "unikd", **settings: Any) -> Distiller:
    torch.manual_seed(1)
    return Distiller(teacher, Stages(4), method=method, image_size=SIZE, **settings)


def agreement(teacher: nn.Module, student: nn.Module) -> float:
    images, _ = next(batches(1, seed=9))
    with torch.no_grad():
        ours, theirs = (copy.deepcopy(network).eval()(images).argmax(1) for network in (student, teacher))
    return float((ours == theirs).float().mean())


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("method", ["unikd", "kd", ["kd", "unikd"]])
def test_a_loop_teaches_the_student(teacher: nn.Module, method: Any, labelled: bool) -> None:
    before = copy.deepcopy(teacher.state_dict())
    kd = distiller(teacher, method, epochs=1)
    kd.fit_teacher(list(batches(10)), steps=40)
    student: Any = kd.module.network.plain
    start = agreement(teacher, student)
    optimizer = torch.optim.Adam(kd.parameters(), lr=0.01)
    for step, (images, labels) in enumerate(batches(60)):
        loss = kd(images, labels if labelled else None, epoch=step / 60)
        optimizer.zero_grad()
        loss.total.backward()
        optimizer.step()
    assert agreement(teacher, student) > max(0.8, start)
    assert float(loss.terms["ce"]) == 0.0 or labelled
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert teacher.training and all(parameter.requires_grad for parameter in teacher.parameters())


def test_the_loss_is_that_of_the_method(teacher: nn.Module) -> None:
    kd = distiller(teacher, "kd", beta=3.0, temperature=2.0, ce_weight=0.5, label_smoothing=0.1)
    images, labels = next(batches(1))
    labels[::3] = -100
    logits = copy.deepcopy(kd.module.network.plain).train()(images)
    with torch.no_grad():
        theirs = kd.teacher(images).logits
        # In the precision of this processor, perhaps bf16, whose logits are off by half a percent.
        torch.testing.assert_close(theirs, copy.deepcopy(teacher).eval()(images), rtol=0.05, atol=0.1)
    kept = labels != -100
    ce = F.cross_entropy(logits[kept], labels[kept], label_smoothing=0.1)
    kl = softmax_kl(logits, theirs, temperature=2.0)
    loss = kd(images, labels)
    torch.testing.assert_close(loss.terms["ce"], ce)
    torch.testing.assert_close(loss.total, 0.5 * ce + 3.0 * kl, rtol=1e-4, atol=1e-5)


def test_warm_ups_follow_the_epoch_and_are_over_without_one(teacher: nn.Module) -> None:
    kd = distiller(teacher, "reviewkd", ramp_epochs=4.0)
    images, labels = next(batches(1))
    terms = []
    for epoch in (0.0, 2.0, None):
        loss = kd(images, labels, epoch=epoch)
        terms.append(float(loss.total - loss.terms["ce"]))
        if epoch is None:
            break
    fresh = distiller(teacher, "reviewkd", ramp_epochs=4.0)
    whole = fresh(images, labels)
    assert terms[0] == pytest.approx(0.0, abs=1e-6)
    assert terms[1] == pytest.approx(0.5 * float(whole.total - whole.terms["ce"]), rel=1e-3)


def test_weights_that_fall_stay_where_no_epoch_is_given(teacher: nn.Module) -> None:
    """WKD's fall to 0 at the end of the run: without an epoch nothing would be distilled."""
    kd = distiller(teacher, "wkd", epochs=10)
    images, labels = next(batches(1))
    without, begun, ended = (kd(images, labels, epoch=epoch) for epoch in (None, 0.0, 10.0))
    assert without.terms["transport"] > 0 and without.terms["mean_gap"] > 0
    torch.testing.assert_close(without.total, begun.total)
    torch.testing.assert_close(ended.total, ended.terms["ce"] + ended.terms["target_class"])


def test_only_what_is_trained_is_a_parameter(teacher: nn.Module) -> None:
    kd = distiller(teacher, "unikd")
    student = kd.module.network.plain
    found = {id(parameter) for parameter in kd.parameters()}
    assert found == {id(parameter) for _, parameter in kd.named_parameters() if parameter.requires_grad}
    assert {id(parameter) for parameter in student.parameters()} < found
    assert kd.head is not None and not found & {id(parameter) for parameter in kd.head.parameters()}
    assert not found & {id(parameter) for parameter in teacher.parameters()}
    assert not any(name.startswith("_teacher") for name in kd.state_dict())


@pytest.mark.parametrize("method", ["kd", "unikd"])
def test_modes_of_the_student_are_left_as_they_are(teacher: nn.Module, method: str) -> None:
    student = Stages(4).train()
    student.one[1].eval()  # a frozen BatchNorm
    modes = [module.training for module in student.modules()]
    Distiller(teacher, student, method=method, image_size=SIZE)
    assert [module.training for module in student.modules()] == modes


def test_a_saved_distiller_goes_on(teacher: nn.Module, tmp_path: Any) -> None:
    kd = distiller(teacher)
    kd.fit_teacher(list(batches(3)), steps=5)
    torch.save(kd.state_dict(), tmp_path / "kd.pt")
    other = distiller(teacher)
    other.load_state_dict(torch.load(tmp_path / "kd.pt", weights_only=True))
    images, labels = next(batches(1))
    assert torch.equal(kd(images, labels).total, other(images, labels).total)
    assert not any(parameter.requires_grad for parameter in other.head.parameters())  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["unikd", "dkd"])
def test_autocast_and_compile_take_it(teacher: nn.Module, method: str) -> None:
    kd = distiller(teacher, method)
    kd.fit_teacher(list(batches(3)), steps=5)
    images, labels = next(batches(1))
    expected = kd(images, labels)
    compiled = torch.compile(kd, backend="eager")(images, labels)
    torch.testing.assert_close(compiled.total, expected.total)
    with torch.autocast("cpu", torch.bfloat16):
        low = kd(images, labels)
    assert low.total.dtype == torch.float32
    torch.testing.assert_close(low.total, expected.total, rtol=0.05, atol=0.05)
    low.total.backward()
    assert all(parameter.grad is not None for parameter in kd.module.network.parameters())


def test_a_copy_has_a_teacher_of_its_own(teacher: nn.Module) -> None:
    kd = distiller(teacher, "kd")
    other = copy.deepcopy(kd)
    images, labels = next(batches(1))
    expected = kd(images, labels).total
    with torch.no_grad():
        for parameter in kd.teacher.parameters():
            parameter.zero_()
    assert torch.equal(other(images, labels).total, expected)


def test_the_fitted_head_stays_as_it_was_fitted(teacher: nn.Module) -> None:
    """A loop calls train() after each evaluation."""
    kd = distiller(teacher)
    kd.eval()
    kd.fit_teacher(list(batches(3)), steps=5)
    kd.train()
    assert kd.head is not None and kd.module.training
    before = copy.deepcopy(kd.head.state_dict())
    kd(*next(batches(1)))
    assert not kd.head.training
    assert all(torch.equal(value, before[name]) for name, value in kd.head.state_dict().items())


def test_a_head_can_be_fitted_again_after_an_older_state(teacher: nn.Module) -> None:
    kd = distiller(teacher)
    older = copy.deepcopy(kd.state_dict())
    kd.fit_teacher(list(batches(2)), steps=2)
    fitted = copy.deepcopy(kd.state_dict())
    kd.load_state_dict(older)
    assert kd.head is not None
    with torch.no_grad():
        kd.fit_teacher(list(batches(2)), steps=2)
    assert any(not torch.equal(value, fitted[f"head.{name}"]) for name, value in kd.head.state_dict().items())
    assert not any(parameter.requires_grad for parameter in kd.head.parameters())


@pytest.mark.parametrize(("method", "settings"), [("nkd", {}), ("dkd", {}), ("wkd", {"feature_weight": 0.0})])
def test_samples_without_a_label_are_left_out(teacher: nn.Module, method: str, settings: dict[str, float]) -> None:
    kd = distiller(teacher, method, **settings).eval()
    images, labels = next(batches(1))
    labels[::3] = -100
    kept = labels != -100
    some, whole = kd(images, labels), kd(images[kept], labels[kept])
    torch.testing.assert_close(some.total, whole.total)
    none = kd(images, torch.full_like(labels, -100))
    none.total.backward()
    assert none.total == 0.0


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"epochs": 0}, "epochs must be above 0, got 0"),
        ({"feature_nodes": {"studnet": ["one", "two"]}}, "feature_nodes has 'studnet'"),
        ({"method": []}, "name at least one method"),
        ({"method": ["kd", "kd"]}, "each once"),
        ({"method": ["kd", "unikd"], "kd": 3}, "kd = 3: settings of several methods are dictionaries"),
    ],
)
def test_a_mistaken_argument_is_refused(teacher: nn.Module, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        distiller(teacher, **settings)


@pytest.mark.parametrize("method", ["kd", "unikd"])
def test_a_scripted_teacher_is_refused(method: str) -> None:
    scripted = torch.jit.trace(Stages(4).eval(), torch.zeros(2, 3, SIZE, SIZE))
    with pytest.raises(ValueError, match=r"the teacher is a TorchScript module, .*; give the network it was made of"):
        distiller(scripted, method)


@pytest.mark.parametrize(
    ("steps", "said"), [(0, "steps must be 1 or more, got 0"), (3, "can be read only once"), (1, "yields no batches")]
)
def test_a_loader_that_does_not_suffice_is_refused(teacher: nn.Module, steps: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        distiller(teacher).fit_teacher(batches(min(2, steps - 1)), steps=steps)


def test_a_transformer_teaches_a_convolutional_network() -> None:
    teacher = build_model(
        "timm/vit_tiny_patch16_224", num_classes=CLASSES, model_args={"img_size": 32, "patch_size": 8, "depth": 4}
    )
    kd = Distiller(teacher, Stages(4), image_size=32, alpha=2.0)
    images = torch.randn(4, 3, 32, 32)
    kd.fit_teacher([{"pixel_values": images}], steps=2)
    loss = kd(images)
    loss.total.backward()
    assert loss.terms["feature_kl"] > 0


HUGGING_FACE: dict[str, tuple[str, dict[str, Any], int]] = {
    "ViT": ("vit.layers.{}", {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "patch_size": 8}, 8),
    "Dinov2": (
        "dinov2.encoder.layer.{}",
        {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "patch_size": 16},
        4,
    ),
    "ConvNext": ("convnext.encoder.stages.{}", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, 16),
    "ResNet": (
        "resnet.encoder.stages.{}",
        {"embedding_size": 8, "hidden_sizes": [8, 16, 24, 32], "depths": [1] * 4},
        16,
    ),
}


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_models_of_transformers_teach_and_learn(name: str) -> None:
    import transformers

    path, sizes, finest = HUGGING_FACE[name]
    config = getattr(transformers, f"{name}Config")(image_size=64, num_labels=CLASSES, **sizes)
    torch.manual_seed(0)
    network = getattr(transformers, f"{name}ForImageClassification")(config)
    images, labels = torch.randn(4, 3, 64, 64), torch.arange(4)
    for method in ("unikd", "kd", "flg"):
        for pair in ((network, Stages(4)), (Stages(8), copy.deepcopy(network))):
            kd = Distiller(*pair, method=method, image_size=64)
            kd.fit_teacher([images], steps=2)
            loss = kd(images, labels)
            loss.total.backward()
            assert loss.total.isfinite()
    levels = extract_features(network, image_size=64)
    assert levels.level_names == tuple(path.format(place) for place in range(4))
    assert levels.level_shapes[0][1] == finest
    with torch.no_grad():
        assert torch.equal(levels.eval()(images).logits, network.eval()(images).logits)


@pytest.mark.parametrize("batch", ["tuple", "tensor", "dictionary"])
def test_every_kind_of_batch_fits_the_teacher(teacher: nn.Module, batch: str) -> None:
    kd = distiller(teacher)
    makes = {
        "tuple": lambda x, y: (x, y),
        "tensor": lambda x, y: x,
        "dictionary": lambda x, y: {"image": x, "label": y},
    }
    kd.fit_teacher(list(itertools.starmap(makes[batch], batches(2))), steps=3)
    kd(*next(batches(1)))


IMAGES = torch.zeros(4, 3, SIZE, SIZE)
LARGER, LABELS = torch.zeros(4, 3, SIZE + 8, SIZE + 8), torch.arange(4)


def one_class(method: str) -> Distiller:
    return Distiller(Stages(4, 1), Stages(4, 1), method=method, image_size=SIZE)


def of_resnets(method: str) -> Distiller:
    return Distiller(*(build_model("cifar/resnet8", num_classes=CLASSES) for _ in "ts"), method=method, image_size=SIZE)


@pytest.mark.parametrize(
    ("use", "said"),
    [
        (lambda t: distiller(t, "unikdd"), "no method 'unikdd'; nearest: unikd"),
        (lambda t: distiller(t, "kd", temprature=3.0), "kd has no setting 'temprature'; nearest: temperature"),
        (lambda t: distiller(t, "kd", temperature=-1.0), "temperature = -1.0 of kd is not valid: .*greater than 0"),
        (lambda t: distiller(t, ["kd", "at"], beta=1.0), r"beta = 1.0: settings of several methods .* kd=\{...\}, at="),
        (lambda t: distiller(t, "crd"), "crd compares with features of all other samples"),
        (lambda t: distiller(t, "none"), "learns from no teacher"),
        (lambda t: distiller(t, teacher_head="anchored"), "'anchored' .* set it to 'prefit'"),
        (lambda t: distiller(t)(IMAGES), r"call fit_teacher\(loader\) before training"),
        (lambda t: distiller(t).fit_teacher([]), "the loader yields no batches"),
        (lambda t: distiller(t).fit_teacher([("a", 1)]), "a batch must be images .* got tuple"),
        (lambda t: distiller(t, "dkd")(IMAGES), "DKD needs labels; pass them, or use a method that needs none"),
        (lambda t: distiller(t, "wkd")(IMAGES, torch.ones(4, 5)), r"WKD needs one class a sample, got .* \(4, 5\)"),
        (lambda t: distiller(t, "mlkd")(IMAGES), "pass the other one as second=..."),
        (lambda t: distiller(t, "reviewkd")(LARGER, LABELS), "ReviewKD: maps of 8 x 8 and of 12 x 12 .*image_size"),
        (lambda t: of_resnets("ofd")(LARGER, LABELS), "OFD: maps of 24 x 24 and of 16 x 16 .*image_size"),
        (lambda t: distiller(t, "fgfi"), "fgfi compares the maps of detectors near objects"),
        (lambda t: Distiller(t, Stages(4, 7), image_size=SIZE), "the student has 7 classes and the teacher 5"),
        (lambda t: one_class("wkd"), "'wkd' weighs classes against each other and needs at least 2, got 1"),
        (lambda t: Distiller(t, nn.Identity(), method="kd", image_size=SIZE), r"must return logits \(N, K\)"),
        (lambda t: Distiller(t, Stages(4), image_size=SIZE, feature_nodes={"teacher": ["tow"]}), "no node 'tow'"),
    ],
)
def test_what_cannot_work_is_refused(teacher: nn.Module, use: Any, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        use(teacher)


def test_several_teachers_are_one(teacher: nn.Module) -> None:
    """The weighted mean of their logits; a head on the features is fitted to it."""
    torch.manual_seed(5)
    others = [Stages(8), Stages(12)]
    kd = distiller([teacher, *others], "kd", ce_weight=0.0, beta=1.0, temperature=2.0, teacher_weights=[2.0, 1.0, 1.0])
    images, labels = next(batches(1))
    student = copy.deepcopy(kd.module.network.plain).train()(images)
    with torch.no_grad():
        each = [copy.deepcopy(network).eval()(images) for network in (teacher, *others)]
        # In the precision of this processor, perhaps bf16, whose logits are off by half a percent.
        torch.testing.assert_close(
            kd.teacher(images).logits, (2 * each[0] + each[1] + each[2]) / 4, rtol=0.05, atol=0.1
        )
        expected = softmax_kl(student, kd.teacher(images).logits, temperature=2.0)
    torch.testing.assert_close(kd(images, labels).total, expected, rtol=1e-4, atol=1e-5)
    unikd = distiller([teacher, others[0]])
    unikd.fit_teacher(list(batches(2)), steps=2)
    unikd(images).total.backward()
    assert all(parameter.grad is not None for parameter in unikd.parameters())
    cases: list[tuple[Any, dict[str, Any], str]] = [
        ([], {}, "the list of teachers is empty"),
        ([teacher, others[0]], {"teacher_weights": [1.0]}, "2 networks and 1 weights"),
        (teacher, {"teacher_weights": [1.0]}, "at least two networks and a weight for each, got 1"),
        ([teacher, Stages(8, 7)], {}, "the student has 5 classes and the teacher 7"),
    ]
    for given, settings, said in cases:
        with pytest.raises(ValueError, match=said):
            distiller(given, "kd", **settings)
