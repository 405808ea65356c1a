"""What `unikd export` does: write a student, read the file back, and compare the outputs."""

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from unikd_fast.config import Config, ConfigError, run_configs
from unikd_fast.config.load import read_stored, run_path, teacher_config
from unikd_fast.errors import FileError, RunError
from unikd_fast.io import make_folder, new_path, read_json, write_json
from unikd_fast.settings import LARGEST_IMAGE

if TYPE_CHECKING:
    from unikd_fast.export.formats import Agreement
    from unikd_fast.export.student import Average

_CONFIG = "config.json"
_DEPTH = 2  # a comparison keeps its runs in seed-<seed>/<label>


def export_run(
    run: Path,
    target: Path,
    *,
    checkpoint: str = "last",
    average: "Average" = "auto",
    opset: int | None = None,
    image_size: int | None = None,
    preprocess: bool = False,
    force: bool = False,
) -> str:
    """Write the student of a run to a file of its own, and return a one-line summary.

    Args:
        run: folder of the run.
        target: file to write; its suffix is the format.
        checkpoint: see `read_weights`.
        average: see `read_weights`.
        opset: ONNX opset. If None, torch's default.
        image_size: height and width of the images that the file is made for. If None, those of the run.
        preprocess: whether the file preprocesses images itself (ONNX).
        force: whether to replace an existing file.

    Raises:
        ConfigError: an option is invalid, or the folder is not a run folder.
        CheckpointError: the checkpoint is damaged or missing.
        RunError: the file cannot be written, or its outputs differ.
    """
    if image_size is not None and image_size > LARGEST_IMAGE:
        raise ConfigError(f"--image-size {image_size} is too large; give at most {LARGEST_IMAGE}")
    config = read_run(run)
    _refuse(run, target, force=force)
    # Import torchvision and DeepSpeed only now. What DeepSpeed prints must not precede our line.
    with redirect_stdout(sys.stderr):
        from unikd_fast.engine.folder import BEST
        from unikd_fast.engine.inputs import as_config_errors
        from unikd_fast.export.formats import (
            FORMATS,
            check,
            check_preprocessing,
            format_of,
            plain_logits,
            random_images,
            with_logits,
        )
        from unikd_fast.export.student import load_student, read_weights
        from unikd_fast.models import StudentCard, parameter_count

    file_format = format_of(target, opset, preprocesses=preprocess)
    has_average = config.train.ema_decay is not None
    weights = read_weights(run, checkpoint, average, has_average=has_average)
    # The mean and deviation may be measured on the data, which need not be here: the run's own file holds them.
    with as_config_errors():
        card = StudentCard.read(run / BEST)
    if card is not None and card.long_side is not None:
        from unikd_fast.export.detectors import FORMATS as DETECTOR_FORMATS
        from unikd_fast.export.detectors import check_detector_format, write_detector

        check_detector_format(target, preprocesses=preprocess, image_size=image_size)
        _refuse_card(target, card.as_dict(), DETECTOR_FORMATS, force=force)
        what = f"{card.model} of {run} from {weights.origin}; {card.num_classes} classes"
        title = f"{card.model} as {file_format.title}"
        write_it = partial(write_detector, card, weights.tensors, opset=opset)
        agreement, size = _written(target, write_it, title, force=force)
        write_json(card_path(target), card.as_dict())
        compared = (
            "which load into the plain torchvision FasterRCNN"
            if file_format.exact
            else f"for images of any size; boxes and scores differ by at most {agreement.difference:.1e} of their size "
            f"({agreement.allowed:.1e} allowed)"
        )
        return (
            f"{target}: {what}, {size / 2**20:.2f} MiB, {file_format.title} {compared}, and how to use it in "
            f"{card_path(target).name}"
        )
    student = load_student(
        config.student.model,
        config.student.weights,
        weights.tensors,
        num_classes=config.data.num_classes,
        model_args=config.student.model_args,
    )
    if card is not None:
        card = replace(card, preprocesses=preprocess)
        if image_size is not None:  # some formats take images of this size alone
            card = replace(card, preprocessing=replace(card.preprocessing, image_size=image_size))
        _refuse_card(target, card.as_dict(), tuple(FORMATS), force=force)
    elif preprocess:
        raise ConfigError(f"--preprocess: {run} does not say how its images are made; train it again, or leave it out")
    student = replace(student, card=card)
    images = random_images(image_size or config.student.image_size or config.data.image_size)
    student = replace(student, logits=with_logits(student.network, images))
    logits = plain_logits(student.logits, images)

    def write(path: Path) -> "Agreement":
        file_format.write(student, path, images[:2], opset)
        run_again = file_format.read(student, path)
        if card is not None and preprocess:
            return check_preprocessing(run_again, student.logits, card.preprocessing)
        return check(run_again, student.logits, images, logits, exact=file_format.exact)

    agreement, size = _written(target, write, f"{student.name} as {file_format.title}", force=force)
    beside = ""
    if card is not None:
        write_json(card_path(target), card.as_dict())
        beside = f", and how to use it in {card_path(target).name}"
    compared = (
        "which is bit for bit the plain network"
        if file_format.exact
        else f"for {'uint8 images of any size' if preprocess else f'images of {images.shape[-1]} pixels'}; logits "
        f"differ by at most {agreement.difference:.1e} of their size ({agreement.allowed:.1e} allowed)"
    )
    return (
        f"{target}: {student.name} of {run} from {weights.origin}; {student.num_classes} classes, "
        f"{parameter_count(student.network):,} parameters, {size / 2**20:.2f} MiB, {file_format.title} "
        f"{compared}{beside}"
    )


