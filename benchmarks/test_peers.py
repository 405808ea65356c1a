"""Our training step beside the peers': the same networks, weights, batch and settings, in one run.

Correctness first: the losses of two steps agree, so the formulas, their gradients and the update do, and both students
train. Then the processor's time of both in turn, on one thread. A peer that is not there is skipped, with the reason.
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from step_peers import Run, Step, mdistiller, plain, timm, torchdistill
from timing import interleaved_times, ratio_quartiles
from torch import Tensor

Peer = Callable[[Run], Step]
PEERS: dict[Peer, tuple[str, ...]] = {
    plain: ("kd", "dkd", "fitnet", "at"),
    mdistiller: ("kd", "dkd", "reviewkd", "fitnet", "at", "crd"),
    torchdistill: ("kd", "at"),
    timm: ("kd",),
}
SMALL = "cifar100/{}/resnet32x4-resnet8x4"
LARGE = "imagenet/{}/resnet50-mobilenetv1"
CASES = [
    *(
        pytest.param(peer, SMALL.format(m), id=f"{peer.__name__}-{m}")
        for peer, methods in PEERS.items()
        for m in methods
    ),
    *(pytest.param(peer, LARGE.format("kd"), id=f"{peer.__name__}-kd-r50") for peer in (plain, mdistiller, timm)),
    pytest.param(mdistiller, LARGE.format("reviewkd"), id="mdistiller-reviewkd-r50"),
]
CIFAR_SAMPLES = 50_000
ROUNDS = 9
LIMIT = 1.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="compares the time of a processor")
@pytest.mark.parametrize(("peer", "recipe"), CASES)
def test_step_over_peers(
    benchmark: Any, monkeypatch: pytest.MonkeyPatch, one_thread: None, peer: Peer, recipe: str
) -> None:
    monkeypatch.setattr(Tensor, "cuda", lambda self, **_: self)  # mdistiller asks for a GPU
    contrasts = "/crd/" in recipe
    ours = Run(recipe, *settings_of(recipe))
    theirs = peer(ours)
    losses = [(ours(), theirs()) for _ in range(4)]
    # fp32 sums in other orders. mdistiller's CRD adds 1e-7 to each of 2 K denominators of about K / M, and after the
    # first step each side draws negatives of its own.
    torch.testing.assert_close(*losses[0], rtol=1e-5, atol=2e-7 * CIFAR_SAMPLES if contrasts else 0.0)
    torch.testing.assert_close(*losses[1], rtol=1e-2 if contrasts else 1e-4, atol=0.0)
    for first, last in zip(losses[0], losses[-1], strict=True):
        assert last < first, losses

    times = interleaved_times({"ours": ours, "peer": theirs}, rounds=ROUNDS, warmup=0, clock=time.process_time)
    ratio = ratio_quartiles(times["ours"], times["peer"])
    benchmark.group = f"step over {peer.__name__}'s, {recipe}, batch {len(ours.batch.labels)}, fp32"
    benchmark.extra_info.update(
        ratio=round(ratio.median, 3),
        quartiles=[round(ratio.low, 3), round(ratio.high, 3)],
        cpu_ms={name: round(1000 * statistics.median(seconds), 1) for name, seconds in times.items()},
        torch=torch.__version__,
    )
    benchmark.pedantic(ours, rounds=1)
    assert ratio.low <= LIMIT, (
        f"{recipe} takes {ratio.median:.3f} (quartiles {ratio.low:.3f} to {ratio.high:.3f}) times as long as "
        f"{peer.__name__}'s step, limit {LIMIT}"
    )


def settings_of(recipe: str) -> list[str]:
    """Return what generated images need, and what makes the networks those of mdistiller."""
    settings = ["train.learning_rate=0.001"]
    if recipe.startswith("cifar100"):
        samples = CIFAR_SAMPLES if "/crd/" in recipe else 64  # all of them are in CRD's banks
        return [*settings, "data.num_classes=100", f"data.synthetic_samples={samples}"]
    settings += ["data.synthetic_samples=8", "train.global_batch_size=8", 'student.model_args={"act_layer":"relu"}']
    # mdistiller's configuration says 256, and its code takes the width of the student's embedding, at most 512.
    return [*settings, "distill.reviewkd.width=512"] if "/reviewkd/" in recipe else settings
