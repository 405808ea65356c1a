"""What Hugging Face `datasets` has on disk, opened by path: each layout, each kind of column, and what is refused."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from support.folder_images import SIZE, loader
from support.generated_images import write_jpegs
from support.odd_images import broken, encoded, odd
from unikd_fast.data.arrow import load_arrow
from unikd_fast.data.dali import dali_problem
from unikd_fast.data.images import StoredImage, read_rgb
from unikd_fast.data.sets import open_data
from unikd_fast.data.sets.image_folder import load_image_folder
from unikd_fast.data.settings import DataSettings
from unikd_fast.data.splits import ArrowImages, DataSplits, ImageFiles, hash_split
from unikd_fast.errors import DataError

TRAIN, VAL = 11, 5
NAMES = ["class_0", "class_1", "class_2"]
pytestmark = pytest.mark.usefixtures("own_cache")
needs_dali = pytest.mark.skipif(dali_problem() is not None, reason="DALI does not work here")
kinds = pytest.mark.parametrize("kind", ["torchvision", pytest.param("dali", marks=needs_dali)])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    return write_jpegs(root, {"train": TRAIN, "val": VAL}, sides=((20, 30), (33, 17), (25, 25)))


def arrow_splits(splits: DataSplits) -> list[ArrowImages]:
    found = [split for split in (splits.train, splits.val) if isinstance(split, ArrowImages)]
    assert len(found) == 2
    return found


def images_of(splits: DataSplits) -> list[list[Any]]:
    return [[image.read() for image in split.images(range(len(split)))] for split in arrow_splits(splits)]


def as_columns(folder: Path) -> dict[str, dict[str, list[Any]]]:
    """Return the bytes, names and labels of each split of an image folder."""
    splits = load_image_folder(folder, SIZE)
    found = {}
    for name, split in (("train", splits.train), ("validation", splits.val)):
        assert isinstance(split, ImageFiles)
        image = [{"bytes": Path(path).read_bytes(), "path": Path(path).name} for path in split.paths]
        found[name] = {"image": image, "label": split.labels.tolist()}
    return found


def saved(root: Path, columns: dict[str, dict[str, list[Any]]], **features: Any) -> Path:
    """Save splits by `save_to_disk`; the features are those of images and classes unless they are given."""
    own = datasets.Features(features or {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)})
    parts = {name: datasets.Dataset.from_dict(content, features=own) for name, content in columns.items()}
    datasets.DatasetDict(parts).save_to_disk(str(root))
    return root


def write_tars(root: Path, columns: dict[str, dict[str, list[Any]]], label: Callable[[int], tuple[str, str]]) -> Path:
    """Write WebDataset tars; `label` gives the extension and the content of a label's file."""
    root.mkdir()
    for name, content in columns.items():
        with tarfile.open(root / f"{name}-000.tar", "w") as archive:
            for row, (image, number) in enumerate(zip(content["image"], content["label"], strict=True)):
                extension, text = label(number)
                for ending, data in (("jpg", image["bytes"]), (extension, text.encode())):
                    member = tarfile.TarInfo(f"{row:04}.{ending}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return root


def in_layout(layout: str, folder: Path, root: Path) -> Path:
    columns = as_columns(folder)
    match layout:
        case "save_to_disk":
            return saved(root, columns)
        case "parquet":
            for name, part in datasets.load_from_disk(str(saved(root / "saved", columns))).items():
                for shard in range(2):
                    part.shard(2, shard).to_parquet(
                        str(root / "files" / "data" / f"{name}-0000{shard}-of-00002.parquet")
                    )
            return root / "files"
        case "imagefolder":
            shutil.copytree(folder / "train", root / "train")
            shutil.copytree(folder / "val", root / "validation")
            return root
        case "imagefolder metadata":
            for name, part in columns.items():
                (root / name).mkdir(parents=True)
                for image in part["image"]:
                    (root / name / image["path"]).write_bytes(image["bytes"])
                rows = zip(part["image"], part["label"], strict=True)
                lines = ["file_name,label", *(f"{image['path']},{NAMES[label]}" for image, label in rows)]
                (root / name / "metadata.csv").write_text("\n".join(lines))
            return root
        case "webdataset cls":
            return write_tars(root, columns, lambda label: ("cls", str(label)))
    return write_tars(root, columns, lambda label: ("json", json.dumps({"width": 3, "label": label})))


@pytest.mark.parametrize(
    "layout",
    ["save_to_disk", "parquet", "imagefolder", "imagefolder metadata", "webdataset cls", "webdataset json"],
)
def test_each_layout_opens_by_its_path(folder: Path, tmp_path: Path, layout: str) -> None:
    root = in_layout(layout, folder, tmp_path / "set")
    splits, expected = (
        open_data(DataSettings(name="arrow", root=str(root), image_size=SIZE)),
        load_image_folder(folder, SIZE),
    )
    assert splits.num_classes == 3
    assert splits.class_names == (None if layout.startswith("webdataset") else tuple(NAMES))
    assert splits.test_is_val
    for name, found, files in zip(as_columns(folder).items(), images_of(splits), arrow_splits(splits), strict=True):
        assert found == [image["bytes"] for image in name[1]["image"]]
        assert files.labels.tolist() == name[1]["label"]
        assert files.sample_ids.tolist() == list(range(len(found)))
    # As the names of files are kept or not.
    assert (hash_split(splits.train) == hash_split(expected.train)) == (layout == "imagefolder")
    again = open_data(DataSettings(name="arrow", root=str(root), image_size=SIZE))
    assert hash_split(again.train) == hash_split(splits.train)
    few = open_data(DataSettings(name="arrow", root=str(root), image_size=SIZE, train_samples=6, num_classes=3))
    assert np.bincount(few.train.labels).tolist() == [2, 2, 2]
    assert isinstance(few.train, ArrowImages)
    every = arrow_splits(splits)[0].images(range(TRAIN))
    assert few.train.images(range(6)) == tuple(every[i] for i in few.train.sample_ids)


@kinds
def test_views_are_the_folders_bit_for_bit(folder: Path, tmp_path: Path, kind: str) -> None:
    splits, expected = load_arrow(in_layout("parquet", folder, tmp_path), SIZE), load_image_folder(folder, SIZE)
    ours, theirs = (loader(each, kind=kind, global_batch_size=4) for each in (splits, expected))  # type: ignore[arg-type]
    for found, wanted in ((ours.train(2), theirs.train(2)), (ours.evaluate("val"), theirs.evaluate("val"))):
        for batch, other in zip(found, wanted, strict=True):
            for part, other_part in zip(batch[:3], other[:3], strict=True):
                assert torch.equal(part, other_part)


@pytest.mark.parametrize("kind", odd())
def test_odd_images_have_the_pixels_of_their_files(tmp_path: Path, kind: str) -> None:
    """Grey, CMYK, palettes, 16 bits, transparency, orientation: `datasets` itself would turn or clip some."""
    (tmp_path / "file").write_bytes(odd()[kind])
    columns = {"image": [{"bytes": odd()[kind], "path": None}], "label": [0]}
    splits = load_arrow(saved(tmp_path / "set", {"train": columns, "test": columns}), SIZE)
    (stored,) = arrow_splits(splits)[0].images([0])
    assert np.array_equal(read_rgb(stored), read_rgb(StoredImage(str(tmp_path / "file"))))


ARRAYS = {
    "Array3D": ((20, 24, 3), datasets.Array3D((20, 24, 3), "uint8")),
    "any height": ((20, 24, 3), datasets.Array3D((None, 24, 3), "uint8")),
    "one channel": ((20, 24, 1), datasets.Array3D((20, 24, 1), "uint8")),
    "Array2D": ((20, 24), datasets.Array2D((20, 24), "uint8")),
    "lists": ((20, 24, 3), datasets.List(datasets.List(datasets.List(datasets.Value("uint8"))))),
}


@pytest.mark.parametrize("form", ARRAYS)
def test_arrays_are_shown_as_images_of_them_are(tmp_path: Path, form: str) -> None:
    shape, feature = ARRAYS[form]
    pixels = np.random.default_rng(0).integers(0, 256, (9, *shape), np.uint8)
    changed = pixels.copy()
    changed[4, 7, 7] ^= 1
    label = {"label": [i % 3 for i in range(9)]}
    files = [{"bytes": encoded("PNG", Image.fromarray(image.squeeze())), "path": None} for image in pixels]
    as_label = datasets.ClassLabel(names=NAMES)
    opened = {}
    for name, column in (("pixels", list(pixels)), ("changed", list(changed)), ("encoded", files)):
        own = datasets.Image() if name == "encoded" else feature
        parts = {part: {"img": column, **label} for part in ("train", "test")}
        opened[name] = load_arrow(saved(tmp_path / name, parts, img=own, label=as_label), SIZE)
    rows, images = (arrow_splits(opened[name])[0].images(range(9)) for name in ("pixels", "encoded"))
    for row, image in zip(rows, images, strict=True):
        assert np.array_equal(row.read(), read_rgb(image))
    for kind in ("torchvision", *(["dali"] if dali_problem() is None else [])):
        ours, theirs = (
            next(loader(opened[name], kind=kind, global_batch_size=9).train(0))  # type: ignore[arg-type]
            for name in ("pixels", "encoded")
        )
        assert torch.equal(ours.images, theirs.images)
    assert len({hash_split(splits.train) for splits in opened.values()}) == 3


def test_arrays_with_names_are_told_apart_by_these(tmp_path: Path) -> None:
    """And by their heights: to read them all would take as long as an epoch."""
    pixels = list(np.zeros((3, 20, 24, 3), np.uint8))
    types = {"image": datasets.Array3D((None, 24, 3), "uint8"), "path": datasets.Value("string")}
    hashes = set()
    for number, (image, third) in enumerate(((pixels[0], "c"), (pixels[0], "d"), (pixels[0][1:], "c"))):
        columns = {"image": [*pixels[:2], image], "path": ["a", "b", third], "label": [0, 1, 2]}
        parts = {"train": columns, "test": columns}
        root = saved(tmp_path / str(number), parts, **types, label=datasets.ClassLabel(names=NAMES))
        hashes.add(hash_split(load_arrow(root, SIZE).train))
    assert len(hashes) == 3


def test_columns_are_found_by_type_and_then_by_name(folder: Path, tmp_path: Path) -> None:
    columns = as_columns(folder)
    plain = {
        name: {
            "mask": part["image"],
            "img": [image["bytes"] for image in part["image"]],
            "coarse_label": [0] * len(part["label"]),
            "fine_label": [NAMES[label] for label in part["label"]],
        }
        for name, part in columns.items()
    }
    of_types = {
        "mask": datasets.Value("binary"),
        "img": datasets.Value("binary"),
        "coarse_label": datasets.Value("int8"),
        "fine_label": datasets.Value("string"),
    }
    for part in plain.values():
        part["mask"] = [image["bytes"][:9] for image in part["mask"]]
    splits = load_arrow(saved(tmp_path / "plain", plain, **of_types), SIZE)
    assert images_of(splits)[0] == [image["bytes"] for image in columns["train"]["image"]]
    assert (splits.class_names, splits.val.labels.tolist()) == (tuple(NAMES), columns["validation"]["label"])
    typed = {
        name: {"photo": part["image"], "image": part["label"], "label": part["label"], "kind": part["label"]}
        for name, part in columns.items()
    }
    number, kinds_of = datasets.Value("int64"), datasets.ClassLabel(names=[*NAMES, "more"])
    root = saved(tmp_path / "typed", typed, photo=datasets.Image(), image=number, label=number, kind=kinds_of)
    splits = load_arrow(root, SIZE)
    assert images_of(splits)[0] == [image["bytes"] for image in columns["train"]["image"]]
    assert splits.num_classes == 4
    with pytest.raises(ValueError, match="arrow has 4 classes, got num_classes 3; set it to 4"):
        open_data(DataSettings(name="arrow", root=str(root), image_size=SIZE, num_classes=3))


def test_plain_numbers_have_the_classes_that_are_asked_for(folder: Path, tmp_path: Path) -> None:
    root = saved(tmp_path / "set", as_columns(folder), image=datasets.Image(), label=datasets.Value("uint8"))
    assert [load_arrow(root, SIZE, count).num_classes for count in (None, 9)] == [3, 9]
    with pytest.raises(ValueError, match="labels of train must be below the number of classes, 2, got 2"):
        load_arrow(root, SIZE, 2)


def test_splits_are_train_validation_and_test(folder: Path, tmp_path: Path) -> None:
    columns = as_columns(folder)
    train, val = columns["train"], columns["validation"]
    both = load_arrow(saved(tmp_path / "both", {"train": train, "val": val, "test": train}), SIZE)
    assert (len(both.train), len(both.val), len(both.test), both.test_is_val) == (TRAIN, VAL, TRAIN, False)
    assert load_arrow(saved(tmp_path / "test", {"train": train, "test": val}), SIZE).test_is_val
    kept_back = {**val, "label": [-1] * VAL}
    hidden = load_arrow(saved(tmp_path / "hidden", {"train": train, "validation": val, "test": kept_back}), SIZE)
    assert hidden.test_is_val
    for name, parts in {"alone": {"train": train}, "other": {"a": train, "b": val}}.items():
        with pytest.raises(ValueError, match=rf"set.* has the splits {', '.join(parts)}, and train with val.*; rename"):
            load_arrow(saved(tmp_path / f"set {name}", parts), SIZE)
    datasets.load_from_disk(str(tmp_path / "test"))["train"].save_to_disk(str(tmp_path / "one"))
    with pytest.raises(ValueError, match="one has the splits train, and train with validation or test is needed"):
        load_arrow(tmp_path / "one", SIZE)


@pytest.mark.parametrize(
    ("features", "message"),
    [
        (
            {"pixels": "binary", "label": "int64"},
            r"has no image column, it holds pixels \(binary\), label \(int64\); ren",
        ),
        (
            {"image": "binary", "target": "int64"},
            r"has no label column, it holds image \(binary\), target \(int64\); ren",
        ),
        (
            {"image": "int64", "label": "int64"},
            r"column image of .* must hold encoded images or .*, got Value\('int64'\)",
        ),
        (
            {"image": "binary", "label": "float32"},
            r"column label of split train of .* as a number or a name, got Value",
        ),
    ],
)
def test_columns_that_are_missing_or_of_no_use_are_named(
    tmp_path: Path, features: dict[str, str], message: str
) -> None:
    values = {"binary": b"x", "int64": 1, "float32": 1.5}
    columns = {name: [values[kind]] for name, kind in features.items()}
    types = {name: datasets.Value(kind) for name, kind in features.items()}
    root = saved(tmp_path / "set", {"train": columns, "test": columns}, **types)
    with pytest.raises(ValueError, match=message):
        load_arrow(root, SIZE)


def test_labels_that_are_missing_or_of_other_classes_are_named(folder: Path, tmp_path: Path) -> None:
    columns = as_columns(folder)
    part = columns["validation"]
    missing = {**columns, "validation": {**part, "label": [0, None, 1, 2, 0]}}
    with pytest.raises(ValueError, match=r"row 1 of split val of .*missing has no label; add it or remove the row"):
        load_arrow(saved(tmp_path / "missing", missing), SIZE)
    words = {name: {**own, "label": [NAMES[label] for label in own["label"]]} for name, own in columns.items()}
    words["validation"]["label"][3] = "wolf"
    text = datasets.Value("string")
    with pytest.raises(ValueError, match=r"split val of .* named classes and train 3, 'wolf' is in one of them; give"):
        load_arrow(saved(tmp_path / "words", words, image=datasets.Image(), label=text), SIZE)


@kinds
def test_bad_images_are_named_or_skipped(folder: Path, tmp_path: Path, kind: str) -> None:
    columns = as_columns(folder)
    bad = dict(zip((1, 4, 8), ("empty", "jpeg without 50", "png zeros for 50"), strict=True))
    for row, name in bad.items():
        columns["train"]["image"][row]["bytes"] = broken()[name]
    columns["validation"]["image"][2] = None
    splits = load_arrow(saved(tmp_path / "set", columns), SIZE)
    lenient = {"kind": kind, "global_batch_size": TRAIN, "bad_images": "skip", "max_bad_share": 0.5}
    shown = loader(splits, **lenient)  # type: ignore[arg-type]
    (batch,) = shown.train(0)
    assert sorted(set(batch.sample_ids.tolist())) == [i for i in range(TRAIN) if i not in bad]
    (clean,) = loader(load_image_folder(folder, SIZE), kind=kind, global_batch_size=TRAIN).train(0)  # type: ignore[arg-type]
    first = clean.sample_ids.tolist().index(0)
    assert torch.equal(batch.images[first], clean.images[first])
    assert {image.sample_id for image in shown.bad_samples} == set(bad)
    (held_out,) = shown.evaluate("val")
    assert held_out.sample_ids.tolist() == [0, 1, 3, 4]
    strict = loader(splits, kind=kind, global_batch_size=TRAIN)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=r"cannot decode \d+\.jpg, row \d+ of .*set/train/data-00000-of-00001\.arrow: "):
        list(strict.train(0))
    with pytest.raises(DataError, match=r"cannot decode row 2 of .*set/validation/.*: it holds no image; restore it"):
        list(strict.evaluate("val"))


