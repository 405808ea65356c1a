"""Registers `unikd_fast.compat.torchdistill.KDLoss` with torchdistill as `UniKDFastKDLoss`. Importing it is using it:

    dependencies:
      - name: 'unikd_fast.compat.torchdistill_register'
    ...
    criterion:
      key: 'UniKDFastKDLoss'

Raises:
    ModuleNotFoundError: where torchdistill is not installed.
"""

from torchdistill.losses.registry import register_mid_level_loss

from unikd_fast.compat.torchdistill import KDLoss

register_mid_level_loss(key="UniKDFastKDLoss")(KDLoss)
