"""The table: means, sample standard deviations, and an honest caption."""

from typing import Any

from unikd_fast.report.table import markdown_report, results_table


def result(label: str, seed: int, best: float, last: float, *, test_is_val: bool = False) -> dict[str, Any]:
    def part(epoch: int, accuracy: float) -> dict[str, Any]:
        return {"epoch": epoch, "test": {"accuracy": accuracy, "top5": 99.0, "ce": 0.5}}

    return {
        "label": label,
        "seed": seed,
        "model": "cifar/resnet8",
        "best": part(7, best),
        "last": part(9, last),
        "test_is_val": test_is_val,
    }


def test_rows_are_statistics_over_seeds_with_the_teacher_first() -> None:
    results = [result("student", 0, 90.0, 80.0), result("teacher", 0, 99.0, 98.0), result("student", 1, 92.0, 84.0)]
    lines = [line for line in results_table(results).splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert cells[2] == ["teacher", "cifar/resnet8", "99.00", "98.00", "1"]
    assert cells[3] == ["student", "cifar/resnet8", "91.00 ± 1.41", "82.00 ± 2.83", "2"]
    assert len({len(line) for line in lines}) == 1


def test_the_caption_states_how_the_best_epoch_was_chosen() -> None:
    assert "chosen on the validation split" in results_table([result("a", 0, 1.0, 1.0)])
    assert "best epoch is the maximum on it" in results_table([result("a", 0, 1.0, 1.0, test_is_val=True)])


def test_the_report_lists_every_single_run() -> None:
    config = {
        "data": {"name": "digits", "train_samples": 200},
        "train": {"total_epochs": 9, "global_batch_size": 50},
        "student": {"model": "cifar/resnet8"},
    }
    report = markdown_report(config, [result("a", 0, 91.5, 90.25), result("a", 1, 92.5, 93.75)])
    assert "| a | 0 | 7 | 91.50 | 9 | 90.25 | 0.5000 |" in report
    assert "| a | 1 | 7 | 92.50 | 9 | 93.75 | 0.5000 |" in report
    assert "200 training samples, 9 epochs, batch 50" in report
