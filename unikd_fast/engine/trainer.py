"""One run from the first step to its result: prepare, train, evaluate, save; resumable after any step."""

from itertools import chain
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from unikd_fast.config import Config
from unikd_fast.engine import checkpoint as ckpt
from unikd_fast.engine.bad_samples import bad_sample_record
from unikd_fast.engine.batch_norm import average_buffers
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.evaluate import evaluate, head_indicators
from unikd_fast.engine.fill_cache import features_without_end, ready_cache
from unikd_fast.engine.metrics import LossMeter, MetricsWriter, memory_gib, read_metrics
from unikd_fast.engine.optimizer_state import restore_optimizer_state
from unikd_fast.engine.pace import Pace, loader_rate
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.run_folder import write_result, write_teacher
from unikd_fast.engine.schedule import learning_rate
from unikd_fast.engine.sharding import start_engine
from unikd_fast.engine.stop import StopSignal
from unikd_fast.engine.train_step import train_step
from unikd_fast.errors import Interrupted, NonFiniteLoss
from unikd_fast.models import FeatureExtractor, LogitsOnly

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
        self.experiment: Experiment = build_experiment(config, processes)
        self.method, self.side = self.experiment.method, self.experiment.side
        saved = ckpt.load_checkpoint(folder) if resume else None
        teacher_record = self.experiment.teacher_record
        if self.experiment.cache is not None:
            teacher_record = ready_cache(
                self.experiment.cache, self.side, stop, self.name, epochs=self.experiment.epochs
            )
            if saved is not None:
                ckpt.require_same_head(saved, self.method)
        if saved is not None:
            ckpt.restore_weights(saved, self.side, self.method, processes)
        self.average = self._start_average()
        self.engine = start_engine(config, self.side, processes)
        self.step = 0
        folder.mkdir(parents=True, exist_ok=True)
        if teacher_record is not None and processes.is_first:
            write_teacher(folder, teacher_record)
        if saved is None:
            if self.experiment.teacher is not None:
                loader, teacher = self.experiment.loader, self.experiment.teacher
                self.method.prepare(features_without_end(loader, teacher, stop, self.name))
            torch.manual_seed(1_000_003 * (config.run.seed + 1) + processes.rank)  # dropout differs between processes
        else:
            self.step = int(saved["step"])
            restore_optimizer_state(self.engine, saved["optimizer"])
            if self.average is not None:
                ckpt.restore_average(saved, self.average, processes)
            ckpt.restore_random_state(saved, processes)
        self.meter = LossMeter(processes)
        self.writer = MetricsWriter(
            folder,
            processes,
            label=self.name,
            total_steps=self.experiment.total_steps,
            start_step=self.step,
            tensorboard=config.run.tensorboard,
        )
        self.evaluations = processes.broadcast([r for r in read_metrics(folder) if r["kind"] == "evaluation"])

    @property
    def evaluated(self) -> FeatureExtractor | LogitsOnly:
        """The network that is evaluated and exported: the student or its exponential average."""
        return self.experiment.student if self.average is None else cast(LogitsOnly, self.average.module)

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
            good = self.folder / ckpt.LAST
            last = f"the last good checkpoint is {good}" if good.exists() else "no checkpoint was written before"
            raise NonFiniteLoss(f"{error}; {last}. Lower train.learning_rate or distill.alpha") from error
        finally:
            self.writer.close()
            self.engine.destroy()

    def _start_pace(self) -> Pace:
        """A run of some length first measures its loader, so that it can say whether that holds it up."""
        experiment, train, rate = self.experiment, self.config.train, None
        if (experiment.total_steps - self.step) * train.accumulation_steps >= _WORTH_MEASURING:
            epochs = range(self.step // experiment.steps_per_epoch, experiment.epochs)
            ahead = chain.from_iterable(map(experiment.micro_batches, epochs))
            rate = loader_rate(ahead, self.processes, micro_batch_size=experiment.loader.schedule.micro_batch_size)
        return Pace(self.processes, global_batch_size=train.global_batch_size, loader_rate=rate)

    def _start_average(self) -> AveragedModel | None:
        decay = self.config.train.ema_decay
        if decay is None:
            return None
        return AveragedModel(self.experiment.student, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)

    def _train_epoch(self) -> None:
        """Trains from ``self.step`` to the end of its epoch, or to the last step."""
        train, run = self.config.train, self.config.run
        per_epoch, total = self.experiment.steps_per_epoch, self.experiment.total_steps
        epoch, start = divmod(self.step, per_epoch)
        batches = self.experiment.micro_batches(epoch, start)
        self.engine.train()
        self.pace.begin(self.step)
        for _ in range(start, min(per_epoch, total - epoch * per_epoch)):
            rate = learning_rate(train, self.step, total_steps=total, steps_per_epoch=per_epoch)
            for group in self.engine.optimizer.param_groups:
                group["lr"] = rate
            self.method.set_progress(self.step / per_epoch)
            for micro_step in range(train.accumulation_steps):
                batch, target = self.pace.next(batches)
                update = micro_step == train.accumulation_steps - 1
                terms = train_step(self.engine, self.experiment.teacher, self.method, batch, target, update=update)
                self.meter.update(terms, self.step)
            self.step += 1
            if self.average is not None:
                self.average.update_parameters(self.experiment.student)
            self.writer.advance(self.step)
            if self.step % run.log_every_steps == 0 or self.step == total:
                means = self.meter.read()
                self.writer.write(
                    "train",
                    self.step,
                    {
                        "epoch": round(self.step / per_epoch, 2),
                        **means,
                        "lr": rate,
                        **self.pace.read(self.step),
                        "memory_gib": memory_gib(self.processes.device),
                    },
                )
            if run.checkpoint_every_steps and self.step % run.checkpoint_every_steps == 0:
                self._save()
            if (number := self.stop.agreed()) and self.step % per_epoch and self.step < total:
                self._save()
                raise Interrupted(number, f"[{self.name}] stopped at step {self.step}; saved {self.folder / ckpt.LAST}")
        average_buffers(self.side, self.processes)
        if self.average is not None:
            average_buffers(self.average, self.processes)
        number = self.stop.agreed()
        if number or self._evaluation_due():  # short epochs would otherwise spend their time on the disk
            self._save()
        if (skipped := bad_sample_record(self.config, self.experiment.loader, self.processes)) is not None:
            self.writer.write("bad_samples", self.step, {"epoch": epoch + 1, **skipped})
        if number:
            raise Interrupted(number, f"[{self.name}] stopped at step {self.step}; saved {self.folder / ckpt.LAST}")

    def _save(self) -> None:
        self.meter.check()
        ckpt.save_checkpoint(
            self.folder,
            step=self.step,
            engine=self.engine,
            method=self.method,
            average=self.average,
            processes=self.processes,
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
        epoch = -(-self.step // self.experiment.steps_per_epoch)
        values: dict[str, Any] = {"epoch": epoch, **self._evaluate("val")}
        values.update(
            head_indicators(
                self.method, self.experiment.teacher, self.experiment.loader.evaluate("val"), self.processes
            )
        )
        record = {"step": self.step, **values}
        if _best([*self.evaluations, record]) is record and self.processes.is_first:
            ckpt.export_student(self.evaluated.plain, self.folder / ckpt.BEST)
        self.writer.write("evaluation", self.step, values)
        self.evaluations.append(record)
        self.processes.barrier()

    def _evaluate(self, split: Literal["val", "test"]) -> dict[str, float]:
        bf16 = self.config.train.precision == "bf16"
        return evaluate(self.evaluated, self.experiment.loader.evaluate(split), self.processes, bf16=bf16)

    def _finish(self) -> dict[str, Any]:
        """Exports the student and evaluates its last and best weights on the test split, once."""
        plain = self.evaluated.plain
        if self.processes.is_first:
            ckpt.export_student(plain, self.folder / "student.safetensors")
        last = self.evaluations[-1]
        best = _best(self.evaluations)
        if self.experiment.splits.test_is_val:
            last_test, best_test = last, best
        else:
            last_test = self._evaluate("test")
            best_test = last_test
            if best["step"] != last["step"]:
                ckpt.import_student(plain, self.folder / ckpt.BEST)
                best_test = self._evaluate("test")
        keys = ("accuracy", "top5", "ce")
        result = {
            "label": self.label,
            "seed": self.config.run.seed,
            "method": self.config.distill.method,
            "model": self.config.student.model,
            "steps": self.step,
            "test_is_val": self.experiment.splits.test_is_val,
            "best": {
                "epoch": best["epoch"],
                "val": {k: best[k] for k in keys},
                "test": {k: best_test[k] for k in keys},
            },
            "last": {
                "epoch": last["epoch"],
                "val": {k: last[k] for k in keys},
                "test": {k: last_test[k] for k in keys},
            },
            "weights": str(self.folder / "student.safetensors"),
        }
        if self.processes.is_first:
            write_result(self.folder, result)
        self.processes.barrier()
        return result


def _best(evaluations: list[dict[str, Any]]) -> dict[str, Any]:
    """The evaluation with the highest accuracy; small splits tie often, so the lower cross-entropy decides."""
    return max(evaluations, key=lambda record: (record["accuracy"], -record["ce"]))
