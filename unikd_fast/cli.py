"""The command `unikd`: its sub-commands, from the arguments to the exit code.

Nothing slow is imported before a sub-command needs it, so `--help` answers at once and without the extras.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from unikd_fast.command import run_command
from unikd_fast.errors import CacheError, ConfigError, DataError, RunError
from unikd_fast.recipes import command as reproduce
from unikd_fast.recipes.experiments import add_experiment_arguments, read_experiment

if TYPE_CHECKING:
    from unikd_fast.config import Config
    from unikd_fast.engine.distributed import Processes
    from unikd_fast.teacher.cache import CacheFolder

_EXIT_CODES = (
    "exit codes: 0 done; 1 a file cannot be read or written; 2 the arguments or the configuration are not usable; "
    "128 + n stopped by signal n"
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one sub-command and return its exit code.

    Args:
        arguments: arguments after the command's name. If None, those of this process.

    Example:
        >>> main(["train", "--config", "configs/digits.json", "--resume", "auto"])
        0
    """
    # Before torch is loaded. OpenMP's threads spin for milliseconds when they wait for each other; where another
    # process shares the cores, that costs two orders of magnitude (two runs on 2 cores: 1 s instead of 9 ms for a
    # forward pass).
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")
    options = _parser().parse_args(arguments)
    return run_command(options.command, lambda: options.function(options), extra=options.extra)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="unikd", description="Distil a student from a teacher.", epilog=_EXIT_CODES)
    _add_local_rank(parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_init(commands)
    _add_train(commands)
    _add_export(commands)
    _add_predict(commands)
    _add_cache(commands)
    _add_data(commands)
    _add_report(commands)
    _add_reproduce(commands)
    return parser


def _add_command(
    commands: Any, name: str, function: Callable[[argparse.Namespace], int], *, extra: str, **texts: str
) -> argparse.ArgumentParser:
    """Add a sub-command.

    Args:
        commands: sub-commands of a parser, to which it is added.
        name: name of the sub-command.
        function: function that runs it and returns the exit code.
        extra: extra of the package that brings what it imports.
        texts: help, description, epilog and usage.
    """
    parser: argparse.ArgumentParser = commands.add_parser(name, **texts)
    parser.set_defaults(function=function, command=parser.prog, extra=extra)
    return parser


def _add_local_rank(parser: argparse.ArgumentParser) -> None:
    """Accept what DeepSpeed's launcher puts before all other arguments."""
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. train.max_steps=3"
    )


def _add_init(commands: Any) -> None:
    parser = _add_command(
        commands,
        "init",
        _init,
        extra="train",
        help="write a configuration for a folder of images",
        description="Look at a folder of images, with train/<class> and val/<class>, or with <class> alone, and write "
        "a configuration that trains on it as it is. Images in a folder unlabeled of it, or in a train without class "
        "folders, have no labels.",
        epilog="exit codes: 0 done; 1 the file cannot be written; 2 the folder or an option is not usable",
    )
    parser.add_argument("folder", metavar="FOLDER", help="folder of images")
    parser.add_argument("--teacher", metavar="NAME", help="network of the teacher, such as timm/resnet50")
    parser.add_argument(
        "--teacher-weights", metavar="FILE", help="weights of the teacher (default: it is trained first)"
    )
    parser.add_argument("--student", metavar="NAME", help="network of the student")
    parser.add_argument("--unlabeled", metavar="FOLDER", help="further training images, without labels")
    parser.add_argument("--to", metavar="FILE", help="file to write (default: the folder's name, .json)")
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def _init(options: argparse.Namespace) -> int:
    from unikd_fast.recipes.own_images import init

    root = Path(options.folder)
    target = Path(options.to or f"{root.resolve().name}.json")
    said = init(
        root,
        target,
        unlabelled=None if options.unlabeled is None else Path(options.unlabeled),
        force=options.force,
        teacher=options.teacher,
        teacher_weights=options.teacher_weights,
        student=options.student,
    )
    print(said)
    return 0


