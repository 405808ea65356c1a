"""Trains a student by distillation: ``deepspeed launch_distill.py --config configs/digits.json``.

Started by deepspeed, torchrun or python alone. ``--help`` lists the options.
"""

import argparse
import os
import sys
import time
from collections.abc import Sequence

from unikd_fast.config import load_config
from unikd_fast.data.roots import check_root
from unikd_fast.errors import RunError

# Before torch is loaded. OpenMP's threads spin for milliseconds when they wait for each other; where another process
# shares the cores, that costs two orders of magnitude (two runs on 2 cores: 1 s instead of 9 ms for a forward pass).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Distil a student from a teacher.")
    parser.add_argument("--config", required=True, help="experiment, a JSON file; see configs/")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="override, e.g. train.max_steps=3"
    )
    parser.add_argument("--resume", choices=("never", "auto"), default="never", help="auto: continue the run folder")
    parser.add_argument("--dry-run", action="store_true", help="print models, shapes, steps and memory, and stop")
    parser.add_argument("--local_rank", type=int, default=0, help=argparse.SUPPRESS)  # deepspeed's launcher passes it
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config, options.set)
        check_root(config.data.name, config.data.root)
    except (RunError, ValueError, FileNotFoundError) as error:
        return _complain(error, 2)
    # Only now torch and DeepSpeed: a wrong configuration or a missing folder is refused within a second.
    from unikd_fast.engine.launch import launch

    try:
        launch(config, resume=options.resume == "auto", dry_run=options.dry_run)
    except RunError as error:
        return _complain(error, error.exit_code)
    return 0


def _complain(error: Exception, code: int) -> int:
    if os.environ.get("RANK", "0") != "0":
        # The first process speaks for all, and its launcher then ends this one. If it did not fail, this one speaks.
        time.sleep(10)  # on a busy machine the first may be that late
    print(f"launch_distill: error: {error}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())
