"""Networks by name, from torchvision, timm, Hugging Face, the CIFAR family or one's own module, and their weights."""

import difflib
import importlib
import inspect
import os
import sys
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor, nn

from unikd_fast.errors import lacks_memory
from unikd_fast.models.cifar import CIFAR_MODELS
from unikd_fast.models.hugging_face import hugging_face_model
from unikd_fast.models.weights import (
    another_classifier,
    classifier_tensor,
    load_state,
    log_new_classifier,
    read_state,
    torchvision_options,
)

T = TypeVar("T")

_FILE_SUFFIXES = (".pth", ".pt", ".safetensors", ".bin", ".tar", ".pkl")


def build_model(
    name: str,
    *,
    num_classes: int,
    model_args: Mapping[str, Any] | None = None,
    weights: str | None = None,
    weights_key: str | None = None,
    new_classifier: bool = False,
    role: str = "model",
) -> nn.Module:
    """Build a classifier: a plain network that maps images (N, 3, H, W) to logits (N, num_classes).

    Args:
        name: name of the network: "torchvision/<name>", "timm/<name>", "cifar/<name>", "hf/<name>" for a model of
            Hugging Face's hub or a folder that `save_pretrained` wrote, or "<module>:<name>" for a class or function of
            a module that can be imported, from the current folder too.
        num_classes: number of classes K; a function of one's own gets it if it takes ``num_classes``.
        model_args: further arguments of the network's class or function. If None, there are none.
        weights: path of a checkpoint (it contains a slash or ends in .pth, .pt, .safetensors, .bin, .tar or .pkl), or
            an identifier: a member of torchvision's weight enum such as "IMAGENET1K_V1", a timm tag such as "a1_in1k",
            or "pretrained" for the default of either and for those of a Hugging Face model. If None or "random", they
            are initialised at random.
        weights_key: key of the state dict in a checkpoint. If None, see `load_weights`.
        new_classifier: whether weights of another number of classes are accepted: the network then gets a classifier
            with random weights, and the log says so.
        role: name of the network in messages, "teacher" or "student".

    Raises:
        ValueError: the name or identifier is unknown, a module cannot be imported, the network does not take an
            argument, the weights have another number of classes, or a key is given for weights that are not a file.
        FileNotFoundError: the checkpoint does not exist.
        ConnectionError: the weights could not be downloaded.

    Example:
        >>> teacher = build_model("cifar/resnet56", num_classes=100, weights="resnet56_vanilla/ckpt_epoch_240.pth")
    """
    from_file = weights is not None and is_file(weights)
    if weights_key is not None and not from_file:
        raise ValueError(
            f"build_model: weights_key = {weights_key!r} with weights {weights!r}, which is not a file, for the "
            f"{role}; remove the key"
        )
    if weights is None or weights == "random":
        return bare_model(name, num_classes=num_classes, model_args=model_args, role=role)
    source, model_name = _parsed(name, num_classes, role)  # refuse an unknown network before reading a large file
    if not from_file:
        return _BUILDERS[source](model_name, num_classes, model_args or {}, weights, new_classifier, role)
    state = read_state(weights, role=role, key=weights_key)
    model = bare_model(name, num_classes=num_classes, model_args=model_args, weights=weights, state=state, role=role)
    load_state(model, state, weights, new_classifier=new_classifier, role=role)
    return model


def bare_model(
    name: str,
    *,
    num_classes: int,
    model_args: Mapping[str, Any] | None = None,
    weights: str | None = None,
    state: Mapping[str, Tensor] | None = None,
    role: str = "model",
) -> nn.Module:
    """Build the network that these weights belong to, with random weights.

    Args:
        weights: weights as in `build_model`; nothing is loaded, and a file need not exist.
        state: tensors of the file, if known: some options of a network can be inferred from them.
        name, num_classes, model_args, role: as in `build_model`.

    Raises:
        ValueError: the name is unknown, or the network does not take an argument.

    Example:
        >>> bare_model("torchvision/googlenet", num_classes=1000, weights="IMAGENET1K_V1").transform_input
        True
    """
    source, model_name = _parsed(name, num_classes, role)
    arguments: dict[str, Any] = {"num_classes": num_classes}
    if source == "own":
        build = own_network(name, role)
        if not _takes(build, "num_classes"):
            arguments = {}
        return constructed(build, {**arguments, **(model_args or {})}, name, role)
    if source == "cifar":
        return constructed(CIFAR_MODELS[model_name], {**arguments, **(model_args or {})}, name, role)
    if source == "hf":
        return hugging_face_model(model_name, num_classes, model_args or {}, pretrained=False, role=role)
    if source == "torchvision":
        import torchvision

        arguments |= torchvision_options(model_name, weights, state) | dict(model_args or {})
        return constructed(partial(torchvision.models.get_model, model_name, weights=None), arguments, name, role)
    arch, _, tag = model_name.partition(".")
    if weights not in (None, "random", "pretrained") and not is_file(str(weights)):
        tag = str(weights)
    if tag and tag not in _timm_tags(arch):
        raise unknown_identifier("timm/" + arch, tag, role, _timm_tags(arch))
    import timm

    build = partial(timm.create_model, f"{arch}.{tag}" if tag else arch, pretrained=False)
    return constructed(build, {**arguments, **(model_args or {})}, name, role)


