"""Loading weights from a file into a network, and the constructor options they imply."""

import argparse
import codecs
import logging
import pickle
import re
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

# torchvision's two networks that were trained with another normalisation, and the auxiliary heads of each.
_INCEPTIONS = {"googlenet": "aux1", "inception_v3": "AuxLogits"}
_TRANSFORM = "transform_input"


def torchvision_options(model: str, weights: str | None, state: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Return the options that a torchvision builder sets itself when it is given weights.

    Published weights of googlenet and inception_v3 need `transform_input`, and their files do not say so. Files are
    assumed to hold such weights or descendants of them, unless they say otherwise (`options_in_words`).

    Args:
        model: name of the network.
        weights: path of a file, an identifier, None or "random".
        state: tensors of the file, if known, under any prefix.

    Example:
        >>> torchvision_options("googlenet", "teacher.pth", read_state("teacher.pth"))
        {'init_weights': False, 'transform_input': True, 'aux_logits': False}
    """
    is_random = weights is None or weights == "random"
    from torchvision.models import get_model_weights

    entry = None if is_random else get_model_weights(model).__members__.get(str(weights))
    options: dict[str, Any] = {}
    if model in _INCEPTIONS:
        # Both warn unless the initialisation is given; by default they use their own.
        options["init_weights"] = is_random
        if not is_random:
            options[_TRANSFORM] = _transforms_input(str(weights))
        if state is not None:
            options["aux_logits"] = any(f".{_INCEPTIONS[model]}." in f".{name}" for name in state)
        elif entry is not None and model == "googlenet":  # whose builder removes them
            options["aux_logits"] = False
    elif model.startswith("vit_"):
        size = _vit_size(state) if state is not None else None if entry is None else entry.meta["min_size"][0]
        options = {} if size is None else {"image_size": size}
    elif model == "maxvit_t" and entry is not None:
        options = {"input_size": entry.meta["min_size"]}
    return options


def options_in_words(network: nn.Module) -> dict[str, str] | None:
    """Return the metadata about the network's options for a safetensors file of its weights, None if there are none.

    Example:
        >>> options_in_words(torchvision.models.googlenet(init_weights=False))
        {'transform_input': 'False'}
    """
    value = getattr(network, _TRANSFORM, None)
    return None if value is None else {_TRANSFORM: str(bool(value))}


def _transforms_input(weights: str) -> bool:
    path = Path(weights)
    if path.suffix != ".safetensors" or not path.is_file():
        return True
    try:
        with safe_open(path, "pt") as file:
            said = file.metadata() or {}
    except SafetensorError:
        return True  # loading its tensors reports what is wrong with the file
    return said.get(_TRANSFORM) != "False"


def _vit_size(state: Mapping[str, Tensor]) -> int | None:
    """Return the image size of a vision transformer: one patch per position, apart from the class token's."""
    positions = next((tensor for name, tensor in state.items() if name.endswith("encoder.pos_embedding")), None)
    patches = next((tensor for name, tensor in state.items() if name.endswith("conv_proj.weight")), None)
    if positions is None or patches is None or positions.ndim != 3 or patches.ndim != 4:
        return None
    return isqrt(positions.shape[1] - 1) * patches.shape[-1]


_logger = logging.getLogger("unikd_fast")

# Where training scripts keep the state dict: at top level, or under one of these. An exponential moving average is
# what its authors report, so it comes first, as in timm.
_EMA_KEYS = ("state_dict_ema", "model_ema", "ema_state_dict", "ema_model", "ema")
_STATE_KEYS = ("model", "state_dict", "model_state", "student")
# Not in checkpoints from before PyTorch 0.4.1.
_COUNTER = "num_batches_tracked"
_SHOWN = 5
_NUMPY_CORES = ("numpy.core", "numpy._core")  # before and since numpy 2


def load_weights(model: nn.Module, path: str | Path, *, role: str = "model", key: str | None = None) -> None:
    """Load a checkpoint into `model`, completely or not at all.

    Reads .safetensors, torch.save files and pickles of numpy arrays (.pkl), without executing any code in them. The
    state dict may be at top level or under a key: that of a moving average (`state_dict_ema`, `model_ema`, ...), which
    is preferred, or `model`, `state_dict`, `model_state` or `student`. A prefix common to all of the model's tensors,
    such as `module.`, `backbone.` or `module.student.`, is removed; tensors that the model does not have, such as
    profiler counters or other networks, are left out. The log says what was used.

    Args:
        model: network that gets the weights; unchanged if an error is raised.
        path: path of the file.
        role: name of the network in messages, "teacher" or "student".
        key: key of the state dict in the file. If None, the first of the above that exists.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is not a checkpoint or is damaged, lacks the key, would have to execute code, belongs to
            another model, has another number of classes, or holds values that are not finite numbers.

    Example:
        >>> load_weights(model, "save/models/resnet56_vanilla/ckpt_epoch_240.pth", role="teacher")
    """
    load_state(model, read_state(path, role=role, key=key), path, role=role)


def read_state(path: str | Path, *, role: str = "model", key: str | None = None) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint, under its names there; arguments and errors as in `load_weights`.

    Example:
        >>> read_state("convnext_ema.pth", key="model_ema")["norm.weight"].shape
        torch.Size([768])
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"load_weights: no file {path} for the {role}; check the path, or pass weights=None for random ones"
        )
    return _state_dict(_read(path, role), path, role, key)


