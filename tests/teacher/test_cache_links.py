"""Links in the folder of a cache: nothing is written through them, and nothing is read by them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from support.cache_inputs import build_all, build_shard, decoded, logits, make
from unikd_fast.errors import CacheError
from unikd_fast.teacher.cache import CacheFolder

Link = Callable[[Path, Path], None]
LINKS: dict[str, Link] = {"symbolic": Path.symlink_to, "hard": Path.hardlink_to}


@pytest.fixture
def precious(tmp_path: Path) -> Path:
    path = tmp_path / "precious"
    path.write_text("kept")
    return path


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
@pytest.mark.parametrize("name", ["create.lock", "sample_ids.npy", "manifest.json.tmp"])
def test_a_cache_is_not_created_through_a_link(tmp_path: Path, precious: Path, name: str, link: Link) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    link(cache / name, precious)
    if name == "sample_ids.npy":
        build_all(cache)
        assert (cache / name).stat().st_ino != precious.stat().st_ino and not (cache / name).is_symlink()
    else:
        with pytest.raises(CacheError, match=name):
            make(cache)
    assert precious.read_text() == "kept"


def test_a_folder_that_cannot_be_created_is_named(precious: Path) -> None:
    with pytest.raises(CacheError, match=r"precious/cache cannot be written: Not a directory; part of its path is a"):
        make(precious / "cache")


@pytest.mark.parametrize("link", LINKS.values(), ids=LINKS)
def test_a_shard_is_not_built_through_a_link(tmp_path: Path, precious: Path, link: Link) -> None:
    folder = make(tmp_path / "cache")
    link(tmp_path / "cache" / "shard-00001.partial", precious)
    with pytest.raises(CacheError, match=r"shard-00001\.partial .*; remove it, and build again"):
        folder.claim(1)
    with pytest.raises(CacheError, match=r"shard-00001\.partial .*; remove it"):
        folder.discard(1)
    assert precious.read_text() == "kept"
    (tmp_path / "cache" / "shard-00001.partial").unlink()
    build_shard(folder, 1)
    assert torch.equal(decoded(folder, [7]), logits([7]))


def test_a_link_in_place_of_a_finished_shard_is_refused(tmp_path: Path) -> None:
    build_all(tmp_path / "cache")
    shard = tmp_path / "cache" / "shard-00001.bin"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    folder = make(tmp_path / "cache")
    with pytest.raises(CacheError, match=r"shard-00001\.bin is a link, .*sample id .*only this shard is redone"):
        folder.read([7])
    assert [(found.shard, found.status) for found in folder.verify().faulty] == [(1, "a link")]
    folder.discard(1)
    build_shard(folder, 1)
    assert torch.equal(decoded(folder, [7]), logits([7]))
    assert (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("name", ["manifest.json", "sample_ids.npy", "teacher.safetensors"])
def test_a_link_in_place_of_the_manifest_is_refused(tmp_path: Path, name: str) -> None:
    build_all(tmp_path / "cache").attach({"head": torch.ones(3)}, {"by": 1})
    path = tmp_path / "cache" / name
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CacheError, match=rf"{name} is a link, or not a regular file; put the file itself there"):
        CacheFolder.open(tmp_path / "cache").attachment()
    path.unlink()
    shutil.move(tmp_path / "elsewhere", path)
    assert CacheFolder.open(tmp_path / "cache").attachment() is not None
