"""A teacher made from a network, and its fidelity to that network in fp32."""

import copy
import logging
from collections.abc import Callable
from functools import partial
from itertools import islice
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn

from unikd_fast.config import Config
from unikd_fast.data.loader import Loader
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.memory import oom_hint
from unikd_fast.engine.zero import local_batch_size
from unikd_fast.teacher import (
    Affine,
    Fidelity,
    OnlineTeacher,
    check_fidelity,
    measure_fidelity,
    pool_fidelity,
    resolve_precision,
)
from unikd_fast.teacher.fidelity import Checked

_logger = logging.getLogger("unikd_fast")


def make_teacher(
    config: Config,
    network: nn.Module,
    device: torch.device,
    *,
    precision: str,
    renormalise: Affine | None,
    compile_mode: str | None = None,
    batch_size: int | None = None,
) -> OnlineTeacher:
    """Return the teacher that ``config.teacher`` describes, without checking its fidelity.

    Args:
        config: configuration of a run with a teacher.
        network: maps images to Features, in fp32; moved and changed in place.
        device: device of the run.
        precision, renormalise, compile_mode, batch_size: see OnlineTeacher.
    """
    assert config.teacher is not None
    return OnlineTeacher(
        network.to(device).eval(),
        precision=precision,
        fold=config.teacher.fold_batch_norm,
        compile_mode=compile_mode,
        channels_last=config.train.channels_last or device.type == "cuda" or not _as_given(config, precision),
        batch_size=batch_size,
        renormalise=renormalise,
    )


@oom_hint("teacher")
def start_teacher(
    config: Config,
    network: nn.Module,
    loader: Loader,
    processes: Processes,
    *,
    renormalise: Affine | None,
    precision: str | None = None,
    batch_size: int | None = None,
) -> OnlineTeacher:
    """Make the teacher that ``config.teacher`` describes and compare it with the network on training batches; see
    `checked_teacher`.

    Args:
        config: configuration of a run with a teacher.
        network: maps images to Features, in fp32; changed in place.
        loader: this process's loader.
        processes: processes of the run.
        renormalise: see `OnlineTeacher`.
        precision: precision of the teacher. If None, the configuration's.
        batch_size: images of one call of the network. If None, those of a micro-batch if it is compiled, else any.

    Returns:
        The teacher, whose `record` holds how it runs, and its fidelity or why it was not checked.

    Raises:
        ValueError: the teacher does not match the network it was made from, or cannot be compiled; see
            `check_fidelity`.
    """
    section = config.teacher
    assert section is not None
    if batch_size is None and section.compile is not None:
        batch_size = local_batch_size(config, processes)
    make = partial(
        make_teacher,
        config,
        device=processes.device,
        renormalise=renormalise,
        compile_mode=section.compile,
        batch_size=batch_size,
    )

    def images(count: int) -> list[Tensor]:
        return [batch.images for batch in islice(loader.train(0), count)]

    return checked_teacher(config, network, images, processes, make=make, measure=measure_fidelity, precision=precision)


T = TypeVar("T", bound="CheckedTeacher")


class CheckedTeacher(Checked, Protocol):
    """A teacher whose precision can be settled, see `OnlineTeacher`."""

    record: dict[str, Any]

    def is_finite(self, batches: Any) -> bool: ...

    def settle(self, finite: bool) -> None: ...


