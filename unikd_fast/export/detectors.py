"""Files of exported detectors: how they are written, read back as their users will read them, and compared."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torchvision.models.detection import FasterRCNN

from unikd_fast.data.detection.views import padded_size
from unikd_fast.engine.folder import export_student
from unikd_fast.errors import ConfigError, RunError
from unikd_fast.export.formats import LAST_BITS, TIMES_ROUNDING, Agreement, check_tensors, quiet, refuse_large
from unikd_fast.models import StudentCard
from unikd_fast.models.detector import Detector
from unikd_fast.models.faster_rcnn import build_detector

FORMATS = (".safetensors", ".onnx")

_THRESHOLD = "roi_heads.score_thresh"
_NAMES = ["boxes", "scores", "labels"]
# Rounding flips what is decided by a comparison: which of two boxes outlives the other, or comes in as the last one.
# A flip concerns single objects, a wrong operation nearly all.
_COMPARED = 0.95
# A network whose rounding errors are larger than this cannot be told from a wrong one: RoIAlign half a pixel off moves
# boxes by some per cent of their sides.
_LARGEST = 1e-2


class Objects(NamedTuple):
    """What is found in an image, the surest first."""

    boxes: Tensor  # (n, 4) fp32: x1, y1, x2, y2 in pixels
    scores: Tensor  # (n,) fp32
    labels: Tensor  # (n,) int64: class + 1


Detect = Callable[[Tensor], Objects]
"""A detector: from a normalised image (1, 3, H, W) of any size to its objects."""


class OneImage(nn.Module):
    """A detector as its files run it: it pads an image as an evaluation does.

    Args:
        plain: the network; changed in place.
    """

    def __init__(self, plain: FasterRCNN) -> None:
        super().__init__()
        self.detector = Detector(plain)
        self.eval().requires_grad_(False)
        # As a tensor it stays a number of its own in a graph, which the comparison of a file sets to 0.
        threshold = torch.tensor(float(plain.roi_heads.score_thresh))
        del plain.roi_heads.score_thresh
        plain.roi_heads.register_buffer("score_thresh", threshold)

    def forward(self, images: Tensor) -> Objects:
        """Return the objects of an image (1, 3, H, W)."""
        height, width = images.shape[-2:]
        high, wide = padded_size([(height, width)])
        padded = nn.functional.pad(images, (0, wide - width, 0, high - height))
        (found,) = self.detector(padded, [(height, width)])
        return Objects(*(found[name] for name in _NAMES))


def plain_detector(card: StudentCard, tensors: dict[str, Tensor]) -> FasterRCNN:
    """Return the network of a card with these weights.

    Raises:
        RunError: they do not load strictly.
    """
    network = build_detector(card.model, num_classes=card.num_classes, model_args=card.model_args, role="student")
    try:
        network.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        said = " ".join(str(error).split())
        raise RunError(f"the weights do not load into {card.model} ({said}); export the student again") from error
    return network


def open_detector(card: StudentCard, path: Path) -> Detect:
    """Return the detector of an exported file, on the CPU."""
    if path.suffix == ".onnx":
        return _of_onnx(str(path))
    return OneImage(plain_detector(card, load_file(path)))


def check_detector_format(target: Path, *, preprocesses: bool, image_size: int | None) -> None:
    """Raise ConfigError for a file that a detector is not exported to, or an option that it does not have."""
    if target.suffix not in FORMATS:
        raise ConfigError(
            f"--to {target}: the run trained a detector, which is exported as {' or '.join(FORMATS)}; give such a file"
        )
    if image_size is not None:
        raise ConfigError(f"--image-size {image_size}: a detector takes images of any size; leave --image-size out")
    if preprocesses:
        raise ConfigError("--preprocess is for classifiers, and the run trained a detector; leave --preprocess out")


def write_detector(card: StudentCard, tensors: dict[str, Tensor], path: Path, opset: int | None = None) -> Agreement:
    """Write a detector, read it back, and return how far its objects in random images are from the plain network's.

    Raises:
        RunError: it cannot be written as ONNX, or the objects differ by more than rounding explains.
    """
    plain = plain_detector(card, tensors)
    if path.suffix == ".safetensors":
        export_student(plain, path, card)
        check_tensors(path, plain)
        return Agreement(0.0, 0.0)
    network = OneImage(plain)
    assert card.long_side is not None
    short = card.preprocessing.image_size
    long = min(card.long_side, 4 * short // 3)
    # The file takes images of any size: upright, and of sides that are padded, too.
    sizes = ((short, long), (long, short), (short // 2 + 1, long - 1))
    generator = torch.Generator().manual_seed(0)
    images = [torch.randn(1, 3, *size, generator=generator) for size in sizes]
    _write_onnx(card, network, images[0], path, opset)
    return _compare(path, network, images)


def _write_onnx(card: StudentCard, network: OneImage, image: Tensor, path: Path, opset: int | None) -> None:
    """Write an ONNX file by tracing.

    torch.export (2.15) does not get through torchvision's `batched_nms` (0.29), which branches on the number of boxes;
    without that branch it takes a minute for what a trace does in two seconds.
    """
    import onnx

    refuse_large(network)
    with torch.no_grad(), quiet():
        torch.onnx.export(
            network,
            (image,),
            path,
            input_names=["images"],
            output_names=_NAMES,
            dynamic_axes={"images": {2: "height", 3: "width"}, **{name: {0: "objects"} for name in _NAMES}},
            opset_version=opset,
            dynamo=False,
        )
    model = onnx.load(path)
    for node in model.graph.node:
        node.ClearField("doc_string")  # source locations on this machine
    onnx.helper.set_model_props(model, card.in_words())
    onnx.checker.check_model(model, full_check=True)
    path.write_bytes(model.SerializeToString())


def _of_onnx(source: str | bytes) -> Detect:
    import onnxruntime

    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_outputs()]
    if names != _NAMES:
        raise ValueError(f"its outputs are {', '.join(names)}, and not {', '.join(_NAMES)}")

    def run(images: Tensor) -> Objects:
        return Objects(*map(torch.from_numpy, session.run(_NAMES, {"images": images.numpy()})))

    return run


@torch.no_grad()
def _compare(path: Path, network: OneImage, images: list[Tensor]) -> Agreement:
    """Compare an ONNX file with the plain network, in their surest objects whatever the score.

    What rounding explains is measured as for classifiers: by the network's own distance from itself in float64.

    Raises:
        RunError: they differ by more.
    """
    import onnx

    model = onnx.load(path)
    (threshold,) = (each for each in model.graph.initializer if each.name.endswith(_THRESHOLD))
    threshold.CopyFrom(onnx.helper.make_tensor(threshold.name, onnx.TensorProto.FLOAT, [], [0.0]))
    run = _of_onnx(model.SerializeToString())
    network = copy.deepcopy(network)
    network.get_buffer(f"detector.plain.{_THRESHOLD}").zero_()
    exact = copy.deepcopy(network).double()
    worst = Agreement(0.0, 0.0)
    for image in images:
        expected = network(image)
        rounding = difference(expected, exact(image.double()))
        allowed = min(TIMES_ROUNDING * rounding + LAST_BITS, _LARGEST)
        found = difference(run(image), expected)
        if not found <= allowed:
            raise RunError(
                f"in an image of {image.shape[2]} x {image.shape[3]} pixels boxes and scores differ by {found:.1e} of "
                f"their size from those of the plain network, {allowed:.1e} allowed"
            )
        worst = max(worst, Agreement(found, allowed), key=lambda one: one.difference)
    return worst


def difference(found: Objects, expected: Objects) -> float:
    """Return by how much the objects of an image differ, but for a twentieth of them.

    The distance of an object from the nearest one of its class in the other list is the larger of two: that of the
    scores relative to the larger one, and that of the boxes' sides relative to the longer side and a pixel more.

    Returns:
        The largest distance; inf if one list is a twentieth longer, or empty.

    Example:
        >>> objects = Objects(torch.tensor([[0.0, 0.0, 9.0, 9.0]]), torch.tensor([0.5]), torch.tensor([1]))
        >>> difference(objects, objects._replace(boxes=objects.boxes + 0.1))
        0.01...
    """
    counts = len(found.scores), len(expected.scores)
    if min(counts) <= _COMPARED * max(counts):
        return float("inf")
    scores = found.scores[:, None].double(), expected.scores[None].double()
    boxes = found.boxes[:, None].double(), expected.boxes[None].double()
    largest = torch.finfo(torch.float64).tiny
    distances = (scores[0] - scores[1]).abs() / torch.maximum(*scores).clamp_min(largest)
    sides = (boxes[1][..., 2:] - boxes[1][..., :2]).amax(dim=-1)
    distances = torch.maximum(distances, (boxes[0] - boxes[1]).abs().amax(dim=-1) / (sides + 1))
    distances[found.labels[:, None] != expected.labels] = float("inf")
    nearest = torch.cat([distances.amin(dim=1), distances.amin(dim=0)]).sort().values
    return float(nearest[int(_COMPARED * (len(nearest) - 1))])
