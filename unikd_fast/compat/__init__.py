"""Drop-in losses for other distillation codebases: their signatures, values and gradients, on `unikd_fast.losses`.

One module per codebase. No codebase is imported until it is needed.

    unikd_fast.compat.mdistiller              kd_loss, dkd_loss
    unikd_fast.compat.logit_standardization   kd_loss, dkd_loss                         the fork of mdistiller
    unikd_fast.compat.rep_distiller           DistillKL
    unikd_fast.compat.torchdistill            KDLoss                                    `torchdistill_register` for YAML
    unikd_fast.compat.mmrazor                 KLDivergence, ChannelWiseDivergence
    unikd_fast.compat.timm_distill            logit_distillation_loss, logit_distillation_forward
    unikd_fast.compat.modelopt                LogitsDistillationLoss, FlattenedLogitsDistillationLoss
    unikd_fast.compat.deit                    DistillationLoss
    unikd_fast.compat.liger                   LigerKLDIVLoss, LigerJSD                  plain PyTorch
    unikd_fast.compat.trl                     generalized_jsd_loss

`patch` puts them into an installed codebase, after comparing the two. `python -m unikd_fast.compat.conformance` writes
docs/conformance.md, the table of how closely each agrees with its original.
"""

from unikd_fast.compat.patching import Patch, patch

__all__ = ["Patch", "patch"]
