"""Weights from files: the layouts in the wild, and refusals that say why."""

import argparse
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from unikd_fast.models import build_model, extract_features, load_weights


@pytest.fixture
def trained() -> nn.Module:
    model = build_model("cifar/resnet8", num_classes=10)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            if tensor.is_floating_point():
                tensor.uniform_(0.1, 1)
            else:
                tensor.fill_(7)
    return model


def _assert_loads(path: Path, trained: nn.Module) -> None:
    model = build_model("cifar/resnet8", num_classes=10, weights=str(path))
    state = model.state_dict()
    for key, value in trained.state_dict().items():
        assert torch.equal(state[key], value), key


@pytest.mark.parametrize("key", [None, "model", "state_dict", "model_state", "student"])
@pytest.mark.parametrize("prefix", ["", "module.", "module._orig_mod."])
def test_published_checkpoint_layouts(tmp_path: Path, trained: nn.Module, key: str | None, prefix: str) -> None:
    state = {prefix + name: value for name, value in trained.state_dict().items()}
    path = tmp_path / "weights.pt"
    torch.save(state if key is None else {"epoch": 3, key: state}, path)
    _assert_loads(path, trained)


@pytest.mark.parametrize("era", ["today", "before torch 1.6", "before torch 1.6 and numpy 2"])
def test_published_teacher_checkpoint(tmp_path: Path, trained: nn.Module, era: str) -> None:
    folder = tmp_path / "resnet8_vanilla"
    folder.mkdir()
    path = folder / "ckpt_epoch_240.pth"
    optimiser = torch.optim.SGD(trained.parameters(), lr=0.05, momentum=0.9)
    content = {
        "opt": argparse.Namespace(model="resnet8", learning_rate=0.05, lr_decay_epochs=[150, 180, 210]),
        "epoch": 240,
        "model": trained.state_dict(),
        "best_acc": np.float64(72.34),
        "accuracy": np.float32(72.3),
        "optimizer": optimiser.state_dict(),
    }
    torch.save(content, path, _use_new_zipfile_serialization=era == "today")
    if "numpy" in era:
        raw = path.read_bytes()
        assert b"numpy._core.multiarray" in raw
        path.write_bytes(raw.replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    _assert_loads(path, trained)


def test_safetensors_round_trip_of_the_plain_network(tmp_path: Path, trained: nn.Module) -> None:
    extractor = extract_features(trained, image_size=16)
    path = tmp_path / "student.safetensors"
    save_file(extractor.plain.state_dict(), path)
    _assert_loads(path, trained)
    fresh = build_model("cifar/resnet8", num_classes=10, weights=str(path)).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(fresh(images), extractor.eval()(images).logits)


def test_counters_may_be_missing(tmp_path: Path, trained: nn.Module) -> None:
    state = {key: value for key, value in trained.state_dict().items() if "num_batches_tracked" not in key}
    torch.save(state, tmp_path / "old.pth")
    model = build_model("cifar/resnet8", num_classes=10, weights=str(tmp_path / "old.pth"))
    assert torch.equal(model.fc.weight, trained.fc.weight)


AVERAGE = ["state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema"]


@pytest.mark.parametrize("raw", ["state_dict", "model", None])
@pytest.mark.parametrize("ema", AVERAGE)
def test_the_moving_average_is_used_and_logged(
    tmp_path: Path, trained: nn.Module, raw: str | None, ema: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "both.pth"
    averaged = {f"module.{name}": value for name, value in trained.state_dict().items()}
    content: dict[str, Any] = {"epoch": 3, ema: {"n_averaged": torch.tensor(7), **averaged}}
    if raw is not None:
        content = {raw: build_model("cifar/resnet8", num_classes=10).state_dict(), **content}
    torch.save(content, path)
    with caplog.at_level("INFO", "unikd_fast"):
        _assert_loads(path, trained)
    beside = f" (weights_key takes {raw!r} instead)" if raw else ""
    assert f"model: weights under {ema!r} of {path}{beside}" in caplog.messages
    assert "prefix 'module.' taken off" in caplog.text
    assert "left out, as the model has no such tensors: n_averaged" in caplog.text


def test_a_key_selects_other_weights(tmp_path: Path, trained: nn.Module) -> None:
    path = tmp_path / "both.pth"
    other = build_model("cifar/resnet8", num_classes=10)
    torch.save({"state_dict_ema": other.state_dict(), "net": trained.state_dict(), "epoch": 3}, path)
    model = build_model("cifar/resnet8", num_classes=10, weights=str(path), weights_key="net")
    assert torch.equal(model.fc.weight, trained.fc.weight)
    with pytest.raises(ValueError, match="no state dict under weights_key = 'epoch'; use 'state_dict_ema' or 'net'"):
        build_model("cifar/resnet8", num_classes=10, weights=str(path), weights_key="epoch")
    torch.save(trained.state_dict(), path)
    with pytest.raises(ValueError, match="at top level, but weights_key is 'net'; remove it"):
        build_model("cifar/resnet8", num_classes=10, weights=str(path), weights_key="net")
    for name, weights in (("cifar/resnet8", None), ("torchvision/resnet18", "DEFAULT")):
        with pytest.raises(ValueError, match=f"weights_key = 'net' with weights {weights!r}, which is not a file"):
            build_model(name, num_classes=10, weights=weights, weights_key="net")


def test_an_unknown_key_is_named(tmp_path: Path, trained: nn.Module) -> None:
    message = _refused(tmp_path, {"net": trained.state_dict(), "epoch": 3})
    assert "choose from 'net' by weights_key" in message


PREFIXES = ["module.student.", "model.", "backbone.", "encoder.", "net.", "student.", "_orig_mod.", "any.thing.at_all."]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_is_removed_and_logged(
    tmp_path: Path, trained: nn.Module, prefix: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "weights.pth"
    state = {prefix + name: value for name, value in trained.state_dict().items()}
    beside = {"adapter.0.weight": torch.ones(3, 3), "module.teacher.layer1.weight": torch.ones(4)}
    torch.save({"state_dict": {**state, **beside}}, path)
    with caplog.at_level("INFO", "unikd_fast"):
        _assert_loads(path, trained)
    left_out = f"left out, as the model has no such tensors: {', '.join(beside)}"
    assert f"prefix {prefix!r} taken off; {left_out}" in caplog.text


def test_counters_and_other_heads_are_left_out(
    tmp_path: Path, trained: nn.Module, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "profiled.pth"
    extra = {"total_ops": torch.zeros(1).double(), "layer1.0.conv1.total_ops": torch.zeros(1).double()}
    extra |= {"n_averaged": torch.tensor(3), "aux_head.weight": torch.ones(4, 4), "mask_token": torch.ones(1, 1, 8)}
    extra |= {"layer1.0.index": torch.arange(5)}
    torch.save({**trained.state_dict(), **extra}, path)
    with caplog.at_level("INFO", "unikd_fast"):
        _assert_loads(path, trained)
    assert f"left out, as the model has no such tensors: {', '.join(list(extra)[:5])} and 1 more" in caplog.text


DEEPER = [("cifar/resnet56", "cifar/resnet20"), ("cifar/wrn_40_1", "cifar/wrn_16_1")]


@pytest.mark.parametrize(("deeper", "name"), DEEPER)
def test_a_deeper_network_is_refused(tmp_path: Path, deeper: str, name: str) -> None:
    state = build_model(deeper, num_classes=10).state_dict()
    small = build_model(name, num_classes=10)
    assert small.state_dict().keys() <= state.keys()  # and of the same shapes
    message = _refused(tmp_path, {"model": state}, small)
    assert "0 tensors differ in shape, 0 are missing" in message


def test_an_extra_stage_is_refused(tmp_path: Path, trained: nn.Module) -> None:
    message = _refused(tmp_path, {**trained.state_dict(), "layer4.0.conv1.weight": torch.ones(4, 4, 3, 3)})
    assert "layer4.0.conv1.weight: (4, 4, 3, 3) in the file, not in the model" in message


def test_two_fitting_networks_are_ambiguous(tmp_path: Path, trained: nn.Module) -> None:
    both = {f"{prefix}.{name}": value for prefix in ("query", "key") for name, value in trained.state_dict().items()}
    assert "2 networks that fit, under the prefixes 'key.', 'query.'" in _refused(tmp_path, both)


def test_class_counts_are_checked_behind_a_prefix(tmp_path: Path) -> None:
    state = build_model("cifar/resnet8", num_classes=100).state_dict()
    message = _refused(tmp_path, {"model": {f"backbone.{name}": value for name, value in state.items()}})
    assert "100 classes and the teacher 10" in message


def test_a_headless_checkpoint_lacks_only_the_head(tmp_path: Path, trained: nn.Module) -> None:
    state = {f"backbone.{name}": value for name, value in trained.state_dict().items() if not name.startswith("fc.")}
    message = _refused(tmp_path, state)
    assert "0 tensors differ in shape, 2 are missing, 0 unexpected" in message
    assert "fc.weight: missing in the file" in message


def test_half_precision_weights_are_cast_to_fp32(tmp_path: Path, trained: nn.Module) -> None:
    torch.save(trained.half().state_dict(), tmp_path / "half.pth")
    model = build_model("cifar/resnet8", num_classes=10, weights=str(tmp_path / "half.pth"))
    assert model.fc.weight.dtype == torch.float32
    assert torch.equal(model.fc.weight, trained.fc.weight.float())


def _refused(tmp_path: Path, content: Any, model: nn.Module | None = None, role: str = "teacher") -> str:
    path = tmp_path / "refused.pth"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    model = model or build_model("cifar/resnet8", num_classes=10)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError) as caught:
        load_weights(model, path, role=role)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    message = str(caught.value)
    assert str(path) in message
    assert role in message
    return message


def test_another_number_of_classes_is_refused(tmp_path: Path) -> None:
    state = build_model("cifar/resnet8", num_classes=100).state_dict()
    message = _refused(tmp_path, {"model": state})
    assert "100 classes and the teacher 10" in message
    assert "fc.weight is (100, 64) in the file and (10, 64) in the model" in message
    assert "set teacher.training to fine-tune it" in message
    assert "set num_classes to 100, or use" in _refused(tmp_path, {"model": state}, role="student")


@pytest.mark.parametrize(
    ("name", "classifiers"),
    [
        ("cifar/resnet8", ["fc.weight", "fc.bias"]),
        ("torchvision/googlenet", ["fc.weight", "fc.bias", "aux1.fc2.weight", "aux2.fc2.weight"]),
        ("torchvision/squeezenet1_1", ["classifier.1.weight", "classifier.1.bias"]),
        ("timm/convnext_atto", ["head.fc.weight", "head.fc.bias"]),
    ],
)
def test_another_number_of_classes_gets_a_new_classifier(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, classifiers: list[str]
) -> None:
    caplog.set_level("INFO", "unikd_fast")
    trained = build_model(name, num_classes=7)
    path = tmp_path / "seven.pth"
    torch.save(trained.state_dict(), path)
    found = build_model(name, num_classes=5, weights=str(path), new_classifier=True, role="student").state_dict()
    own = [key for key, value in trained.state_dict().items() if value.shape != found[key].shape]
    assert set(classifiers) <= set(own)
    assert all(torch.equal(found[key], trained.state_dict()[key]) for key in found if key not in own)
    assert all(found[key].shape[0] == 5 and found[key].isfinite().all() for key in own)
    assert f"student: a new classifier for 5 classes, the weights {path} are for 7" in caplog.text
    with pytest.raises(ValueError, match="another model than the student"):
        build_model("cifar/resnet14", num_classes=5, weights=str(path), new_classifier=True, role="student")


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    message = _refused(tmp_path, build_model("cifar/resnet8x4", num_classes=10).state_dict(), role="student")
    assert "checkpoint of another model than the student (CifarResNet)" in message
    assert "conv1.weight: (32, 3, 3, 3) in the file, (16, 3, 3, 3) in the model" in message
    shown = message.splitlines()[1:]
    assert len(shown) == 6
    assert shown[-1].startswith("  and ")


def test_missing_and_unexpected_tensors_are_refused(tmp_path: Path, trained: nn.Module) -> None:
    state: dict[str, Tensor] = dict(trained.state_dict())
    state["head.weight"] = state.pop("fc.weight")
    message = _refused(tmp_path, state)
    assert "0 tensors differ in shape, 1 are missing, 1 unexpected" in message
    assert "fc.weight: missing in the file, (10, 64) in the model" in message
    assert "head.weight: (10, 64) in the file, not in the model" in message


class Runs:
    """Unpickling this would execute code."""

    def __reduce__(self) -> tuple[Any, ...]:
        return pytest.fail, ("the checkpoint executed code",)


def test_code_in_a_checkpoint_is_refused(tmp_path: Path, trained: nn.Module) -> None:
    message = _refused(tmp_path, {"model": trained.state_dict(), "hook": Runs()})
    assert "executing code" in message
    assert "save model.state_dict()" in message
    assert "executing code" in _refused(tmp_path, trained)  # a whole pickled network
    assert "executing code" in _refused(tmp_path, pickle.dumps(Runs(), protocol=2))


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html>not found", b"PK\x03\x04truncated"])
def test_damaged_files_are_refused(tmp_path: Path, content: bytes) -> None:
    _refused(tmp_path, content)
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="cannot be read"):
        load_weights(build_model("cifar/resnet8", num_classes=10), path)


@pytest.mark.parametrize("content", [{"epoch": 3, "optimizer": {}}, [1, 2], {}])
def test_a_file_without_a_state_dict_is_refused(tmp_path: Path, content: Any) -> None:
    assert "no state dict at top level or under model, state_dict" in _refused(tmp_path, content)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "resnet56_vanilla" / "ckpt_epoch_240.pth"
    with pytest.raises(FileNotFoundError, match=r"no file .*ckpt_epoch_240\.pth for the teacher; check the path"):
        build_model("cifar/resnet56", num_classes=100, weights=str(path), role="teacher")


def quantised(tensor: Tensor) -> Tensor:
    return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8) if tensor.is_floating_point() else tensor


ODD: dict[str, Any] = {
    "sparse": (lambda tensor: tensor.to_sparse(), "is torch.sparse_coo"),
    "without values": (lambda tensor: tensor.to("meta"), "is without values"),
    "quantised": (quantised, "is quantised"),
    "complex": (lambda tensor: tensor.to(torch.complex64), "holds torch.complex64"),
    "whole": (lambda tensor: tensor.long(), "holds torch.int64, but finite real numbers"),
    "bool": (lambda tensor: tensor.bool(), "holds torch.bool"),
    "NaN": (lambda tensor: tensor / 0 if tensor.is_floating_point() else tensor, "holds inf or NaN"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_not_weights_are_refused(tmp_path: Path, trained: nn.Module, kind: str) -> None:
    """Of the right shape, so that copying would fail halfway, or make a network that knows nothing."""
    change, said = ODD[kind]
    path = tmp_path / "weights.pt"
    torch.save({name: change(tensor) for name, tensor in trained.state_dict().items()}, path)
    with pytest.raises(ValueError, match=rf"the teacher's checkpoint {path} cannot be used: conv1.weight {said}"):
        build_model("cifar/resnet8", num_classes=10, weights=str(path), role="teacher")


def test_averaged_counters_load(tmp_path: Path, trained: nn.Module) -> None:
    path = tmp_path / "ema.pt"
    state = {name: tensor.float() for name, tensor in trained.state_dict().items()}
    assert any(not tensor.is_floating_point() for tensor in trained.state_dict().values())
    torch.save(state, path)
    loaded = build_model("cifar/resnet8", num_classes=10, weights=str(path)).state_dict()
    assert all(torch.equal(loaded[name], tensor.to(loaded[name].dtype)) for name, tensor in state.items())


@pytest.mark.parametrize("dtype", [torch.bool, torch.complex64])
def test_buffers_of_other_dtypes_load(tmp_path: Path, dtype: torch.dtype) -> None:
    networks = [nn.Linear(2, 2) for _ in range(2)]
    for network, values in zip(networks, (torch.eye(2), torch.ones(2, 2)), strict=True):
        network.register_buffer("mask", values.to(dtype))
    torch.save(networks[0].state_dict(), tmp_path / "masked.pt")
    load_weights(networks[1], tmp_path / "masked.pt")
    assert torch.equal(networks[1].get_buffer("mask"), torch.eye(2).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn])
def test_weights_of_another_precision_load(tmp_path: Path, trained: nn.Module, dtype: torch.dtype) -> None:
    path = tmp_path / "weights.pt"
    state = {k: v.to(dtype) if v.is_floating_point() else v for k, v in trained.state_dict().items()}
    torch.save(state, path)
    loaded = build_model("cifar/resnet8", num_classes=10, weights=str(path)).state_dict()
    assert all(torch.equal(loaded[name], tensor.to(loaded[name].dtype)) for name, tensor in state.items())


@pytest.mark.parametrize("kind", ["text", "cut", "numbers for names", "pairs for names"])
def test_malformed_files_raise_errors_that_name_them(tmp_path: Path, trained: nn.Module, kind: str) -> None:
    path, state = tmp_path / "weights.pth", trained.state_dict()
    if kind == "text":
        path.write_text("hello")
    elif kind == "cut":
        torch.save(state, path)
        path.write_bytes(path.read_bytes()[:5000])
    else:
        names = [index if kind.startswith("numbers") else (name,) for index, name in enumerate(state)]
        torch.save(dict(zip(names, state.values(), strict=True)), path)
    with pytest.raises(ValueError, match=rf"the model's checkpoint {path} (cannot be read|has no state dict)"):
        build_model("cifar/resnet8", num_classes=10, weights=str(path))
