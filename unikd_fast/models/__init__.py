"""Networks by name, their weights, and the features at the ends of their stages."""

from unikd_fast.models.build import bare_model, build_model, has_published_weights, parameter_count
from unikd_fast.models.checkpointing import checkpoint_blocks
from unikd_fast.models.cifar import CIFAR_MODELS
from unikd_fast.models.features import FeatureExtractor, LogitsOnly, extract_features
from unikd_fast.models.preprocessing import (
    Preprocessing,
    StudentCard,
    attached_preprocessing,
    published_preprocessing,
    stored_preprocessing,
)
from unikd_fast.models.weights import load_weights, options_in_words

__all__ = [
    "CIFAR_MODELS",
    "FeatureExtractor",
    "LogitsOnly",
    "Preprocessing",
    "StudentCard",
    "attached_preprocessing",
    "bare_model",
    "build_model",
    "checkpoint_blocks",
    "extract_features",
    "has_published_weights",
    "load_weights",
    "options_in_words",
    "parameter_count",
    "published_preprocessing",
    "stored_preprocessing",
]
