"""What a run listens on: nothing where it is one process, the loopback interface alone on one node."""

from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from support.ranks import Ranks
from support.real_runs import in_this_process, run, write_config
from unikd_fast.engine.distributed import StopSignal, join_alone, start_processes
from unikd_fast.engine.step import train_step

pytestmark = pytest.mark.slow


def listening() -> list[str]:
    connections = psutil.Process().net_connections()
    return [each.laddr.ip for each in connections if each.status == psutil.CONN_LISTEN]


def talk() -> int:
    """Be one of the processes of a run, and say what it listens on."""
    processes = start_processes(0.5)
    with StopSignal(processes) as stop:
        stop.agreed(), stop.agreed()
    assert processes.gather(processes.rank) == list(range(processes.world_size))
    assert float(processes.sum_(torch.ones(()))) == processes.world_size
    print("listens", *listening())
    processes.barrier()
    processes.leave()
    return 0


def test_one_process_opens_no_connection(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole run, with DeepSpeed's engine; without a launcher."""
    before = psutil.Process().net_connections()
    opened = []

    def step(*arguments: Any, **options: Any) -> Any:
        opened.extend(each for each in psutil.Process().net_connections() if each not in before)
        return train_step(*arguments, **options)

    monkeypatch.setattr("unikd_fast.engine.step.train_step", step)
    done = run(write_config(tmp_path, train={"max_steps": 2}, deepspeed={"zero_optimization": {"stage": 2}}))
    assert done.returncode == 0, done.stderr
    assert opened == []


def test_ranks_of_one_node_listen_on_loopback(tmp_path: Path) -> None:
    done = Ranks(talk, tmp_path, processes=2).done()
    assert done.returncode == 0, done.stderr
    addresses = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("listens")]
    assert len(addresses) == 2
    for own in addresses:
        assert own
        assert all(ip_address(address).is_loopback for address in own)


def test_an_older_torch_listens_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.11, in whose group for tests a reduce-scatter leaves what it is to write as it was."""
    scatter: Callable[..., Any] = dist.reduce_scatter_tensor

    def returns_nothing(output: Any, *arguments: Any, **options: Any) -> Any:
        return None if dist.get_backend() == "fake" else scatter(output, *arguments, **options)

    monkeypatch.setattr(dist, "reduce_scatter_tensor", returns_nothing)

    def joined() -> int:
        join_alone(torch.device("cpu"))
        return talk()

    before, done = listening(), in_this_process(joined)
    (line,) = done.stdout.splitlines()
    opened = [address for address in line.split()[1:] if address not in before]
    assert opened and all(ip_address(address).is_loopback for address in opened)
