"""Networks by name, from torchvision, timm and the CIFAR family, with random, published or local weights."""

import difflib
import os
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from unikd_fast.models.cifar import CIFAR_MODELS
from unikd_fast.models.weights import (
    another_classifier,
    classifier_tensor,
    load_state,
    log_new_classifier,
    read_state,
    torchvision_options,
)

_FILE_SUFFIXES = (".pth", ".pt", ".safetensors", ".bin", ".tar")


def build_model(
    name: str,
    *,
    num_classes: int,
    weights: str | None = None,
    weights_key: str | None = None,
    new_classifier: bool = False,
    role: str = "model",
) -> nn.Module:
    """Build a classifier: a plain network that maps images (N, 3, H, W) to logits (N, num_classes).

    Args:
        name: name of the network: "torchvision/<name>", "timm/<name>" or "cifar/<name>".
        num_classes: number of classes K.
        weights: path of a checkpoint (it contains a slash or ends in .pth, .pt, .safetensors, .bin or .tar), or an
            identifier: a member of torchvision's weight enum such as "IMAGENET1K_V1", a timm tag such as "a1_in1k", or
            "pretrained" for the default of either. If None or "random", they are initialised at random.
        weights_key: key of the state dict in a checkpoint. If None, see `load_weights`.
        new_classifier: whether weights of another number of classes are accepted: the network then gets a classifier
            with random weights, and the log says so.
        role: name of the network in messages, "teacher" or "student".

    Raises:
        ValueError: the name or identifier is unknown, the weights have another number of classes, or a key is given for
            weights that are not a file.
        FileNotFoundError: the checkpoint does not exist.
        ConnectionError: the weights could not be downloaded.

    Example:
        >>> teacher = build_model("cifar/resnet56", num_classes=100, weights="resnet56_vanilla/ckpt_epoch_240.pth")
    """
    is_file = weights is not None and _is_file(weights)
    if weights_key is not None and not is_file:
        raise ValueError(
            f"build_model: weights_key = {weights_key!r} with weights {weights!r}, which is not a file, for the "
            f"{role}; remove the key"
        )
    if weights is None or weights == "random":
        return bare_model(name, num_classes=num_classes, role=role)
    if not is_file:
        source, model_name = _parsed(name, num_classes, role)
        return _BUILDERS[source](model_name, num_classes, weights, new_classifier, role)
    _parsed(name, num_classes, role)  # refuse an unknown network before reading a large file
    state = read_state(weights, role=role, key=weights_key)
    model = bare_model(name, num_classes=num_classes, weights=weights, state=state, role=role)
    load_state(model, state, weights, new_classifier=new_classifier, role=role)
    return model


def bare_model(
    name: str,
    *,
    num_classes: int,
    weights: str | None = None,
    state: Mapping[str, Tensor] | None = None,
    role: str = "model",
) -> nn.Module:
    """Build the network that these weights belong to, with random weights.

    Args:
        weights: weights as in `build_model`; nothing is loaded, and a file need not exist.
        state: tensors of the file, if known: some options of a network can be inferred from them.
        name, num_classes, role: as in `build_model`.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> bare_model("torchvision/googlenet", num_classes=1000, weights="IMAGENET1K_V1").transform_input
        True
    """
    source, model_name = _parsed(name, num_classes, role)
    if source == "cifar":
        return CIFAR_MODELS[model_name](num_classes=num_classes)
    if source == "torchvision":
        import torchvision

        options = torchvision_options(model_name, weights, state)
        return torchvision.models.get_model(model_name, weights=None, num_classes=num_classes, **options)
    arch, _, tag = model_name.partition(".")
    if weights not in (None, "random", "pretrained") and not _is_file(str(weights)):
        tag = str(weights)
    if tag and tag not in _timm_tags(arch):
        raise _unknown_identifier("timm/" + arch, tag, role, _timm_tags(arch))
    import timm

    return timm.create_model(f"{arch}.{tag}" if tag else arch, pretrained=False, num_classes=num_classes)


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters of `model`, without buffers; shared ones count once.

    Example:
        >>> parameter_count(build_model("cifar/resnet20", num_classes=100))
        278324
    """
    return sum(parameter.numel() for parameter in model.parameters())


def _parsed(name: str, num_classes: int, role: str) -> tuple[str, str]:
    """Return the source and the network's name in it, for timm possibly with a tag, "resnet50.a1_in1k"."""
    if num_classes < 1:
        raise ValueError(f"build_model: num_classes of the {role} must be 1 or more, got {num_classes}")
    source, _, model_name = name.partition("/")
    arch = model_name.split(".")[0] if source == "timm" else model_name
    if source not in _BUILDERS or arch not in _names(source):
        raise ValueError(f"build_model: no network {name!r} for the {role}; nearest: {_nearest(name)}")
    return source, model_name


