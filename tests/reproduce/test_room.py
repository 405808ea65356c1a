"""How many runs at a time."""

from collections.abc import Mapping
from pathlib import Path

import pytest

from support.report_runs import training, write_metrics
from unikd_fast.reproduce.room import (
    CpuRoom,
    Gpu,
    GpuRoom,
    largest_memory_gib,
    parse_gpus,
    runs_that_fit,
)
from unikd_fast.reproduce.schedule import Room

TWO = (Gpu("0", 80.0), Gpu("1", 80.0))


def filled(room: Room) -> list[Mapping[str, str]]:
    """What is offered until there is no more."""
    running: list[Mapping[str, str]] = []
    while (offered := room.offer(running)) is not None:
        running.append(offered)
        assert len(running) < 100
    return running


@pytest.mark.parametrize(
    ("jobs", "cores", "expected"),
    [(None, 1, ["1"]), (None, 2, ["2"]), (None, 8, ["2"] * 4), (3, 8, ["2"] * 3), (4, 2, ["1"] * 4), (1, 16, ["16"])],
)
def test_a_run_has_two_cores_unless_asked_otherwise(
    jobs: int | None, cores: int, expected: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert [offered["OMP_NUM_THREADS"] for offered in filled(CpuRoom(jobs, cores))] == expected


def test_a_given_number_of_threads_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert filled(CpuRoom(2, 8)) == [{}, {}]


def test_as_many_fit_as_the_memory_allows() -> None:
    # 0.9 * 80 GiB = 72 GiB; 1.25 * 2 GiB + 0.75 GiB = 3.25 GiB, which goes into it 22 times
    assert runs_that_fit(80.0, 2.0) == 22
    assert runs_that_fit(80.0, 57.0) == 1  # 72 GiB exactly
    assert runs_that_fit(8.0, 40.0) == 1
    assert runs_that_fit(80.0, None) == 1


def test_one_run_a_gpu_until_its_memory_is_known() -> None:
    known: list[float] = []
    room = GpuRoom(TWO, None, 64, lambda: max(known, default=None))
    assert filled(room) == [{"CUDA_VISIBLE_DEVICES": "0"}, {"CUDA_VISIBLE_DEVICES": "1"}]
    known.append(20.0)  # 72 / 25.75: two on each
    assert [offered["CUDA_VISIBLE_DEVICES"] for offered in filled(room)] == ["0", "1", "0", "1"]
    known.append(60.0)
    assert len(filled(room)) == 2


def test_the_cores_bound_what_starts_by_itself_and_not_what_is_asked_for() -> None:
    assert len(filled(GpuRoom(TWO[:1], None, 8, lambda: 0.5))) == 4
    assert len(filled(GpuRoom(TWO, None, 1, lambda: 0.5))) == 2  # one a GPU in any case
    asked = filled(GpuRoom(TWO, 5, 2, lambda: 500.0))
    assert [offered["CUDA_VISIBLE_DEVICES"] for offered in asked] == ["0", "1", "0", "1", "0"]


@pytest.mark.parametrize("room", [CpuRoom(4, 8), GpuRoom(TWO, 4, 8, lambda: None)])
def test_who_runs_out_of_memory_beside_others_is_given_more_room(room: Room) -> None:
    assert len(filled(room)) == 4
    for running, left in ((3, 3), (3, 2), (3, 1), (1, 1)):  # all four at once: each is tried again
        assert room.narrow(running)
        assert len(filled(room)) == left
    assert not room.narrow(0)
    assert len(filled(room)) == 1


LISTED = "0, GPU-aa11, 81920\n1, GPU-bb22, 40960\n2, GPU-cc33, [N/A]\n"


@pytest.mark.parametrize(
    ("visible", "expected"),
    [
        (None, [Gpu("0", 80.0), Gpu("1", 40.0)]),
        ("1", [Gpu("1", 40.0)]),
        ("GPU-bb22, 0", [Gpu("GPU-bb22", 40.0), Gpu("0", 80.0)]),
        ("MIG-5", [Gpu("MIG-5", 0.0)]),
        ("", []),
    ],
)
def test_gpus_are_those_that_are_visible(visible: str | None, expected: list[Gpu]) -> None:
    assert parse_gpus(LISTED, visible) == expected


def test_the_memory_is_the_largest_that_a_run_has_written(tmp_path: Path) -> None:
    assert largest_memory_gib([tmp_path / "none"]) is None
    write_metrics(tmp_path / "a", [training(1.0) | {"memory_gib": 1.5}, training(2.0) | {"memory_gib": 3.5}])
    write_metrics(tmp_path / "b", [training(1.0) | {"memory_gib": 2.5}])
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"memory_gib": 9')  # being written
    assert largest_memory_gib([tmp_path / "a", tmp_path / "b", tmp_path / "none"]) == 3.5
