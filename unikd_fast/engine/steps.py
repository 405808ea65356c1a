"""The optimiser steps of a run, one at a time: the data they take and what is done around `train_step`."""

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

from unikd_fast.engine.average import StudentAverage
from unikd_fast.engine.build import Experiment
from unikd_fast.engine.gradient_watch import GradientWatch
from unikd_fast.engine.metrics import LossMeter
from unikd_fast.engine.pace import Pace
from unikd_fast.engine.sharding import gathered
from unikd_fast.engine.step_time import StepClock
from unikd_fast.engine.train_step import train_step


class Parts(NamedTuple):
    """What a step acts on."""

    experiment: Experiment
    engine: Any  # the DeepSpeed engine, or a LocalEngine
    watch: GradientWatch
    meter: LossMeter
    average: StudentAverage | None
    clock: StepClock


class Steps(Protocol):
    """One optimiser step after the other."""

    def data(self, epoch: int, start: int) -> Iterator[Any]:
        """What the steps of an epoch take from its step ``start`` on."""
        ...

    def take(self, data: Iterator[Any], pace: Pace, step: int, *, learning_rate: float) -> None:
        """One step: its number in the run, from 0, says how far the method's ramps are."""
        ...


class EagerSteps:
    """Steps whose operations are launched one by one."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._micro_steps = parts.engine.gradient_accumulation_steps()

    def data(self, epoch: int, start: int) -> Iterator[Any]:
        """Micro-batches, and their targets where these are cached."""
        return self._parts.experiment.micro_batches(epoch, start)

    def take(self, data: Iterator[Any], pace: Pace, step: int, *, learning_rate: float) -> None:
        experiment, engine, watch, meter, average, clock = self._parts
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate
        experiment.method.set_progress(step / experiment.steps_per_epoch)
        clock.start()
        for micro_step in range(self._micro_steps):
            batch, target = pace.next(data)
            clock.mark("data")
            update = micro_step == self._micro_steps - 1
            loss = train_step(
                engine, experiment.teacher, experiment.method, batch, target, update=update, watch=watch, clock=clock
            )
            meter.update(loss, step, updated=update)
        watch.require_progress(meter.describe_first)
        if average is not None:
            with gathered(experiment.student):
                average.update_parameters(experiment.student)
        clock.mark("optimiser")
