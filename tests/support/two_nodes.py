"""Two nodes on one machine: network namespaces with addresses and an sshd of their own, joined by a cable to cut."""

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

TOOLS = {"ip": "iproute2", "sshd": "openssh-server", "ssh-keygen": "openssh-client", "pdsh": "pdsh"}
ADDRESSES = ("10.197.31.1", "10.197.31.2")
CABLE = "unikd0"
PORT = 2297


class Nodes(NamedTuple):
    """Where the pair lies."""

    names: tuple[str, str]
    folder: Path

    @property
    def hostfile(self) -> Path:
        return self.folder / "hosts"

    def environment(self) -> dict[str, str]:
        """For DeepSpeed's launcher: how pdsh reaches the nodes, and what they are to know."""
        ssh = (
            f"-i {self.folder / 'key'} -p {PORT} -o StrictHostKeyChecking=no -o UserKnownHostsFile=/dev/null "
            "-o LogLevel=ERROR -o ServerAliveInterval=3 -o ServerAliveCountMax=2"
        )
        return {
            **os.environ,
            "PDSH_RCMD_TYPE": "ssh",
            "PDSH_SSH_ARGS_APPEND": ssh,
            "DS_ENV_FILE": str(self.folder / "environment"),
        }

    def on_first(self, *command: str) -> list[str]:
        return ["ip", "netns", "exec", self.names[0], *command]

    def cut(self) -> None:
        """Pull the cable."""
        _run(*self.on_first("ip", "link", "set", CABLE, "down"))


def missing() -> str | None:
    """Why there can be no nodes here; None if there can."""
    absent = [package for tool, package in TOOLS.items() if shutil.which(tool) is None]
    if absent:
        return f"needs {', '.join(absent)}"
    if os.geteuid() != 0:
        return "needs root, for network namespaces"
    name = f"unikd-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"needs network namespaces: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "delete", name], check=True)
    return None


@contextmanager
def two_nodes(folder: Path, environment: dict[str, str]) -> Iterator[Nodes]:
    """Two nodes that reach each other and nothing else, gone after the block.

    Args:
        folder: for keys and settings.
        environment: of the processes that DeepSpeed starts on the nodes.
    """
    nodes = Nodes((f"unikd-a-{os.getpid()}", f"unikd-b-{os.getpid()}"), folder)
    servers: list[subprocess.Popen[bytes]] = []
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key"))
    _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "host_key"))
    (folder / "authorized_keys").write_text((folder / "key.pub").read_text())
    settings = {"GLOO_SOCKET_IFNAME": CABLE, **environment}
    (folder / "environment").write_text("".join(f"{name}={value}\n" for name, value in settings.items()))
    nodes.hostfile.write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    Path("/run/sshd").mkdir(exist_ok=True)
    try:
        for name in nodes.names:
            _run("ip", "netns", "add", name)
        ends = [f"unikd{os.getpid() % 10_000}{end}" for end in "ab"]
        _run("ip", "link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for name, end, address in zip(nodes.names, ends, ADDRESSES, strict=True):
            _run("ip", "link", "set", end, "netns", name)
            inside = ("ip", "netns", "exec", name, "ip")
            _run(*inside, "link", "set", end, "name", CABLE)
            _run(*inside, "address", "add", f"{address}/24", "dev", CABLE)
            _run(*inside, "link", "set", CABLE, "up")
            _run(*inside, "link", "set", "lo", "up")
        for number, (name, address) in enumerate(zip(nodes.names, ADDRESSES, strict=True)):
            settings_file = folder / f"sshd-{number}"
            settings_file.write_text(
                f"ListenAddress {address}\nPort {PORT}\nHostKey {folder / 'host_key'}\n"
                f"AuthorizedKeysFile {folder / 'authorized_keys'}\nPermitRootLogin prohibit-password\nStrictModes no\n"
                f"PasswordAuthentication no\nUsePAM no\nPidFile {folder / f'pid-{number}'}\n"
            )
            command = ["ip", "netns", "exec", name, shutil.which("sshd") or "sshd", "-D", "-f", str(settings_file)]
            servers.append(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL))
        _wait_for_ssh(nodes)
        yield nodes
    finally:
        for server in servers:
            server.kill()
            server.wait()
        for name in nodes.names:
            there = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True).stdout.split()
            subprocess.run(["kill", "-9", *there], capture_output=True) if there else None
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def _wait_for_ssh(nodes: Nodes) -> None:
    options = ["-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "BatchMode=yes"]
    deadline = time.monotonic() + 30
    for address in ADDRESSES:
        line = nodes.on_first("ssh", "-i", str(nodes.folder / "key"), "-p", str(PORT), *options, address, "true")
        while (tried := subprocess.run(line, capture_output=True, text=True)).returncode:
            assert time.monotonic() < deadline, tried.stderr
            time.sleep(0.2)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