def _written(target: Path, write: "Callable[[Path], Agreement]", title: str, *, force: bool) -> "tuple[Agreement, int]":
    """Write a file under another name, check it, and put it in place; return how it compares and its size in bytes.

    Raises:
        RunError: it cannot be written, or its outputs differ.
        ConfigError: there is another file by now.
    """
    make_folder(target.parent)
    with new_path(target) as unfinished:
        try:
            agreement = write(unfinished)
        except OSError:
            raise
        except Exception as error:  # of one of three libraries, each with its own kinds
            raise RunError(f"{target} is not written, exporting {title} failed: {_root_cause(error)}") from error
        size = unfinished.stat().st_size
        _refuse_existing(target, force=force)  # it may have been written meanwhile
    return agreement, size


def card_path(exported: Path) -> Path:
    """Return the file beside an exported student that says how to use it.

    Example:
        >>> card_path(Path("student.onnx"))
        PosixPath('student.json')
    """
    return exported.with_suffix(".json")


def read_run(folder: Path) -> Config:
    """Return the configuration of the single run whose checkpoints are in a folder.

    Args:
        folder: folder of a run, of one run of a comparison (``runs/x/seed-0/unikd``), or of a teacher that was trained
            first (``runs/x/teacher``).

    Raises:
        ConfigError: the folder is not a run folder, or holds several runs, which the message lists.

    Example:
        >>> read_run(Path("runs/digits-5cb1dd29/seed-0/student-unikd")).distill.method
        'unikd'
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder} is not a folder; give a run folder (run.dir)")
    here = Path(os.path.abspath(folder))  # noqa: PTH100 - resolve() would leave a linked folder for another one
    for root in (here, *here.parents[:_DEPTH]):
        if (root / _CONFIG).is_file():
            runs = _runs(read_stored(root / _CONFIG))
            name = here.relative_to(root).as_posix()
            if name in runs:
                return runs[name]
            raise ConfigError(_which(folder, root, runs))
    raise ConfigError(f"{folder} is not a run folder, it has no {_CONFIG}; give the folder in run.dir")


def _runs(config: Config) -> dict[str, Config]:
    """Return the single runs of a configuration by their folders relative to its own."""
    runs: dict[str, Config] = {}
    for label, seed, single in run_configs(config):
        home = f"seed-{seed}/" if config.compare else ""
        teacher = single.teacher
        if single.distill.method != "none" and teacher is not None and teacher.is_trained:
            runs.setdefault(f"{home}teacher", teacher_config(single))
        runs[run_path(config, label, seed)] = single
    return runs


def _which(folder: Path, root: Path, runs: Mapping[str, Config]) -> str:
    given = root == Path(os.path.abspath(folder))  # noqa: PTH100
    started = [str((folder if given else root) / name) for name in runs if (root / name).is_dir()]
    if given:
        what = f"{folder} holds a comparison of {len(runs)} runs"
    else:
        what = f"{folder} is not a run folder, but lies in {root}, which is one"
    return f"{what}; name one of these: {', '.join(started)}" if started else f"{what}, and none has started"


def _refuse(run: Path, target: Path, *, force: bool) -> None:
    """Raise ConfigError for an unusable target before anything is read.

    Raises:
        ConfigError: the file would replace another one, or look like one of the run's own.
    """
    place = target.resolve()
    if (run / "checkpoints").resolve() in place.parents or place == (run / "student.safetensors").resolve():
        raise ConfigError(f"--to {target}: the run writes that itself; give another name or folder")
    if target.is_dir():
        raise ConfigError(f"--to {target} is a folder; give the name of a file in it")
    _refuse_existing(target, force=force)


def _refuse_card(target: Path, card: Mapping[str, object], suffixes: Sequence[str], *, force: bool) -> None:
    """Raise ConfigError if the file that says how to use the export is another's, or would no longer hold for an export
    beside it.

    Raises:
        ConfigError: it is, or would not.
    """
    beside = card_path(target)
    if not beside.exists():
        return
    try:
        found = read_json(beside)
    except FileError:
        found = {}
    others = [other for suffix in suffixes if (other := target.with_suffix(suffix)) != target and other.exists()]
    if "preprocessing" not in found:
        if force:
            return
        what, remedy = "is not of an export", "--force to replace it"
    elif others and found != json.loads(json.dumps(card)):  # which would be read wrongly from now on
        what, remedy = f"says how to use {others[0]}, which is of other classes or images", f"remove {others[0]}"
    else:
        return
    raise ConfigError(
        f"--to {target}: how to use it is written to {beside}, which {what}; give another name, or {remedy}"
    )


def _refuse_existing(target: Path, *, force: bool) -> None:
    if not force and (target.exists() or target.is_symlink()):
        raise ConfigError(f"--to {target} exists; give another name, or --force to replace it")


def _root_cause(error: BaseException) -> str:
    """Return the first line of the original error; exporters wrap it in advice to their own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = str(error).strip().partition("\n")[0]
    return line if isinstance(error, RunError) else f"{type(error).__name__}: {line}"
