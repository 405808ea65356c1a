"""Weights of detectors: of the whole network, in torchvision's layout or Detectron2's, or of its body alone."""

import logging
from collections.abc import Mapping, Sequence

from torch import Tensor, nn
from torchvision.models import get_model_weights
from torchvision.models.detection import FasterRCNN, FasterRCNN_ResNet50_FPN_Weights

from unikd_fast.models.build import bare_model, build_model, downloaded, is_file, unknown_identifier
from unikd_fast.models.detectron2 import (
    AlignedRoIAlign,
    absorbs_deviation,
    has_stride_in_1x1,
    is_detectron2,
    to_torchvision,
)
from unikd_fast.models.weights import another_classifier, classifier_tensor, load_state, log_new_classifier, read_state

_PUBLISHED = {"torchvision/resnet50": FasterRCNN_ResNet50_FPN_Weights.COCO_V1}  # of what is built here, by its body
COCO_ROWS: tuple[str, ...] = tuple(FasterRCNN_ResNet50_FPN_Weights.COCO_V1.meta["categories"])
"""Names of the rows of torchvision's classifier: the background, and COCO's ids 1 to 90, ten of them "N/A"."""
COCO_CLASSES = tuple(name for name in COCO_ROWS[1:] if name != "N/A")
"""COCO's 80 classes in the order of their ids, which is that of Detectron2's rows."""

_PREDICTOR, _SCORES = "roi_heads.box_predictor.", "roi_heads.box_predictor.cls_score.weight"
_ROWS = {"cls_score.weight": 1, "cls_score.bias": 1, "bbox_pred.weight": 4, "bbox_pred.bias": 4}  # of a class
_HEAD = "rpn.head.cls_logits.weight"  # a detector has it, and a classifier has not
# Tensors by which torchvision's other detectors are known, and how many rows they have there, if that tells.
_OTHERS = {
    "fasterrcnn_resnet50_fpn_v2": ("rpn.head.conv.1.0.weight", None),
    "fasterrcnn_mobilenet_v3_large_fpn": (_HEAD, 15),
}
_EPS = 1e-5  # of the norms of every body
_SHOWN = 5

_logger = logging.getLogger("unikd_fast")


def load_detector_weights(
    network: FasterRCNN,
    name: str,
    weights: str,
    *,
    key: str | None = None,
    class_names: Sequence[str] | None = None,
    new_predictor: bool = False,
    role: str = "model",
) -> None:
    """Load weights into a detector.

    A file holds the weights of a detector in the layout of torchvision, which is ours, or of Detectron2, or those of a
    classifier, for the body alone; its names tell. An identifier names weights to download: "COCO_V1" torchvision's of
    the whole detector, which there are for torchvision/resnet50 (its fasterrcnn_resnet50_fpn; no other of its detectors
    is built here), and any other one those of the body, as in `build_model`. "pretrained" is "COCO_V1" where there is
    one, and the body's default elsewhere.

    Rows of COCO's weights, 91 in torchvision's layout and 81 in Detectron2's, are taken by the names of the data's
    classes. If none of these is COCO's and there are as many classes, the weights are taken to be of that data.

    Images must be made for the weights as our loaders make them, less ImageNet's mean and over its deviation. This
    holds for torchvision's, and is worked into those of Detectron2; a file of it that does not state the deviation of
    its pixels, as in the zoo, is taken to have none. Of other files nothing is known.

    torchvision's COCO weights belong to frozen norms w (x - m) / sqrt(v + ε) + b with ε = 0, and ours have ε = 1e-5:
    they get w sqrt((v + ε) / v). A file of 91 rows for torchvision/resnet50 is taken to be these weights.

    Args:
        network: detector that gets the weights; unchanged if an error is raised.
        name: its name, as in `build_detector`.
        weights: path of a file, or an identifier.
        key, class_names, new_predictor, role: as in `build_detector`; key is its weights_key.

    Raises:
        ValueError: there are no such weights, they are of another network or for other classes, or of the body alone
            and the teacher is not trained; or the network lacks the conventions that they need.
        FileNotFoundError: the file does not exist.
        ConnectionError: the weights could not be downloaded.

    Example:
        >>> load_detector_weights(network, "frcnn/torchvision/resnet50", "COCO_V1", class_names=["cat", "dog"])
    """
    source, _, body = name.partition("/")
    body = body if source == "frcnn" else ""
    rows, is_published = COCO_ROWS, not is_file(weights)
    if is_published:
        if key is not None:
            raise ValueError(
                f"load_detector_weights: weights_key = {key!r} with weights {weights!r}, which is not a file, for the "
                f"{role}; remove the key"
            )
        found = _published(network, name, body, weights, role)
        if found is None:
            _check_body(network, body, weights, new_predictor, role)
            _load_body(network, body, _classifier(body, weights, role), weights, role)
            return
        state = found
    else:
        state = read_state(weights, role=role, key=key)
        if is_detectron2(state):
            _check_conventions(network, state, weights, role)
            state, rows = to_torchvision(state, weights, role), (COCO_ROWS[0], *COCO_CLASSES)
        elif body and not any(each.endswith(_HEAD) for each in state):
            _check_body(network, body, weights, new_predictor, role)
            _load_body(network, body, _classifier_of(body, state, weights, role), weights, role)
            return
        if body:
            _refuse_others(state, weights, role)
    expected = network.state_dict()
    prefixes = [each.removesuffix(_SCORES) for each in state if each.endswith(_SCORES)]
    if _SCORES in expected and len(prefixes) == 1:
        state = {each.removeprefix(prefixes[0]): tensor for each, tensor in state.items()}
        theirs, ours = len(state[_SCORES]), len(expected[_SCORES])
        if is_published or (rows is COCO_ROWS and body in _PUBLISHED and theirs == len(rows) != ours):
            state = _with_eps(state)
        chosen = _rows(theirs, ours, rows, class_names, is_published, new_predictor, weights, role)
        for part, count in _ROWS.items():
            each = _PREDICTOR + part
            if chosen is None:
                state[each] = expected[each]
            elif each in state and len(state[each]) == count * theirs:  # otherwise load_state says what it is
                state[each] = state[each].unflatten(0, (theirs, count))[chosen].flatten(0, 1)
    load_state(network, state, weights, role=role)


