"""Settings of the data: which set it is, and how its images are read and changed."""

from dataclasses import replace
from typing import Annotated, Literal

from annotated_types import Ge, Lt

from unikd_fast.data.augmentation import Augmentation
from unikd_fast.data.mixing import Mixing
from unikd_fast.settings import Fraction, PositiveInt, Text, settings

LoaderKind = Literal["auto", "device", "dali", "torchvision"]
BadImages = Literal["error", "skip"]


@settings
class DataSettings:
    """The data set and how it is read."""

    name: Literal["digits", "cifar100", "image_folder", "imagenet", "arrow", "synthetic", "fine_grained"]
    """digits ships with scikit-learn; cifar100 and image folders are read from root, and so is arrow, whatever Hugging
    Face datasets opens: stores of unikd data pack or save_to_disk, Parquet files, WebDataset tars, an imagefolder;
    synthetic and fine_grained are generated."""
    root: Text | None = None
    """Folder of the data set; environment variables are written ${IMAGENET_ROOT}."""
    loader: LoaderKind = "auto"
    """device: tensors that live on the device, augmented by gathers; dali: files decoded by NVIDIA DALI, on the GPU if
    there is one; torchvision: files decoded by PIL in worker processes; auto: device for data held in memory, for files
    dali where it works and else torchvision."""
    image_size: PositiveInt = 224
    """Height and width in pixels of the images that the networks see."""
    num_classes: PositiveInt | None = None
    """Number of classes of generated data, and of arrow where labels are plain numbers; checked against what is found
    on disk for the others."""
    train_samples: PositiveInt | None = None
    """Use a class-balanced subset of this many training samples; null: all."""
    val_samples: Annotated[int, Ge(0)] = 0
    """Held out of cifar100's training split for validation; 0: validate on the test split, as the literature does."""
    synthetic_samples: PositiveInt = 256
    """Training images of generated data."""
    seed: Annotated[int, Ge(0), Lt(2**32)] = 0
    """Seed of the few-sample subset and of generated images; fixed while run.seed changes, so all runs see one set."""
    workers: Annotated[int, Ge(0)] = 2
    """Decoding processes per training process of the torchvision loader."""
    dali_threads: PositiveInt = 2
    """Decoding threads per training process of the dali loader; as many read files and, without a GPU, resize."""
    bad_images: BadImages = "error"
    """Files that cannot be decoded. error: the run ends and names the file; skip: it is logged, in training the next
    good sample of its micro-batch takes its place, and evaluation goes without it."""
    max_bad_share: Fraction = 0.001
    """Largest share of the samples of an epoch, or of an evaluated split, that bad_images = skip may skip."""
    augmentation: Augmentation = Augmentation()
    """How a training view is cut from an image."""
    second_view: Augmentation | None = None
    """How the second view is made, for methods that compare a weak and a strong one; null: as the first, with
    RandAugment of 2 operations at magnitude 10 and a quarter of the area erased."""
    mixing: Mixing = Mixing()
    """Mixup and CutMix."""

    @property
    def first_augmentation(self) -> Augmentation:
        """How a training view is made, with the usual recipe of the data set where nothing is set."""
        return self.augmentation.for_data(self.name)

    @property
    def second_augmentation(self) -> Augmentation:
        """How the second view of a method that compares two is made: the first's crop and flip, and strong changes."""
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