def test_a_file_of_an_imagefolder_is_named_itself(folder: Path, tmp_path: Path) -> None:
    root = write_jpegs(tmp_path / "set", {"train": 6, "test": 3}, sides=((20, 30),))
    splits = load_arrow(root, SIZE)
    path = root / "train" / "class_1" / "0004.jpg"
    path.write_bytes(b"text")
    with pytest.raises(DataError, match=rf"cannot decode {path}, row 3 of .*\.arrow: not a JPEG, PNG"):
        list(loader(splits, global_batch_size=6).train(0))
    path.unlink()
    with pytest.raises(DataError, match=f"cannot read {path}: No such file"):
        list(loader(splits, global_batch_size=6).train(0))


@pytest.mark.parametrize(
    ("pixels", "shape"),
    [
        ([[[1, 2, 3]], [[1, 2, 3], [4, 5, 6]]], "2 x varying x 3"),
        ([[[1, 2]] * 5] * 3, "3 x 5 x 2"),
        ([], "0 x 0 x 0"),
    ],
)
def test_arrays_that_are_not_images_are_named(tmp_path: Path, pixels: list[Any], shape: str) -> None:
    columns = {"image": [pixels], "label": [0]}
    feature = datasets.List(datasets.List(datasets.List(datasets.Value("uint8"))))
    root = saved(tmp_path / "set", {"train": columns, "test": columns}, image=feature, label=datasets.Value("int64"))
    with pytest.raises(DataError, match=f"row 0 of .*: it holds an array of {shape}, and height x width x 3"):
        read_rgb(arrow_splits(load_arrow(root, SIZE))[0].images([0])[0])


def test_what_cannot_be_opened_is_named_with_the_remedy(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"empty cannot be opened by datasets [\d.]+: .*; it must hold what `unikd"):
        load_arrow(tmp_path / "empty", SIZE)
    root = saved(tmp_path / "cut", as_columns(folder))
    data = root / "train" / "data-00000-of-00001.arrow"
    data.write_bytes(data.read_bytes()[:300])
    with pytest.raises(ValueError, match="cut cannot be opened by datasets"):
        load_arrow(root, SIZE)
    (root / "dataset_dict.json").write_text('{"splits": 3}')
    with pytest.raises(ValueError, match="cut cannot be opened by datasets"):
        load_arrow(root, SIZE)
    tars = in_layout("webdataset cls", folder, tmp_path / "tars")
    (tars / "train-000.tar").write_bytes((tars / "train-000.tar").read_bytes()[:700])
    with pytest.raises(ValueError, match="tars cannot be opened by datasets"):
        load_arrow(tars, SIZE)
    with pytest.raises(FileNotFoundError, match=r"the root of data set arrow, .*gone, is missing; it must"):
        open_data(DataSettings(name="arrow", root=str(tmp_path / "gone"), image_size=SIZE))
