"""One run from the first step to its result: prepare, train, evaluate, save; resumable after any step."""

import copy
import logging
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, cast

import torch
from torch import Tensor, nn

from unikd_fast.config import Config
from unikd_fast.engine import checkpoint as ckpt
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.cache import ready_cache
from unikd_fast.engine.cuda_graph import CapturedSteps, captures
from unikd_fast.engine.describe import header
from unikd_fast.engine.distributed import Processes, StopSignal, average_buffers, doubt_about
from unikd_fast.engine.evaluate import Outputs, Probe, evaluate, head_indicators, write_outputs
from unikd_fast.engine.folder import (
    BEST,
    STUDENT,
    best_evaluation,
    export_student,
    import_student,
    student_result,
    write_result,
    write_teacher,
)
from unikd_fast.engine.gradients import GradientWatch, LossScale
from unikd_fast.engine.inputs import preprocessing_of
from unikd_fast.engine.local_engine import LocalEngine
from unikd_fast.engine.memory import naming_part
from unikd_fast.engine.metrics import LossMeter, MetricsWriter, bad_sample_record, memory_gib, read_metrics
from unikd_fast.engine.optimizer import StudentAverage, learning_rate
from unikd_fast.engine.step import EagerSteps, Parts, Steps
from unikd_fast.engine.teacher import check_teacher, prepare_method
from unikd_fast.engine.timing import Pace, StepClock, loader_rate
from unikd_fast.engine.zero import autocast_dtype, gathered, restore_optimizer_state, start_engine, zero_stage
from unikd_fast.errors import CheckpointError, Interrupted, NonFiniteLoss
from unikd_fast.io import make_folder, remove_leftovers
from unikd_fast.models import FeatureExtractor, LogitsOnly

_logger = logging.getLogger("unikd_fast")

_REMOVE = "remove that folder and continue with --resume auto"


class Prepared(NamedTuple):
    """A run's parts, how many steps it has done, and where they are needed and known a copy of the student to evaluate,
    and the teacher's logits for this process's validation batches."""

    parts: Parts
    steps: Steps
    step: int
    copy: FeatureExtractor | LogitsOnly | None
    teacher_logits: dict[int, Tensor] | None


@naming_part("run")
def prepare(
    config: Config, folder: Path, processes: Processes, stop: StopSignal, *, name: str, resume: bool
) -> Prepared:
    """Builds a single run in its folder; all processes must call it.

    Args:
        name: of the run in what is said meanwhile.
        resume: take up the folder's newest checkpoint if there is one.

    Raises:
        OutOfMemory: it does not fit into memory; names the part.
    """
    experiment = build_experiment(config, processes)
    method, side = experiment.method, experiment.side
    newest = _newest_checkpoint(folder, side, processes) if resume else None
    saved = None if newest is None else ckpt.read_folder(newest)
    teacher_record = experiment.teacher_record
    if experiment.cache is not None:
        teacher_record = ready_cache(experiment.cache, side, stop, name, epochs=experiment.epochs)
        if saved is not None:
            ckpt.require_same_head(saved, method)
    logits = None
    if teacher_record is not None:
        logits = check_teacher(experiment, teacher_record, folder, processes, name, resume=resume)
    if newest is not None and saved is not None:
        with ckpt.restoring(newest, advice=_REMOVE):
            ckpt.restore_weights(saved, side, method, processes)
    if processes.is_first:
        _say_what_runs(config, experiment, teacher_record, name, processes)
    average = _start_average(experiment)
    # At ZeRO stage 3 nobody has whole weights to evaluate, and processes do not evaluate in step.
    needs_copy = zero_stage(config) == 3 and average is None
    whole = copy.deepcopy(experiment.student) if needs_copy else None
    captured = captures(config, experiment, processes)
    # Every step has the same shapes, so cuDNN times its algorithms once; where it has to be deterministic, its choice
    # would differ between runs.
    deterministic = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
    torch.backends.cudnn.benchmark = not deterministic
    with naming_part("optimiser"):
        engine = LocalEngine(config, side, processes.device) if captured else start_engine(config, side, processes)
    processes.from_first(lambda: _begin(folder, teacher_record))
    scale = LossScale() if config.train.precision == "fp16" else None
    if newest is None or saved is None:
        if experiment.teacher is not None:
            prepare_method(method, experiment.loader, experiment.teacher, processes, stop, name)
        torch.manual_seed(1_000_003 * (config.run.seed + 1) + processes.rank)  # dropout differs between processes
    else:
        with ckpt.restoring(newest, advice=_REMOVE):
            restore_optimizer_state(engine, saved["optimizer"])
            if average is not None:
                ckpt.restore_average(saved, average, processes)
            ckpt.restore_random_state(saved, processes)
            if scale is not None:
                scale.load_state_dict(saved["run"]["loss_scale"])
    skip = config.train.nonfinite == "skip"
    watch = GradientWatch(engine, skip=skip, scale=scale)
    # With fp16 gradients overflow now and then, and the loss scale sees to them.
    meter = LossMeter(processes, method.term_names, None if scale else watch, skip=skip)
    clock = StepClock(processes.device if processes.is_first else None, whole=captured)
    parts = Parts(experiment, engine, watch, meter, average, clock)
    required = config.train.cuda_graph == "on"
    steps: Steps = CapturedSteps(parts, required=required) if captured else EagerSteps(parts)
    return Prepared(parts, steps, 0 if saved is None else int(saved["run"]["step"]), whole, logits)


