"""One run from its first step to its result: prepare, train, evaluate, save; resumable after any step."""

import copy
from contextlib import suppress
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NoReturn, cast

import torch
from torch import Tensor

from unikd_fast.engine import checkpoint as ckpt
from unikd_fast.engine.build import Experiment
from unikd_fast.engine.cache import ready_cache
from unikd_fast.engine.cost import cost_of
from unikd_fast.engine.cuda_graph import CapturedSteps, captures
from unikd_fast.engine.describe import log_run
from unikd_fast.engine.distributed import StopSignal, average_buffers, explain_bad_evaluation
from unikd_fast.engine.evaluate import BatchLogits, Probe, head_indicators
from unikd_fast.engine.folder import (
    BEST,
    STUDENT,
    commit,
    export_student,
    import_student,
    student_result,
    write_result,
    write_teacher,
)
from unikd_fast.engine.gradients import GradientWatch, LossScale
from unikd_fast.engine.memory import oom_hint
from unikd_fast.engine.metrics import LossMeter, MetricsWriter, bad_sample_record, memory_gib, read_metrics
from unikd_fast.engine.optimizer import StudentAverage, learning_rate
from unikd_fast.engine.step import EagerSteps, Steps
from unikd_fast.engine.teacher import check_teacher, prepare_method
from unikd_fast.engine.timing import StepClock, Throughput, loader_rate
from unikd_fast.engine.trackers import TrackedRun, Trackers
from unikd_fast.engine.zero import autocast_dtype, gathered, restore_optimizer_state, start_engine, zero_stage
from unikd_fast.errors import CheckpointError, Interrupted, NonFiniteLoss
from unikd_fast.io import make_folder, remove_leftovers
from unikd_fast.models import FeatureExtractor, LogitsOnly
from unikd_fast.tasks import best_evaluation

_REMOVE = "remove that folder and continue with --resume auto"

_WORTH_MEASURING = 120  # micro-batches


