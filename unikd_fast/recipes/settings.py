"""The published settings of each method by pair of networks: the `distill` section of its recipes."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from unikd_fast.recipes.pairs import Pair

_R56, _R110, _R32X4, _WRN_16_2, _WRN_40_1, _VGG = (
    "resnet56-resnet20",
    "resnet110-resnet32",
    "resnet32x4-resnet8x4",
    "wrn_40_2-wrn_16_2",
    "wrn_40_2-wrn_40_1",
    "vgg13-vgg8",
)
_R18, _MV1 = "resnet34-resnet18", "resnet50-mobilenetv1"
# Weight of ReviewKD on COCO; 1 for other pairs.
_REVIEWS = {"resnet101-resnet18": 1.2, "resnet101-resnet50": 1.0, "resnet50-mobilenet_v2": 2.0}
# Weight of UniKD's L_FL on regions.
_FEATURES_OF_REGIONS = 0.2


class Setting(NamedTuple):
    """How a method is run.

    Args:
        title: name in tables.
        distill: function that returns the `distill` section for a pair.
        remark: what to know about its figures.
        on: what else to know about its figures on a data set, by its name.
        train: function that returns what differs in the `train` section of a pair's recipe.
    """

    title: str
    distill: Callable[[Pair], dict[str, Any]]
    remark: str = ""
    on: Mapping[str, str] = MappingProxyType({})
    train: Callable[[Pair], dict[str, Any]] = lambda pair: {}

    def remark_for(self, data: str) -> str:
        """Return what to know about its figures on a data set.

        Example:
            >>> METHODS["at"].remark_for("imagenet"), METHODS["flg"].remark_for("cifar100")
            ('', 'our reading: the original formula was not found')
        """
        return "; ".join(filter(None, (self.remark, self.on.get(data))))


def _on_imagenet(pair: Pair) -> bool:
    return pair.data == "imagenet"


def _of_regions(pair: Pair) -> bool:
    """Return whether the networks are detectors, whose samples are regions; the paper's pairs are those of COCO."""
    return pair.data in ("coco", "toy_scenes")


def _none(pair: Pair) -> dict[str, Any]:
    return {"method": "none"}


def _kd(pair: Pair) -> dict[str, Any]:
    if _of_regions(pair):  # with the cross-entropy whole: it is the detector's own loss
        return {"method": "kd", "kd": {"ce_weight": 1.0, "beta": 1.0, "temperature": 1.0}}
    if _on_imagenet(pair):
        return {"method": "kd", "kd": {"ce_weight": 0.5, "beta": 0.5, "temperature": 1.0}}
    return {"method": "kd", "kd": {"ce_weight": 0.1, "beta": 0.9, "temperature": 4.0}}


def _dkd_section(pair: Pair) -> dict[str, Any]:
    if _of_regions(pair):
        return {"alpha": 1.0, "beta": 0.25, "temperature": 1.0, "ramp_epochs": 0.0}
    if _on_imagenet(pair):
        beta = {_R18: 0.5, _MV1: 2.0}[pair.name]
        return {"alpha": 1.0, "beta": beta, "temperature": 1.0, "ramp_epochs": 1.0}
    beta = 2.0 if pair.name in (_R56, _R110) else 6.0 if pair.name.startswith(("vgg13", "wrn_40_2-wrn")) else 8.0
    return {"alpha": 1.0, "beta": beta, "temperature": 4.0, "ramp_epochs": 20.0}


def _dkd(pair: Pair) -> dict[str, Any]:
    return {"method": "dkd", "dkd": _dkd_section(pair)}


# (temperature, weight, beta); pairs that the paper lacks have its most frequent setting.
_STANDARDIZED = {
    _R56: (3.0, 18.0, 2.0),
    _R110: (2.0, 15.0, 2.0),
    _R32X4: (2.0, 9.0, 8.0),
    _WRN_16_2: (2.0, 12.0, 2.0),
    _WRN_40_1: (2.0, 12.0, 2.0),
    _VGG: (2.0, 15.0, 2.0),
    "vgg13-MobileNetV2": (3.0, 9.0, 2.0),
    "ResNet50-MobileNetV2": (2.0, 15.0, 2.0),
}


