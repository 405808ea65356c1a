"""Before torch is loaded: OpenMP's threads must not spin for long, see launch_distill.py."""

import os

os.environ.setdefault("GOMP_SPINCOUNT", "1000")
