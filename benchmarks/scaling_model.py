"""Weak scaling: what share of its speed a GPU keeps among many, predicted from the bytes that a step all-reduces.

`python benchmarks/scaling_model.py` writes the table of docs/training.md.
"""

import math
from dataclasses import dataclass
from pathlib import Path

from unikd_fast.io import write_file

DOCUMENT = Path(__file__).parents[1] / "docs" / "training.md"
BEGIN, END = "<!-- table:begin -->", "<!-- table:end -->"


@dataclass(frozen=True)
class Cluster:
    """Links of a cluster, as NCCL gets out of them.

    Args:
        node: GPUs of a node.
        inside: bytes a second and GPU within a node.
        outside: bytes a second and GPU between nodes.
        latency: seconds of one hop.
    """

    node: int = 8
    inside: float = 300e9  # NVSwitch of an H100 or H200 node, three quarters of 400 GB/s
    outside: float = 40e9  # one 400 Gb/s adapter a GPU, four fifths of it
    latency: float = 15e-6


def all_reduce_seconds(parameters: int, gpus: int, cluster: Cluster) -> float:
    """Time of an all-reduce of fp32 gradients: 2 (n - 1) / n of them leave each GPU, by the slowest link on the way."""
    if gpus == 1:
        return 0.0
    link = cluster.inside if gpus <= cluster.node else cluster.outside
    hops = 2 * math.log2(gpus)  # of a tree, up and down
    return 2 * (gpus - 1) / gpus * 4 * parameters / link + hops * cluster.latency


def efficiency(
    step_s: float, parameters: int, gpus: int, cluster: Cluster, *, overlap: float = 0.0, backward_s: float = 0.0
) -> float:
    """Images a second and GPU among `gpus`, over those of a GPU alone.

    Args:
        step_s: a step of one GPU alone.
        parameters: of the student's side.
        overlap: share of the backward pass that the all-reduce runs beside; 0 at ZeRO stage 0, where DeepSpeed starts
            it when the backward pass is over.
        backward_s: of the student's backward pass.
    """
    exposed = max(0.0, all_reduce_seconds(parameters, gpus, cluster) - overlap * backward_s)
    return step_s / (step_s + exposed)


# Parameters of the student's side of configs/imagenet_*.json, AFF and FDP among them (--dry-run shows them).
STUDENTS = {"MobileNetV1": 4_738_347, "ResNet-18": 11_950_123}


def table() -> str:
    """Predicted efficiencies at ZeRO stage 0, by student, step time and number of GPUs."""
    lines = [
        "| student | gradients | step of one GPU | 8 GPUs | 64 GPUs | 512 GPUs |",
        "|---|---|---|---|---|---|",
    ]
    for name, parameters in STUDENTS.items():
        for step_ms in (10, 20, 50):
            shares = [efficiency(step_ms / 1000, parameters, gpus, Cluster()) for gpus in (8, 64, 512)]
            said = " | ".join(f"{share:.1%}" for share in shares)
            lines.append(f"| {name} | {4 * parameters / 1e6:.1f} MB | {step_ms} ms | {said} |")
    return "\n".join(lines)


def main() -> None:
    text = DOCUMENT.read_text()
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    write_file(DOCUMENT, f"{before}{BEGIN}\n{table()}\n{END}{after}")


if __name__ == "__main__":
    main()
