"""CIFAR-100 as it is published, and files that only pretend to be it."""

import io
import os
import pickle
import signal
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from support.processes import finished, peak_of_memory
from unikd_fast.data.sets.in_memory import load_cifar100
from unikd_fast.data.splits import TensorImages

Writer = Callable[[Any], bytes]


class Python2Pickler(pickle._Pickler):
    """Write what Python 2 wrote: byte strings by their own opcode, and numpy under its old name."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_bytes(self, value: bytes | str) -> None:
        encoded = value.encode() if isinstance(value, str) else value
        self.write(pickle.BINSTRING + struct.pack("<i", len(encoded)) + encoded)

    dispatch[bytes] = save_bytes
    dispatch[str] = save_bytes

    def save_global(self, obj: Any, name: str | None = None) -> None:
        if getattr(obj, "__name__", "") == "_reconstruct":
            self.write(pickle.GLOBAL + b"numpy.core.multiarray\n_reconstruct\n")
        else:
            super().save_global(obj, name)


def python2(content: Any) -> bytes:
    buffer = io.BytesIO()
    Python2Pickler(buffer, protocol=2).dump(content)
    return buffer.getvalue()


WRITERS: dict[str, Writer] = {
    "python 2": python2,
    "python 3, protocol 2": lambda content: pickle.dumps(content, protocol=2),
    "python 3, protocol 4": lambda content: pickle.dumps(content, protocol=4),
    "python 3, numpy 1": lambda content: pickle.dumps(content, protocol=2).replace(b"numpy._core.", b"numpy.core."),
}


def images(count: int, seed: int) -> dict[bytes, Any]:
    random = np.random.default_rng(seed)
    return {
        b"filenames": [f"picture_{i}.png".encode() for i in range(count)],
        b"batch_label": b"training batch 1 of 1",
        b"fine_labels": [i % 100 for i in range(count)],
        b"coarse_labels": [i % 20 for i in range(count)],
        b"data": random.integers(0, 256, (count, 3072), np.uint8),
    }


META = {b"fine_label_names": [b"class_%d" % i for i in range(100)], b"coarse_label_names": [b"", b"b"]}


def write(folder: Path, writer: Writer = python2, **replaced: bytes) -> Path:
    content = {"train": images(400, 0), "test": images(200, 1), "meta": META}
    for name, part in content.items():
        (folder / name).write_bytes(replaced.get(name, writer(part)))
    return folder


@pytest.mark.parametrize("writer", WRITERS.values(), ids=WRITERS)
def test_reads_the_published_layout(tmp_path: Path, writer: Writer) -> None:
    splits = load_cifar100(write(tmp_path, writer))
    assert isinstance(splits.train, TensorImages)
    expected = images(400, 0)
    assert np.array_equal(splits.train.images.numpy().reshape(400, 3072), expected[b"data"])
    assert splits.train.images[7, 1, 2, 3] == expected[b"data"][7, 1024 + 2 * 32 + 3]  # green, row 2, column 3
    assert splits.train.labels.tolist() == expected[b"fine_labels"]
    assert splits.train.labels.dtype == np.int64
    assert (len(splits.train), len(splits.test), splits.num_classes, splits.image_size) == (400, 200, 100, 32)
    assert splits.class_names is not None
    assert splits.class_names[42] == "class_42"
    assert splits.test_is_val


def test_an_array_by_columns_is_read(tmp_path: Path) -> None:
    expected = images(400, 0)
    by_columns = {**expected, b"data": np.asfortranarray(expected[b"data"])}
    splits = load_cifar100(write(tmp_path, train=python2(by_columns)))
    assert isinstance(splits.train, TensorImages)
    assert np.array_equal(splits.train.images.numpy().reshape(400, 3072), expected[b"data"])


def test_python2_writer_resembles_the_published_files() -> None:
    written = python2(images(1, 0))
    assert written.startswith(b"\x80\x02}")
    assert b"cnumpy.core.multiarray\n_reconstruct\n" in written
    assert b"_codecs" not in written


def test_val_can_be_held_out_of_train_and_ids_stay(tmp_path: Path) -> None:
    splits = load_cifar100(write(tmp_path), val_samples=100)
    assert isinstance(splits.train, TensorImages)
    assert isinstance(splits.val, TensorImages)
    assert not splits.test_is_val
    assert sorted([*splits.train.sample_ids, *splits.val.sample_ids]) == list(range(400))
    assert np.array_equal(np.bincount(splits.val.labels, minlength=100), np.ones(100))
    published = images(400, 0)[b"data"]
    for part in (splits.train, splits.val):
        assert np.array_equal(part.images.numpy().reshape(-1, 3072), published[part.sample_ids])


@pytest.mark.parametrize("val_samples", [-1, 400])
def test_refuses_val_samples_that_leave_nothing(tmp_path: Path, val_samples: int) -> None:
    with pytest.raises(ValueError, match=rf"val_samples must be in \[0, 400\).* got {val_samples}"):
        load_cifar100(write(tmp_path), val_samples=val_samples)


class Malicious:
    """Run a command when unpickled."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = function, arguments

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.call


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (Path.touch, "getattr"),
        (eval, "builtins.eval|__builtin__.eval"),
        (np.load, "numpy.load"),
        (np.frombuffer, "frombuffer"),
        (print, "print"),
    ],
    ids=["method", "eval", "numpy.load", "frombuffer", "print"],
)
def test_a_malicious_pickle_is_refused_by_name(tmp_path: Path, function: Callable[..., object], name: str) -> None:
    target = tmp_path / "touched"
    argument = f"__import__('pathlib').Path({str(target)!r}).touch()" if function is eval else str(target)
    train = pickle.dumps({b"data": Malicious(function, argument)}, protocol=2)
    with pytest.raises(ValueError, match=f"{tmp_path / 'train'}: refused the global .*({name})"):
        load_cifar100(write(tmp_path, train=train))
    assert not target.exists()


