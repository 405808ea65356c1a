"""How processes start: the launch line, ranks that differ or are missing, and what they listen on."""

import os
import sys
from collections.abc import Callable
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.distributed as dist

from support.free_ports import free_port
from support.ranks import Ranks
from support.real_runs import in_this_process, run, write_config
from unikd_fast.config import Config, ConfigError, load_config
from unikd_fast.engine import preflight as launched
from unikd_fast.engine.distributed import Processes, StopSignal, join_alone, start_processes
from unikd_fast.engine.preflight import _ranges, describe_launch, program_facts, require_agreement
from unikd_fast.engine.step import train_step


class Several(Processes):
    """This process and others that say what a test has them say."""

    others: list[Any]

    def gather(self, value: Any) -> list[Any]:
        return [value, *[other(value) if callable(other) else other for other in self.others]]


def several(*others: Any) -> Several:
    processes = Several(0, 1 + len(others), 0, torch.device("cpu"))
    object.__setattr__(processes, "others", list(others))
    return processes


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(write_config(tmp_path))


@pytest.mark.parametrize(
    ("numbers", "said"), [([], ""), ([0], "0"), ([0, 1], "0-1"), ([0, 1, 2, 5, 7, 8], "0-2, 5, 7-8")]
)
def test_number_ranges(numbers: list[int], said: str) -> None:
    assert _ranges(numbers) == said


def test_the_launch_line_lists_nodes_and_devices(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GROUP_RANK", "0")
    monkeypatch.setattr(launched.socket, "gethostname", lambda: "red")
    monkeypatch.setattr(launched.dist, "is_initialized", lambda: False)  # other tests make a group of this process
    others = [(("0", "red"), "CPU"), (("1", "blue"), "CPU"), (("1", "blue"), "CPU")]
    said = describe_launch(config, several(*others))
    assert said == "launched 4 processes on 2 nodes: red (processes 0-1), blue (processes 2-3); CPU"


def test_two_nodes_with_one_hostname(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CROSS_RANK", "0")
    monkeypatch.setattr(launched.socket, "gethostname", lambda: "box")
    assert "on 2 nodes" in describe_launch(config, several((("1", "box"), "CPU")))


def test_a_wrong_number_of_nodes_is_refused(tmp_path: Path) -> None:
    config = load_config(write_config(tmp_path, run={"nodes": 2}))
    with pytest.raises(ConfigError, match=r"run\.nodes = 2, and the launcher started processes on 1: "):
        describe_launch(config, several())


@pytest.mark.parametrize(
    ("other", "told"),
    [
        ({"torch": "1.0"}, r"torch is .* on 0, 2, 1\.0 on 1"),
        ({"configuration": "ffff"}, r"configuration is .* on 0, 2, ffff on 1"),
        ({"steps": 7}, r"steps is 6 on 0, 2, 7 on 1"),
        ({"unikd_fast": "0.1.0, commit abc"}, r"unikd_fast is .* on 0, 2, 0\.1\.0, commit abc on 1"),
    ],
)
def test_ranks_that_differ_are_refused(config: Config, other: dict[str, Any], told: str) -> None:
    facts = {**program_facts(config), "steps": 6}
    require_agreement(several(lambda own: own, lambda own: own), facts)
    with pytest.raises(ConfigError, match=f"the processes do not agree: {told}; start all with one"):
        require_agreement(several(lambda own: {**own, **other}, lambda own: own), facts)


def test_a_rank_without_the_others_times_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = write_config(tmp_path, run={"timeout_minutes": 0.02})
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    for name, value in {**environment, "MASTER_PORT": str(free_port())}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("unikd_fast.command._FIRST_SPEAKS_S", 0.1)
    done = run(config)
    assert done.returncode == 2, done.stderr
    port = os.environ["MASTER_PORT"]
    assert f"process 1 of 2 could not join the others at 127.0.0.1:{port} within 0.02 minutes" in done.stderr


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
    sys.stdout.write(f"listens {' '.join(listening())}\n")  # at once: print() writes in pieces, between another rank's
    sys.stdout.flush()
    processes.barrier()
    processes.leave()
    return 0


@pytest.mark.slow
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


@pytest.mark.slow
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