class Trainer:
    """Trains one student in one folder. All processes must create it.

    Args:
        experiment: the run.
        folder: run folder.
        stop: signals that stop the run after a checkpoint.
        label: name of the run in log messages and tables.
        resume: whether to continue from the folder's newest checkpoint, if there is one.

    Attributes:
        engine: LocalEngine, or DeepSpeed's engine.
        watch: watch of the gradients.
        meter: sums of the loss terms.
        average: exponential average of the student. If None, there is none.
        copy: whole copy of the student to evaluate. If None, the student itself is whole.
        clock: clock of the parts of a step.
        steps: eager or captured steps.
        step: number of finished steps.
        probe: comparison of the student with the teacher on held-out samples. If None, there is none.

    Raises:
        CacheError, CheckpointError, ConfigError: the folder, the teacher or its cache does not fit the run.
        Interrupted: SIGTERM or Ctrl-C while the cache was being built or the method prepared.
        OutOfMemory: the memory is not sufficient; names the part.
    """

    @oom_hint("run")
    def __init__(self, experiment: Experiment, folder: Path, stop: StopSignal, *, label: str, resume: bool) -> None:
        config, processes, method = experiment.config, experiment.processes, experiment.method
        self.experiment, self.folder, self.stop, self.label = experiment, folder, stop, label
        self.config, self.processes, self.method = config, processes, method
        self.name = f"{label}, seed {config.run.seed}"
        newest = self._newest_checkpoint() if resume else None
        saved = None if newest is None else ckpt.read_folder(newest)
        teacher_logits = self._check_teacher(saved, resume=resume)
        if newest is not None and saved is not None:
            with ckpt.restoring(newest, advice=_REMOVE):
                ckpt.restore_weights(saved, experiment.student_module, method, processes)
        if processes.is_first:
            log_run(experiment, self.name)
        self.average = _start_average(experiment)
        # At ZeRO stage 3 no process has whole weights to evaluate, and processes do not evaluate in step.
        needs_copy = zero_stage(config) == 3 and self.average is None
        self.copy = copy.deepcopy(experiment.student) if needs_copy else None
        captured = captures(experiment)
        # Every step has the same shapes, so cuDNN times its algorithms once, unless it has to be deterministic: its
        # choice could differ between runs.
        deterministic = torch.backends.cudnn.deterministic or torch.are_deterministic_algorithms_enabled()
        torch.backends.cudnn.benchmark = not deterministic
        with oom_hint("optimiser"):
            self.engine = start_engine(config, experiment.student_module, processes, captured=captured)
        processes.from_first(self._begin_folder)
        scale = LossScale() if config.train.precision == "fp16" else None
        if newest is None or saved is None:
            if experiment.teacher is not None:
                prepare_method(
                    method,
                    experiment.loader,
                    experiment.teacher,
                    processes,
                    stop,
                    self.name,
                    features=experiment.task.teacher_features,
                )
            torch.manual_seed(1_000_003 * (config.run.seed + 1) + processes.rank)  # dropout differs between processes
        else:
            with ckpt.restoring(newest, advice=_REMOVE):
                restore_optimizer_state(self.engine, saved["optimizer"])
                if self.average is not None:
                    ckpt.restore_average(saved, self.average, processes)
                ckpt.restore_random_state(saved, processes)
                if scale is not None:
                    scale.load_state_dict(saved["run"]["loss_scale"])
        self.step = 0 if saved is None else int(saved["run"]["step"])
        self.saved_step = self.step  # a new run saves nothing before its first step
        skip = config.train.nonfinite == "skip"
        self.watch = GradientWatch(self.engine, skip=skip, scale=scale)
        # With fp16 gradients overflow now and then, which the loss scale handles.
        self.meter = LossMeter(
            processes, (*method.term_names, *experiment.task.term_names), None if scale else self.watch, skip=skip
        )
        self.clock = StepClock(processes.device if processes.is_first else None, whole=captured)
        kind = CapturedSteps if captured else EagerSteps
        self.steps: Steps = kind(experiment, self.engine, self.watch, self.meter, self.average, self.clock)
        self.probe = self._start_probe(teacher_logits)
        self.checkpoints = ckpt.CheckpointWriter(
            folder, keep=config.run.keep_checkpoints, beside_training=config.run.async_checkpoints
        )
        self.writer = MetricsWriter(
            folder,
            processes,
            label=self.name,
            total_steps=experiment.total_steps,
            start_step=self.step,
            track=self._start_trackers,
            hidden=None if config.run.show_head else "head_",
        )
        self.evaluations = processes.from_first(
            lambda: [record for record in read_metrics(folder) if record["kind"] == "evaluation"]
        )

    def _newest_checkpoint(self) -> Path | None:
        """Return the newest checkpoint that this run can continue from, chosen by the first process."""
        student_module = self.experiment.student_module
        return self.processes.from_first(
            lambda: ckpt.find_newest(self.folder, lambda path: ckpt.require_usable(path, student_module))
        )

    def _check_teacher(self, saved: dict[str, Any] | None, *, resume: bool) -> dict[int, Tensor] | None:
        """Make the teacher's cache ready and check the teacher's accuracy; return what `check_teacher` does."""
        experiment = self.experiment
        if experiment.cache is not None:
            ready_cache(experiment, self.stop, self.name)
            if saved is not None:
                ckpt.require_same_head(saved, self.method)
        if experiment.teacher_record is None:
            return None
        return check_teacher(experiment, self.folder, self.name, resume=resume)

    def _begin_folder(self) -> None:
        make_folder(self.folder)
        remove_leftovers(self.folder)
        best = (self.folder / BEST).parent
        if best.is_dir():
            remove_leftovers(best)
        if self.experiment.teacher_record is not None:
            write_teacher(self.folder, self.experiment.teacher_record)

    @property
    def evaluated(self) -> FeatureExtractor | LogitsOnly:
        """Return the network to evaluate and export: the student, a whole copy of it, or its exponential average."""
        if self.average is not None:
            return cast(LogitsOnly, self.average.module)
        return self.experiment.student if self.copy is None else self.copy

    def run(self) -> dict[str, Any]:
        """Train to the end and return the result, which is also written to result.json.

        Raises:
            NonFiniteLoss: a loss term became inf or NaN; names the step, the terms and the last good checkpoint.
            Interrupted: SIGTERM or Ctrl-C, after a checkpoint.
        """
        try:
            self.throughput = self._start_throughput()
            while True:
                self._evaluate_if_due()
                if self.step >= self.experiment.total_steps:
                    return self._finish()
                self._train_epoch()
        except NonFiniteLoss as error:
            with suppress(CheckpointError):  # if it fails, the previous one is the last
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
        if teacher is None or not self.config.run.probe or not self.experiment.task.figures.has_logits:
            return None
        return Probe(teacher, lambda: loader.evaluate("val"), self.processes, known)

    def _start_trackers(self) -> Trackers:
        return Trackers(
            self.config.run.trackers,
            TrackedRun(
                folder=self.folder,
                group=Path(self.config.run.dir).resolve().name,
                name=self.name,
                settings=self.config.model_dump(mode="json", exclude={"json_schema"}),
                commit=commit() if self.config.run.trackers else "",
                step=self.step,
            ),
        )

    def _start_throughput(self) -> Throughput:
        """Measure the loader first, if the run is long, to be able to tell whether the run is loader-bound."""
        experiment, train, rate = self.experiment, self.config.train, None
        if (experiment.total_steps - self.step) * train.accumulation_steps >= _WORTH_MEASURING:
            epochs = range(self.step // experiment.steps_per_epoch, experiment.epochs)
            ahead = chain.from_iterable(map(experiment.micro_batches, epochs))
            rate = loader_rate(ahead, self.processes, micro_batch_size=experiment.loader.schedule.micro_batch_size)
        return Throughput(self.processes, global_batch_size=train.global_batch_size, loader_rate=rate)

    def _train_epoch(self) -> None:
        """Train from ``self.step`` to the end of its epoch, or to the last step."""
        train, run = self.config.train, self.config.run
        per_epoch, total = self.experiment.steps_per_epoch, self.experiment.total_steps
        epoch, start = divmod(self.step, per_epoch)
        data = self.steps.data(epoch, start)
        self.engine.train()
        self.throughput.begin(self.step)
        for _ in range(start, min(per_epoch, total - epoch * per_epoch)):
            rate = learning_rate(train, self.step, total_steps=total, steps_per_epoch=per_epoch)
            self.steps.take(data, self.throughput, self.step, learning_rate=rate)
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
                        **self.throughput.read(self.step),
                        "memory_gib": memory_gib(self.processes.device),
                    },
                )
            # At the end of an epoch the buffers are averaged before they are saved.
            if self._checkpoint_due() and self.step % per_epoch:
                self._save()
            if (number := self.stop.agreed()) and self.step % per_epoch and self.step < total:
                self._stop(number)
        head = None if self.method.head is None else self.method.head.module
        for module in (self.experiment.student_module, self.average, head):
            if module is not None:
                average_buffers(module, self.processes)
        number = self.stop.agreed()
        # Not after every epoch: short ones would spend their time on the disk.
        if self._checkpoint_due() or self._evaluation_due():
            self._save()
        if (skipped := bad_sample_record(self.config, self.experiment.loader, self.processes)) is not None:
            self._record("bad_samples", {"epoch": epoch + 1, **skipped})
        if number:
            self._stop(number)

    def _record(self, kind: str, values: dict[str, Any]) -> None:
        """Write a record, and once the times of a step; an error on the first process is raised on all."""

        def write() -> None:
            self.writer.write(kind, self.step, values)
            self.clock.write(self.folder)

        self.processes.from_first(write)

    def _checkpoint_due(self) -> bool:
        every = self.config.run.checkpoint_every_steps
        return every is not None and self.step % every == 0

    def _save(self) -> None:
        """Take a checkpoint, unless this step is saved; a thread may write it while training continues."""
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

    def _stop(self, number: int) -> NoReturn:
        self._save()
        self.processes.from_first(self.checkpoints.finish)
        saved = self.folder / ckpt.FOLDER / ckpt.checkpoint_name(self.step)
        raise Interrupted(
            number, f"[{self.name}] stopped at step {self.step}; saved {saved}; continue with --resume auto"
        )

    def _evaluation_due(self) -> bool:
        """Return whether this step ends the run or an epoch to evaluate, and was not evaluated before a resume."""
        epoch, inside = divmod(self.step, self.experiment.steps_per_epoch)
        due = not inside and epoch > 0 and epoch % self.config.run.evaluate_every_epochs == 0
        last = self.step == self.experiment.total_steps
        return (due or last) and not any(record["step"] == self.step for record in self.evaluations)

    def _evaluate_if_due(self) -> None:
        """Evaluate at the end of an epoch, once, and keep the best student."""
        if not self._evaluation_due():
            return
        if self.copy is not None:
            with gathered(self.experiment.student):
                self.copy.load_state_dict(self.experiment.student.state_dict())
        epoch = -(-self.step // self.experiment.steps_per_epoch)
        outputs: list[BatchLogits] | None = [] if self.probe is not None else None
        values: dict[str, Any] = {"epoch": epoch, **self._evaluate("val", outputs)}
        if self.probe is not None and outputs is not None:
            values["probe_kl"] = self.probe.measure(outputs)
        values.update(
            head_indicators(
                self.method.head,
                self.experiment.teacher,
                self.experiment.loader.evaluate("val"),
                self.processes,
                features=self.experiment.task.teacher_features,
            )
        )
        record = {"step": self.step, **values}

        def keep_best() -> None:
            if best_evaluation([*self.evaluations, record]) is record:
                self._export(BEST)

        self.processes.from_first(keep_best)
        self._record("evaluation", values)
        if self.processes.is_first and "ce" in values:
            doubt = explain_bad_evaluation(values["ce"], self.evaluated, self.experiment.splits.num_classes)
            if doubt is not None:
                self.writer.explain(doubt)
        self.evaluations.append(record)

    def _evaluate(self, split: Literal["val", "test"], keep: list[BatchLogits] | None = None) -> dict[str, float]:
        experiment, dtype = self.experiment, autocast_dtype(self.config.train.precision)
        return experiment.task.evaluate(
            self.evaluated, experiment.loader, experiment.splits, split, self.processes, autocast=dtype, keep=keep
        )

    def _export(self, name: Path) -> None:
        experiment = self.experiment
        card = experiment.task.card(self.config, experiment.splits, experiment.loader)
        export_student(self.evaluated.plain, self.folder / name, card)

    def _cost(self) -> dict[str, Any]:
        size = self.config.student.image_size or self.config.data.image_size
        return cost_of(self.evaluated.plain, size, self.processes.device)

    def _finish(self) -> dict[str, Any]:
        """Export the student, and evaluate its last and best weights on the test split."""
        self.processes.from_first(self.checkpoints.finish)
        self.processes.from_first(lambda: self._export(STUDENT))
        last = self.evaluations[-1]
        best = best_evaluation(self.evaluations)
        outputs: list[BatchLogits] | None = [] if self.config.run.test_logits else None
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
            self.experiment.task.write_outputs(self.folder, outputs, self.experiment.splits, self.processes)
        result = student_result(
            self.config,
            label=self.label,
            steps=self.step,
            splits=self.experiment.splits,
            best=(best, best_test),
            last=(last, last_test),
            weights=self.folder / STUDENT,
        )
        worth = self.step * self.config.train.accumulation_steps >= _WORTH_MEASURING
        if worth and self.experiment.task.figures.has_logits:
            result |= self.processes.from_first(self._cost)
        self.processes.from_first(lambda: write_result(self.folder, result))
        self.writer.finish(self.step, result)
        return result


def _start_average(experiment: Experiment) -> StudentAverage | None:
    decay = experiment.config.train.ema_decay
    if decay is None:
        return None
    average = StudentAverage(experiment.student, decay)
    if experiment.config.train.channels_last and zero_stage(experiment.config) == 0:
        # As the engine's: tensors of two layouts are averaged one by one.
        average.module.to(memory_format=torch.channels_last)
    return average
