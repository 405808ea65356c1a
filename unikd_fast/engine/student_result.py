"""What a run of training came to, as result.json and the report have it."""

from pathlib import Path
from typing import Any

from unikd_fast.config import Config

_FIGURES = ("accuracy", "top5", "ce")  # top5 of more than five classes


def best_evaluation(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """The evaluation with the highest accuracy; small splits tie often, so the lower cross-entropy decides."""
    return max(evaluations, key=lambda record: (record["accuracy"], -record["ce"]))


def student_result(
    config: Config,
    *,
    label: str,
    steps: int,
    test_is_val: bool,
    best: tuple[dict[str, Any], dict[str, Any]],
    last: tuple[dict[str, Any], dict[str, Any]],
    weights: Path,
) -> dict[str, Any]:
    """The content of result.json.

    Args:
        config: of the run.
        label: its name in tables.
        steps: that were trained.
        test_is_val: whether there is no split of its own to test on.
        best, last: an evaluation's figures on the validation split and on the test split.
        weights: file of the last student.
    """

    def figures(of: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, Any]:
        val, test = of
        return {
            "epoch": val["epoch"],
            "val": {name: val[name] for name in _FIGURES if name in val},
            "test": {name: test[name] for name in _FIGURES if name in test},
        }

    return {
        "label": label,
        "seed": config.run.seed,
        "method": config.distill.label,
        "model": config.student.model,
        "steps": steps,
        "test_is_val": test_is_val,
        "best": figures(best),
        "last": figures(last),
        "weights": str(weights),
    }
