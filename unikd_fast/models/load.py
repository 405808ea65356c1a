"""Reading weights from a file into a network: safetensors, or PyTorch checkpoints as the field publishes them."""

import argparse
import codecs
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# Where training scripts keep the state dict: at top level, else under one of these.
_STATE_KEYS = ("model", "state_dict", "model_state", "student")
# Put before every name by DistributedDataParallel and torch.compile.
_WRAPPER_PREFIXES = ("module.", "_orig_mod.")
_SHOWN = 5


def load_weights(model: nn.Module, path: str | Path, *, role: str = "model") -> None:
    """Load a checkpoint into `model`, all of it or nothing.

    Reads .safetensors and torch.save files, the latter without executing any code they hold. The state dict may lie at
    top level or under `model`, `state_dict`, `model_state` or `student`, with or without the prefix `module.`

    Args:
        model: gets the weights; unchanged if an error is raised.
        path: the file.
        role: "teacher" or "student", for error messages.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no checkpoint, would need code to be executed, belongs to another model, or has another
            number of classes.

    Example:
        >>> load_weights(model, "save/models/resnet56_vanilla/ckpt_epoch_240.pth", role="teacher")
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"load_weights: no file {path} for the {role}; check the path, or pass weights=None for random ones"
        )
    state = _state_dict(_read(path, role), path, role)
    _check(model, state, path, role)
    # BatchNorm counters are absent from checkpoints older than PyTorch 0.4.1; strict loading fills them in.
    model.load_state_dict(state, strict=True)


def classifier_tensor(model: nn.Module, num_classes: int) -> str:
    """The name of the weight that maps features to `num_classes` logits, or "the classifier" where none is found.

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
        with _published_checkpoint_types():
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"load_weights: the {role}'s checkpoint {path} is no plain checkpoint: it is damaged, or it holds Python "
            "objects that only executing code from the file would restore, which is refused; load it where you trust "
            "it and save model.state_dict() alone"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, UnicodeDecodeError) as error:
        raise ValueError(
            f"load_weights: the {role}'s checkpoint {path} cannot be read ({error}); is the download complete?"
        ) from error


@contextmanager
def _published_checkpoint_types() -> Iterator[None]:
    # Published checkpoints hold the options of their run and accuracies as numpy scalars. None of these run code.
    numpy_scalar = np.float64(0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")  # before and since numpy 2
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


def _state_dict(content: Any, path: Path, role: str) -> dict[str, Tensor]:
    found = content
    if isinstance(content, Mapping) and not _is_state(content):
        found = next((content[key] for key in _STATE_KEYS if _is_state(content.get(key))), None)
    if not _is_state(found):
        keys = list(content)[:_SHOWN] if isinstance(content, Mapping) else type(content).__name__
        raise ValueError(
            f"load_weights: the {role}'s checkpoint {path} has no state dict at top level or under "
            f"{', '.join(_STATE_KEYS)}, got {keys}; save model.state_dict()"
        )
    state = dict(found)
    while prefix := next((p for p in _WRAPPER_PREFIXES if all(name.startswith(p) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def _is_state(value: Any) -> bool:
    return isinstance(value, Mapping) and bool(value) and all(isinstance(tensor, Tensor) for tensor in value.values())


def _check(model: nn.Module, state: Mapping[str, Tensor], path: Path, role: str) -> None:
    expected = model.state_dict()
    missing = [name for name in expected if name not in state and not name.endswith("num_batches_tracked")]
    unexpected = [name for name in state if name not in expected]
    differing = [name for name in expected if name in state and state[name].shape != expected[name].shape]
    if not (missing or unexpected or differing):
        return
    counts = {(state[name].shape[:1], expected[name].shape[:1]) for name in differing}
    bodies_agree = all(state[name].shape[1:] == expected[name].shape[1:] for name in differing)
    if not (missing or unexpected) and bodies_agree and len(counts) == 1:
        name = next((name for name in differing if expected[name].ndim > 1), differing[0])
        theirs, ours = state[name].shape[0], expected[name].shape[0]
        raise ValueError(
            f"load_weights: the {role}'s checkpoint {path} has {theirs} classes and the {role} {ours}: "
            f"{name} is {tuple(state[name].shape)} in the file and {tuple(expected[name].shape)} in the model; set "
            f"num_classes to {theirs}, or take a checkpoint trained on the {ours} classes"
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
