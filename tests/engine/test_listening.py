"""What a run listens on: nothing where it is one process, the loopback interface alone on one node."""

import os
import subprocess
import sys
from ipaddress import ip_address
from pathlib import Path

import psutil
import pytest

from support.free_ports import free_port
from support.real_runs import ROOT, start, wait_for_step, write_config

pytestmark = pytest.mark.slow

PROGRAM = """
import psutil, torch, torch.distributed as dist
from unikd_fast.engine.distributed import start_processes
from unikd_fast.engine.distributed import StopSignal

processes = start_processes(0.5)
with StopSignal(processes) as stop:
    stop.agreed(), stop.agreed()
assert processes.gather(processes.rank) == list(range(processes.world_size))
assert float(processes.sum_(torch.ones(()))) == processes.world_size
listening = [c.laddr.ip for c in psutil.Process().net_connections() if c.status == psutil.CONN_LISTEN]
print("listens", *listening)
processes.barrier()
processes.leave()
"""


# The group for tests as it is in torch 2.11: a reduce-scatter leaves what it is to write as it was.
OLD_TORCH = """
import torch.distributed as dist
from torch.distributed import reduce_scatter_tensor

def returns_nothing(output, *arguments, **options):
    if dist.get_backend() != "fake":
        return reduce_scatter_tensor(output, *arguments, **options)

dist.reduce_scatter_tensor = returns_nothing
"""


def of_program(world_size: int, before: str = "") -> list[list[str]]:
    """The addresses that each of so many processes listens on, started as DeepSpeed's launcher does."""
    shared = {"WORLD_SIZE": str(world_size), "LOCAL_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1"}
    shared["MASTER_PORT"] = str(free_port())
    started = [
        subprocess.Popen(
            [sys.executable, "-c", before + PROGRAM],
            cwd=ROOT,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(world_size)
    ]
    said = [process.communicate(timeout=120)[0] for process in started]
    assert [process.returncode for process in started] == [0] * world_size
    return [line.split()[1:] for text in said for line in text.splitlines() if line.startswith("listens")]


def test_one_process_listens_on_nothing(tmp_path: Path) -> None:
    """The whole run, with DeepSpeed's engine; without a launcher."""
    process = start(write_config(tmp_path, train={"total_epochs": 50}, deepspeed={"zero_optimization": {"stage": 2}}))
    try:
        wait_for_step(tmp_path / "tiny", 2, process)
        of_run = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        connections = [connection for one in of_run for connection in one.net_connections()]
        assert connections == []
    finally:
        process.kill()
        process.communicate()


def test_one_process_of_a_launcher_listens_on_nothing() -> None:
    assert of_program(1) == [[]]


def test_processes_of_one_node_listen_on_the_loopback() -> None:
    addresses = of_program(2)
    assert len(addresses) == 2
    for own in addresses:
        assert own
        assert all(ip_address(address).is_loopback for address in own)


def test_an_older_torch_listens_on_the_loopback() -> None:
    [addresses] = of_program(1, OLD_TORCH)
    assert addresses and all(ip_address(address).is_loopback for address in addresses)