def test_the_malicious_pickle_would_have_worked(tmp_path: Path) -> None:
    target = tmp_path / "touched"
    pickle.loads(pickle.dumps(Malicious(eval, f"__import__('pathlib').Path({str(target)!r}).touch()"), protocol=2))
    assert target.exists()


def test_codecs_other_than_latin1_are_refused(tmp_path: Path) -> None:
    import codecs

    train = pickle.dumps({b"data": Malicious(codecs.encode, "x", "rot13")}, protocol=2)
    with pytest.raises(ValueError, match=r"refused to call _codecs\.encode with other arguments"):
        load_cifar100(write(tmp_path, train=train))


def text(value: str) -> bytes:
    return b"U" + bytes([len(value)]) + value.encode()


def pickled_array(kind: str, flags: int, content: bytes, *, shape: bytes = b"K\x01\x85") -> bytes:
    """Pickle {"data": array} as Python 2 does, with a state of the dtype that numpy would not write."""
    dtype = b"cnumpy\ndtype\n(" + text(kind) + b"K\0K\1tR(K\3" + text("|") + b"NNNJ\xff\xff\xff\xff"
    dtype += b"J\xff\xff\xff\xffK" + bytes([flags]) + b"tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85" + text("b") + b"tR"
    state = b"(K\1" + shape + dtype + b"K\0T" + struct.pack("<i", len(content)) + content + b"tb"
    return b"\x80\2}(" + text("data") + array + state + b"u."


# numpy takes these bytes for the address of an object, which it lets go of with the array.
ADDRESS = pickled_array("O8", 1, b"A" * 8)


def test_bytes_do_not_become_addresses(tmp_path: Path) -> None:
    """In a process of its own, which a failure ends."""
    folder = write(tmp_path, train=ADDRESS)
    process = os.fork()
    if not process:
        try:
            load_cifar100(folder)
        except ValueError as error:
            os._exit(0 if "refused an array of O8, CIFAR-100 holds u1" in str(error) else 1)
        os._exit(2)
    assert os.waitpid(process, 0)[1] == 0


def test_the_address_would_have_been_used() -> None:
    code, *_ = finished("import pickle, sys; pickle.loads(bytes.fromhex(sys.argv[1]), encoding='bytes')", ADDRESS.hex())
    assert code == -signal.SIGSEGV


READ = """
import sys
from pathlib import Path
from unikd_fast.data.sets.in_memory import load_cifar100
try:
    load_cifar100(Path(sys.argv[1]))
except ValueError as error:
    print(error)
"""


def test_tuples_in_tuples_as_a_name_do_not_kill(tmp_path: Path) -> None:
    write(tmp_path, train=b"\x80\x04)" + 10**6 * b"\x85" + b"\x8c\x01a\x93.")
    code, said, _ = finished(READ, tmp_path)
    assert code == 0
    assert "refused a global without a name" in said