def _published(network: FasterRCNN, name: str, body: str, weights: str, role: str) -> dict[str, Tensor] | None:
    """Return torchvision's weights of a whole detector, or None if the identifier is of the body."""
    if not body:
        raise ValueError(
            f"load_detector_weights: {name} has no weights to download, got {weights!r} for the {role}; pass the path "
            "of a file, or None for random weights"
        )
    entry = _PUBLISHED.get(body)
    if entry is None or weights not in ("pretrained", entry.name):
        source, _, model = body.partition("/")
        members = [*get_model_weights(model).__members__] if source == "torchvision" else None
        if members is not None and weights not in ("pretrained", *members):
            own = [] if entry is None else [entry.name]
            raise unknown_identifier(name, weights, role, [*own, *members])
        return None
    if isinstance(network.roi_heads.box_roi_pool, AlignedRoIAlign) or has_stride_in_1x1(
        network.backbone.get_submodule("body")
    ):
        raise ValueError(
            f"load_detector_weights: the weights {weights!r} of the {role} need torchvision's conventions; remove "
            f"conventions and stride_in_1x1 from {role}.model_args, or take a file of Detectron2's"
        )
    state: dict[str, Tensor] = downloaded(
        lambda: dict(entry.get_state_dict(progress=True, check_hash=True)), name, weights, role
    )
    return state


def _check_conventions(network: FasterRCNN, state: Mapping[str, Tensor], weights: str, role: str) -> None:
    """Refuse Detectron2's weights for a network that would place anchors, regions or strides elsewhere."""
    needed = []
    if not isinstance(network.roi_heads.box_roi_pool, AlignedRoIAlign):
        needed.append('conventions to "detectron2"')
    # Bodies of MSRA have the deviation of pixels in their weights, and their strides in the 1x1 convolutions.
    if absorbs_deviation(state) and has_stride_in_1x1(network.backbone.get_submodule("body")) is False:
        needed.append("stride_in_1x1 to true")
    if needed:
        raise ValueError(
            f"load_detector_weights: the {role}'s weights {weights} are Detectron2's, and the network computes in "
            f"another way; set {' and '.join(needed)} in {role}.model_args"
        )


def _refuse_others(state: Mapping[str, Tensor], weights: str, role: str) -> None:
    for name, (tensor, rows) in _OTHERS.items():
        found = next((value for each, value in state.items() if each.endswith(tensor)), None)
        if found is not None and rows in (None, len(found)):
            raise ValueError(
                f"load_detector_weights: the {role}'s weights {weights} are of a {name}, which is not built here; take "
                "those of a fasterrcnn_resnet50_fpn, or name your own <module>:<function> that returns the network"
            )