def _add_train(commands: Any) -> None:
    parser = _add_command(
        commands,
        "train",
        _train,
        extra="train",
        help="train a student",
        description="Distil a student from a teacher. Under torchrun: torchrun ... -m unikd_fast train ...; under "
        "deepspeed: deepspeed ... --module unikd_fast train ...",
        epilog="exit codes: 0 done; 1 a file cannot be read or written; 2 the arguments or the configuration are not "
        "usable; 3 a loss is not finite; 4 the teacher's cache and 5 the data cannot be used; 6 there is no whole "
        "checkpoint; 7 out of memory; 8 another process was lost; 128 + n stopped by signal n",
    )
    _add_local_rank(parser)
    add_experiment_arguments(parser.add_mutually_exclusive_group(required=True))
    _add_set(parser)
    parser.add_argument("--resume", choices=("never", "auto"), default="never", help="auto: continue the run folder")
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration as JSON, and stop")
    parser.add_argument("--dry-run", action="store_true", help="print models, shapes, steps and memory, and stop")


def _train(options: argparse.Namespace) -> int:
    config = read_experiment(options.config, options.recipe, options.set)
    if options.print_config:
        print(config.model_dump_json(by_alias=True, indent=2))
        return 0
    _check_paths([config])
    # Only now torchvision and DeepSpeed: a wrong configuration or a missing folder is refused before.
    from unikd_fast.engine.run import launch

    launch(config, resume=options.resume == "auto", dry_run=options.dry_run)
    return 0


def _add_export(commands: Any) -> None:
    parser = _add_command(
        commands,
        "export",
        _export,
        extra="export",
        help="write the student of a run to a file of its own",
        description="Write the student of a run, finished or not, to a file of its own, read the file back, and "
        "compare what it computes with the plain network. A file that exists has passed.",
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
        help="last: the newest that is whole (default); best: that of the best evaluation; step-<number>; or a path",
    )
    parser.add_argument(
        "--average",
        choices=("auto", "yes", "no"),
        default="auto",
        help="export the exponential average of the weights (train.ema_decay); auto: if there is one (default)",
    )
    parser.add_argument("--opset", type=_positive, metavar="N", help="opset of ONNX, 18 or later (default: torch's)")
    parser.add_argument(
        "--image-size",
        type=_positive,
        metavar="N",
        help="height and width of the images that .pt and .onnx are made for (default: the student's own)",
    )
    parser.add_argument(
        "--preprocess",
        action="store_true",
        help="of ONNX: the file takes uint8 images of any size, and resizes, crops and normalises them itself",
    )
    parser.add_argument("--force", action="store_true", help="replace the file if it exists")


def _export(options: argparse.Namespace) -> int:
    from unikd_fast.export.command import export_run

    said = export_run(
        Path(options.run),
        Path(options.to),
        checkpoint=options.checkpoint,
        average=options.average,
        opset=options.opset,
        image_size=options.image_size,
        preprocess=options.preprocess,
        force=options.force,
    )
    print(said)
    return 0


def _add_predict(commands: Any) -> None:
    parser = _add_command(
        commands,
        "predict",
        _predict,
        extra="train",
        help="name the classes of images, or the objects in them",
        description="Print the most probable classes of images, by the student of a run or of a file that unikd export "
        "wrote, or the objects that the student of a detection run finds. The images are preprocessed as in the run's "
        "evaluation.",
        epilog="exit codes: 0 done; 1 a file cannot be read; 2 an argument is not usable; 5 images that cannot be "
        "decoded are named, and the others predicted",
    )
    parser.add_argument("source", metavar="SOURCE", help="run folder, or a file that unikd export wrote")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="paths of images")
    parser.add_argument(
        "--top", type=_positive, metavar="N", help="number of classes shown (default: 5), or of objects (default: 100)"
    )
    parser.add_argument(
        "--least-score", type=_share, default=0.5, metavar="P", help="smallest score of an object (default: 0.5)"
    )
    parser.add_argument("--draw", metavar="FOLDER", help="write the images there with the boxes of the objects, as PNG")
    parser.add_argument(
        "--checkpoint", default="best", metavar="WHICH", help="of a run folder, as for unikd export (default: best)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object a line for each image")


