"""Teacher and student as the configuration describes them."""

import torch

from unikd_fast.config import Config, ConfigError
from unikd_fast.data.roots import expand_weights
from unikd_fast.data.splits import DataSplits
from unikd_fast.methods import Needs
from unikd_fast.models import FeatureExtractor, LogitsOnly, build_model, checkpoint_blocks, extract_features


def build_network(
    config: Config, role: str, splits: DataSplits, *, needs: Needs, with_weights: bool = True
) -> FeatureExtractor | LogitsOnly:
    """Teacher or student with its weights; it returns its logits and of its features what is needed.

    Without its weights a network serves for its shapes alone.
    """
    section = config.student if role == "student" else config.teacher
    assert section is not None
    weights = expand_weights(role, section.weights) if with_weights and section.weights is not None else None
    model = build_model(section.model, num_classes=splits.num_classes, weights=weights, role=role)
    if role == "student" and config.train.activation_checkpointing:
        checkpoint_blocks(model)
    before_activation = needs.before_activation_of(role)
    levels = needs.levels or before_activation
    if not levels and not needs.embedding:
        return LogitsOnly(model)
    network = extract_features(
        model,
        image_size=splits.image_size,
        max_levels=config.distill.max_levels,
        nodes=section.feature_nodes,
        levels=levels,
        before_activation=before_activation,
        embedding=needs.embedding,
    )
    if network.num_classes != splits.num_classes:
        raise ConfigError(
            f"{role}.model = {section.model} has {network.num_classes} classes, the data {splits.num_classes}; "
            "use a model or weights for this data"
        )
    return network


def build_teacher_network(
    config: Config, splits: DataSplits, *, needs: Needs, with_weights: bool = True
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
    return build_network(config, "teacher", splits, needs=needs, with_weights=with_weights)
