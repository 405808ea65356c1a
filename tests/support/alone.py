"""A process that DeepSpeed's engine leaves as it was."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

from torch import distributed
from torch.nn import functional


@contextmanager
def alone() -> Iterator[None]:
    """Take down the process group of a run and put back what it has set: variables, and torch's linear layer.

    DeepSpeed replaces the latter for good at ZeRO stage 3.
    """
    others = distributed.is_initialized()
    with patch.dict(os.environ), patch.object(functional, "linear", functional.linear):
        try:
            yield
        finally:
            if distributed.is_initialized() and not others:
                from unikd_fast.engine.distributed import leave_group

                leave_group()
