"""Train a student by distillation: ``deepspeed launch_distill.py --config configs/digits.json``.

Started by deepspeed, torchrun or python alone, it is `unikd train`. ``--help`` lists the options.
"""

import sys

try:
    from unikd_fast.cli import main
except ModuleNotFoundError as error:
    sys.exit(
        f"launch_distill: error: the package {error.name} is not installed for {sys.executable}; activate the "
        "environment (source .venv/bin/activate, made by `make setup`) or pip install 'unikd-fast[train]'"
    )

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
