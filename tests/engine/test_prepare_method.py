"""The head that a method fits to the teacher before training is one head, however many processes fit it."""

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from support.build_method import build
from support.ranks import Ranks
from unikd_fast.engine.distributed import Processes
from unikd_fast.engine.teacher import prepare_method
from unikd_fast.errors import OutOfMemory
from unikd_fast.methods import Method, UniKD
from unikd_fast.values import Features

NORMS = ["input", "batch"]


class Images:
    """A loader of other images on every process."""

    def __init__(self, rank: int) -> None:
        self._generator = torch.Generator().manual_seed(rank)

    def train(self, epoch: int, *, stream: int) -> Any:
        assert stream != 0, "that is the views of training"
        return (
            SimpleNamespace(images=torch.randn(4, 3, 4, 4, generator=self._generator), labels=None) for _ in range(2)
        )


def teacher(images: torch.Tensor) -> Features:
    return Features((images, images[:, :, ::2, ::2] * 2 + 1), images.mean((2, 3)))


def _fits(folder: Path) -> int:
    torch.distributed.init_process_group("gloo")
    rank = torch.distributed.get_rank()
    own: Any = Images(rank), teacher, Processes(rank, 2, rank, torch.device("cpu")), SimpleNamespace(agreed=lambda: 0)
    for norm in NORMS:
        torch.manual_seed(0)
        method = build(UniKD, [2, 3], [3, 3], 3, norm=norm, head_steps=3)
        prepare_method(method, *own, "run")
        assert method.head is not None and not method.head.module.training
        torch.save(method.head.module.state_dict(), folder / f"{norm}-{rank}.pt")
    torch.distributed.destroy_process_group()
    return 0


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    done = Ranks(partial(_fits, folder), folder, processes=2).done()
    assert done.returncode == 0, done.stderr
    return folder


class Greedy(Method):
    """Needs more than there is, once the teacher has been asked."""

    def prepare(self, batches: Iterable[Features]) -> None:
        next(iter(batches))
        torch.empty(2**60, dtype=torch.uint8)


def test_out_of_memory_names_the_head_or_the_teacher() -> None:
    own: Any = Processes(0, 1, 0, torch.device("cpu")), SimpleNamespace(agreed=lambda: 0), "run"
    loader: Any = Images(0)
    of_method = (
        r"^out of memory in the method's part: .*; lower distill\.unikd\.width, set distill\.unikd\.fdp = direct"
    )
    with pytest.raises(OutOfMemory, match=of_method) as caught:
        prepare_method(build(Greedy), loader, teacher, *own)
    assert caught.value.exit_code == 7
    with pytest.raises(OutOfMemory, match=r"^out of memory in the teacher's part"):
        prepare_method(build(Greedy), loader, lambda images: images.new_empty(2**60), *own)


@pytest.mark.parametrize("norm", NORMS)
def test_two_ranks_freeze_the_same_head(fitted: Path, norm: str) -> None:
    one, other = (torch.load(fitted / f"{norm}-{rank}.pt") for rank in (0, 1))
    assert any("running_mean" in name for name in one)
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name