def _dkd_standardized(pair: Pair) -> dict[str, Any]:
    temperature, weight, beta = _STANDARDIZED.get(pair.name, (2.0, 9.0, 8.0))
    section = {"alpha": weight, "beta": weight * beta, "temperature": temperature, "ramp_epochs": 20.0}
    return {"method": "dkd", "dkd": {**section, "standardized": True}}


def _reviewkd_section(pair: Pair) -> dict[str, Any]:
    if _of_regions(pair):
        return {"weight": _REVIEWS.get(pair.name, 1.0), "ramp_epochs": 0.0}
    if _on_imagenet(pair):
        weight = {_R18: 1.0, _MV1: 8.0}[pair.name]
        width = {"width": 256} if pair.name == _MV1 else {}
        return {"weight": weight, "ramp_epochs": 1.0, "student_before_activation": True, **width}
    weight = {_R56: 0.6, _R110: 1.0}.get(pair.name, 5.0)
    if pair.name.endswith(("ShuffleV2", "MobileNetV2")):
        weight = 8.0
    return {"weight": weight, "ramp_epochs": 20.0}


def _reviewkd(pair: Pair) -> dict[str, Any]:
    return {"method": "reviewkd", "reviewkd": _reviewkd_section(pair)}


def _fitnet(pair: Pair) -> dict[str, Any]:
    return {"method": "fitnet", "fitnet": {"weight": 1.0 if _of_regions(pair) else 100.0}}


def _fgfi(pair: Pair) -> dict[str, Any]:
    return {"method": "fgfi", "fgfi": {"weight": 0.01}}


def _at(pair: Pair) -> dict[str, Any]:
    return {"method": "at", "at": {"weight": 1000.0}}


def _ofd(pair: Pair) -> dict[str, Any]:
    return {"method": "ofd", "ofd": {"weight": 1e-4 if _on_imagenet(pair) else 1e-3}}


def _crd(pair: Pair) -> dict[str, Any]:
    return {"method": "crd", "crd": {"weight": 0.8}}


def _kd_crd(pair: Pair) -> dict[str, Any]:
    """Use RepDistiller's weights of a sum: 1 for the cross-entropy and for KD, where KD alone has 0.1 and 0.9."""
    merged = _sum(_kd, _crd)(pair)
    return {**merged, "kd": {**merged["kd"], "beta": 1.0}}


def _mlkd(pair: Pair) -> dict[str, Any]:
    return {"method": "mlkd", "mlkd": {}}


def _flg(pair: Pair) -> dict[str, Any]:
    return {"method": "flg", "flg": {}}


def _wkd(pair: Pair) -> dict[str, Any]:
    """Use the published code's settings of both parts together; pairs that it lacks have those of the nearest."""
    section: dict[str, Any] = {"logit_weight": 200.0, "feature_weight": 0.08, "temperature": 8.0, "mean_ratio": 8.0}
    if pair.name.endswith(("ShuffleV1", "ShuffleV2")):
        section = {"logit_weight": 60.0, "feature_weight": 0.5, "temperature": 4.0, "mean_ratio": 3.0, "grid": 4}
    if _on_imagenet(pair):
        logit_weight, feature_weight, sharpness = {_R18: (10.0, 1.0, 1.0), _MV1: (25.0, 0.005, 2.0)}[pair.name]
        section = {"logit_weight": logit_weight, "feature_weight": feature_weight, "sharpness": sharpness}
        section |= {"temperature": 2.0, "mean_ratio": 2.0, "grid": 4, "projector": "bottleneck", "decay_from": 0.0}
    return {"method": "wkd", "wkd": section}


def _nkd(pair: Pair) -> dict[str, Any]:
    """Use the published code's settings: 3.5 and 3 on CIFAR, 1.5 and 1 on ImageNet, which the paper has for both."""
    gamma, temperature = (1.5, 1.0) if _on_imagenet(pair) else (3.5, 3.0)
    return {"method": "nkd", "nkd": {"gamma": gamma, "temperature": temperature}}


