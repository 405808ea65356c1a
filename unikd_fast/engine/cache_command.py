"""``unikd-cache``: the teacher's outputs on disk, built without training, verified, described and planned.

``python -m unikd_fast.engine.cache_command`` is the same, for torchrun (``-m``) and deepspeed (``--module``).
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from unikd_fast.command import run_command
from unikd_fast.config import Config, ConfigError, config_hash, run_configs
from unikd_fast.config.load import cache_dir, override
from unikd_fast.engine.paths import check_paths
from unikd_fast.errors import CacheError
from unikd_fast.recipes.experiments import add_experiment_arguments, read_experiment

if TYPE_CHECKING:
    from unikd_fast.engine.distributed import Processes
    from unikd_fast.teacher.cache import CacheFolder

# Before torch is loaded; see launch_distill.py.
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one subcommand and returns the exit code; ``--help`` describes them."""
    options = _parser().parse_args(arguments)
    return run_command("unikd-cache", lambda: options.run(options))


def _build(options: argparse.Namespace) -> int:
    runs = _runs(options)
    for *_, config in runs:
        assert config.teacher is not None
        if config.teacher.weights is None and config.teacher.training is not None:
            raise ConfigError(
                "teacher.weights is not set and teacher.training is: the run trains its teacher itself, and builds the "
                "cache then, with teacher.cache.mode = 'read_write'; to build it beforehand, give teacher.weights"
            )
    _check_paths(runs)
    processes = _start_processes()
    from unikd_fast.engine.cache_commands import build_caches

    build_caches([(f"{label}, seed {seed}", config) for label, seed, config in runs], processes)
    processes.leave()
    return 0


def _verify(options: argparse.Namespace) -> int:
    folders = _folders(options)
    from unikd_fast.engine.cache_commands import verify_folder

    good = [verify_folder(folder, repair=options.repair) for folder in folders]
    return 0 if all(good) else CacheError.exit_code


def _info(options: argparse.Namespace) -> int:
    folders = _folders(options)
    from unikd_fast.engine.cache_commands import describe_facts, folder_facts

    for number, folder in enumerate(folders):
        facts = folder_facts(folder)
        print(json.dumps(facts) if options.json else "\n" * (number > 0) + describe_facts(facts))
    return 0


def _plan(options: argparse.Namespace) -> int:
    runs = _runs(options)
    _check_paths(runs)
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


def _runs(options: argparse.Namespace) -> list[tuple[str, int, Config]]:
    """The runs of the configuration that have a teacher, as (label, seed, config), each with a cache to be built."""
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


def _check_paths(runs: Sequence[tuple[str, int, Config]]) -> None:
    for *_, config in runs:
        check_paths(config)


def _start_processes() -> "Processes":
    # Only now torch and DeepSpeed, as in launch_distill.py. What DeepSpeed prints must not stand among our lines.
    with redirect_stdout(sys.stderr):
        from unikd_fast.engine.distributed import start_processes

        return start_processes()


def _folders(options: argparse.Namespace) -> list["CacheFolder"]:
    """The folder that is given, or those of the configuration's runs."""
    if options.set and options.folder is not None:
        raise ConfigError("--set changes a configuration, and a folder needs none; leave it out or give --config")
    paths = [cache_dir(config) for *_, config in _runs(options)] if options.folder is None else [Path(options.folder)]
    from unikd_fast.teacher.cache import CacheFolder

    return [CacheFolder.open(path) for path in dict.fromkeys(paths)]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="unikd-cache",
        description="The teacher's outputs on disk (teacher.cache in a configuration).",
        epilog="exit codes: 0 done; 1 a file cannot be read or written; 2 the configuration is not usable; 4 the cache "
        "is damaged, incomplete or another run's; 128 + n stopped by signal n",
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    build = commands.add_parser(
        "build",
        help="build what is missing, without training",
        description="Builds what the caches of a configuration's runs lack, without training. The processes of a "
        "launcher share the work, and so do several builds of one folder. SIGTERM and Ctrl-C keep what is written; the "
        "next build goes on from there.",
    )
    verify = commands.add_parser(
        "verify",
        usage="%(prog)s [-h] [--repair] (FOLDER | (--config FILE|NAME | --recipe NAME) [--set KEY=VALUE])",
        help="read everything and name the shards that are not ok",
        description="Reads every record and prints a line for each shard that is bad or not built.",
        epilog="exit codes: 0 every shard is ok, or with --repair: no bad shard is left, and unikd-cache build "
        "completes the cache; 4 otherwise, and where the folder is no cache or what belongs to all shards is damaged",
    )
    verify.add_argument("--repair", action="store_true", help="discard bad shards, so that build makes these anew")
    info = commands.add_parser(
        "info",
        usage="%(prog)s [-h] [--json] (FOLDER | (--config FILE|NAME | --recipe NAME) [--set KEY=VALUE])",
        help="say what a cache holds, what it was made from and by whom",
        description="Prints size, codec and key of a cache, and how the teacher that built it ran.",
    )
    plan = commands.add_parser(
        "plan",
        help="say what a cache costs and saves",
        description="Measures teacher and student on this machine and prints size, times and break-even of the cache "
        "of each run. Writes nothing. A teacher that the run would train first has random weights.",
    )
    for command in (build, plan):
        add_experiment_arguments(command.add_mutually_exclusive_group(required=True))
    for command in (verify, info):
        which = command.add_mutually_exclusive_group(required=True)
        add_experiment_arguments(which)
        which.add_argument("folder", nargs="?", metavar="FOLDER", help="of a cache; no configuration is needed")
    for command in (info, plan):
        command.add_argument("--json", action="store_true", help="print one JSON object a line for each cache")
    for command, run in ((build, _build), (verify, _verify), (info, _info), (plan, _plan)):
        command.add_argument(
            "--set",
            action="append",
            default=[],
            metavar="KEY=VALUE",
            help="override, e.g. teacher.cache.dir=/fast/disk",
        )
        command.set_defaults(run=run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
