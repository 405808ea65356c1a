"""Before torch and the kernels are loaded: OpenMP's threads must not spin for long, see launch_distill.py.

Without a GPU the kernels run interpreted, which Triton decides when a kernel is defined.
"""

import os
import signal

os.environ.setdefault("GOMP_SPINCOUNT", "1000")

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# A shell starts jobs in the background with Ctrl-C ignored, nohup with the hang-up, and so would be the processes that
# tests start.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