def _unikd(pair: Pair) -> dict[str, Any]:
    if _of_regions(pair):  # DKD in place of L_L, as in the public development code
        section = {"alpha": _FEATURES_OF_REGIONS, "beta": 0.0}
        return {"method": ["unikd", "dkd"], "unikd": section, "dkd": _dkd_section(pair)}
    temperature, ramp = (1.0, 1.0) if _on_imagenet(pair) else (4.0, 20.0)
    return {"method": "unikd", "unikd": {"alpha": 4.0, "temperature": temperature, "alpha_ramp_epochs": ramp}}


def _unikd_dev_dkd(pair: Pair) -> dict[str, Any]:
    return {"method": ["unikd_dev", "dkd"], "unikd_dev": {"temperature": 1.0}, "dkd": _dkd_section(pair)}


def _unikd_dev_mlkd(pair: Pair) -> dict[str, Any]:
    mlkd = {"second_ce_weight": 1.0, "weight": 1.0, "second_grams": True}
    return {
        "method": ["unikd_dev", "mlkd"],
        "unikd_dev": {"temperature": 4.0, "fusion": "pooled"},
        "mlkd": mlkd,
    }


def _longer(pair: Pair) -> dict[str, Any]:
    """Use the development code's length and learning rate; slow students keep their rate."""
    epochs = 960 if pair.name in ("resnet32x4-ShuffleV1", "resnet32x4-ShuffleV2") else 480
    return {"total_epochs": epochs, "learning_rate": 0.025 if pair.learning_rate == 0.05 else pair.learning_rate}


def _unikd_without_aff(pair: Pair) -> dict[str, Any]:
    return {"method": "unikd", "unikd": {**_unikd(pair)["unikd"], "fusion": "last"}}


def _unikd_without_both(pair: Pair) -> dict[str, Any]:
    """Use what is left of Eq. 7 without L_FL: L_CE + beta L_L."""
    section = {"ce_weight": 1.0, "beta": 1.0, "temperature": 1.0 if _on_imagenet(pair) else 4.0}
    return {"method": "kd", "kd": section}


def _blockwise(pair: Pair) -> dict[str, Any]:
    return {"method": "blockwise", "blockwise": {"temperature": 1.0 if _on_imagenet(pair) else 4.0}}


def _blockwise_light(pair: Pair) -> dict[str, Any]:
    section: dict[str, Any] = _blockwise(pair)["blockwise"]
    return {"method": "blockwise", "blockwise": {**section, "light": True}}


def _sum(*parts: Callable[[Pair], dict[str, Any]]) -> Callable[[Pair], dict[str, Any]]:
    """Return the section of several methods; the cross-entropy then counts once, with weight 1."""

    def distill(pair: Pair) -> dict[str, Any]:
        merged: dict[str, Any] = {}
        for part in parts:
            merged |= part(pair)
        if "kd" in merged:
            merged["kd"] = {key: value for key, value in merged["kd"].items() if key != "ce_weight"}
        return {**merged, "method": [part(pair)["method"] for part in parts]}

    return distill


# From the first and last version of the code's file of each pair. In all of them the rate drops after 150, 180 and 210
# epochs.
_LONGER = (
    "MLKD's published code trains with a learning rate of 0.025 (0.01 for MobileNetV2 and the ShuffleNets) for 480 "
    "epochs, later 240 for pairs of one family and 960 for resnet32x4 with a ShuffleNet; here all methods have 0.05 "
    "(0.01) and 240"
)

_SMALLER_BATCH = (
    "on ImageNet mdistiller trains it with a batch of 256 and a learning rate of 0.1; here all methods have 512 and 0.2"
)
_OFD_BATCH = (
    "on ImageNet mdistiller trains it with a batch of 128 and a learning rate of 0.05, and its authors with 256 and "
    "0.1; here all methods have 512 and 0.2"
)