def _say_what_runs(
    config: Config, experiment: Experiment, teacher_record: dict[str, Any] | None, name: str, processes: Processes
) -> None:
    _logger.info("[%s] trains %s", name, config.student.model)
    for line in header(config, experiment, processes):
        _logger.info("  %s", line)
    teacher = config.teacher
    if teacher_record is None or teacher is None:
        return
    teacher_record = teacher_record.get("teacher", teacher_record)  # of one whose outputs are cached
    if teacher_record.get("fidelity") is not None:
        return
    if teacher.weights == "random" or teacher.fidelity.batches == 0:
        _logger.warning("the teacher's fidelity is not checked: %s", teacher_record["fidelity_skipped"])


def _newest_checkpoint(folder: Path, side: nn.Module, processes: Processes) -> Path | None:
    """Return the newest checkpoint that this run can go on from, chosen by the first process for all."""
    return processes.from_first(lambda: ckpt.find_newest(folder, lambda path: ckpt.require_usable(path, side)))


def _begin(folder: Path, teacher_record: dict[str, Any] | None) -> None:
    make_folder(folder)
    remove_leftovers(folder)
    if (folder / BEST).parent.is_dir():
        remove_leftovers((folder / BEST).parent)
    if teacher_record is not None:
        write_teacher(folder, teacher_record)


def _start_average(experiment: Experiment) -> StudentAverage | None:
    decay = experiment.config.train.ema_decay
    if decay is None:
        return None
    average = StudentAverage(experiment.student, decay)
    if experiment.config.train.channels_last and zero_stage(experiment.config) == 0:
        # As the engine's: tensors of two layouts are averaged one by one.
        average.module.to(memory_format=torch.channels_last)
    return average


_WORTH_MEASURING = 120  # micro-batches