def checked_teacher(
    config: Config,
    network: nn.Module,
    batches: Callable[[int], list[Any]],
    processes: Processes,
    *,
    make: Callable[..., T],
    measure: Callable[[T, nn.Module, list[Any]], Fidelity],
    precision: str | None = None,
    compared: str = "training images",
) -> T:
    """Make a teacher and compare it with the network that it is made from.

    All processes decide alike: the first one resolves precision "auto", fp16 is replaced by bf16 everywhere if it is
    not finite on any of them, and the metrics are pooled. Where "auto" came to a precision that fails the comparison,
    the teacher runs in fp32.

    Args:
        config: configuration of a run with a teacher.
        network: network in fp32; moved to the device, and changed in place.
        batches: function of a number that returns as many training batches, on the device.
        processes: processes of the run.
        make: function of the network, and of a precision by name, that returns the teacher.
        measure: function of teacher, copy of the network and batches that compares the two.
        precision: precision of the teacher. If None, the configuration's.
        compared: what is compared, for messages.

    Raises:
        ValueError: see `start_teacher`.
    """
    section = config.teacher
    assert section is not None
    chosen_here = precision is None and section.precision == "auto"
    precision = processes.broadcast(resolve_precision(precision or section.precision, processes.device))
    unsettled = chosen_here and precision == "fp16"
    network = network.to(processes.device).eval()
    unchecked = _why_unchecked(config, precision)
    reference = None if unchecked else copy.deepcopy(network).requires_grad_(False)
    teacher = make(network, precision="auto" if unsettled else precision)
    first_call = unsettled or section.compile is not None
    needed = section.fidelity.batches if reference is not None else int(first_call)
    shown = batches(needed) if needed else []
    if first_call:  # compiles here, and not in the first step
        teacher.settle(all(processes.gather(teacher.is_finite(shown))))
    several = [dict(member) for member in section.ensemble]
    teacher.record |= {
        "model": section.model,
        "weights": section.weights,
        **({"weight": section.weight, "ensemble": several} if several else {}),
        "precision": teacher.precision,
        "folded_batch_norms": teacher.folded,
        "compile": section.compile,
        "fidelity": None,
        "fidelity_skipped": unchecked,
    }
    if reference is None:
        return teacher
    found = pool_fidelity(processes.gather(measure(teacher, reference, shown)))
    try:
        check_fidelity(found, teacher, min_agreement=section.fidelity.min_agreement, compared=compared)
        teacher.record["fidelity"] = found._asdict()
        return teacher
    except ValueError as error:
        if not chosen_here or teacher.precision == "fp32":
            raise
        reason = str(error).rpartition("; ")[0]
    _logger.warning("teacher.precision = auto: the teacher runs in fp32 instead; %s", reason)
    del teacher, network, shown  # before there is another
    again = partial(checked_teacher, make=make, measure=measure, precision="fp32", compared=compared)
    return again(config, reference, batches, processes)


def describe_teacher(record: dict[str, Any]) -> list[str]:
    """Return how the teacher runs and its fidelity, as lines for ``--dry-run``."""
    lines = [
        f"          runs in {record['precision']}, {record['folded_batch_norms']} BatchNorms folded, compile "
        f"{record['compile'] or 'off'}"
    ]
    found = record["fidelity"]
    if found is None:
        return [*lines, f"          fidelity not checked: {record['fidelity_skipped']}"]
    what = record.get("compared", "images")
    levels = ", ".join(f"{error:.1e}" for error in found["feature_errors"]) or "none"
    return [
        *lines,
        f"          against fp32 on {found['images']} {what}: logits {found['relative_logit_error']:.1e}, same class "
        f"{100 * found['top1_agreement']:.2f} % ({found['near_ties']} near ties), levels {levels}",
    ]


def _why_unchecked(config: Config, precision: str) -> str | None:
    section = config.teacher
    assert section is not None
    if section.weights == "random":
        return "teacher.weights=random, whose classes mean nothing"
    if section.is_trained:  # a dry run, which may see a new classifier
        return "the run trains the teacher first"
    if section.fidelity.batches == 0:
        return "teacher.fidelity.batches=0"
    if _as_given(config, precision):
        return "the teacher runs as it was given, in fp32 and eagerly"
    return None


def _as_given(config: Config, precision: str) -> bool:
    section = config.teacher
    assert section is not None
    return precision == "fp32" and not section.fold_batch_norm and section.compile is None
