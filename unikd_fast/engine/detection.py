"""Training and evaluation of detectors: a region of an image is a sample, so that every method runs as it is.

The student proposes regions; there both networks pool their features and classify them. Logits, labels and levels that
a method sees are those of the regions; what is left of the detector's own loss is added once.
"""

import json
import logging
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from unikd_fast import tasks
from unikd_fast.config import Config, ConfigError
from unikd_fast.data.detection.loader import DetectionLoader, build_detection_loader
from unikd_fast.data.detection.pictures import sheet
from unikd_fast.data.detection.scenes import BoxedImages, DetectionSplits
from unikd_fast.data.detection.sets import open_scenes
from unikd_fast.data.detection.views import padded_size
from unikd_fast.data.roots import named_as_configured
from unikd_fast.engine.detector_teacher import DetectorTeacher, start_detector
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.inputs import loader_arguments
from unikd_fast.engine.memory import oom_hint
from unikd_fast.engine.networks import require_teacher_weights
from unikd_fast.engine.task import Task
from unikd_fast.engine.timing import UNTIMED, StepClock
from unikd_fast.io import make_folder, write_file, write_json
from unikd_fast.methods import METHODS, Method, Needs
from unikd_fast.models import Preprocessing, StudentCard
from unikd_fast.models.detector import Detector, Regions, sizes_of
from unikd_fast.models.faster_rcnn import build_detector
from unikd_fast.report.run_files import PICTURE
from unikd_fast.tasks import detection
from unikd_fast.values import DetectionBatch, Features, Loss, RegionBatch, StudentOutput, Target

DETECTIONS = "detections.json"
"""File of a run folder: detections in the test split, in COCO's format."""

_OF_TRANSFORM = {"min_size", "max_size", "image_mean", "image_std", "size_divisible", "fixed_size"}
"""Arguments of torchvision's `FasterRCNN` for its own transform of images, which does not run here."""

_logger = logging.getLogger("unikd_fast")


class StudentRegions(NamedTuple):
    """The student's pass over a batch of images."""

    output: StudentOutput  # logits (R, K + 1), and what the adapter makes of the student's levels
    regions: Regions
    losses: dict[str, Tensor]  # of proposals and boxes


class DetectorModule(nn.Module):
    """The student with what the method trains alongside it; see `networks.StudentModule`.

    Args:
        network: the student.
        adapter, companion: as for `networks.StudentModule`.
    """

    def __init__(self, network: Detector, adapter: nn.Module | None, companion: nn.Module | None) -> None:
        super().__init__()
        self.network, self.adapter, self.companion = network, adapter, companion

    def forward(self, batch: DetectionBatch) -> StudentRegions:
        regions, features, losses = self.network.train_step(batch)
        adapted = None if self.adapter is None else self.adapter(features)
        return StudentRegions(StudentOutput(features.logits, adapted), regions, losses)


