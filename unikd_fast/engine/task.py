"""What differs between tasks: data, networks, the loss of a step, an evaluation and which one is the best.

The data set decides on the task (`build.task_of`). Everything else in the engine, from the optimiser to checkpoints, is
the same for all.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from unikd_fast.config import Config
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.timing import UNTIMED, StepClock
from unikd_fast.methods import Method, Needs
from unikd_fast.models import StudentCard
from unikd_fast.tasks import Figures
from unikd_fast.values import Features, Loss, Target


class Task(ABC):
    """A task: `Classification` or `Detection`; its objects have no state.

    Attributes:
        figures: figures of its evaluations.
        term_names: terms of `loss` besides the method's.
    """

    figures: Figures
    term_names: tuple[str, ...] = ()

    @abstractmethod
    def open_data(self, config: Config, needs: Needs, processes: Processes) -> Any:
        """Return the splits of a run; all processes must call it.

        Raises:
            ConfigError: the data or a setting does not fit the method.
        """

    @abstractmethod
    def build_loader(self, config: Config, splits: Any, needs: Needs, processes: Processes) -> Any:
        """Return this process's `Loader` of the splits."""

    @abstractmethod
    def build_student(self, config: Config, splits: Any, needs: Needs, batch: int) -> nn.Module:
        """Return the student, with the features that the method needs; ``batch`` samples are a micro-batch."""

    @abstractmethod
    def build_teacher(
        self, config: Config, splits: Any, needs: Needs, *, with_weights: bool = True, batch: int | None = None
    ) -> nn.Module:
        """Return the teacher's network in fp32; see `networks.build_teacher_network`."""

    @abstractmethod
    def context(self, splits: Any, student: nn.Module, teacher: nn.Module | None) -> dict[str, Any]:
        """Return what the method can know of networks and data, as fields of `RunContext`."""

    @abstractmethod
    def student_module(self, student: nn.Module, method: Method[Any], autocast: torch.dtype | None) -> nn.Module:
        """Return the student with what the method trains alongside it."""

    @abstractmethod
    def check_method(
        self,
        config: Config,
        student_module: nn.Module,
        method: Method[Any],
        teacher: nn.Module | None,
        head: nn.Module | None,
        batch: int,
        processes: Processes,
    ) -> None:
        """Run once what the method puts on top of both networks, which have been checked by themselves.

        Raises:
            ConfigError: it does not run.
        """

    @abstractmethod
    def start_teacher(
        self, config: Config, network: nn.Module, loader: Any, splits: Any, processes: Processes
    ) -> nn.Module:
        """Return the teacher as it runs, with its `record`."""

    @abstractmethod
    def loss(
        self,
        engine: Any,
        teacher: nn.Module | None,
        method: Method[Any],
        batch: Any,
        target: Target | None = None,
        clock: StepClock = UNTIMED,
    ) -> Loss:
        """Return the loss of one micro-batch; see `step.train_step`."""

    def trial_inputs(self, config: Config, needs: Needs, images: int, device: torch.device) -> tuple[Any, ...]:
        """Return what the student's module takes of so many images, to measure what it keeps of them."""
        views = torch.zeros(images, 3, config.data.image_size, config.data.image_size, device=device)
        return views, views if needs.second_view else None

    @abstractmethod
    def teacher_features(self, teacher: nn.Module, batch: Any) -> tuple[Features, torch.Tensor]:
        """Return the teacher's features of a batch, without a student, and the labels of their rows."""

    @abstractmethod
    def evaluate(
        self,
        network: nn.Module,
        loader: Any,
        splits: Any,
        split: Literal["val", "test"],
        processes: Processes,
        *,
        autocast: torch.dtype | None = None,
        keep: list[Any] | None = None,
    ) -> dict[str, Any]:
        """Return the figures of a network on a split, exact over all processes, which all must call it.

        Args:
            keep: list to append this process's outputs to. If None, they are not kept.
        """

    @abstractmethod
    def write_outputs(self, folder: Path, outputs: list[Any], splits: Any, processes: Processes) -> None:
        """Write what `evaluate` kept of the test split into a run folder; all processes must call it."""

    @abstractmethod
    def require_teacher(
        self, config: Config, found: dict[str, float], splits: Any, processes: Processes, name: str
    ) -> None:
        """Log what the teacher reaches on the validation split, and refuse one that is not worth learning from.

        Raises:
            ConfigError: on every process.
        """

    @abstractmethod
    def plain_teacher(self, config: Config, network: nn.Module, splits: Any, processes: Processes) -> nn.Module:
        """Return the teacher for one pass over a split: as it runs, but neither compiled nor compared with itself."""

    def size_in_words(self, config: Config) -> str:
        """Return the size of the images of training."""
        return f"{config.data.image_size} x {config.data.image_size}"

    @abstractmethod
    def card(self, config: Config, splits: Any, loader: Any) -> StudentCard | None:
        """Return what one must know to use the student, or None if its images' preprocessing is not known."""
