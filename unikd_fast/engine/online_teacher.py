"""The teacher of a run: in its precision, compiled, and compared with itself in fp32 before it teaches."""

import copy
from itertools import islice
from typing import Any

import torch
from torch import nn

from unikd_fast.config import Config
from unikd_fast.data.loader import Loader
from unikd_fast.engine.out_of_memory import naming_part
from unikd_fast.engine.processes import Processes
from unikd_fast.engine.sharding import local_batch_size
from unikd_fast.teacher import (
    Affine,
    OnlineTeacher,
    check_fidelity,
    measure_fidelity,
    pool_fidelity,
    resolve_precision,
)


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
    """The teacher that ``config.teacher`` describes, not compared with anything.

    Args:
        network: maps images to Features, in fp32; moved and changed in place.
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


@naming_part("teacher")
def start_teacher(
    config: Config,
    network: nn.Module,
    loader: Loader,
    processes: Processes,
    *,
    renormalise: Affine | None,
    precision: str | None = None,
    batch_size: int | None = None,
) -> tuple[OnlineTeacher, dict[str, Any]]:
    """Makes the teacher that ``config.teacher`` describes and compares it with the network on training batches.

    All processes come to one decision: the first one resolves precision "auto", fp16 gives way to bf16 everywhere if
    it is not finite on any of them, and the figures are pooled.

    Args:
        config: with a teacher.
        network: maps images to Features, in fp32; changed in place.
        loader: of this process's training batches.
        renormalise: see OnlineTeacher.
        precision: None for that of the configuration.
        batch_size: images of one call of the network; None: that of a micro-batch if it is compiled, any otherwise.

    Returns:
        The teacher, and what the run folder says about it: how it runs, and its fidelity or why there is none.

    Raises:
        ValueError: the teacher is not the network it was made of, or cannot be compiled; see `check_fidelity`.
    """
    section = config.teacher
    assert section is not None
    device = processes.device
    unsettled = precision is None and section.precision == "auto"
    precision = processes.broadcast(resolve_precision(precision or section.precision, device))
    unsettled = unsettled and precision == "fp16"
    network = network.to(device).eval()
    unchecked = _why_unchecked(config, precision)
    reference = None if unchecked else copy.deepcopy(network).requires_grad_(False)
    if batch_size is None and section.compile is not None:
        batch_size = local_batch_size(config, processes)
    teacher = make_teacher(
        config,
        network,
        device,
        precision="auto" if unsettled else precision,
        renormalise=renormalise,
        compile_mode=section.compile,
        batch_size=batch_size,
    )
    first_call = unsettled or section.compile is not None
    needed = section.fidelity.batches if reference is not None else int(first_call)
    batches = [batch.images for batch in islice(loader.train(0), needed)] if needed else []
    if first_call:  # compiles here, and not in the first step
        teacher.settle(all(processes.gather(teacher.is_finite(batches))))
    record: dict[str, Any] = {
        "model": section.model,
        "weights": section.weights,
        "precision": teacher.precision,
        "folded_batch_norms": teacher.folded,
        "compile": section.compile,
        "fidelity": None,
        "fidelity_skipped": unchecked,
    }
    if reference is None:
        return teacher, record
    found = pool_fidelity(processes.gather(measure_fidelity(teacher, reference, batches)))
    check_fidelity(found, teacher, min_agreement=section.fidelity.min_agreement)
    return teacher, {**record, "fidelity": found._asdict()}


def describe_teacher(record: dict[str, Any]) -> list[str]:
    """How the teacher runs and how faithful it is, for ``--dry-run``."""
    lines = [
        f"          runs in {record['precision']}, {record['folded_batch_norms']} BatchNorms folded, compile "
        f"{record['compile'] or 'off'}"
    ]
    found = record["fidelity"]
    if found is None:
        return [*lines, f"          fidelity not checked: {record['fidelity_skipped']}"]
    levels = ", ".join(f"{error:.1e}" for error in found["feature_errors"]) or "none"
    return [
        *lines,
        f"          against fp32 on {found['images']} images: logits {found['relative_logit_error']:.1e}, same class "
        f"{100 * found['top1_agreement']:.2f} % ({found['near_ties']} near ties), levels {levels}",
    ]


def _why_unchecked(config: Config, precision: str) -> str | None:
    section = config.teacher
    assert section is not None
    if section.weights == "random":
        return "teacher.weights=random, whose classes mean nothing"
    if section.fidelity.batches == 0:
        return "teacher.fidelity.batches=0"
    if _as_given(config, precision):
        return "the teacher runs as it was given, in fp32 and eagerly"
    return None


def _as_given(config: Config, precision: str) -> bool:
    section = config.teacher
    assert section is not None
    return precision == "fp32" and not section.fold_batch_norm and section.compile is None