def _predict(options: argparse.Namespace) -> int:
    with redirect_stdout(sys.stderr):
        from unikd_fast.data.images import BadImage
        from unikd_fast.export.predict import Prediction, as_json, predict

    paths, code = [Path(image) for image in options.images], 0
    settings = {"top": options.top, "checkpoint": options.checkpoint, "least_score": options.least_score}
    for number, found in enumerate(predict(Path(options.source), paths, **settings)):
        if isinstance(found, Prediction):
            print(as_json(found) if options.json else found)
        elif not isinstance(found, BadImage):
            print(found.as_json() if options.json else found)
            if options.draw is not None:
                found.draw(Path(options.draw) / f"{number:04d}-{Path(found.image).stem}.png")
        else:  # the others are worth having
            print(f"unikd predict: error: {found.reason}", file=sys.stderr)
            code = DataError.exit_code
    return code


def _add_cache(commands: Any) -> None:
    cache = commands.add_parser(
        "cache",
        help="build, verify, describe or plan the cache of a teacher's outputs",
        description="Manage the teacher's outputs on disk (teacher.cache in a configuration).",
        epilog="exit codes: 0 done; 1 a file cannot be read or written; 2 the configuration is not usable; 4 the cache "
        "is damaged, incomplete or that of another run; 128 + n stopped by signal n",
    )
    commands = cache.add_subparsers(required=True, metavar="COMMAND")
    build = _add_command(
        commands,
        "build",
        _cache_build,
        extra="train",
        help="build what is missing, without training",
        description="Build what the caches of a configuration's runs lack, without training. The processes of a "
        "launcher share the work, and so do several builds of one folder. SIGTERM and Ctrl-C keep what is written; the "
        "next build continues from there.",
    )
    verify = _add_command(
        commands,
        "verify",
        _cache_verify,
        extra="train",
        usage="%(prog)s [-h] [--repair] (FOLDER | (--config FILE|NAME | --recipe NAME) [--set KEY=VALUE])",
        help="read everything and name the shards that are not ok",
        description="Read every record, and print a line for each shard that is bad or not built.",
        epilog="exit codes: 0 every shard is ok, or with --repair: no bad shard is left, and unikd cache build "
        "completes the cache; 4 otherwise, and if the folder is not a cache or what belongs to all shards is damaged",
    )
    verify.add_argument("--repair", action="store_true", help="discard bad shards, so that build makes them again")
    info = _add_command(
        commands,
        "info",
        _cache_info,
        extra="train",
        usage="%(prog)s [-h] [--json] (FOLDER | (--config FILE|NAME | --recipe NAME) [--set KEY=VALUE])",
        help="say what a cache holds, what it was made from and by whom",
        description="Print size, codec and key of a cache, and how the teacher that built it ran.",
    )
    plan = _add_command(
        commands,
        "plan",
        _cache_plan,
        extra="train",
        help="say what a cache costs and saves",
        description="Measure teacher and student on this machine, and print size, times and break-even of the cache "
        "of each run. Nothing is written. A teacher that the run would train first has random weights.",
    )
    for parser in (build, plan):
        add_experiment_arguments(parser.add_mutually_exclusive_group(required=True))
    for parser in (verify, info):
        which = parser.add_mutually_exclusive_group(required=True)
        add_experiment_arguments(which)
        which.add_argument("folder", nargs="?", metavar="FOLDER", help="folder of a cache; no configuration is needed")
    for parser in (info, plan):
        parser.add_argument("--json", action="store_true", help="print one JSON object a line for each cache")
    for parser in (build, verify, info, plan):
        _add_set(parser)


