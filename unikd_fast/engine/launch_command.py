"""What ``launch_distill.py`` does, from its arguments to its exit code.

``python -m unikd_fast.engine.launch_command`` is the same where the package is installed without the script; so are
torchrun's ``-m`` and deepspeed's ``--module``.
"""

import argparse
import os
import sys
from collections.abc import Sequence

from unikd_fast.command import run_command
from unikd_fast.engine.paths import check_paths
from unikd_fast.engine.supervise import supervise
from unikd_fast.errors import ConfigError
from unikd_fast.recipes.experiments import add_experiment_arguments, read_experiment

# Before torch is loaded. OpenMP's threads spin for milliseconds when they wait for each other; where another process
# shares the cores, that costs two orders of magnitude (two runs on 2 cores: 1 s instead of 9 ms for a forward pass).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")

_MODULE = ("-m", "unikd_fast.engine.launch_command")


def main(arguments: Sequence[str] | None = None, *, program: Sequence[str] = _MODULE) -> int:
    """Trains, and returns the exit code; ``--help`` describes the options.

    Args:
        arguments: None for those of this process.
        program: what Python is to run for the same command, after a fault.
    """
    parser = argparse.ArgumentParser(prog="launch_distill", description="Distil a student from a teacher.")
    add_experiment_arguments(parser.add_mutually_exclusive_group(required=True))
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. train.max_steps=3"
    )
    parser.add_argument("--resume", choices=("never", "auto"), default="never", help="auto: continue the run folder")
    parser.add_argument("--print-config", action="store_true", help="print the whole configuration as JSON, and stop")
    parser.add_argument("--dry-run", action="store_true", help="print models, shapes, steps and memory, and stop")
    parser.add_argument(
        "--max-restarts", type=int, default=0, metavar="N", help="start again after a fault, from the newest checkpoint"
    )
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    options = parser.parse_args(arguments)
    given = sys.argv[1:] if arguments is None else arguments
    return run_command("launch_distill", lambda: _launch(options, program, given))


def _launch(options: argparse.Namespace, program: Sequence[str], given: Sequence[str]) -> int:
    if options.max_restarts:
        return _supervised(program, given, options.max_restarts)
    config = read_experiment(options.config, options.recipe, options.set)
    if options.print_config:
        print(config.model_dump_json(by_alias=True, indent=2))
        return 0
    check_paths(config)
    # Only now torch and DeepSpeed: a wrong configuration or a missing folder is refused within a second.
    from unikd_fast.engine.run import launch

    launch(config, resume=options.resume == "auto", dry_run=options.dry_run)
    return 0


def _supervised(program: Sequence[str], arguments: Sequence[str], restarts: int) -> int:
    if "TORCHELASTIC_RUN_ID" in os.environ:
        raise ConfigError(
            f"--max-restarts {restarts} under torchrun, which restarts by itself: torchrun --max-restarts {restarts} "
            "... launch_distill.py ... --resume auto"
        )
    own: list[str] = []
    for argument in arguments:
        if own and own[-1] == "--max-restarts":
            own.pop()
        elif not argument.startswith("--max-restarts="):
            own.append(argument)
    return supervise([sys.executable, *program, *own], restarts)


if __name__ == "__main__":
    sys.exit(main())
