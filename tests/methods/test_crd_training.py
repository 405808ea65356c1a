"""Training with CRD: banks that are the same in every process, and a run that learns and resumes."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from support.crd_inputs import (
    build,
    step,
)
from support.long_rounds import long


def _one_of_two(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    method = build()
    losses = [step(method, seed, part=slice(4 * rank, 4 * rank + 4))["crd"] for seed in range(3)]
    torch.save({"losses": losses, **method.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.long
def test_two_processes_share_banks_and_draws(tmp_path: Path) -> None:
    mp.spawn(_one_of_two, args=(str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    alone = build()
    losses = [step(alone, seed)["crd"] for seed in range(3)]
    for side in ("student", "teacher"):
        assert torch.equal(first["banks"][side], second["banks"][side])
        torch.testing.assert_close(first["banks"][side], alone.state_dict()["banks"][side])
    assert torch.equal(first["log_z"], second["log_z"])
    torch.testing.assert_close(first["log_z"], alone.log_z)
    for a, b, whole in zip(first["losses"], second["losses"], losses, strict=True):
        assert not torch.equal(a, b)
        torch.testing.assert_close((a + b) / 2, whole)


CONFIG: dict[str, Any] = {
    "distill": {"method": "crd", "crd": {"negatives": 64, "width": 16}},
    "train": {"total_epochs": 4, "learning_rate": 0.02, "weight_decay": 0.0},
}


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "stage"), [long("fp32", 0), long("bf16", 0), long("bf16", 3)])
def test_a_run_learns_contrastively_and_resumes(tmp_path: Path, precision: str, stage: int) -> None:
    from support.real_runs import (
        cached_config,
        newest_checkpoint,
        save_teacher,
        train_here,
        train_records,
    )
    from unikd_fast.config import load_config
    from unikd_fast.engine.checkpoint import FOLDER

    weights = save_teacher(tmp_path / "teacher.pt")
    settings = {**CONFIG, "deepspeed": {"zero_optimization": {"stage": stage}}}
    settings["train"] = {**CONFIG["train"], "precision": precision}
    settings["run"] = {"checkpoint_every_steps": 6, "keep_checkpoints": 9}

    def config(name: str) -> Any:
        path = cached_config(tmp_path, weights, name=name, cache={"mode": "off"}, **settings)
        return load_config(path)

    whole = train_here(config("whole"))
    records = [record for record in train_records(whole) if record["kind"] == "train"]
    assert len(records) == 24
    losses = [record["crd"] for record in records]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
    saved = newest_checkpoint(whole)
    assert saved["method"]["banks"]["step"] == 24
    assert saved["method"]["banks"]["student"].shape == (96, 16)
    assert not any("bank" in name for name in saved["student"])
    assert saved["student"]["companion.weight"].shape == (16, 64)
    parted = config("parted")
    folder = train_here(parted)
    for later in sorted((folder / FOLDER).glob("step-*"))[2:]:
        shutil.rmtree(later)
    assert newest_checkpoint(folder)["run"]["step"] == 12
    (folder / "result.json").unlink()
    train_here(parted, resume=True)
    assert train_records(folder) == train_records(whole)
    resumed = newest_checkpoint(folder)["method"]["banks"]
    assert torch.equal(resumed["student"], saved["method"]["banks"]["student"])