class Trainer:
    """Trains one student in one folder.

    Args:
        config: of a single run.
        folder: where it writes.
        label: its name in log lines and tables.
        resume: continue from the folder's last checkpoint if there is one.
    """

    def __init__(
        self, config: Config, folder: Path, processes: Processes, stop: StopSignal, *, label: str, resume: bool
    ) -> None:
        self.config, self.folder, self.processes, self.stop = config, folder, processes, stop
        self.label, self.name = label, f"{label}, seed {config.run.seed}"
        parts, self.steps, self.step, self.copy, teacher_logits = prepare(
            config, folder, processes, stop, name=self.name, resume=resume
        )
        self.experiment, self.engine, self.watch, self.meter, self.average, self.clock = parts
        self.method, self.side = self.experiment.method, self.experiment.side
        self.saved_step = self.step  # a new run has nothing to save before its first step
        self.checkpoints = ckpt.CheckpointWriter(
            folder, keep=config.run.keep_checkpoints, beside_training=config.run.async_checkpoints
        )
        self.writer = MetricsWriter(
            folder,
            processes,
            label=self.name,
            total_steps=self.experiment.total_steps,
            start_step=self.step,
            tensorboard=config.run.tensorboard,
            hidden=None if config.run.show_head else "head_",
        )
        self.probe = self._start_probe(teacher_logits)
        self.evaluations = processes.from_first(
            lambda: [record for record in read_metrics(folder) if record["kind"] == "evaluation"]
        )

    @property
    def evaluated(self) -> FeatureExtractor | LogitsOnly:
        """The network that is evaluated and exported: the student, a whole copy of it, or its exponential average."""
        if self.average is not None:
            return cast(LogitsOnly, self.average.module)
        return self.experiment.student if self.copy is None else self.copy

    def run(self) -> dict[str, Any]:
        """Trains to the end and returns the result that is also written to result.json.

        Raises:
            NonFiniteLoss: a loss term became inf or NaN; names the step, the terms and the last good checkpoint.
            Interrupted: SIGTERM or Ctrl-C, after a checkpoint.
        """
        try:
            self.pace = self._start_pace()
            while True:
                self._evaluate_if_due()
                if self.step >= self.experiment.total_steps:
                    return self._finish()
                self._train_epoch()
        except NonFiniteLoss as error:
            with suppress(CheckpointError):  # if the one under way fails, the one before is the last
                self.checkpoints.finish()
            good = next(iter(ckpt.complete_checkpoints(self.folder)), None)
            last = "no checkpoint was written before" if good is None else f"the last good checkpoint is {good}"
            raise NonFiniteLoss(
                f"{error}; {last}. Lower train.learning_rate, or the weight of the term that grew"
            ) from error
        finally:
            self.writer.close()
            self.checkpoints.close()
            self.engine.destroy()

    def _start_probe(self, known: dict[int, Tensor] | None) -> Probe | None:
        teacher, loader = self.experiment.teacher, self.experiment.loader
        if teacher is None or not self.config.run.probe:
            return None
        return Probe(teacher, lambda: loader.evaluate("val"), self.processes, known)

    def _start_pace(self) -> Pace:
        """A run of some length first measures its loader, so that it can say whether that holds it up."""
        experiment, train, rate = self.experiment, self.config.train, None
        if (experiment.total_steps - self.step) * train.accumulation_steps >= _WORTH_MEASURING:
            epochs = range(self.step // experiment.steps_per_epoch, experiment.epochs)
            ahead = chain.from_iterable(map(experiment.micro_batches, epochs))
            rate = loader_rate(ahead, self.processes, micro_batch_size=experiment.loader.schedule.micro_batch_size)
        return Pace(self.processes, global_batch_size=train.global_batch_size, loader_rate=rate)

    def _train_epoch(self) -> None:
        """Trains from ``self.step`` to the end of its epoch, or to the last step."""
        train, run = self.config.train, self.config.run
        per_epoch, total = self.experiment.steps_per_epoch, self.experiment.total_steps
        epoch, start = divmod(self.step, per_epoch)
        data = self.steps.data(epoch, start)
        self.engine.train()
        self.pace.begin(self.step)
        for _ in range(start, min(per_epoch, total - epoch * per_epoch)):
            rate = learning_rate(train, self.step, total_steps=total, steps_per_epoch=per_epoch)
            self.steps.take(data, self.pace, self.step, learning_rate=rate)
            self.step += 1
            self.writer.advance(self.step)
            if self.step % run.log_every_steps == 0 or self.step == total:
                means = self.meter.read()
                self._record(
                    "train",
                    {
                        "epoch": round(self.step / per_epoch, 2),
                        **means,
                        "lr": rate,
                        **self.watch.figures(),
                        **self.pace.read(self.step),
                        "memory_gib": memory_gib(self.processes.device),
                    },
                )
            # At the end of an epoch the buffers are averaged before they are saved.
            if self._checkpoint_due() and self.step % per_epoch:
                self._save()
            if (number := self.stop.agreed()) and self.step % per_epoch and self.step < total:
                self._stop(number)
        average_buffers(self.side, self.processes)
        if self.average is not None:
            average_buffers(self.average, self.processes)
        number = self.stop.agreed()
        # Short epochs would otherwise spend their time on the disk.
        if self._checkpoint_due() or self._evaluation_due():
            self._save()
        if (skipped := bad_sample_record(self.config, self.experiment.loader, self.processes)) is not None:
            self._record("bad_samples", {"epoch": epoch + 1, **skipped})
        if number:
            self._stop(number)

    def _record(self, kind: str, values: dict[str, Any]) -> None:
        """Writes a record, and once the times of a step; what goes wrong on the first process is raised on all."""

        def write() -> None:
            self.writer.write(kind, self.step, values)
            self.clock.write(self.folder)

        self.processes.from_first(write)

    def _checkpoint_due(self) -> bool:
        every = self.config.run.checkpoint_every_steps
        return every is not None and self.step % every == 0

    def _save(self) -> None:
        """Take a checkpoint, which a thread may write while training goes on; a step that is saved stays as it is."""
        if self.saved_step == self.step:
            return
        self.meter.check()
        parts = ckpt.collect_state(
            step=self.step,
            engine=self.engine,
            method=self.method,
            average=self.average,
            processes=self.processes,
            seed=self.config.run.seed,
            loss_scale=None if self.watch.scale is None else self.watch.scale.state_dict(),
        )
        self.processes.from_first(lambda: self.checkpoints.write(self.step, parts))
        self.saved_step = self.step
        run = self.config.run
        if run.deepspeed_checkpoints:
            ckpt.write_native(self.engine, self.folder, self.processes, step=self.step, keep=run.keep_checkpoints)

    def _stop(self, number: int) -> NoReturn:
        self._save()
        self.processes.from_first(self.checkpoints.finish)
        saved = self.folder / ckpt.FOLDER / ckpt.checkpoint_name(self.step)
        raise Interrupted(
            number, f"[{self.name}] stopped at step {self.step}; saved {saved}; continue with --resume auto"
        )

    def _evaluation_due(self) -> bool:
        """Whether this step ends the run, or an epoch that is evaluated, and was not evaluated before a resume."""
        epoch, inside = divmod(self.step, self.experiment.steps_per_epoch)
        due = not inside and epoch > 0 and epoch % self.config.run.evaluate_every_epochs == 0
        last = self.step == self.experiment.total_steps
        return (due or last) and not any(record["step"] == self.step for record in self.evaluations)

    def _evaluate_if_due(self) -> None:
        """Evaluates at the end of an epoch, once, and keeps the best student."""
        if not self._evaluation_due():
            return
        if self.copy is not None:
            with gathered(self.experiment.student):
                self.copy.load_state_dict(self.experiment.student.state_dict())
        epoch = -(-self.step // self.experiment.steps_per_epoch)
        outputs: list[Outputs] | None = [] if self.probe is not None else None
        values: dict[str, Any] = {"epoch": epoch, **self._evaluate("val", outputs)}
        if self.probe is not None and outputs is not None:
            values["probe_kl"] = self.probe.measure(outputs)
        values.update(
            head_indicators(
                self.method, self.experiment.teacher, self.experiment.loader.evaluate("val"), self.processes
            )
        )
        record = {"step": self.step, **values}

        def keep_best() -> None:
            if best_evaluation([*self.evaluations, record]) is record:
                self._export(BEST)

        self.processes.from_first(keep_best)
        self._record("evaluation", values)
        if self.processes.is_first:
            doubt = doubt_about(values["ce"], self.evaluated, self.experiment.splits.num_classes)
            if doubt is not None:
                self.writer.explain(doubt)
        self.evaluations.append(record)

    def _evaluate(self, split: Literal["val", "test"], keep: list[Outputs] | None = None) -> dict[str, float]:
        batches, dtype = self.experiment.loader.evaluate(split), autocast_dtype(self.config.train.precision)
        return evaluate(self.evaluated, batches, self.processes, autocast=dtype, keep=keep)

    def _export(self, name: Path) -> None:
        preprocessing = preprocessing_of(self.experiment.splits, self.experiment.loader.schedule.augmentation)
        export_student(self.evaluated.plain, self.folder / name, preprocessing)

    def _finish(self) -> dict[str, Any]:
        """Exports the student and evaluates its last and best weights on the test split, once."""
        self.processes.from_first(self.checkpoints.finish)
        self.processes.from_first(lambda: self._export(STUDENT))
        last = self.evaluations[-1]
        best = best_evaluation(self.evaluations)
        outputs: list[Outputs] | None = [] if self.config.run.test_logits else None
        if self.experiment.splits.test_is_val:
            last_test, best_test = last, best
            if outputs is not None:
                self._evaluate("val", outputs)
        else:
            last_test = self._evaluate("test", outputs)
            best_test = last_test
            if best["step"] != last["step"]:
                import_student(self.evaluated.plain, self.folder / BEST)
                best_test = self._evaluate("test")
        if outputs is not None:
            write_outputs(self.folder, outputs, self.processes, split="test")
        result = student_result(
            self.config,
            label=self.label,
            steps=self.step,
            test_is_val=self.experiment.splits.test_is_val,
            best=(best, best_test),
            last=(last, last_test),
            weights=self.folder / STUDENT,
        )
        self.processes.from_first(lambda: write_result(self.folder, result))
        return result
