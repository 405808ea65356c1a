"""What differs between tasks: what an evaluation counts, its figures, and which evaluation is the best."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple


class Figures(NamedTuple):
    """The figures of a task's evaluations, in result.json and the report."""

    main: str  # in percent; decides on the best evaluation
    title: str  # of the main one
    required: tuple[str, ...]
    optional: tuple[str, ...]
    columns: tuple[tuple[str, str, str], ...]  # of a table of single runs: figure, heading, format
    course: tuple[str, str, str]  # of a curve over the epochs: figure, title, unit
    by_class: str = ""  # the main figure of each class, by its name
    has_logits: bool = True  # of a sample (K,), which the probe and the report compare

    @property
    def all(self) -> tuple[str, ...]:
        return (*self.required, *self.optional)


CLASSIFICATION = Figures(
    "accuracy",
    "top-1 accuracy",
    ("accuracy", "ce"),
    ("top5",),
    (("accuracy", "top-1", ".2f"), ("ce", "cross-entropy", ".4f")),
    ("ce", "Cross-entropy", "nats per sample"),
)
DETECTION = Figures(
    "ap",
    "AP",
    ("ap", "ap50", "ap75"),
    ("ap_small", "ap_medium", "ap_large"),
    (
        ("ap", "AP", ".2f"),
        ("ap50", "AP50", ".2f"),
        ("ap75", "AP75", ".2f"),
        ("ap_small", "AP small", ".2f"),
        ("ap_medium", "AP medium", ".2f"),
        ("ap_large", "AP large", ".2f"),
    ),
    ("ap", "AP", "AP (%)"),
    "ap_by_class",
    has_logits=False,
)


def figures_of(evaluation: Mapping[str, Any]) -> Figures:
    """Return the figures of the task that an evaluation is of."""
    return DETECTION if DETECTION.main in evaluation else CLASSIFICATION


def best_evaluation(evaluations: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Return the evaluation with the highest main figure, and among equal ones the lowest cross-entropy."""
    main = figures_of(evaluations[0]).main
    return max(evaluations, key=lambda record: (record[main], -record.get("ce", 0.0)))
