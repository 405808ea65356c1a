"""Train a student by distillation: ``deepspeed launch_distill.py --config configs/digits.json``.

Started by deepspeed, torchrun or python alone, it is `unikd train`. ``--help`` lists the options.
"""

import sys

from unikd_fast.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
