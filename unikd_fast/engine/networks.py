"""Teacher and student as the configuration describes them."""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from unikd_fast.config import Config, ConfigError
from unikd_fast.data.roots import named_as_configured
from unikd_fast.data.splits import DataSplits
from unikd_fast.engine.first_forward import check_forward
from unikd_fast.methods import Needs
from unikd_fast.models import FeatureExtractor, LogitsOnly, bare_model, build_model, checkpoint_blocks, extract_features


def build_network(
    config: Config, role: str, splits: DataSplits, *, needs: Needs, with_weights: bool = True, batch: int | None = None
) -> FeatureExtractor | LogitsOnly:
    """Teacher or student with its weights; it returns its logits and of its features what is needed.

    Without its weights a network serves for its shapes alone.

    Args:
        batch: samples of a micro-batch that it is trained on. If None, it is not trained.

    Raises:
        ConfigError: it does not take the data's images, or not so few of them; see `check_forward`.
    """
    section = config.student if role == "student" else config.teacher
    assert section is not None
    key, classes = section.weights_key, splits.num_classes
    naming = nullcontext() if section.weights is None else named_as_configured(role, section.weights)
    with naming as weights:
        if with_weights:
            model = build_model(section.model, num_classes=classes, weights=weights, weights_key=key, role=role)
        else:
            model = bare_model(section.model, num_classes=classes, weights=weights, role=role)
    if role == "teacher" and needs.teacher_batch_statistics:
        _drop_running_statistics(model)
    if role == "student" and config.train.activation_checkpointing:
        checkpoint_blocks(model)
    plain = LogitsOnly(model)
    _check_logits(plain, f"{role}.model = {section.model}", splits, batch)
    before_activation = needs.before_activation_of(role)
    levels = needs.levels or before_activation
    if not levels and not needs.embedding:
        return plain
    return extract_features(
        model,
        image_size=splits.image_size,
        max_levels=config.distill.max_levels,
        nodes=section.feature_nodes,
        levels=levels,
        before_activation=before_activation,
        embedding=needs.embedding,
    )


def _drop_running_statistics(model: nn.Module) -> None:
    """Without any a BatchNorm normalises by the batch in eval mode too, and has nothing that a batch could change."""
    for module in model.modules():
        if isinstance(module, _BatchNorm):
            module.running_mean = module.running_var = module.num_batches_tracked = None


def _check_logits(network: LogitsOnly, what: str, splits: DataSplits, batch: int | None) -> None:
    """Refuse a network that cannot be evaluated on these images, or trained where ``batch`` says so."""
    settings: dict[str, Any] = {"what": what, "image_size": splits.image_size}
    logits = check_forward(network, {network: False}, **settings).logits
    shape = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if shape != (2, splits.num_classes):
        raise ConfigError(
            f"{what} must return logits (2, {splits.num_classes}) for two images of this data, got {shape}; use a "
            "model or weights for this data"
        )
    if batch is not None:
        check_forward(network, {network: True}, **settings, batch=batch)


def build_teacher_network(
    config: Config, splits: DataSplits, *, needs: Needs, with_weights: bool = True, batch: int | None = None
) -> FeatureExtractor | LogitsOnly:
    """The teacher, as ``build_network``; an untrained one must be asked for, and is that of the seed."""
    assert config.teacher is not None
    if config.teacher.weights is None:
        raise ConfigError(
            f"teacher.weights is not set, so teacher {config.teacher.model} would know nothing; give a file or an "
            "identifier, add teacher.training to train it first, or allow random weights with --set "
            "teacher.weights=random"
        )
    torch.manual_seed(config.run.seed + 1)
    return build_network(config, "teacher", splits, needs=needs, with_weights=with_weights, batch=batch)