def constructed(
    build: Callable[..., Any], arguments: dict[str, Any], name: str, role: str, *, downloads: bool = False
) -> nn.Module:
    """Call a class or function that builds a network, and name it in its errors, apart from those of a download."""
    try:
        network = build(**arguments)
    except Exception as error:  # one's own code raises anything
        if lacks_memory(error) or (downloads and isinstance(error, OSError)):
            raise
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"build_model: {role}.model = {name} cannot be built with {arguments} ({said}); correct {role}.model_args"
            + (", or its code" if ":" in name else "")
        ) from error
    if not isinstance(network, nn.Module):
        raise ValueError(
            f"build_model: {role}.model = {name} builds a {type(network).__name__}, and not a torch.nn.Module; name a "
            "class of a network, or a function that returns one"
        )
    return network


def _takes(build: Callable[..., Any], argument: str) -> bool:
    parameters = inspect.signature(build).parameters.values()
    return any(each.name == argument or each.kind is each.VAR_KEYWORD for each in parameters)


def own_network(name: str, role: str) -> Callable[..., Any]:
    """Return the class or function "<module>:<name>"; the module may lie in the current folder."""
    module_name, _, path = name.partition(":")
    if (here := str(Path.cwd())) not in sys.path and "" not in sys.path:  # `python -m` has it, a console script has not
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except Exception as error:
        said = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(
            f"build_model: {role}.model = {name}: the module {module_name} cannot be imported ({said}); start in its "
            "folder, or add that to PYTHONPATH"
        ) from error
    module = found
    for part in path.split("."):
        found = getattr(found, part, None)
    if not callable(found):
        near = difflib.get_close_matches(path, [each for each in vars(module) if callable(getattr(module, each))], n=3)
        raise ValueError(
            f"build_model: {role}.model = {name}: {module_name} has no class or function {path!r}; nearest: "
            f"{', '.join(near) or 'none'}"
        )
    own: Callable[..., Any] = found
    return own


def parameter_count(model: nn.Module) -> int:
    """Return the number of parameters of `model`, without buffers; shared ones count once.

    Example:
        >>> parameter_count(build_model("cifar/resnet20", num_classes=100))
        278324
    """
    return sum(parameter.numel() for parameter in model.parameters())


def _parsed(name: str, num_classes: int, role: str) -> tuple[str, str]:
    """Return the source and the network's name in it, for timm possibly with a tag, "resnet50.a1_in1k".

    The source of "<module>:<name>" is "own".
    """
    if num_classes < 1:
        raise ValueError(f"build_model: num_classes of the {role} must be 1 or more, got {num_classes}")
    source, _, model_name = name.partition("/")
    if source == "hf" and model_name:
        return source, model_name
    if ":" in name:
        return "own", name
    arch = model_name.split(".")[0] if source == "timm" else model_name
    if source not in _NAMED or arch not in _names(source):
        raise ValueError(f"build_model: no network {name!r} for the {role}; nearest: {_nearest(name)}")
    return source, model_name


def has_published_weights(name: str) -> bool:
    """Return whether a network has weights under the identifier "pretrained"; nothing is downloaded.

    A name of the Hugging Face hub is taken to have them.

    Args:
        name: name of the network, as in `build_model`, or "frcnn/<body>" of a detector, which has those of its body.

    Raises:
        ValueError: the name is unknown.

    Example:
        >>> has_published_weights("timm/resnet50"), has_published_weights("cifar/resnet56")
        (True, False)
    """
    source, model_name = _parsed(name.removeprefix("frcnn/"), 1, "network")
    if source == "torchvision":
        import torchvision

        return len(torchvision.models.get_model_weights(model_name)) > 0
    return source == "hf" or (source == "timm" and bool(_timm_tags(model_name.partition(".")[0])))


def is_file(weights: str) -> bool:
    """Return whether weights are the path of a file, and not an identifier."""
    return "/" in weights or os.sep in weights or weights.endswith(_FILE_SUFFIXES)


def _timm_tags(arch: str) -> list[str]:
    import timm

    return [full.partition(".")[2] for full in timm.list_pretrained(f"{arch}.*") if full.split(".")[0] == arch]


def _torchvision_weights(
    name: str, num_classes: int, model_args: Mapping[str, Any], weights: str, new_classifier: bool, role: str
) -> nn.Module:
    import torchvision

    members = torchvision.models.get_model_weights(name).__members__
    chosen = "DEFAULT" if weights == "pretrained" else weights
    if chosen not in members:
        raise unknown_identifier("torchvision/" + name, weights, role, list(members))
    entry, full_name = members[chosen], "torchvision/" + name
    count = len(entry.meta["categories"])
    if not new_classifier:
        _check_class_count("torchvision", name, count, num_classes, weights, role)
    download = partial(torchvision.models.get_model, name, weights=entry)
    build = partial(constructed, download, dict(model_args), full_name, role, downloads=True)
    model = downloaded(build, full_name, weights, role)
    if count == num_classes:
        return model
    state = model.state_dict()
    own = bare_model(
        full_name, num_classes=num_classes, model_args=model_args, weights=entry.name, state=state, role=role
    )
    load_state(own, state, entry.name, new_classifier=True, role=role)
    return own