class Detection(Task):
    """Images with boxes."""

    figures = tasks.DETECTION
    term_names = ("loss_objectness", "loss_rpn_box_reg", "loss_box_reg")

    def open_data(self, config: Config, needs: Needs, processes: Processes) -> DetectionSplits:
        _refuse(config, needs)
        return open_scenes(config.data)

    def build_loader(
        self, config: Config, splits: DetectionSplits, needs: Needs, processes: Processes
    ) -> DetectionLoader:
        return build_detection_loader(splits, config.data, **loader_arguments(config, processes))

    def build_student(self, config: Config, splits: DetectionSplits, needs: Needs, batch: int) -> Detector:
        return _network(config, "student", splits, needs)

    def build_teacher(
        self,
        config: Config,
        splits: DetectionSplits,
        needs: Needs,
        *,
        with_weights: bool = True,
        batch: int | None = None,
    ) -> Detector:
        require_teacher_weights(config)
        torch.manual_seed(config.run.seed + 1)
        return _network(config, "teacher", splits, needs)

    def context(self, splits: DetectionSplits, student: nn.Module, teacher: nn.Module | None) -> dict[str, Any]:
        return {"student": student, "teacher": teacher, "num_classes": splits.num_classes + 1}

    def student_module(self, student: nn.Module, method: Method[Any], autocast: torch.dtype | None) -> DetectorModule:
        assert isinstance(student, Detector)
        return DetectorModule(student, method.adapter, method.companion)

    def start_teacher(
        self, config: Config, network: nn.Module, loader: Any, splits: DetectionSplits, processes: Processes
    ) -> DetectorTeacher:
        assert isinstance(network, Detector)
        return start_detector(config, network, loader, processes)

    def plain_teacher(
        self, config: Config, network: nn.Module, splits: DetectionSplits, processes: Processes
    ) -> DetectorTeacher:
        assert isinstance(network, Detector)
        assert config.teacher is not None
        precision = "fp32" if config.teacher.precision == "auto" else config.teacher.precision  # see Classification
        network = network.to(processes.device)
        return DetectorTeacher(network, precision=precision, fold=config.teacher.fold_batch_norm)

    def loss(
        self,
        engine: Any,
        teacher: nn.Module | None,
        method: Method[Any],
        batch: DetectionBatch,
        target: Target | None = None,
        clock: StepClock = UNTIMED,
    ) -> Loss:
        """Return the method's loss over regions, and the detector's own of proposals and boxes."""
        assert teacher is None or isinstance(teacher, DetectorTeacher)
        with oom_hint("teacher"):
            maps = None if teacher is None else teacher.maps(batch.images)
        clock.mark("teacher")
        with oom_hint("student"):
            student: StudentRegions = engine(batch)
        clock.mark("student_forward")
        if teacher is not None and maps is not None:
            with oom_hint("teacher"):
                target = method.target(teacher.at(maps, student.regions, sizes_of(batch)))
        clock.mark("teacher")
        counts = torch.tensor([len(boxes) for boxes in student.regions.boxes], device=batch.sample_ids.device)
        near = None
        if method.needs.near_objects and teacher is not None and maps is not None:
            near = teacher.network.near_objects(maps, batch)
        ids = batch.sample_ids.repeat_interleave(counts)
        regions: Any = RegionBatch(batch.images, student.regions.labels, ids, near_objects=near)
        with oom_hint("student"):
            loss = method.loss(student.output, target, regions)
            total = loss.total + torch.stack([*student.losses.values()]).sum()
        return Loss(total, {**loss.terms, **{name: value.detach() for name, value in student.losses.items()}})

    def trial_inputs(self, config: Config, needs: Needs, images: int, device: torch.device) -> tuple[DetectionBatch]:
        sizes = config.data.detection.for_data(config.data.name)
        assert sizes.short_sides is not None
        assert sizes.long_side is not None
        height, width = padded_size([(max(sizes.short_sides), sizes.long_side)])
        box = torch.tensor([[0.0, 0.0, height / 2, width / 2]], device=device)
        zeros = torch.zeros(images, dtype=torch.int64, device=device)
        batch = DetectionBatch(
            torch.zeros(images, 3, height, width, device=device),
            torch.tensor([[height, width]] * images, device=device),
            (box,) * images,
            (zeros[:1],) * images,
            zeros,
            zeros,
        )
        return (batch,)

    def teacher_features(self, teacher: nn.Module, batch: DetectionBatch) -> tuple[Features, Tensor]:
        assert isinstance(teacher, DetectorTeacher)
        return teacher.sampled(batch)

    def evaluate(
        self,
        network: nn.Module,
        loader: DetectionLoader,
        splits: DetectionSplits,
        split: Literal["val", "test"],
        processes: Processes,
        *,
        autocast: torch.dtype | None = None,
        keep: list[Any] | None = None,
    ) -> dict[str, Any]:
        assert isinstance(network, Detector | DetectorTeacher)
        held_out: BoxedImages = splits.val if split == "val" else splits.test
        with torch.autocast(processes.device.type, autocast, enabled=autocast is not None):
            own = detect(network, loader.evaluate(split), held_out, splits.category_ids.tolist())
        every = [each for share in processes.gather(own) for each in share]
        every.sort(key=lambda each: each["image_id"])  # the order of one process
        if keep is not None:
            keep += every
        return processes.from_first(lambda: detection.figures(splits.ground_truth(split), every))

    def write_outputs(self, folder: Path, outputs: list[Any], splits: DetectionSplits, processes: Processes) -> None:
        def write() -> None:
            make_folder(folder)
            write_json(folder / DETECTIONS, outputs)
            write_file(folder / PICTURE, sheet(splits.test, splits.class_names, splits.category_ids, outputs))

        processes.from_first(write)

    def require_teacher(
        self, config: Config, found: dict[str, float], splits: DetectionSplits, processes: Processes, name: str
    ) -> None:
        assert config.teacher is not None
        reached, least = found["ap"] / 100, config.teacher.min_accuracy or 0.0
        said = f"reaches an AP of {found['ap']:.2f} on {found['samples']:,} validation images"
        if reached < least:
            raise ConfigError(
                f"the teacher, {config.teacher.label} with teacher.weights = {config.teacher.all_weights}, {said}, and "
                f"teacher.min_accuracy is {least:g}; check that the weights are for these classes, in this order, or "
                "train from it nevertheless with --set teacher.min_accuracy=0"
            )
        if processes.is_first:
            _logger.info("[%s] the teacher %s", name, said)

    def check_method(
        self,
        config: Config,
        student_module: nn.Module,
        method: Method[Any],
        teacher: nn.Module | None,
        head: nn.Module | None,
        batch: int,
        processes: Processes,
    ) -> None:
        """Check that maps are of the same strides; regions have one shape, and what runs on them needs no trial."""
        assert isinstance(student_module, DetectorModule)
        if not isinstance(teacher, Detector) or student_module.network.level_strides == teacher.level_strides:
            return
        own, other = (", ".join(map(str, each.level_strides)) for each in (student_module.network, teacher))
        raise ConfigError(
            f"distill.method = {config.distill.label!r} with data.name = {config.data.name!r} compares maps of the "
            f"same strides, and those of the student have {own}, of the teacher {other}; set student.feature_nodes "
            "and teacher.feature_nodes to maps of the same strides"
        )

    def size_in_words(self, config: Config) -> str:
        sizes = config.data.detection.for_data(config.data.name)
        shorts = sizes.short_sides or ()
        span = f"{min(shorts)} to {max(shorts)}" if len(set(shorts)) > 1 else f"{shorts[0]}"
        return f"short sides {span} px, long sides to {sizes.long_side} px"

    def card(self, config: Config, splits: DetectionSplits, loader: Any) -> StudentCard:
        sizes = config.data.detection.for_data(config.data.name)
        assert sizes.eval_short_side is not None
        return StudentCard(
            config.student.model,
            config.student.model_args,
            splits.num_classes,
            splits.class_names,
            Preprocessing(splits.mean, splits.std, "bilinear", 1.0, False, sizes.eval_short_side),
            long_side=sizes.long_side,
        )