def _rows(
    theirs: int,
    ours: int,
    names: Sequence[str],
    class_names: Sequence[str] | None,
    is_published: bool,
    new_predictor: bool,
    weights: str,
    role: str,
) -> list[int] | None:
    """Return which rows of the weights' classifier are ours, or None if it gets new ones.

    Args:
        theirs, ours: number of rows, with the background.
        names: names of COCO's rows in the layout of the weights.
    """
    is_coco = theirs == len(names) and class_names is not None
    wanted = list(class_names or ()) if is_coco else []
    lacking = [each for each in wanted if each not in COCO_CLASSES]
    if is_coco and not lacking:
        return [0, *(names.index(each) for each in wanted)]
    if theirs == ours and (not lacking or (len(lacking) == len(wanted) and not is_published)):
        return [*range(ours)]
    if new_predictor:
        log_new_classifier(weights, theirs - 1, ours - 1, role)
        return None
    if lacking:
        more = f" and {len(lacking) - _SHOWN} more" if len(lacking) > _SHOWN else ""
        raise ValueError(
            f"load_detector_weights: the {role}'s weights {weights} are for COCO's {len(COCO_CLASSES)} classes, which "
            f"lack {', '.join(map(repr, lacking[:_SHOWN]))}{more} of the data's {ours - 1}; name the classes as COCO "
            f"does, or {another_classifier(role, len(COCO_CLASSES))}"
        )
    raise ValueError(
        f"load_detector_weights: the {role}'s weights {weights} have {theirs - 1} classes and the {role} {ours - 1}; "
        f"{another_classifier(role, theirs - 1)}, or use weights trained on the {ours - 1} classes"
    )


def _with_eps(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return weights of norms with ε = 0 for norms with ε = 1e-5."""
    found = dict(state)
    for name, variance in state.items():
        if name.endswith("running_var"):
            weight, var = name.removesuffix("running_var") + "weight", variance.double()
            found[weight] = (state[weight].double() * ((var + _EPS) / var).sqrt()).to(state[weight].dtype)
    return found


def _classifier(body: str, weights: str, role: str) -> nn.Module:
    """Return the classifier whose published weights the body gets."""
    return build_model(body, num_classes=1000, weights=weights, new_classifier=True, role=role)


def _classifier_of(body: str, state: Mapping[str, Tensor], weights: str, role: str) -> nn.Module:
    """Return the classifier that a file is of, with as many classes as it has there."""
    classifier = bare_model(body, num_classes=1000, role=role)
    tensor = classifier_tensor(classifier, 1000)
    classes = next((len(value) for name, value in state.items() if name.endswith(tensor)), 1000)
    if classes != 1000:
        classifier = bare_model(body, num_classes=classes, role=role)
    load_state(classifier, state, weights, role=role)
    return classifier


def _check_body(network: FasterRCNN, name: str, weights: str, new_predictor: bool, role: str) -> None:
    """Refuse weights of the body alone where they are not enough, or are of another one."""
    if role == "teacher" and not new_predictor:
        raise ValueError(
            f"load_detector_weights: the weights {weights} are of the body {name} alone, so that the teacher would "
            "detect nothing; give those of a detector, or add teacher.training to train it first"
        )
    if has_stride_in_1x1(network.backbone.get_submodule("body")):
        raise ValueError(
            f"load_detector_weights: the weights {weights} of the body {name} have their strides in the 3x3 "
            f"convolutions; remove stride_in_1x1 from {role}.model_args"
        )


def _load_body(network: FasterRCNN, name: str, classifier: nn.Module, weights: str, role: str) -> None:
    """Load the body's tensors of a classifier, every one of them."""
    body = network.backbone.get_submodule("body")
    expected, own = body.state_dict(), {}
    for each, tensor in classifier.state_dict().items():
        # A body of torchvision's MobileNetV2 is its `features`, and timm joins the first two names of most bodies.
        for found in (each, each.removeprefix("features."), each.replace(".", "_", 1)):
            if found in expected:
                own[found] = tensor
    load_state(body, own, weights, role=role)
    _logger.info("%s: the body %s has the weights %s, the rest of the detector is new", role, name, weights)
