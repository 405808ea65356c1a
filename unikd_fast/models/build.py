"""Networks by name, from torchvision, timm and the CIFAR family, with random, published or local weights."""

import difflib
import os
from collections.abc import Callable

import timm
import torchvision
from timm.models import get_pretrained_cfg
from torch import nn

from unikd_fast.models.load import classifier_tensor, load_weights
from unikd_fast.models.zoo import CIFAR_MODELS

_FILE_SUFFIXES = (".pth", ".pt", ".safetensors", ".bin", ".tar")


def build_model(name: str, *, num_classes: int, weights: str | None = None, role: str = "model") -> nn.Module:
    """Build a classifier: a plain network that maps images (N, 3, H, W) to logits (N, num_classes).

    Args:
        name: "torchvision/<name>", "timm/<name>" or "cifar/<name>".
        num_classes: K.
        weights: None or "random"; the path of a checkpoint (it contains a slash or ends in .pth, .pt, .safetensors,
            .bin or .tar); or an identifier: a member of torchvision's weight enum such as "IMAGENET1K_V1" or "DEFAULT",
            a timm tag such as "a1_in1k", or "pretrained" for timm's default tag.
        role: "teacher" or "student", for error messages.

    Raises:
        ValueError: the name or the identifier is unknown, or the weights have another number of classes.
        FileNotFoundError: there is no such checkpoint.
        ConnectionError: the weights could not be downloaded.

    Example:
        >>> teacher = build_model("cifar/resnet56", num_classes=100, weights="resnet56_vanilla/ckpt_epoch_240.pth")
    """
    if num_classes < 1:
        raise ValueError(f"build_model: num_classes of the {role} must be 1 or more, got {num_classes}")
    source, _, model_name = name.partition("/")
    arch = model_name.split(".")[0] if source == "timm" else model_name  # timm also takes "resnet50.a1_in1k"
    if source not in _BUILDERS or arch not in _names(source):
        raise ValueError(f"build_model: no network {name!r} for the {role}; nearest: {_nearest(name)}")
    if weights is None or weights == "random":
        return _random(source, arch, num_classes)
    if "/" in weights or os.sep in weights or weights.endswith(_FILE_SUFFIXES):
        model = _random(source, arch, num_classes)
        load_weights(model, weights, role=role)
        return model
    return _BUILDERS[source](model_name, num_classes, weights, role)


def parameter_count(model: nn.Module) -> int:
    """Number of scalars in the parameters of `model`, buffers not counted, shared ones counted once.

    Example:
        >>> parameter_count(build_model("cifar/resnet20", num_classes=100))
        278324
    """
    return sum(parameter.numel() for parameter in model.parameters())


def _random(source: str, name: str, num_classes: int) -> nn.Module:
    if source == "cifar":
        return CIFAR_MODELS[name](num_classes=num_classes)
    if source == "timm":
        return timm.create_model(name, pretrained=False, num_classes=num_classes)
    # These two print a warning unless told which initialisation to use; it is the one they use by default.
    extra = {"init_weights": True} if name in ("googlenet", "inception_v3") else {}
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **extra)


def _torchvision_weights(name: str, num_classes: int, weights: str, role: str) -> nn.Module:
    members = torchvision.models.get_model_weights(name).__members__
    if weights not in members:
        raise _unknown_identifier("torchvision/" + name, weights, role, list(members))
    entry = members[weights]
    _check_class_count("torchvision", name, len(entry.meta["categories"]), num_classes, weights, role)
    return _downloaded(lambda: torchvision.models.get_model(name, weights=entry), "torchvision/" + name, weights, role)


def _timm_weights(name: str, num_classes: int, weights: str, role: str) -> nn.Module:
    arch, _, tag = name.partition(".")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{arch}.*") if full.split(".")[0] == arch]
    if weights != "pretrained":
        tag = weights
    elif not tag and tags:
        tag = get_pretrained_cfg(arch).tag
    if tag not in tags:
        raise _unknown_identifier("timm/" + arch, tag or weights, role, tags)
    full_name = f"{arch}.{tag}"
    _check_class_count("timm", arch, get_pretrained_cfg(full_name).num_classes, num_classes, tag, role)
    return _downloaded(
        lambda: timm.create_model(full_name, pretrained=True, num_classes=num_classes), "timm/" + arch, tag, role
    )


def _cifar_weights(name: str, num_classes: int, weights: str, role: str) -> nn.Module:
    raise ValueError(
        f"build_model: cifar/{name} has no weights to download, got {weights!r} for the {role}; pass the path of a "
        "checkpoint (./ckpt_epoch_240.pth), or None for random weights"
    )


_BUILDERS: dict[str, Callable[[str, int, str, str], nn.Module]] = {
    "torchvision": _torchvision_weights,
    "timm": _timm_weights,
    "cifar": _cifar_weights,
}


def _names(source: str) -> list[str]:
    if source == "cifar":
        return list(CIFAR_MODELS)
    if source == "timm":
        return timm.list_models()
    return torchvision.models.list_models(module=torchvision.models)  # its classifiers


def _nearest(name: str) -> str:
    source, _, rest = name.rpartition("/")
    known = [f"{each}/{model}" for each in _BUILDERS for model in _names(each)]
    if source in _BUILDERS:
        found = difflib.get_close_matches(name, [full for full in known if full.startswith(source + "/")], n=3)
    else:  # the source is missing or misspelt: look for the network in all of them
        found = [full for full in known if full.partition("/")[2] == rest]
        found = found or difflib.get_close_matches(name, known, n=3)
    return ", ".join(found) if found else f"none; a name is one of {', '.join(_BUILDERS)}, a slash, a network"


def _check_class_count(source: str, name: str, count: int, num_classes: int, weights: str, role: str) -> None:
    if count == num_classes:
        return
    tensor = classifier_tensor(_random(source, name, num_classes), num_classes)
    raise ValueError(
        f"build_model: the {role} {source}/{name} has {count} classes in its weights {weights!r} and num_classes is "
        f"{num_classes}: {tensor} would not fit; set num_classes to {count}, or pass the path of a checkpoint trained "
        f"on the {num_classes} classes"
    )


def _unknown_identifier(name: str, weights: str, role: str, valid: list[str]) -> ValueError:
    nearest = difflib.get_close_matches(weights, valid, n=3, cutoff=0.3) or valid[:5]
    return ValueError(
        f"build_model: the {role} {name} has no weights {weights!r}; nearest: {', '.join(nearest) or 'none at all'}; "
        "a path needs a slash or the ending of a checkpoint"
    )


def _downloaded(build: Callable[[], nn.Module], name: str, weights: str, role: str) -> nn.Module:
    try:
        return build()
    except OSError as error:  # every failure of urllib and of the Hugging Face client derives from it
        raise ConnectionError(
            f"build_model: could not download weights {weights!r} of {name} for the {role} ({error}); save them on a "
            "machine that is connected (torch.save(model.state_dict(), path)) and pass that path"
        ) from error