DETECTION = Detection()


def _refuse(config: Config, needs: Needs) -> None:
    """Refuse what has no meaning where regions are samples.

    Raises:
        ConfigError: a setting, or the method.
    """
    teacher, train, name = config.teacher, config.train, config.data.name
    changing = "the sizes of images and the number of regions change with every step"
    sizes = "images have the sizes of data.detection"
    refused: tuple[tuple[str, object, object, str], ...] = (
        (
            "teacher.cache.mode",
            "off" if teacher is None else teacher.cache.mode,
            "off",
            "the student proposes other regions in every step, whose outputs cannot be stored",
        ),
        (
            "teacher.ensemble",
            [] if teacher is None else [each.model for each in teacher.ensemble],
            [],
            "regions are of one teacher",
        ),
        ("teacher.image_size", None if teacher is None else teacher.image_size, None, sizes),
        ("student.image_size", config.student.image_size, None, sizes),
        ("teacher.compile", None if teacher is None else teacher.compile, None, changing),
        ("train.compile", train.compile, None, changing),
        ("train.cuda_graph", "auto" if train.cuda_graph == "off" else train.cuda_graph, "auto", changing),
        (
            "train.precision",
            "fp32" if train.precision == "bf16" else train.precision,
            "fp32",
            "its range is too small",
        ),
        ("distill.max_levels", config.distill.max_levels, 4, "levels are chosen by the names of feature_nodes"),
        ("train.activation_checkpointing", train.activation_checkpointing, False, "it is for classifiers"),
    )
    for key, value, wanted, reason in refused:
        if value != wanted:
            raise ConfigError(f"{key} = {value!r} with data.name = {name!r}: {reason}; set it to {json.dumps(wanted)}")
    for role, section in (("student", config.student), ("teacher", teacher)):
        unread = [] if section is None or ":" in section.model else sorted(_OF_TRANSFORM & section.model_args.keys())
        if section is not None and unread:
            raise ConfigError(
                f"{role}.model_args.{unread[0]} = {section.model_args[unread[0]]!r} with data.name = {name!r}: images "
                "are resized as data.detection says, and normalised as all networks see them; remove it"
            )
    own, other = config.student.feature_nodes, None if teacher is None else teacher.feature_nodes
    if needs.near_objects and own != other:
        raise ConfigError(
            f"student.feature_nodes = {own} and teacher.feature_nodes = {other} with distill.method = "
            f"{config.distill.label!r}, which compares the same maps of both; set both to the same names"
        )
    of_levels = {name: METHODS[name].needs_of(own) for name, own in config.distill.settings.items()}
    pooled = {name: own.pooled for name, own in of_levels.items() if own.levels}
    if len(set(pooled.values())) > 1:
        regions = [name for name, is_pooled in pooled.items() if is_pooled]
        raise ConfigError(
            f"distill.method = {config.distill.label!r} with data.name = {name!r}: {' and '.join(regions)} takes the "
            f"levels of regions, {' and '.join(sorted(pooled.keys() - regions))} those of images; take one kind"
        )
    lacking = {
        "a second view": needs.second_view,
        "the input of the classifier": needs.embedding and not needs.levels,
        "the teacher's own blocks": needs.teacher_network,
        "a teacher with batch statistics": needs.teacher_batch_statistics,
    }
    for what, is_needed in lacking.items():
        if is_needed:
            raise ConfigError(
                f"data.name = {name!r} with distill.method = {config.distill.label!r}, which needs {what}: a detector "
                "has none; use a method that needs logits or levels alone, such as kd, dkd or unikd"
            )