def load_state(
    model: nn.Module,
    state: Mapping[str, Tensor],
    path: str | Path,
    *,
    new_classifier: bool = False,
    role: str = "model",
) -> None:
    """Load what `read_state` returned; arguments and errors as in `load_weights`.

    Args:
        new_classifier: whether a classifier of another number of classes is left out, and the model keeps its own.

    Example:
        >>> load_state(model, read_state("resnet56.pth"), "resnet56.pth")
    """
    path, expected = Path(path), model.state_dict()
    prefix = _find_prefix(state, expected, path, role)
    own = {name.removeprefix(prefix): tensor for name, tensor in state.items() if name.startswith(prefix)}
    beside = [name for name in state if not name.startswith(prefix)]
    spare = [name for name, tensor in own.items() if name not in expected and not _is_of_the_body(name, tensor, model)]
    if all(name in own or name.endswith(_COUNTER) for name in expected):  # otherwise these may be the missing ones
        for name in spare:
            del own[name]
    differing = _other_classes(expected, own)
    if differing and new_classifier:
        theirs, ours = own[differing[0]].shape[0], expected[differing[0]].shape[0]
        log_new_classifier(str(path), theirs, ours, role)
        for name in differing:
            own[name] = expected[name]
    _check(model, own, path, role)
    _check_values(expected, own, path, role)
    said = [f"prefix {prefix!r} taken off"] if prefix else []
    if left := [*(prefix + name for name in spare), *beside]:
        more = f" and {len(left) - _SHOWN} more" if len(left) > _SHOWN else ""
        said.append(f"left out, as the {role} has no such tensors: {', '.join(left[:_SHOWN])}{more}")
    if said:
        _logger.info("%s: weights of %s, %s", role, path, "; ".join(said))
    # BatchNorm counters are missing in checkpoints from before PyTorch 0.4.1; strict loading fills them in.
    model.load_state_dict(own, strict=True)


def classifier_tensor(model: nn.Module, num_classes: int) -> str:
    """Return the name of the weight that maps features to `num_classes` logits, or "the classifier" if none is found.

    Example:
        >>> classifier_tensor(torchvision.models.resnet18(num_classes=10), 10)
        'fc.weight'
    """
    names = [name for name, value in model.named_parameters() if value.ndim > 1 and value.shape[0] == num_classes]
    return names[-1] if names else "the classifier"


def _read(path: Path, role: str) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        if path.suffix == ".pkl" and not zipfile.is_zipfile(path):
            with path.open("rb") as file:
                found = _ArrayUnpickler(file, encoding="latin1").load()  # Python 2 wrote the oldest ones
            if isinstance(found, dict):  # what torch.save wrote begins with a number
                return _as_tensors(found)
        with _published_checkpoint_types():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"load_weights: the {role}'s checkpoint {path} is damaged, or it holds Python objects that can only be "
            "restored by executing code from the file, which is refused; load it in an environment you trust and save "
            "model.state_dict() alone"
        ) from error
    except OSError as error:
        if error.filename is not None:  # about the file, rather than its contents
            raise
        raise ValueError(_unreadable(path, role, error)) from error
    except Exception as error:  # arbitrary bytes make the unpickler raise anything
        raise ValueError(_unreadable(path, role, error)) from error


