"""Steps of one GPU as one CUDA graph: for small networks, whose kernels are shorter than their launches.

A step is a program over buffers at fixed addresses: the plans of its micro-batches (which samples, which windows, which
are mirrored), the learning rate, the method's ramps and the number of the step are filled in before; weights, optimiser
state, sums of the log and averages are changed in place. The first steps run the program as it is, on a stream of their
own, as CUDA requires, and are steps like any other. Then it is captured, which computes nothing, and replayed from then
on. On a CPU the program is called every time.
"""

import logging
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from unikd_fast.config.schema import OWN_GRAPHS
from unikd_fast.data.device import DeviceLoader
from unikd_fast.data.mixing import MixedLoader
from unikd_fast.engine.build import Experiment
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.gradients import GradientWatch
from unikd_fast.engine.local_engine import LocalEngine
from unikd_fast.engine.metrics import LossMeter
from unikd_fast.engine.optimizer import StudentAverage
from unikd_fast.engine.step import Steps, train_step
from unikd_fast.engine.timing import StepClock, Throughput
from unikd_fast.engine.zero import reasons_for_deepspeed
from unikd_fast.errors import ConfigError, OutOfMemory, RunError

_logger = logging.getLogger("unikd_fast")


def captures(experiment: Experiment) -> bool:
    """Return whether the steps of a run are captured; the first process logs it, and with "auto" also why not.

    Raises:
        ConfigError: train.cuda_graph = on, and the steps cannot be captured.
    """
    asked, processes = experiment.config.train.cuda_graph, experiment.processes
    if asked == "off":
        return False
    found = [*device_obstacles(processes), *obstacles(experiment)]
    if found and asked == "on":
        raise ConfigError(
            f"train.cuda_graph = 'on', but the step cannot be captured: {'; '.join(found)}; or set it to auto"
        )
    if processes.is_first:
        if found:
            # Without a GPU nobody expects otherwise.
            level = logging.INFO if processes.device.type == "cuda" else logging.DEBUG
            _logger.log(level, "train.cuda_graph: steps are launched operation by operation, because %s", found[0])
        else:
            _logger.info("train.cuda_graph: steps are captured in a CUDA graph and replayed")
    return not found


def device_obstacles(processes: Processes) -> Iterator[str]:
    """Yield what about the device prevents a capture, with its remedy."""
    if processes.device.type != "cuda":
        yield f"the device is {processes.device.type}, not a CUDA device (run on a GPU)"


def obstacles(experiment: Experiment) -> Iterator[str]:
    """Yield what else prevents a capture, each with its remedy, the most general first."""
    config, processes = experiment.config, experiment.processes
    train, teacher = config.train, config.teacher
    yield from reasons_for_deepspeed(config, processes)
    yield from _loader_obstacles(experiment)
    if train.precision == "fp16":
        yield "train.precision = 'fp16' has a loss scale that the host follows (set bf16 or fp32)"
    if train.nonfinite == "skip":
        yield "train.nonfinite = 'skip' makes the host read every gradient's norm (set stop)"
    if train.activation_checkpointing:
        yield "train.activation_checkpointing reads the random state on the host (set it to false)"
    for key, mode in (("train", train.compile), ("teacher", None if teacher is None else teacher.compile)):
        if mode in OWN_GRAPHS:
            yield f"{key}.compile = {mode!r} captures graphs of its own (set null or 'default')"
    if (reason := experiment.method.uncapturable) is not None:
        yield f"{reason} (choose another setting)"


def _loader_obstacles(experiment: Experiment) -> Iterator[str]:
    if experiment.cache is not None:
        yield "the teacher's outputs come from a cache on disk (set teacher.cache.mode = off)"
    loader = experiment.loader
    if isinstance(loader, MixedLoader):
        yield "data.mixing is drawn on the host (set mixup_alpha and cutmix_alpha to 0)"
    elif not isinstance(loader, DeviceLoader):
        yield f"{type(loader).__name__} decodes files on the host (use a data set that fits into the device's memory)"
    elif loader.unplanned is not None:
        yield f"{loader.unplanned} (turn them off in data.augmentation and data.second_view)"


WARM_UP = 3
"""Steps before the capture, which create the optimiser's state and what a method creates with its first batch."""