ANNOUNCED = {
    "memo": b"]r\xff\xff\xff\x7f.",
    "text": b"T\xff\xff\xff\x7f.",
    "bytes": b"\x80\3B\xff\xff\xff\xff.",
    "frame": b"\x80\4\x95\xff\xff\xff\xff\xff\0\0\0].",
    "number": b"\x80\2\x8b\xff\xff\xff\x7f.",
    "array": pickled_array("u1", 0, b"", shape=b"J\xff\xff\xff\x7fJ\xff\xff\xff\x7f\x86"),
    "negative array": pickled_array("u1", 0, b"x", shape=b"J\xff\xff\xff\xffJ\xff\xff\xff\xff\x86"),
}


@pytest.mark.parametrize("train", ANNOUNCED.values(), ids=ANNOUNCED)
def test_what_is_announced_takes_no_memory(tmp_path: Path, train: bytes) -> None:
    """Gigabytes, by a few bytes that are not followed by more."""
    folder = write(tmp_path, train=train)
    with peak_of_memory() as peak, pytest.raises(ValueError, match=f"{tmp_path / 'train'}"):
        load_cifar100(folder)
    assert peak.bytes < 2**25


NESTED = b"))\x86" + b"q\0h\0\x86" * 60  # a pair of pairs of pairs, which is small but for who spells it out
REFUSED = {
    "other names": (b"\x80\2}(" + text("data") + b"cnumpy\nload\nu.", "the global numpy.load, which CIFAR-100"),
    "a key that is nested": (b"\x80\2}" + NESTED + b"K\0s.", "a key that is a tuple"),
    "a shape that is nested": (pickled_array("u1", 0, b"x", shape=b"K\1" + NESTED + b"\x86"), "without a usual shape"),
    "a structure": (
        pickled_array("u1", 0, b"x").replace(b"NNN", b"N" + text("f") + b"\x85}" + text("f") + b"K\0K\0\x86s"),
        "of other elements than single bytes",
    ),
    "an attribute": (b"\x80\2cnumpy\nndarray\n}" + text("a") + b"K\0sb.", "set_state"),
    "a new object": (b"\x80\2cnumpy\nndarray\n)\x81.", "the operation NEWOBJ, which CIFAR-100 does not use"),
    "an instance": (b"(inumpy\nndarray\n.", "the operation INST"),
    "an extension": (b"\x80\2\x82\1.", "the operation EXT1"),
    "an object kept elsewhere": (b"P7\n.", "the operation PERSID"),
}


@pytest.mark.parametrize(("train", "message"), REFUSED.values(), ids=REFUSED)
def test_what_the_published_files_do_not_is_refused(tmp_path: Path, train: bytes, message: str) -> None:
    with pytest.raises(ValueError, match=rf"cannot read {tmp_path / 'train'}: .*{message}"):
        load_cifar100(write(tmp_path, train=train))


BROKEN: dict[str, tuple[dict[bytes, Any] | bytes, str]] = {
    "empty file": (b"", "cannot read"),
    "truncated": (python2(images(3, 0))[:-200], "cannot read"),
    "no pickle": (b"\x1f\x8b\x08 not a pickle", "cannot read"),
    "no dictionary": (python2([1, 2]), "must hold a dictionary, got list"),
    "no data": ({b"fine_labels": [0]}, r"`data` .* got NoneType"),
    "CIFAR-10 shape": ({b"data": np.zeros((2, 100), np.uint8), b"fine_labels": [0, 0]}, r"got \(2, 100\) uint8"),
    "floats": (
        {b"data": np.zeros((2, 3072), np.float32), b"fine_labels": [0, 0]},
        "refused an array of f4, CIFAR-100 holds u1",
    ),
    "labels of CIFAR-10": ({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0, 0]}, "`fine_labels`"),
    "too few labels": ({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0]}, "per image, 2 in all"),
    "class 100": ({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, 100]}, "one class in"),
    "text labels": ({b"data": np.zeros((2, 3072), np.uint8), b"fine_labels": [0, b"1"]}, "one class in"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_named(tmp_path: Path, content: dict | bytes, message: str) -> None:
    train = content if isinstance(content, bytes) else python2(content)
    with pytest.raises(ValueError, match=message) as error:
        load_cifar100(write(tmp_path, train=train))
    assert str(tmp_path / "train") in str(error.value)


def test_meta_without_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="meta must hold a list of 100 fine_label_names"):
        load_cifar100(write(tmp_path, meta=python2({b"label_names": [b"a"]})))
