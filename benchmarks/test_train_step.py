"""A step of distillation against its parts: the teacher's forward pass and the student trained alone.

What AFF, FDP and the losses add is what is above 1 in the ratio.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from timing import interleaved_medians

from unikd_fast.config import load_config
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.distributed import start_processes
from unikd_fast.engine.step import train_step
from unikd_fast.engine.zero import start_engine
from unikd_fast.values import Batch

CONFIG = Path(__file__).parents[1] / "configs" / "imagenet_r50_mbv1.json"
BATCH = 8
LIMIT = 1.10


def experiment(method: str) -> Experiment:
    overrides = [
        "data.name=synthetic",
        f"data.synthetic_samples={2 * BATCH}",
        "teacher.weights=random",
        "teacher.precision=fp32",
        "teacher.fold_batch_norm=false",
        "train.precision=fp32",
        f"train.global_batch_size={BATCH}",
        f"distill.method={method}",
        "train.learning_rate=0.001",
    ]
    return build_experiment(load_config(CONFIG, overrides), start_processes())


@pytest.mark.benchmark(group="step R50 -> MobileNetV1, 224 px, batch 8, fp32")
def test_distillation_step_over_teacher_forward_and_student_step(benchmark: Any) -> None:
    processes = start_processes()
    distilled, alone = experiment("unikd"), experiment("none")
    method, teacher = distilled.method, distilled.teacher
    assert teacher is not None
    batch: Batch = next(distilled.loader.train(0))
    method.prepare(teacher(batch.images) for _ in range(2))
    distilling = start_engine(distilled.config, distilled.student_module, processes)
    training = start_engine(alone.config, alone.student_module, processes)
    distilling.train()
    training.train()

    def distillation_step() -> torch.Tensor:
        return train_step(distilling, teacher, method, batch, update=True).total

    def student_step() -> torch.Tensor:
        return train_step(training, None, alone.method, batch, update=True).total

    # Correct before fast: both train, on the same student, and the teacher is the same one afterwards.
    logits = teacher(batch.images).logits
    first = (distillation_step().item(), student_step().item())
    for _ in range(4):
        last = (distillation_step().item(), student_step().item())
    assert last[0] < first[0]
    assert last[1] < first[1]
    assert torch.equal(teacher(batch.images).logits, logits)

    times = interleaved_medians(
        {"distill": distillation_step, "teacher": lambda: teacher(batch.images), "student": student_step}, rounds=15
    )
    ratio = times["distill"] / (times["teacher"] + times["student"])
    benchmark.extra_info.update(
        ratio=round(ratio, 4),
        step_ms={name: round(1000 * seconds, 2) for name, seconds in times.items()},
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )
    benchmark.pedantic(distillation_step, rounds=3, warmup_rounds=0)
    assert ratio <= LIMIT, f"t_D / (t_T + t_S) = {ratio:.3f}, limit {LIMIT}"
