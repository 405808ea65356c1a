"""One step of distillation. Read this first: everything else in the engine feeds it."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

from torch import nn

from unikd_fast.engine.build import Experiment
from unikd_fast.engine.classification import CLASSIFICATION
from unikd_fast.engine.gradients import GradientWatch
from unikd_fast.engine.memory import oom_hint
from unikd_fast.engine.metrics import LossMeter
from unikd_fast.engine.optimizer import StudentAverage
from unikd_fast.engine.task import Task
from unikd_fast.engine.timing import UNTIMED, StepClock, Throughput
from unikd_fast.engine.zero import gathered
from unikd_fast.methods import Method
from unikd_fast.values import Loss, Target


def train_step(
    engine: Any,
    teacher: nn.Module | None,
    method: Method,
    batch: Any,
    target: Target | None = None,
    *,
    task: Task = CLASSIFICATION,
    update: bool,
    watch: GradientWatch | None = None,
    clock: StepClock = UNTIMED,
) -> Loss:
    """Compute forward, loss and backward of one micro-batch; with ``update``, step the parameters.

    A function of tensors of fixed shape on the device: no host read, no data-dependent branch.

    Args:
        engine: LocalEngine, or DeepSpeed's engine, around the StudentModule.
        teacher: maps images to Features without gradients. If None, the method needs no teacher, or `target` is given.
        method: distillation method.
        batch: this process's micro-batch.
        target: the teacher's outputs for this batch. If None, the teacher is run.
        task: what the loss of a batch is.
        update: whether this is the last micro-batch of an optimiser step.
        watch: watch of the gradients. If None, gradients are not checked.
        clock: clock of the parts of a step.
    """
    loss = task.loss(engine, teacher, method, batch, target, clock)
    clock.mark("loss")
    with oom_hint("student"):
        scale = None if watch is None else watch.scale
        engine.backward(loss.total if scale is None else scale.scaled(loss.total))
    clock.mark("backward")
    with oom_hint("optimiser"):
        if update and watch is not None:
            watch.before_update()
        engine.step()  # DeepSpeed steps the optimiser on the last micro-batch only
    left_out = update and watch is not None and watch.after_update()
    if method.head is not None:
        steps = engine.gradient_accumulation_steps()
        method.head.train(loss.terms, accumulation_steps=steps, update=update, leave_out=left_out)
    clock.mark("optimiser")
    return loss


class Steps(ABC):
    """Takes one optimiser step after the other.

    Args:
        experiment: the run.
        engine: LocalEngine, or DeepSpeed's engine, around its StudentModule.
        watch: watch of the gradients.
        meter: sums of the loss terms.
        average: exponential average of the student. If None, there is none.
        clock: clock of the parts of a step.
    """

    def __init__(
        self,
        experiment: Experiment,
        engine: Any,
        watch: GradientWatch,
        meter: LossMeter,
        average: StudentAverage | None,
        clock: StepClock,
    ) -> None:
        self._experiment, self._engine, self._watch = experiment, engine, watch
        self._meter, self._average, self._clock = meter, average, clock

    @abstractmethod
    def data(self, epoch: int, start: int) -> Iterator[Any]:
        """Return what the steps of an epoch take from its step ``start`` on."""

    @abstractmethod
    def take(self, data: Iterator[Any], throughput: Throughput, step: int, *, learning_rate: float) -> None:
        """Take one step; its number in the run, from 0, determines the method's ramps."""


class EagerSteps(Steps):
    """Launches the operations of a step one by one."""

    def data(self, epoch: int, start: int) -> Iterator[Any]:
        """Return micro-batches, with their targets if these are cached."""
        return self._experiment.micro_batches(epoch, start)

    def take(self, data: Iterator[Any], throughput: Throughput, step: int, *, learning_rate: float) -> None:
        experiment, engine, watch, clock = self._experiment, self._engine, self._watch, self._clock
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        experiment.method.set_progress(step / experiment.steps_per_epoch)
        clock.start()
        micro_steps = engine.gradient_accumulation_steps()
        for micro_step in range(micro_steps):
            batch, target = throughput.next(data)
            clock.mark("data")
            update = micro_step == micro_steps - 1
            loss = train_step(
                engine,
                experiment.teacher,
                experiment.method,
                batch,
                target,
                task=experiment.task,
                update=update,
                watch=watch,
                clock=clock,
            )
            self._meter.update(loss, step, updated=update)
        watch.require_progress(self._meter.describe_first)
        if self._average is not None:
            with gathered(experiment.student):
                self._average.update_parameters(experiment.student)
        clock.mark("optimiser")
