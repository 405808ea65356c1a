"""Constructor options that weights imply: what a network is built with so that they mean what they meant."""

from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import torchvision
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

# torchvision's two networks that were trained on images of another normalisation, and the auxiliary heads of each.
_INCEPTIONS = {"googlenet": "aux1", "inception_v3": "AuxLogits"}
_TRANSFORM = "transform_input"


def torchvision_options(model: str, weights: str | None, state: Mapping[str, Tensor] | None = None) -> dict[str, Any]:
    """Return the options of one of torchvision's builders: those that it sets itself when it is given weights.

    Published weights of googlenet and inception_v3 need `transform_input`, and their files do not say so. Files are
    taken to hold such weights or what was made of them, but for files that say otherwise (`options_in_words`).

    Args:
        model: name of the network.
        weights: None or "random", the path of a file, or an identifier.
        state: the tensors, where they are known; under any prefix.

    Example:
        >>> torchvision_options("googlenet", "teacher.pth", read_state("teacher.pth"))
        {'init_weights': False, 'transform_input': True, 'aux_logits': False}
    """
    is_random = weights is None or weights == "random"
    entry = None if is_random else torchvision.models.get_model_weights(model).__members__.get(str(weights))
    options: dict[str, Any] = {}
    if model in _INCEPTIONS:
        # Which initialisation is to be said, or both print a warning; by default they take their own.
        options["init_weights"] = is_random
        if not is_random:
            options[_TRANSFORM] = _transforms_input(str(weights))
        if state is not None:
            options["aux_logits"] = any(f".{_INCEPTIONS[model]}." in f".{name}" for name in state)
        elif entry is not None and model == "googlenet":  # whose builder takes them away
            options["aux_logits"] = False
    elif model.startswith("vit_"):
        size = _vit_size(state) if state is not None else None if entry is None else entry.meta["min_size"][0]
        options = {} if size is None else {"image_size": size}
    elif model == "maxvit_t" and entry is not None:
        options = {"input_size": entry.meta["min_size"]}
    return options


def options_in_words(network: nn.Module) -> dict[str, str] | None:
    """Return what a safetensors file of these weights is to say of the network's options, None if nothing.

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
        return True  # reading its tensors says what is wrong with it
    return said.get(_TRANSFORM) != "False"


def _vit_size(state: Mapping[str, Tensor]) -> int | None:
    """The image size of a vision transformer: as many patches a side as it has positions, but for the class's."""
    positions = next((tensor for name, tensor in state.items() if name.endswith("encoder.pos_embedding")), None)
    patches = next((tensor for name, tensor in state.items() if name.endswith("conv_proj.weight")), None)
    if positions is None or patches is None or positions.ndim != 3 or patches.ndim != 4:
        return None
    return isqrt(positions.shape[1] - 1) * patches.shape[-1]