_ARRAY_TYPES: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): codecs.encode,
    ("collections", "OrderedDict"): OrderedDict,
    **{(f"{core}.multiarray", "_reconstruct"): np.zeros(1).__reduce__()[0] for core in _NUMPY_CORES},
    **{(f"{core}.multiarray", "scalar"): np.float64(0).__reduce__()[0] for core in _NUMPY_CORES},
    **{(f"{core}.numeric", "_frombuffer"): np.zeros(1).__reduce_ex__(5)[0] for core in _NUMPY_CORES},
}


class _ArrayUnpickler(pickle.Unpickler):
    """Reads dictionaries of numpy arrays, as Detectron2 publishes them; none of what it makes executes code."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _ARRAY_TYPES:
            raise pickle.UnpicklingError(f"{module}.{name} is refused")
        return _ARRAY_TYPES[module, name]


def _as_tensors(value: Any) -> Any:
    """Return a dictionary of arrays, or of dictionaries of them, with tensors in their place."""
    if isinstance(value, dict):
        return {name: _as_tensors(each) for name, each in value.items()}
    return torch.tensor(value) if isinstance(value, np.ndarray) else value


def _unreadable(path: Path, role: str, error: Exception) -> str:
    said = f"{type(error).__name__}: {error}".partition("\n")[0]
    return f"load_weights: the {role}'s checkpoint {path} cannot be read ({said}); is the download complete?"


@contextmanager
def _published_checkpoint_types() -> Iterator[None]:
    # Published checkpoints hold options and accuracies as numpy scalars. None of these execute code.
    numpy_scalar = np.float64(0).__reduce__()[0]
    names = [f"{core}.multiarray.scalar" for core in _NUMPY_CORES]
    dtypes = [type(np.dtype(kind)) for kind in "?bBhHiIlLqQefd"]
    allowed: list[Any] = [
        argparse.Namespace,
        np.dtype,
        codecs.encode,
        *dtypes,
        *((numpy_scalar, name) for name in names),
    ]
    with torch.serialization.safe_globals(allowed):
        yield


def _state_dict(content: Any, path: Path, role: str, key: str | None) -> dict[str, Tensor]:
    entries = content if isinstance(content, Mapping) else {}
    there = [name for name in entries if _is_state(entries[name])]
    if _is_state(content):
        if key is not None:
            raise ValueError(
                f"load_weights: the {role}'s checkpoint {path} has its tensors at top level, but weights_key is "
                f"{key!r}; remove it"
            )
        return dict(content)
    if key is not None and key not in there:
        raise ValueError(
            f"load_weights: the {role}'s checkpoint {path} has no state dict under weights_key = {key!r}; use "
            f"{' or '.join(map(repr, there)) or 'another file, which has one'}"
        )
    found = key or next((name for name in (*_EMA_KEYS, *_STATE_KEYS) if name in there), None)
    if found is None:
        keys = list(entries)[:_SHOWN] if isinstance(content, Mapping) else type(content).__name__
        remedy = f"choose from {', '.join(map(repr, there))} by weights_key" if there else "save model.state_dict()"
        raise ValueError(
            f"load_weights: the {role}'s checkpoint {path} has no state dict at top level or under "
            f"{', '.join((*_STATE_KEYS, *_EMA_KEYS))}, got {keys}; {remedy}"
        )
    others = [name for name in there if name != found]
    beside = f" (weights_key takes {' or '.join(map(repr, others))} instead)" if others else ""
    _logger.info("%s: weights under %r of %s%s", role, found, path, beside)
    return dict(content[found])


def _is_state(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and bool(value)
        and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in value.items())
    )


def _find_prefix(state: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path, role: str) -> str:
    """Return what precedes the name of every tensor of the model in the file; if no prefix fits, the nearest."""
    needed = {name for name in expected if not name.endswith(_COUNTER)}
    found: Counter[str] = Counter()
    for name in state:
        starts = [0, *(match.end() for match in re.finditer(r"\.", name))]
        found.update(name[:start] for start in starts if name[start:] in needed)
    most = max(found.values(), default=0)
    if 2 * most <= len(needed):
        return ""
    nearest = sorted((prefix for prefix, count in found.items() if count == most), key=len)
    if most < len(needed):
        return nearest[0]
    fitting = [start for start in nearest if all(state[start + name].shape == expected[name].shape for name in needed)]
    if not fitting:
        return nearest[0]
    if len(fitting) > 1 and fitting[0]:
        raise ValueError(
            f"load_weights: the {role}'s checkpoint {path} holds {len(fitting)} networks that fit, under the prefixes "
            f"{', '.join(map(repr, fitting))}; save the state dict of one of them alone"
        )
    return fitting[0]


def _is_of_the_body(name: str, tensor: Tensor, model: nn.Module) -> bool:
    """Return whether a tensor that the model does not have shows that the file is of a deeper network.

    A resnet34 has every tensor of a resnet18, and more in the same stages. Modules that the model does not have at all,
    such as another head, do not count, and neither do counters.
    """
    if tensor.numel() <= 1 or not tensor.is_floating_point():
        return False
    first, _, rest = name.partition(".")
    children = {child for child, _ in model.named_children()}
    numbers = re.compile(r"\d+")
    series = {numbers.sub("#", child) for child in children if numbers.search(child)}
    return bool(rest) and (first in children or numbers.sub("#", first) in series)


def _check(model: nn.Module, state: Mapping[str, Tensor], path: Path, role: str) -> None:
    expected = model.state_dict()
    missing = [name for name in expected if name not in state and not name.endswith(_COUNTER)]
    unexpected = [name for name in state if name not in expected]
    differing = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    if not (missing or unexpected or differing):
        return
    if not (missing or unexpected) and _other_classes(expected, state):
        name = next((name for name in differing if expected[name].ndim > 1), differing[0])
        theirs, ours = state[name].shape[0], expected[name].shape[0]
        raise ValueError(
            f"load_weights: the {role}'s checkpoint {path} has {theirs} classes and the {role} {ours}: "
            f"{name} is {tuple(state[name].shape)} in the file and {tuple(expected[name].shape)} in the model; "
            f"{another_classifier(role, theirs)}, or use a checkpoint trained on the {ours} classes"
        )
    in_model = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    in_file = {name: tuple(tensor.shape) for name, tensor in state.items()}
    lines = [f"{name}: {in_file[name]} in the file, {in_model[name]} in the model" for name in differing]
    lines += [f"{name}: missing in the file, {in_model[name]} in the model" for name in missing]
    lines += [f"{name}: {in_file[name]} in the file, not in the model" for name in unexpected]
    more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    raise ValueError(
        f"load_weights: {path} is a checkpoint of another model than the {role} ({type(model).__name__}): "
        f"{len(differing)} tensors differ in shape, {len(missing)} are missing, {len(unexpected)} unexpected; "
        "build the network it was trained as\n  " + "\n  ".join(lines[:_SHOWN]) + more
    )


def _other_classes(expected: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    """Return the tensors of a classifier that differ in the number of classes, if nothing else differs in shape."""
    differing = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    counts = {(state[name].shape[:1], expected[name].shape[:1]) for name in differing}
    bodies_agree = all(state[name].shape[1:] == expected[name].shape[1:] for name in differing)
    return differing if bodies_agree and len(counts) == 1 else []


def another_classifier(role: str, classes: int) -> str:
    """Return what to do about weights of so many classes, for a message."""
    by_training = "set teacher.training to fine-tune it with a new classifier"
    return by_training if role == "teacher" else f"set num_classes to {classes}"


def log_new_classifier(weights: str, theirs: int, ours: int, role: str) -> None:
    """Log that a network keeps its own, untrained classifier."""
    _logger.info("%s: a new classifier for %d classes, the weights %s are for %d", role, ours, weights, theirs)


def _check_values(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path, role: str) -> None:
    """Raise ValueError for values that have the right shape but are not the numbers of a network."""
    for name, tensor in state.items():
        kind = "real" if expected[name].is_floating_point() else "whole"
        found = ""
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
            held = "quantised" if tensor.is_quantized else "without values" if tensor.is_meta else str(tensor.layout)
            found = f"is {held}"
        elif tensor.dtype == expected[name].dtype and kind == "whole":
            continue  # a mask of bools, or complex frequencies, if the network has them
        elif name.endswith(_COUNTER) and tensor.is_floating_point() and torch.isfinite(tensor).all():
            continue  # a moving average over all buffers makes it so
        elif tensor.is_complex() or tensor.is_floating_point() != (kind == "real") or tensor.dtype == torch.bool:
            found = f"holds {tensor.dtype}"
        elif kind == "real" and not torch.isfinite(tensor.float()).all():
            found = "holds inf or NaN"
        if found:
            raise ValueError(
                f"load_weights: the {role}'s checkpoint {path} cannot be used: {name} {found}, but finite {kind} "
                f"numbers are needed; save model.state_dict() of the trained network"
            )