def _is_file(weights: str) -> bool:
    return "/" in weights or os.sep in weights or weights.endswith(_FILE_SUFFIXES)


def _timm_tags(arch: str) -> list[str]:
    import timm

    return [full.partition(".")[2] for full in timm.list_pretrained(f"{arch}.*") if full.split(".")[0] == arch]


def _torchvision_weights(name: str, num_classes: int, weights: str, new_classifier: bool, role: str) -> nn.Module:
    import torchvision

    members = torchvision.models.get_model_weights(name).__members__
    chosen = "DEFAULT" if weights == "pretrained" else weights
    if chosen not in members:
        raise _unknown_identifier("torchvision/" + name, weights, role, list(members))
    entry, full_name = members[chosen], "torchvision/" + name
    count = len(entry.meta["categories"])
    if not new_classifier:
        _check_class_count("torchvision", name, count, num_classes, weights, role)
    model = _downloaded(lambda: torchvision.models.get_model(name, weights=entry), full_name, weights, role)
    if count == num_classes:
        return model
    own = bare_model(full_name, num_classes=num_classes, weights=entry.name, state=model.state_dict(), role=role)
    load_state(own, model.state_dict(), entry.name, new_classifier=True, role=role)
    return own


def _timm_weights(name: str, num_classes: int, weights: str, new_classifier: bool, role: str) -> nn.Module:
    import timm
    from timm.models import get_pretrained_cfg

    arch, _, tag = name.partition(".")
    tags = _timm_tags(arch)
    if weights != "pretrained":
        tag = weights
    elif not tag and tags:
        tag = get_pretrained_cfg(arch).tag
    if tag not in tags:
        raise _unknown_identifier("timm/" + arch, tag or weights, role, tags)
    full_name = f"{arch}.{tag}"
    count = get_pretrained_cfg(full_name).num_classes
    if not new_classifier:
        _check_class_count("timm", arch, count, num_classes, tag, role)
    elif count != num_classes:
        log_new_classifier(f"timm/{full_name}", count, num_classes, role)
    return _downloaded(
        lambda: timm.create_model(full_name, pretrained=True, num_classes=num_classes), "timm/" + arch, tag, role
    )


def _cifar_weights(name: str, num_classes: int, weights: str, new_classifier: bool, role: str) -> nn.Module:
    raise ValueError(
        f"build_model: cifar/{name} has no weights to download, got {weights!r} for the {role}; pass the path of a "
        "checkpoint (./ckpt_epoch_240.pth), or None for random weights"
    )


_BUILDERS: dict[str, Callable[[str, int, str, bool, str], nn.Module]] = {
    "torchvision": _torchvision_weights,
    "timm": _timm_weights,
    "cifar": _cifar_weights,
}


def _names(source: str) -> list[str]:
    if source == "cifar":
        return list(CIFAR_MODELS)
    if source == "timm":
        import timm

        return timm.list_models()
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)  # its classifiers


def _nearest(name: str) -> str:
    source, _, rest = name.rpartition("/")
    known = [f"{each}/{model}" for each in _BUILDERS for model in _names(each)]
    if source in _BUILDERS:
        found = difflib.get_close_matches(name, [full for full in known if full.startswith(source + "/")], n=3)
    else:  # the source is missing or misspelt: search all of them
        found = [full for full in known if full.partition("/")[2] == rest]
        found = found or difflib.get_close_matches(name, known, n=3)
    return ", ".join(found) if found else f"none; a name is one of {', '.join(_BUILDERS)}, a slash, and a network"


def _check_class_count(source: str, name: str, count: int, num_classes: int, weights: str, role: str) -> None:
    if count == num_classes:
        return
    tensor = classifier_tensor(bare_model(f"{source}/{name}", num_classes=num_classes), num_classes)
    raise ValueError(
        f"build_model: the weights {weights!r} of the {role} {source}/{name} have {count} classes and num_classes is "
        f"{num_classes}: {tensor} would not fit; {another_classifier(role, count)}, or pass the path of a checkpoint "
        f"trained on the {num_classes} classes"
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
    except OSError as error:  # base class of all errors of urllib and the Hugging Face client
        raise ConnectionError(
            f"build_model: could not download weights {weights!r} of {name} for the {role} ({error}); save them on a "
            "connected machine (torch.save(model.state_dict(), path)) and pass that path"
        ) from error