def _timm_weights(
    name: str, num_classes: int, model_args: Mapping[str, Any], weights: str, new_classifier: bool, role: str
) -> nn.Module:
    import timm
    from timm.models import get_pretrained_cfg

    arch, _, tag = name.partition(".")
    tags = _timm_tags(arch)
    if weights != "pretrained":
        tag = weights
    elif not tag and tags:
        tag = get_pretrained_cfg(arch).tag
    if tag not in tags:
        raise unknown_identifier("timm/" + arch, tag or weights, role, tags)
    full_name = f"{arch}.{tag}"
    count = get_pretrained_cfg(full_name).num_classes
    if not new_classifier:
        _check_class_count("timm", arch, count, num_classes, tag, role)
    elif count != num_classes:
        log_new_classifier(f"timm/{full_name}", count, num_classes, role)
    download = partial(timm.create_model, full_name, pretrained=True)
    arguments = {"num_classes": num_classes, **model_args}
    build = partial(constructed, download, arguments, f"timm/{name}", role, downloads=True)
    return downloaded(build, "timm/" + arch, tag, role)


def _hugging_face_weights(
    name: str, num_classes: int, model_args: Mapping[str, Any], weights: str, new_classifier: bool, role: str
) -> nn.Module:
    if weights != "pretrained":
        raise unknown_identifier(f"hf/{name}", weights, role, ["pretrained"])
    return hugging_face_model(name, num_classes, model_args, pretrained=True, new_classifier=new_classifier, role=role)


def _no_weights(
    name: str, num_classes: int, model_args: Mapping[str, Any], weights: str, new_classifier: bool, role: str
) -> nn.Module:
    full_name = name if ":" in name else f"cifar/{name}"
    raise ValueError(
        f"build_model: {full_name} has no weights to download, got {weights!r} for the {role}; pass the path of a "
        "checkpoint (./ckpt_epoch_240.pth), or None for random weights"
    )


_BUILDERS: dict[str, Callable[[str, int, Mapping[str, Any], str, bool, str], nn.Module]] = {
    "torchvision": _torchvision_weights,
    "timm": _timm_weights,
    "cifar": _no_weights,
    "hf": _hugging_face_weights,
    "own": _no_weights,
}


_NAMED = tuple(source for source in _BUILDERS if source != "own")


def _names(source: str) -> list[str]:
    if source == "cifar":
        return list(CIFAR_MODELS)
    if source == "hf":
        return []  # those of the hub are not listed
    if source == "timm":
        import timm

        return timm.list_models()
    import torchvision

    return torchvision.models.list_models(module=torchvision.models)  # its classifiers


def _nearest(name: str) -> str:
    source, _, rest = name.rpartition("/")
    known = [f"{each}/{model}" for each in _NAMED for model in _names(each)]
    if source in _NAMED:
        found = difflib.get_close_matches(name, [full for full in known if full.startswith(source + "/")], n=3)
    else:  # the source is missing or misspelt: search all of them
        found = [full for full in known if full.partition("/")[2] == rest]
        found = found or difflib.get_close_matches(name, known, n=3)
    return (
        ", ".join(found)
        if found
        else (f"none; a name is one of {', '.join(_NAMED)}, a slash and a network, or your own <module>:<class>")
    )


def _check_class_count(source: str, name: str, count: int, num_classes: int, weights: str, role: str) -> None:
    if count == num_classes:
        return
    tensor = classifier_tensor(bare_model(f"{source}/{name}", num_classes=num_classes), num_classes)
    raise ValueError(
        f"build_model: the weights {weights!r} of the {role} {source}/{name} have {count} classes and num_classes is "
        f"{num_classes}: {tensor} would not fit; {another_classifier(role, count)}, or pass the path of a checkpoint "
        f"trained on the {num_classes} classes"
    )


def unknown_identifier(name: str, weights: str, role: str, valid: list[str]) -> ValueError:
    """Return the error about an identifier that is not one of the valid ones."""
    nearest = difflib.get_close_matches(weights, valid, n=3, cutoff=0.3) or valid[:5]
    return ValueError(
        f"build_model: the {role} {name} has no weights {weights!r}; nearest: {', '.join(nearest) or 'none at all'}; "
        "a path needs a slash or the ending of a checkpoint"
    )


def downloaded(build: Callable[[], T], name: str, weights: str, role: str) -> T:
    """Return what a function gives that may download weights.

    Raises:
        ConnectionError: they could not be downloaded.
    """
    try:
        return build()
    except OSError as error:  # base class of all errors of urllib and the Hugging Face client
        raise ConnectionError(
            f"build_model: could not download weights {weights!r} of {name} for the {role} ({error}); save them on a "
            "connected machine (torch.save(model.state_dict(), path)) and pass that path"
        ) from error
