"""Activation checkpointing changes what is kept until the backward pass, and nothing else."""

import copy

import pytest
import torch
from torch import Tensor, nn

from unikd_fast.models import build_model, checkpoint_blocks, extract_features
from unikd_fast.models.checkpointing import Checkpointed

# ResNet, inverted residuals with squeeze-and-excitation and dropout, depthwise-separable stages, CIFAR's.
MODELS = {
    "torchvision/resnet18": 8,
    "torchvision/mobilenet_v3_small": 13,
    "timm/mobilenetv1_100": 13,
    "cifar/resnet20": 9,
}


def trained(model: nn.Module, extracted: bool) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor], int]:
    """The logits of a training step, its gradients, the buffers after it, and the bytes kept for the backward pass."""
    network = extract_features(model, image_size=64) if extracted else model
    network.train()
    known = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in known:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    torch.manual_seed(1)
    images = torch.randn(4, 3, 64, 64)
    torch.manual_seed(2)  # of dropout
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = network(images)
        logits = output.logits if extracted else output
        levels = sum(level.square().mean() for level in output.levels) if extracted else 0.0
    (logits.square().sum() + levels).backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return logits.detach(), gradients, dict(model.named_buffers()), sum(kept.values())


@pytest.mark.parametrize("extracted", [False, True], ids=["logits", "levels"])
@pytest.mark.parametrize("name", MODELS)
def test_gradients_and_buffers_match_without_checkpointing(name: str, extracted: bool) -> None:
    torch.manual_seed(0)
    plain = build_model(name, num_classes=10)
    blocks = copy.deepcopy(plain)
    assert checkpoint_blocks(blocks) == MODELS[name]
    assert list(blocks.state_dict()) == list(plain.state_dict())
    (logits, gradients, buffers, kept), (own_logits, own_gradients, own_buffers, own_kept) = (
        trained(model, extracted) for model in (plain, blocks)
    )
    assert torch.equal(logits, own_logits)
    assert gradients.keys() == own_gradients.keys() == dict(plain.named_parameters()).keys()
    assert all(torch.equal(gradients[key], own_gradients[key]) for key in gradients)
    assert any(key.endswith("running_mean") for key in buffers)
    assert all(torch.equal(buffers[key], own_buffers[key]) for key in buffers)
    assert own_kept < 0.6 * kept  # the stem, which is no block, is most of what is left


def test_a_copy_uses_its_own_weights() -> None:
    model = build_model("cifar/resnet20", num_classes=10)
    checkpoint_blocks(model)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    images = torch.randn(2, 3, 32, 32)
    assert other(images).abs().max() == 0
    assert model(images).abs().max() > 0
    assert sum(isinstance(module, Checkpointed) for module in other.modules()) == 9


def test_evaluation_recomputes_nothing() -> None:
    model = build_model("cifar/resnet20", num_classes=10)
    checkpoint_blocks(model)
    calls = []
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda *_: calls.append(1))
    count = sum(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    model.eval()(torch.randn(2, 3, 32, 32, requires_grad=True)).sum().backward()
    assert len(calls) == count
    calls.clear()
    model.train()(torch.randn(2, 3, 32, 32)).sum().backward()
    assert count < len(calls) <= 2 * count


def test_a_network_without_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match="VGG has no blocks to recompute"):
        checkpoint_blocks(build_model("torchvision/vgg11", num_classes=10))