def _cache_build(options: argparse.Namespace) -> int:
    runs = _cached_runs(options)
    for *_, config in runs:
        assert config.teacher is not None
        if config.teacher.is_trained:
            raise ConfigError(
                "teacher.training is set: the run trains its teacher itself, and builds the cache then, with "
                "teacher.cache.mode = 'read_write'; to build it beforehand, give teacher.weights and set "
                "teacher.training = null"
            )
    _check_paths([config for *_, config in runs])
    processes = _start_processes()
    from unikd_fast.engine.cache_commands import build_caches

    build_caches([(f"{label}, seed {seed}", config) for label, seed, config in runs], processes)
    processes.leave()
    return 0


def _cache_verify(options: argparse.Namespace) -> int:
    folders = _cache_folders(options)
    from unikd_fast.engine.cache_commands import verify_folder

    good = [verify_folder(folder, repair=options.repair) for folder in folders]
    return 0 if all(good) else CacheError.exit_code


def _cache_info(options: argparse.Namespace) -> int:
    folders = _cache_folders(options)
    from unikd_fast.engine.cache_commands import describe_facts, folder_facts

    for number, folder in enumerate(folders):
        facts = folder_facts(folder)
        print(json.dumps(facts) if options.json else "\n" * (number > 0) + describe_facts(facts))
    return 0


def _cache_plan(options: argparse.Namespace) -> int:
    runs = _cached_runs(options)
    _check_paths([config for *_, config in runs])
    from unikd_fast.config import config_hash
    from unikd_fast.config.load import cache_dir

    first, seeds = runs[0][1], len({seed for _, seed, _ in runs})
    distinct: dict[str, tuple[str, Config]] = {}  # neither labels nor seeds cost anything
    for label, seed, config in runs:
        if seed == first:
            distinct.setdefault(config_hash(config), (label, config))
    processes = _start_processes()
    from unikd_fast.engine.cache_commands import plan_caches

    others = f" (and {seeds - 1} more: a cache each)" if seeds > 1 else ""
    for number, (label, config, plan) in enumerate(plan_caches(list(distinct.values()), processes)):
        folder = str(cache_dir(config))
        if options.json:
            derived = ("build_s", "epoch_s", "cached_epoch_s", "speedup", "break_even_epoch")
            figures = {**asdict(plan), **{name: getattr(plan, name) for name in derived}}
            print(json.dumps({"run": label, "seed": first, "folder": folder, **figures}), flush=True)
            continue
        heading = f"{label}, seed {first}{others}\n" if len(runs) > 1 else ""
        print("\n" * (number > 0) + f"{heading}{'folder':<12}{folder}\n{plan.table()}", flush=True)
    processes.leave()
    return 0


def _cached_runs(options: argparse.Namespace) -> "list[tuple[str, int, Config]]":
    """Return the configuration's runs that have a teacher, as (label, seed, config), each with a cache to be built."""
    from unikd_fast.config import run_configs
    from unikd_fast.config.load import override

    config = read_experiment(options.config, options.recipe, options.set)
    source = options.config or options.recipe
    runs = [
        (label, seed, override(single, {"teacher.cache.mode": "read_write"}, label if config.compare else source))
        for label, seed, single in run_configs(config)
        if single.distill.method != "none"
    ]
    if not runs:
        raise ConfigError(f"{source}: no run has a teacher (distill.method = 'none'), so there is nothing to cache")
    return runs


def _cache_folders(options: argparse.Namespace) -> "list[CacheFolder]":
    """Return the folder that is given, or those of the configuration's runs."""
    from unikd_fast.config.load import cache_dir

    if options.set and options.folder is not None:
        raise ConfigError("--set changes a configuration, and a folder needs none; leave it out or give --config")
    if options.folder is not None:
        paths = [Path(options.folder)]
    else:
        paths = [cache_dir(config) for *_, config in _cached_runs(options)]
    from unikd_fast.teacher.cache import CacheFolder

    return [CacheFolder.open(path) for path in dict.fromkeys(paths)]


