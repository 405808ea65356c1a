"""Settings of the data: which set it is, and how its images are read and changed."""

from dataclasses import replace
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.detection.views import DetectionSettings
from unikd_fast.data.mixing import Mixing
from unikd_fast.settings import Fraction, ImageSize, PositiveInt, Text, settings

LoaderKind = Literal["auto", "device", "dali", "torchvision"]
BadImages = Literal["error", "skip"]


@settings
class DataSettings:
    """The data set and how it is read."""

    name: Literal[
        "digits",
        "cifar100",
        "image_folder",
        "imagenet",
        "arrow",
        "synthetic",
        "given",
        "coco",
        "voc",
        "toy_scenes",
    ]
    """Name of the data set. digits ships with scikit-learn. cifar100, image_folder and imagenet are read from root, as
    is arrow: anything that Hugging Face datasets opens (stores of unikd data pack or save_to_disk, Parquet files,
    WebDataset tars, an imagefolder). synthetic is generated. given: data sets passed to
    unikd_fast.distill. With boxes, for detection: coco and voc are read from root, toy_scenes is generated."""
    root: Text | None = None
    """Folder of the data set, for data that are read from disk. Environment variables are written ${IMAGENET_ROOT}."""
    unlabeled_root: Text | None = None
    """Folder of further training images, at any depth, without labels: the student learns from the teacher on them, and
    an epoch shows each of them once as it does the others. For image_folder and imagenet, whose root needs no train
    then. If null, there are none."""
    digest: Text | None = None
    """Digest of data sets passed to unikd_fast.distill, which writes it; for no other data."""
    loader: LoaderKind = "auto"
    """device: tensors in the device's memory, augmented by gathers; dali: files decoded by NVIDIA DALI, on the GPU if
    there is one; torchvision: files decoded by Pillow in worker processes; auto: device for data held in memory, and
    for files dali if it works, otherwise torchvision."""
    image_size: ImageSize = 224
    """Height and width, in pixels, of the loader's images, which the networks see unless they have an image_size of
    their own."""
    num_classes: PositiveInt | None = None
    """Number of classes of generated data (if null, 10), and of arrow data whose
    labels are plain numbers (if null, one more than the largest). For all other data only their own number is
    accepted."""
    train_samples: PositiveInt | None = None
    """Number of training samples with a label, in a class-balanced subset. If null, all are used. Images without a
    label are used in any case."""
    val_samples: Annotated[int, Ge(0)] = 0
    """Number of samples held out of the training split for validation, stratified, the same in every run. For
    cifar100: with 0, the test split is used for validation, as in the literature. For an image_folder without train and
    val, whose class folders then lie in the root itself."""
    synthetic_samples: PositiveInt = 256
    """Number of training images of generated data."""
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    """Seed of the subset and of generated images. It does not follow run.seed, so that all runs see the same set."""
    workers: Annotated[int, Ge(0)] = 2
    """Number of decoding processes per training process, for loader = torchvision."""
    dali_threads: PositiveInt = 2
    """Number of decoding threads per training process, for loader = dali; as many again read files and, without a GPU,
    resize."""
    bad_images: BadImages = "error"
    """What happens to a file that cannot be decoded. error: the run ends and names it; skip: it is logged, the next
    good sample of its micro-batch takes its place in training, and evaluation leaves it out."""
    max_bad_share: Fraction = 0.001
    """Largest share of the samples of an epoch, or of an evaluated split, that may be skipped, for bad_images =
    skip."""
    augmentation: Augmentation = Augmentation()
    """How a training view is made of an image."""
    second_view: Augmentation | None = None
    """How the second view is made, for methods that compare a weak and a strong view. If null, like the first, with
    RandAugment (2 operations at magnitude 10) and a quarter of the area erased."""
    mixing: Mixing = Mixing()
    """Mixup and CutMix."""
    detection: DetectionSettings = DetectionSettings()
    """How images with boxes are resized."""

    @property
    def first_augmentation(self) -> Augmentation:
        """Return how a training view is made, with the usual recipe of the data set for what is not set."""
        return self.augmentation.for_data(self.name)

    @property
    def second_augmentation(self) -> Augmentation:
        """Return how the second view is made: unless it is set, the first's crop and flip, and strong changes."""
        given = self.second_view or replace(
            self.augmentation,
            policy="rand",
            rand_ops=2,
            rand_magnitude=10,
            erase_probability=1.0,
            erase_scale=(0.25, 0.25),
            erase_ratio=(1.0, 1.0),
        )
        return given.for_data(self.name)
