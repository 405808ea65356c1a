"""Where data lies: found, or refused at once with what to do about it."""

import subprocess
import sys
from pathlib import Path

import pytest

from unikd_fast.data.roots import DATA_NAMES, check_root, expand_weights


def make_folders(root: Path, *parts: str) -> Path:
    for part in parts:
        (root / part).mkdir(parents=True)
    return root


@pytest.mark.parametrize("name", ["digits", "synthetic"])
def test_data_sets_without_files_need_no_root(name: str) -> None:
    assert check_root(name, None) is None
    assert check_root(name, "/nowhere") is None


@pytest.mark.parametrize("name", ["imagenet", "image_folder"])
def test_image_folders_are_found(tmp_path: Path, name: str) -> None:
    assert check_root(name, str(make_folders(tmp_path, "train", "val"))) == tmp_path


def test_cifar100_is_found_in_its_folder_and_in_the_parent(tmp_path: Path) -> None:
    folder = make_folders(tmp_path, "cifar-100-python") / "cifar-100-python"
    for part in ("train", "test", "meta"):
        (folder / part).touch()
    assert check_root("cifar100", str(tmp_path)) == folder
    assert check_root("cifar100", str(folder)) == folder


def test_variables_and_home_are_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_folders(tmp_path, "sets/a/train", "sets/a/val")
    monkeypatch.setenv("SETS", str(tmp_path / "sets"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_root("imagenet", "${SETS}/a") == tmp_path / "sets" / "a"
    assert check_root("imagenet", "~/sets/a") == tmp_path / "sets" / "a"


@pytest.mark.parametrize("value", [None, ""])
def test_a_variable_without_a_value_is_named(monkeypatch: pytest.MonkeyPatch, value: str | None) -> None:
    monkeypatch.delenv("MY_IMAGES", raising=False)
    if value is not None:
        monkeypatch.setenv("MY_IMAGES", value)
    with pytest.raises(
        ValueError, match=r"MY_IMAGES is not set; .*export MY_IMAGES=/path/to/imagenet.*--set data.root="
    ):
        check_root("imagenet", "${MY_IMAGES}/ilsvrc")


@pytest.mark.parametrize("root", [None, ""])
def test_no_root_at_all(root: str | None) -> None:
    with pytest.raises(ValueError, match=r"cifar100 needs a root folder and got none; set it by `--set data.root="):
        check_root("cifar100", root)


def test_a_missing_folder_comes_with_layout_and_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError) as error:
        check_root("imagenet", str(tmp_path / "gone"))
    for part in (str(tmp_path / "gone"), "missing", "train/<class>/<image>", "set it by `--set data.root="):
        assert part in str(error.value)


def test_classes_to_hold_out_from_lie_in_the_root_itself(tmp_path: Path) -> None:
    missing = tmp_path / "images"
    with pytest.raises(FileNotFoundError, match="is missing; it must hold <class>/<image>; set it by"):
        check_root("image_folder", str(missing), val_samples=10)
    missing.mkdir()
    assert check_root("image_folder", str(missing), val_samples=10) == missing


def test_only_a_variable_that_the_root_names_is_a_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SETS", str(tmp_path / "gone"))
    with pytest.raises(FileNotFoundError, match=r"`export SETS=/path/to/image_folder` or `--set data.root="):
        check_root("image_folder", "${SETS}/photos")


def test_a_file_is_no_root(tmp_path: Path) -> None:
    (tmp_path / "archive.tar").touch()
    with pytest.raises(FileNotFoundError, match=r"archive\.tar, is not a folder"):
        check_root("imagenet", str(tmp_path / "archive.tar"))


@pytest.mark.parametrize(
    ("name", "present", "missing"),
    [
        ("imagenet", "train", "val"),
        ("imagenet", "val", "train"),
        ("cifar100", "cifar-100-python", "cifar-100-python/train"),
    ],
)
def test_a_missing_part_is_named(tmp_path: Path, name: str, present: str, missing: str) -> None:
    make_folders(tmp_path, present)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path / missing} is missing"):
        check_root(name, str(tmp_path))


def test_an_unknown_data_set_is_refused_with_the_names() -> None:
    with pytest.raises(ValueError, match=f"one of {', '.join(DATA_NAMES)}, got 'cifar10'"):
        check_root("cifar10", None)


@pytest.mark.slow
def test_the_check_imports_neither_torch_nor_numpy() -> None:
    program = """
import sys
from unikd_fast.data.roots import check_root
try:
    check_root("imagenet", "/nowhere/at/all")
except FileNotFoundError as error:
    print("refused:", error)
print("heavy:", sorted({"torch", "numpy", "torchvision", "PIL", "sklearn"} & set(sys.modules)))
"""
    output = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert "refused: check_root: the root of data set imagenet, /nowhere/at/all, is missing" in output
    assert "heavy: []" in output


def test_weights_are_files_with_variables_or_identifiers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHERS", str(tmp_path))
    monkeypatch.setenv("HOME", "/home/somebody")
    assert expand_weights("teacher", "${TEACHERS}/resnet56_vanilla/a.pth") == f"{tmp_path}/resnet56_vanilla/a.pth"
    assert expand_weights("teacher", "~/a.pth") == "/home/somebody/a.pth"
    assert expand_weights("teacher", "./a.pth") == "./a.pth"  # a slash tells a file from an identifier
    assert expand_weights("student", "IMAGENET1K_V1") == "IMAGENET1K_V1"
    monkeypatch.delenv("TEACHERS")
    with pytest.raises(ValueError) as refusal:
        expand_weights("teacher", "${TEACHERS}/a.pth")
    message = str(refusal.value)
    assert message.startswith("teacher.weights is '${TEACHERS}/a.pth' and TEACHERS is not set")
    assert "export TEACHERS=" in message
    assert "--set teacher.weights=" in message
