"""The sections of the data: what is read, and how a view is made of an image."""

from typing import Annotated, Literal

from pydantic import Field

from unikd_fast.config.section import Fraction, HueShift, NonNegative, Positive, PositiveInt, Section, Text


class AugmentationConfig(Section):
    """How a training view is made of an image. null fields take the data set's usual recipe."""

    crop: Literal["none", "pad", "resized"] | None = None
    """none; pad: zero padding and a random crop back to size; resized: a random area and aspect ratio, resized."""
    padding: Annotated[int, Field(ge=0)] | None = None
    """Pixels of zero padding on each side for crop = pad."""
    scale: tuple[Positive, Positive] = (0.08, 1.0)
    """Range of the crop's share of the image's area for crop = resized."""
    ratio: tuple[Positive, Positive] = (3 / 4, 4 / 3)
    """Range of the crop's width over height for crop = resized."""
    flip_probability: Fraction | None = None
    """Probability of a horizontal flip."""
    eval_resize: PositiveInt | None = None
    """Short side in pixels before the centre crop of an evaluation image; null: as the networks' published weights ask
    for, see docs/data.md, else image_size * 8 / 7."""
    jitter: tuple[NonNegative, NonNegative, NonNegative, HueShift] = (0.0, 0.0, 0.0, 0.0)
    """Strengths of random brightness, contrast, saturation and hue, as torchvision's ColorJitter has them; 0: off."""
    policy: Literal["none", "trivial", "rand"] = "none"
    """Strong augmentation after crop and flip. trivial: one operation of any magnitude, torchvision's
    TrivialAugmentWide; rand: rand_ops operations of rand_magnitude, its RandAugment."""
    rand_ops: Annotated[int, Field(ge=1, le=16)] = 2
    """Operations of policy = rand, one after the other."""
    rand_magnitude: Annotated[int, Field(ge=0, le=30)] = 9
    """Magnitude of policy = rand, from 0 to 30."""
    erase_probability: Fraction = 0.0
    """Probability of erasing a rectangle to black."""
    erase_scale: tuple[Positive, Positive] = (0.02, 0.33)
    """Range of the erased share of the view's area."""
    erase_ratio: tuple[Positive, Positive] = (0.3, 3.3)
    """Range of the erased rectangle's height over its width."""


class MixingConfig(Section):
    """Training samples mixed in pairs within a micro-batch, and their labels likewise. The teacher sees them mixed too;
    evaluation never does."""

    mixup_alpha: NonNegative = 0.0
    """Mixup with shares drawn from Beta(alpha, alpha); 0: off."""
    cutmix_alpha: NonNegative = 0.0
    """CutMix with shares drawn from Beta(alpha, alpha); 0: off."""
    probability: Fraction = 1.0
    """Probability that a micro-batch is mixed."""
    switch_probability: Fraction = 0.5
    """Probability that it is by CutMix, where both are on."""


class DataConfig(Section):
    """The data set and how it is read."""

    name: Literal["digits", "cifar100", "image_folder", "imagenet", "packed", "webdataset", "synthetic", "fine_grained"]
    """digits ships with scikit-learn; cifar100, image folders, packed stores (unikd-data pack) and the tar files of
    webdataset are read from root; synthetic and fine_grained are generated."""
    root: Text | None = None
    """Folder of the data set; environment variables are written ${IMAGENET_ROOT}."""
    loader: Literal["auto", "device", "dali", "torchvision"] = "auto"
    """device: tensors that live on the device, augmented by gathers; dali: files decoded by NVIDIA DALI, on the GPU if
    there is one; torchvision: files decoded by PIL in worker processes; auto: device for data held in memory, for files
    dali where it works and else torchvision."""
    image_size: PositiveInt = 224
    """Height and width in pixels of the images that the networks see."""
    num_classes: PositiveInt | None = None
    """Number of classes of generated data and webdataset; checked against what is found on disk for the others."""
    train_samples: PositiveInt | None = None
    """Use a class-balanced subset of this many training samples; null: all."""
    val_samples: Annotated[int, Field(ge=0)] = 0
    """Held out of cifar100's training split for validation; 0: validate on the test split, as the literature does."""
    synthetic_samples: PositiveInt = 256
    """Training images of generated data."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seed of the few-sample subset and of generated images; fixed while run.seed changes, so all runs see one set."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Decoding processes per training process of the torchvision loader."""
    dali_threads: PositiveInt = 2
    """Decoding threads per training process of the dali loader; as many read files and, without a GPU, resize."""
    dali_prefetch: PositiveInt = 2
    """Micro-batches that the dali loader decodes at a time, ahead of training."""
    bad_images: Literal["error", "skip"] = "error"
    """Files that cannot be decoded. error: the run ends and names the file; skip: it is logged, in training the next
    good sample of its micro-batch takes its place, and evaluation goes without it."""
    max_bad_share: Fraction = 0.001
    """Largest share of the samples of an epoch, or of an evaluated split, that bad_images = skip may skip."""
    augmentation: AugmentationConfig = AugmentationConfig()
    """How a training view is cut from an image."""
    second_view: AugmentationConfig | None = None
    """How the second view is made, for methods that compare a weak and a strong one; null: as the first, with
    RandAugment of 2 operations at magnitude 10 and a quarter of the area erased."""
    mixing: MixingConfig = MixingConfig()
    """Mixup and CutMix."""