def _network(config: Config, role: str, splits: DetectionSplits, needs: Needs) -> Detector:
    section = config.student if role == "student" else config.teacher
    assert section is not None
    naming = nullcontext() if section.weights is None else named_as_configured(role, section.weights)
    with naming as weights:
        network = build_detector(
            section.model,
            num_classes=splits.num_classes,
            model_args=section.model_args,
            weights=weights,
            weights_key=section.weights_key,
            class_names=splits.class_names,
            new_predictor=role == "student" or (config.teacher is not None and config.teacher.is_trained),
            role=role,
        )
    levels: Literal["none", "maps", "regions"] = "none"
    if needs.levels or needs.before_activation:
        levels = "regions" if needs.pooled else "maps"
    try:
        return Detector(network, levels=levels, level_names=section.feature_nodes)
    except ValueError as error:
        raise ConfigError(f"{role}.feature_nodes: {error}") from error


@torch.no_grad()
def detect(
    network: Detector | DetectorTeacher,
    batches: Iterable[DetectionBatch],
    split: BoxedImages,
    category_ids: Sequence[int],
) -> list[dict[str, Any]]:
    """Return the detections of a split in COCO's format, in pixels of the annotated images.

    Args:
        network: the detector; put into eval mode meanwhile.
        batches: images of the split one by one: how they are batched changes the average precision.
        split: the split.
        category_ids: the data set's own number of each class.
    """
    place = {sample_id: position for position, sample_id in enumerate(split.ids.tolist())}
    training = network.training
    network.eval()
    found: list[dict[str, Any]] = []
    for batch in batches:
        detections = network(batch.images, sizes_of(batch))
        for sample_id, size, each in zip(batch.sample_ids.tolist(), sizes_of(batch), detections, strict=True):
            position = place[sample_id]
            height, width = (own / shown for own, shown in zip(split.sizes[position].tolist(), size, strict=True))
            boxes = each["boxes"].double().cpu() * torch.tensor([width, height, width, height])
            boxes[:, 2:] -= boxes[:, :2]
            rows = zip(boxes.tolist(), each["labels"].tolist(), each["scores"].double().tolist(), strict=True)
            image_id = int(split.image_ids[position])
            found += [
                {"image_id": image_id, "category_id": int(category_ids[label - 1]), "bbox": box, "score": score}
                for box, label, score in rows
            ]
    network.train(training)
    return found