def _start_processes() -> "Processes":
    # Only now DeepSpeed. What it prints must not stand among our lines.
    with redirect_stdout(sys.stderr):
        from unikd_fast.engine.distributed import start_processes

        return start_processes()


def _add_data(commands: Any) -> None:
    text = "pack an image folder for fast reading"
    data = commands.add_parser("data", help=text, description=f"{text.capitalize()}.")
    commands = data.add_subparsers(required=True, metavar="COMMAND")
    pack = _add_command(
        commands,
        "pack",
        _data_pack,
        extra="train",
        help="pack an image folder into Arrow files",
        description="Pack an image folder into Arrow files, which data.name = arrow reads. After an interruption the "
        "same command continues.",
        epilog="exit codes: 0 done; 1 a file cannot be written, or another process packs into the folder; 2 a folder "
        "or a number is not usable; 5 an image file cannot be read; 130 stopped by Ctrl-C",
    )
    pack.add_argument(
        "source", type=Path, metavar="SOURCE", help="folder with train/<class>/<image> and val/<class>/<image>"
    )
    pack.add_argument("target", type=Path, metavar="TARGET", help="new or empty folder, or one that was begun")
    pack.add_argument(
        "--raw",
        type=int,
        metavar="SIDE",
        help="store pixels, which need no decoding and 5 to 20 times the room, with a short side of at most SIDE, at "
        "least what evaluation resizes to (default: store the files as they are)",
    )
    pack.add_argument(
        "--workers", type=int, default=2, metavar="N", help="threads that read and decode (default: %(default)s)"
    )


def _data_pack(options: argparse.Namespace) -> int:
    from unikd_fast.data.pack import pack_folder

    try:
        pack_folder(options.source, options.target, raw=options.raw, workers=options.workers)
    except (ValueError, FileNotFoundError) as error:
        raise error if isinstance(error, RunError) else ConfigError(str(error)) from error
    print(f"{options.source} is packed into {options.target}; train with data.name=arrow data.root={options.target}")
    return 0


def _add_report(commands: Any) -> None:
    parser = _add_command(
        commands,
        "report",
        _report,
        extra="report",
        help="write the page of finished runs",
        description="Write one HTML page of finished runs, and PNG figures beside it.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, comparisons or single runs")
    parser.add_argument(
        "--to", type=Path, metavar="FILE", default=Path("report.html"), help="page to write (default: %(default)s)"
    )
    parser.add_argument("--title", help="title of the page (default: the data sets and students)")
    parser.add_argument("--force", action="store_true", help="replace a page that exists, and its figures")


def _report(options: argparse.Namespace) -> int:
    from unikd_fast.report.command import refuse_target, write_report
    from unikd_fast.report.runs import find_runs

    refuse_target(options.to, force=options.force)
    print(write_report(find_runs(options.runs), options.to, title=options.title, force=options.force))
    return 0


def _add_reproduce(commands: Any) -> None:
    text = "run what is missing of the papers' tables"
    reproduce.add_arguments(_add_command(commands, "reproduce", reproduce.run, extra="train,report", help=text))


def _check_paths(configs: "Sequence[Config]") -> None:
    """Check the root of each data set, and that the networks' weights name no variable that is not set.

    Raises:
        ConfigError: what is missing, and the remedy.
    """
    from unikd_fast.data.roots import check_root, check_unlabeled_root, expand_weights

    for config in configs:
        try:
            data = config.data
            without_labels = check_unlabeled_root(data.name, data.unlabeled_root)
            check_root(data.name, data.root, val_samples=data.val_samples, needs_train=without_labels is None)
            given = [("student", config.student.weights)]
            given += [("teacher", network.weights) for network in (config.teacher.networks if config.teacher else ())]
            for role, weights in given:
                if weights is not None:
                    expand_weights(role, weights)
        except (ValueError, OSError) as error:
            raise ConfigError(str(error)) from error


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is less than 1")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{value} is not between 0 and 1")
    return value
