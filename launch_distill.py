"""Trains a student by distillation: ``deepspeed launch_distill.py --config configs/digits.json``.

Started by deepspeed, torchrun or python alone. ``--help`` lists the options.
"""

import sys

from unikd_fast.engine.launch_command import main

if __name__ == "__main__":
    sys.exit(main(program=[__file__]))