_OTHER_COSTS = "the published figures have costs from the CKA of the classes' {}, ours from the teacher's classifier"
_WKD_CIFAR = (
    "published for ResNet32x4 to ResNet8x4 (77.28) and WRN-40-2 to ShuffleNet-V1 (77.50); other pairs have the "
    f"settings of one of these; {_OTHER_COSTS.format('features')}"
)
_WKD_IMAGENET = (
    "published: 72.76 for ResNet34 to ResNet18 and 73.69 for ResNet50 to MobileNetV1, with a batch of 256 and a "
    f"learning rate of 0.1; here all methods have 512 and 0.2; {_OTHER_COSTS.format('logits')}; the features' weight "
    "of the first pair is 1 in the published file of both parts and 0.02 in that of the features alone"
)
_DEVELOPMENT = "of a public repository that is by all signs the authors' development code, not of the paper's text"
_PRINTED_BY_IT = (
    "the printed 78.18 of ResNet32x4 to ResNet8x4 is the name of a folder of its runs of 480 epochs; as there, the "
    "learning rate drops after 150, 180 and 210 epochs, at 0.025 (0.01 for MobileNetV2 and the ShuffleNets), and "
    "ResNet32x4 with a ShuffleNet has 960 epochs"
)
_UNPUBLISHED = "recipe unpublished on COCO: no public code has it, and the weight is ours"
_MANY_LEVELS = "published for a VGG of one level: on a pyramid the places of all levels are joined"
_ON_REGIONS = (
    "recipe unpublished: L_FL is of features of regions, and the logits have DKD's loss in place of the softmax KL, as "
    "in the public development code; the weight of L_FL is ours"
)
_TWO_VIEWS = (
    "not run: it compares two views of an image by the logits of both, and a detector's two views have different "
    "regions; no public code has it on COCO"
)

METHODS: dict[str, Setting] = {
    "none": Setting("student alone", _none),
    "fitnet": Setting("FitNet", _fitnet, on={"coco": _UNPUBLISHED}),
    "fgfi": Setting("FGFI", _fgfi, on={"coco": _MANY_LEVELS}),
    "at": Setting("AT", _at),
    "ofd": Setting("OFD", _ofd, on={"imagenet": _OFD_BATCH}),
    "crd": Setting("CRD", _crd, on={"imagenet": _SMALLER_BATCH}),
    "reviewkd": Setting("KR (ReviewKD)", _reviewkd, on={"imagenet": _SMALLER_BATCH}),
    "kd": Setting("KD", _kd, on={"coco": _UNPUBLISHED}),
    "dkd": Setting("DKD", _dkd),
    "dkd_standardized": Setting("NKD* (logit standardisation with DKD)", _dkd_standardized),
    "nkd": Setting("NKD proper", _nkd),
    "mlkd": Setting("MLKD", _mlkd, on={"cifar100": _LONGER, "coco": _TWO_VIEWS}),
    "flg": Setting("FLG", _flg, remark="our reading: the original formula was not found"),
    "wkd": Setting("WKD", _wkd, on={"cifar100": _WKD_CIFAR, "imagenet": _WKD_IMAGENET}),
    "kd_fitnet": Setting("KD + FitNet", _sum(_kd, _fitnet), on={"coco": _UNPUBLISHED}),
    "kd_crd": Setting("KD + CRD", _kd_crd),
    "dkd_reviewkd": Setting("DKD + KR", _sum(_dkd, _reviewkd)),
    "mlkd_reviewkd": Setting("MLKD + KR", _sum(_mlkd, _reviewkd), remark=_LONGER),
    "unikd": Setting("UniKD", _unikd, on={"coco": _ON_REGIONS}),
    "unikd_dev_dkd": Setting("UniKD, development code, with DKD", _unikd_dev_dkd, remark=_DEVELOPMENT),
    "unikd_dev_mlkd": Setting(
        "UniKD, development code, with MLKD", _unikd_dev_mlkd, remark=f"{_DEVELOPMENT}; {_PRINTED_BY_IT}", train=_longer
    ),
    "unikd_without_aff": Setting("UniKD, FDP only", _unikd_without_aff),
    "unikd_without_fdp_and_aff": Setting("UniKD without FDP and AFF", _unikd_without_both),
    "blockwise": Setting("block-wise logit distillation", _blockwise),
    "blockwise_light": Setting("block-wise logit distillation, light", _blockwise_light),
}
"""By their names in those of recipes."""

CLASSIFIERS = tuple(name for name in METHODS if name != "fgfi")
"""Those for classifiers: FGFI is about places near objects."""
