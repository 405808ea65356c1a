"""``unikd-export``: the student alone from any checkpoint of a run, in a file that other programs read.

``python -m unikd_fast.export.command`` is the same.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

from unikd_fast.command import run_command
from unikd_fast.config import ConfigError
from unikd_fast.errors import RunError
from unikd_fast.export.run import read_run
from unikd_fast.io import make_folder, new_path

# Before torch is loaded; see launch_distill.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main(arguments: Sequence[str] | None = None) -> int:
    """Exports one student and returns the exit code; ``--help`` describes the options."""
    options = _parser().parse_args(arguments)
    return run_command("unikd-export", lambda: _export(options))


def _export(options: argparse.Namespace) -> int:
    """Does it, and says what in a line."""
    run, target = Path(options.run), Path(options.to)
    config = read_run(run)
    _refuse(run, target, force=options.force)
    # Only now torch and DeepSpeed. What DeepSpeed prints must not stand before our line.
    with redirect_stdout(sys.stderr):
        from unikd_fast.engine.folder import BEST
        from unikd_fast.engine.inputs import refusing_misfits
        from unikd_fast.export.formats import check, format_of, plain_logits, random_images
        from unikd_fast.export.run import load_student, read_weights
        from unikd_fast.models import parameter_count, stored_preprocessing

    file_format = format_of(target, options.opset)
    has_average = config.train.ema_decay is not None
    weights = read_weights(run, options.checkpoint, options.average, has_average=has_average)
    student = load_student(
        config.student.model, config.student.weights, weights.tensors, num_classes=config.data.num_classes
    )
    # Whose mean and deviation may be measured on its data, which need not be here: its own file says them.
    with refusing_misfits():
        student = replace(student, preprocessing=stored_preprocessing(run / BEST))
    images = random_images(options.image_size or config.data.image_size)
    logits = plain_logits(student.network, images)
    make_folder(target.parent)
    with new_path(target) as unfinished:
        try:
            file_format.write(student, unfinished, images[:2], options.opset)
            run_again = file_format.read(student, unfinished)
            agreement = check(run_again, student.network, images, logits, exact=file_format.exact)
        except OSError:
            raise
        except Exception as error:  # of one of three libraries, each with kinds of its own
            raise RunError(
                f"{target} is not written, {student.name} as {file_format.title} went wrong: {_root_cause(error)}"
            ) from error
        size = unfinished.stat().st_size
        _refuse_existing(target, force=options.force)  # somebody else may have written it meanwhile
    compared = (
        "which is bit for bit the plain network"
        if file_format.exact
        else f"for images of {images.shape[-1]} pixels; logits differ by at most {agreement.difference:.1e} of their "
        f"size ({agreement.allowed:.1e} allowed)"
    )
    print(
        f"{target}: {student.name} of {run} from {weights.origin}; {student.num_classes} classes, "
        f"{parameter_count(student.network):,} parameters, {size / 2**20:.2f} MiB, {file_format.title} {compared}"
    )
    return 0


def _refuse(run: Path, target: Path, *, force: bool) -> None:
    """Before anything is read.

    Raises:
        ConfigError: the file would replace another one, or be taken for one of the run's own.
    """
    place = target.resolve()
    if (run / "checkpoints").resolve() in place.parents or place == (run / "student.safetensors").resolve():
        raise ConfigError(f"--to {target}: the run writes that itself; give another name or folder")
    if target.is_dir():
        raise ConfigError(f"--to {target} is a folder; give the name of a file in it")
    _refuse_existing(target, force=force)


def _refuse_existing(target: Path, *, force: bool) -> None:
    if not force and (target.exists() or target.is_symlink()):
        raise ConfigError(f"--to {target} exists; give another name, or --force to replace it")


def _root_cause(error: BaseException) -> str:
    """The first line of what was raised first; exporters wrap it in advice to their own developers."""
    while error.__cause__ is not None:
        error = error.__cause__
    line = str(error).strip().partition("\n")[0]
    return line if isinstance(error, RunError) else f"{type(error).__name__}: {line}"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unikd-export",
        description="Writes the student of a run, finished or not, to a file of its own, reads the file back and "
        "compares what it computes with the plain network; a file that is there has passed.",
        epilog="exit codes: 0 done; 1 the file could not be written, or computes something else; 2 an option or the "
        "run folder is not usable; 6 the checkpoint is damaged, or there is none; 130 stopped by Ctrl-C",
    )
    parser.add_argument("run", metavar="RUN", help="folder of a run (run.dir); of a comparison that of one of its runs")
    parser.add_argument(
        "--to",
        required=True,
        metavar="FILE",
        help="file to write: .safetensors (state dict of the torchvision, timm or cifar model), .pt (TorchScript) or "
        ".onnx",
    )
    parser.add_argument(
        "--checkpoint",
        default="last",
        metavar="WHICH",
        help="last: the newest that is whole (default); best: of the best evaluation; step-<number>; or a path",
    )
    parser.add_argument(
        "--average",
        choices=("auto", "yes", "no"),
        default="auto",
        help="the exponential average of the weights (train.ema_decay) instead of the last ones; auto: if there is one",
    )
    parser.add_argument("--opset", type=_positive, metavar="N", help="of ONNX, 18 or later; torch's default otherwise")
    parser.add_argument(
        "--image-size",
        type=_positive,
        metavar="N",
        help="height and width of the images that .pt and .onnx are made for; data.image_size otherwise",
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


if __name__ == "__main__":
    sys.exit(main())
