"""Teachers and students of the tables, and how each student is trained."""

from typing import Literal, NamedTuple

TEACHER = "teacher"
"""Stands where a method would: the pair's teacher, trained here like a student alone."""


class Pair(NamedTuple):
    """A teacher and a student.

    Args:
        data: data set that both are trained on.
        teacher, student: names of the networks; see `build_model`.
        teacher_weights: file below the folder of published teachers, or identifier of torchvision.
        learning_rate: learning rate of the student, at the batch size of the recipe.
        remark: what to know about the figures of all its students.
    """

    data: Literal["cifar100", "imagenet", "coco", "digits", "study", "toy_scenes"]
    teacher: str
    student: str
    teacher_weights: str
    learning_rate: float
    remark: str = ""

    @property
    def name(self) -> str:
        """Return the pair as it stands in names of recipes and folders.

        Example:
            >>> CIFAR_PAIRS[0].name, IMAGENET_PAIRS[1].name
            ('resnet56-resnet20', 'resnet50-mobilenetv1')
        """
        return f"{_short(self.teacher)}-{_short(self.student)}"

    def networks(self, method: str) -> str:
        """Return the networks of a method's run, as in its name: only one if there is no teacher.

        In the study a pair stands for its images too, so that a student alone belongs to it.

        Example:
            >>> [CIFAR_PAIRS[0].networks(method) for method in ("kd", "none", TEACHER)]
            ['resnet56-resnet20', 'resnet20', 'resnet56']
        """
        if method == TEACHER:
            return _short(self.teacher)
        return _short(self.student) if method == "none" and self.data != "study" else self.name


def _short(network: str) -> str:
    """Return a network's name without its source, and without timm's suffix for the full width."""
    return network.rpartition("/")[2].removesuffix("_100")


# Students that the literature trains at a fifth of the usual rate.
_SLOW = ("MobileNetV2", "ShuffleV1", "ShuffleV2")


def _cifar(teacher: str, student: str) -> Pair:
    rate = 0.01 if student in _SLOW else 0.05
    return Pair("cifar100", f"cifar/{teacher}", f"cifar/{student}", f"{teacher}_vanilla/ckpt_epoch_240.pth", rate)


CIFAR_PAIRS = (
    _cifar("resnet56", "resnet20"),
    _cifar("resnet110", "resnet32"),
    _cifar("resnet32x4", "resnet8x4"),
    _cifar("wrn_40_2", "wrn_16_2"),
    _cifar("wrn_40_2", "wrn_40_1"),
    _cifar("vgg13", "vgg8"),
    _cifar("resnet32x4", "ShuffleV1"),
    _cifar("wrn_40_2", "ShuffleV1"),
    _cifar("vgg13", "MobileNetV2"),
    _cifar("ResNet50", "MobileNetV2"),
    _cifar("resnet32x4", "ShuffleV2"),
)
"""The six pairs of Tables 1 and 5, then the five of Table 2."""

IMAGENET_PAIRS = (
    Pair("imagenet", "torchvision/resnet34", "torchvision/resnet18", "IMAGENET1K_V1", 0.2),
    Pair("imagenet", "torchvision/resnet50", "timm/mobilenetv1_100", "IMAGENET1K_V1", 0.2),
)
"""The pairs of Table 3."""


def _coco(teacher: str, student: str, weights: str, remark: str = "") -> Pair:
    file = f"COCO-Detection/{weights}"
    return Pair("coco", f"frcnn/torchvision/{teacher}", f"frcnn/torchvision/{student}", file, 0.01, remark)


_R50 = "faster_rcnn_R_50_FPN_3x/137849458/model_final_280758.pkl"
_R101 = "faster_rcnn_R_101_FPN_3x/137851257/model_final_f6e8b1.pkl"
_BODY = (
    "the ResNet-50 of the published student begins as MSRA's, with the strides in the 1x1 convolutions; ours as "
    "torchvision's, with the strides in the 3x3"
)

COCO_PAIRS = (
    _coco("resnet101", "resnet18", _R101),
    _coco("resnet101", "resnet50", _R101, _BODY),
    _coco("resnet50", "mobilenet_v2", _R50),
)
"""The pairs of Table 4; their teachers' files lie as on Detectron2's server."""
