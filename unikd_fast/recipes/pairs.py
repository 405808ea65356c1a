"""Teachers and students of the tables, and how each student is trained."""

from typing import Literal, NamedTuple


class Pair(NamedTuple):
    """A teacher and a student.

    Args:
        data: what they are trained on.
        teacher, student: names of networks; see `build_model`.
        teacher_weights: a file below the folder of published teachers, or an identifier of torchvision.
        learning_rate: of the student, at the batch size of the recipe.
    """

    data: Literal["cifar100", "imagenet", "digits", "fine_grained"]
    teacher: str
    student: str
    teacher_weights: str
    learning_rate: float

    @property
    def name(self) -> str:
        """As in file names.

        Example:
            >>> CIFAR_PAIRS[0].name
            'resnet56-resnet20'
        """
        return f"{_short(self.teacher)}-{_short(self.student)}"


def _short(network: str) -> str:
    return network.rpartition("/")[2]


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


def networks() -> dict[str, Pair]:
    """Every network of the CIFAR pairs, teachers too, by its name in files, with a pair that has it.

    They are trained alone by one recipe; a student's rate is that of its pair.
    """
    found = {_short(pair.student): pair for pair in CIFAR_PAIRS}
    return {**{_short(pair.teacher): pair for pair in CIFAR_PAIRS if _short(pair.teacher) not in found}, **found}
