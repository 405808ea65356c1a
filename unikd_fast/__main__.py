"""``python -m unikd_fast`` is the command `unikd`; so are torchrun's ``-m`` and deepspeed's ``--module``."""

import sys

from unikd_fast.cli import main

sys.exit(main())
