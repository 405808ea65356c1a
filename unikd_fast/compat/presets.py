"""The drop-ins: what each replaces, and where the original is found."""

from importlib import import_module
from typing import Any, NamedTuple

from unikd_fast.compat import _cases as cases
from unikd_fast.compat._cases import Case


class Target(NamedTuple):
    """A function, class or method, and its stand-in."""

    places: tuple[str, ...]  # module:name of the original, newest first; the name may be Class.method
    replacement: str  # module:name
    cases: tuple[Case, ...]
    published: str | None = None  # name of the restatement in `_published`, where the original cannot be installed
    in_fp64: bool = True  # whether the original computes in fp64 what it gets in fp64


class Preset(NamedTuple):
    """The drop-ins for one codebase."""

    package: str  # the top-level name it is imported by
    distribution: str | None  # name on the package index; None if there is none
    targets: tuple[Target, ...]


_HERE = "unikd_fast.compat."

PRESETS: dict[str, Preset] = {
    "mdistiller": Preset(
        "mdistiller",
        None,
        (
            Target(("mdistiller.distillers.KD:kd_loss",), _HERE + "mdistiller:kd_loss", cases.KD, "kd_loss"),
            Target(("mdistiller.distillers.DKD:dkd_loss",), _HERE + "mdistiller:dkd_loss", cases.DKD, "dkd_loss"),
        ),
    ),
    "logit_standardization": Preset(
        "mdistiller",
        None,
        (
            Target(
                ("mdistiller.distillers.KD:kd_loss",),
                _HERE + "logit_standardization:kd_loss",
                cases.STANDARDIZED_KD,
                "standardized_kd_loss",
            ),
            Target(
                ("mdistiller.distillers.DKD:dkd_loss",),
                _HERE + "logit_standardization:dkd_loss",
                cases.STANDARDIZED_DKD,
                "standardized_dkd_loss",
            ),
        ),
    ),
    "rep_distiller": Preset(
        "distiller_zoo",
        None,
        (Target(("distiller_zoo.KD:DistillKL",), _HERE + "rep_distiller:DistillKL", cases.DISTILL_KL, "DistillKL"),),
    ),
    "torchdistill": Preset(
        "torchdistill",
        "torchdistill",
        (Target(("torchdistill.losses.mid_level:KDLoss",), _HERE + "torchdistill:KDLoss", cases.TORCHDISTILL),),
    ),
    "mmrazor": Preset(
        "mmrazor",
        None,
        (
            Target(
                ("mmrazor.models.losses.kl_divergence:KLDivergence", "mmrazor.models.losses:KLDivergence"),
                _HERE + "mmrazor:KLDivergence",
                cases.MMRAZOR,
                "KLDivergence",
            ),
            Target(
                ("mmrazor.models.losses.cwd:ChannelWiseDivergence", "mmrazor.models.losses:ChannelWiseDivergence"),
                _HERE + "mmrazor:ChannelWiseDivergence",
                cases.CHANNEL_WISE,
                "ChannelWiseDivergence",
            ),
        ),
    ),
    "timm": Preset(
        "timm",
        "timm",
        (
            Target(
                ("timm.task.distillation:LogitDistillationTask.forward",),
                _HERE + "timm_distill:logit_distillation_forward",
                cases.TIMM,
            ),
        ),
    ),
    "modelopt": Preset(
        "modelopt",
        "nvidia-modelopt",
        (
            Target(
                ("modelopt.torch.distill.losses:LogitsDistillationLoss",),
                _HERE + "modelopt:LogitsDistillationLoss",
                cases.MODELOPT,
            ),
        ),
    ),
    "modelopt_flattened": Preset(
        "modelopt",
        None,
        (
            Target(
                ("modelopt.torch.distill.losses:LogitsDistillationLoss",),
                _HERE + "modelopt:FlattenedLogitsDistillationLoss",
                cases.MODELOPT,
                "FlattenedLogitsDistillationLoss",
            ),
        ),
    ),
    "deit": Preset(
        "losses",
        None,
        (Target(("losses:DistillationLoss",), _HERE + "deit:DistillationLoss", cases.DEIT, "DistillationLoss"),),
    ),
    "liger": Preset(
        "liger_kernel",
        "liger-kernel",
        (
            Target(
                ("liger_kernel.transformers.kl_div:LigerKLDIVLoss",),
                _HERE + "liger:LigerKLDIVLoss",
                cases.LIGER_KL,
                in_fp64=False,
            ),
            Target(
                ("liger_kernel.transformers.jsd:LigerJSD",), _HERE + "liger:LigerJSD", cases.LIGER_JSD, in_fp64=False
            ),
            Target(
                ("liger_kernel.transformers.fused_linear_jsd:LigerFusedLinearJSD",),
                _HERE + "liger:LigerFusedLinearJSD",
                cases.LIGER_FUSED_JSD,
                in_fp64=False,
            ),
        ),
    ),
    "trl": Preset(
        "trl",
        "trl",
        (
            Target(
                (
                    "trl.experimental.gkd.gkd_trainer:GKDTrainer.generalized_jsd_loss",
                    "trl.trainer.gkd_trainer:GKDTrainer.generalized_jsd_loss",
                ),
                _HERE + "trl:generalized_jsd_loss",
                cases.TRL,
            ),
        ),
    ),
}


def load(place: str) -> Any:
    """Return what "module:name" or "module:Class.method" names."""
    module, _, name = place.partition(":")
    found = import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found