class CapturedSteps(Steps):
    """Takes steps of a captured program, with a LocalEngine and a DeviceLoader whose batches can be planned.

    If capturing fails, it is an error with train.cuda_graph = on; otherwise a warning, and the program is called every
    time.
    """

    def __init__(
        self,
        experiment: Experiment,
        engine: LocalEngine,
        watch: GradientWatch,
        meter: LossMeter,
        average: StudentAverage | None,
        clock: StepClock,
    ) -> None:
        super().__init__(experiment, engine, watch, meter, average, clock)
        assert isinstance(experiment.loader, DeviceLoader)
        self._loader = experiment.loader
        self._rate: Tensor = engine.optimizer.param_groups[0]["lr"]
        device = self._rate.device
        views = 2 if experiment.method.needs.second_view else 1
        shape = (engine.gradient_accumulation_steps(), views, experiment.loader.schedule.micro_batch_size, 6)
        self._plans = torch.zeros(shape, dtype=torch.int64, device=device)
        self._step = torch.zeros((), dtype=torch.int64, device=device)
        self._warm_up = WARM_UP if device.type == "cuda" else 0
        self._side = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._run: Callable[[], None] = self.program

    def data(self, epoch: int, start: int) -> Iterator[Tensor]:
        """Return the plans of micro-batches."""
        return self._loader.plans(epoch, start)

    def take(self, data: Iterator[Tensor], throughput: Throughput, step: int, *, learning_rate: float) -> None:
        experiment, clock = self._experiment, self._clock
        clock.start()
        for plan in self._plans:
            plan.copy_(throughput.next(data), non_blocking=True)
        clock.mark("data")
        self._rate.fill_(learning_rate)
        experiment.method.set_progress(step / experiment.steps_per_epoch)
        self._step.fill_(step)
        self.replay()
        clock.mark("step")
        if self._average is not None:
            self._average.count()

    def replay(self) -> None:
        """Run the program on what the buffers hold."""
        if self._side is None or self._warm_up < 0:
            self._run()
        elif self._warm_up:
            current = torch.cuda.current_stream()
            self._side.wait_stream(current)
            with torch.cuda.stream(self._side):
                self.program()
            current.wait_stream(self._side)
            self._warm_up -= 1
        else:
            self._warm_up = -1
            self._run = self._captured()
            self._run()

    def program(self) -> None:
        """Do one step, as a function of the buffers alone; no host read."""
        experiment, engine, watch = self._experiment, self._engine, self._watch
        for number, plan in enumerate(self._plans):
            update = number == len(self._plans) - 1
            batch = self._loader.batch_of(plan)
            loss = train_step(engine, experiment.teacher, experiment.method, batch, update=update, watch=watch)
            self._meter.update(loss, self._step, updated=update)
        if self._average is not None:
            self._average.mix(experiment.student)

    def _captured(self) -> Callable[[], None]:
        """Return a function that launches the captured program, or the program itself if capturing failed.

        Raises:
            ConfigError: capturing failed, and train.cuda_graph = on.
            OutOfMemory: the memory was not sufficient for it, and train.cuda_graph = on.
            RunError: the failed capture has not ended on the device.
        """
        try:
            return record(self.program)
        except (RuntimeError, OutOfMemory) as error:
            chain = list(exception_chain(error))
        # torch then raises "operation failed due to a previous error"; the first error is in the chain.
        said = str(chain[-1]).strip().partition("\n")[0]
        memory = any(isinstance(error, OutOfMemory | torch.OutOfMemoryError) for error in chain)
        del chain  # its tracebacks hold what the capture had allocated
        self._engine.start_over()
        if self._side is not None:
            require_no_capture(self._side.device, said)
        if self._experiment.config.train.cuda_graph == "on":
            kind = OutOfMemory if memory else ConfigError
            raise kind(f"train.cuda_graph = 'on', but capturing a step failed: {said}; set it to 'off'")
        _logger.warning(
            "train.cuda_graph: capturing a step failed, and steps are launched operation by operation: %s; "
            "train.cuda_graph = off avoids the attempt",
            said,
        )
        return self.program


def exception_chain(error: BaseException) -> Iterator[BaseException]:
    """Yield the RuntimeErrors and RunErrors that led to an error, the first of them last."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, RuntimeError | RunError):
            yield found
        found = found.__cause__ or found.__context__


def require_no_capture(device: torch.device, failure: str) -> None:
    """Check that a failed capture has ended: the allocator frees memory, and the generator draws numbers.

    If ending the capture fails as well, both stay marked as captured, and the next dropout or lack of memory would end
    the run, far from the cause. There is no call that removes the mark.

    Raises:
        RunError: it has not.
    """
    before = torch.cuda.get_rng_state(device)
    try:
        torch.cuda.empty_cache()
        torch.rand(1, device=device)
    except RuntimeError as error:
        said = str(error).strip().partition("\n")[0]
        raise RunError(
            f"train.cuda_graph: capturing a step failed ({failure}) and left the device in the capture ({said}); start "
            "again with train.cuda_graph = off, and --resume auto continues from the last checkpoint"
        ) from error
    torch.cuda.set_rng_state(before, device)  # so that the run draws the same numbers


def record(program: Callable[[], None]) -> Callable[[], None]:
    """Capture what a program launches on the current device, and return a function that launches it again.

    Raises:
        RuntimeError: the program did what a graph cannot hold, such as waiting for the device.
    """
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        # The thread that writes checkpoints may continue meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            program()
    finally:
        torch.cuda.set_stream(stream)  # a failed capture does not restore it
    return graph.replay
