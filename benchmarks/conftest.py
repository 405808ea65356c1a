"""Before torch is loaded: OpenMP's threads must not spin, see launch_distill.py."""

import os

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
