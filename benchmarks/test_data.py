"""The loaders against what they replace, and a run against its parts: DALI, stored pixels, tensors on the device.

Ratios within one run only, correctness before any timing. On a CPU, whose cores the loader shares with all else, a
missed target is recorded and is no failure; on a GPU it is treated as those of the kernels are. What is timed are whole
epochs with the loader's start.
"""

import shutil
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from data_cases import (
    CIFAR_SAMPLES,
    CLASSES,
    PADDED,
    RESIZED,
    PilImages,
    assert_every_id_once,
    assert_near,
    assert_same,
    cifar_like,
    mean_kilobytes,
    pil_batches,
    write_photos,
)
from speed_targets import Target, describe, judge_all, raise_if_missed
from timing import interleaved_medians

from unikd_fast.config import load_config
from unikd_fast.data.augmentation import Augmentation, view_parameters
from unikd_fast.data.loader import Loader, build_loader
from unikd_fast.data.pack import pack_folder
from unikd_fast.data.sets import open_data
from unikd_fast.data.settings import DataSettings, LoaderKind
from unikd_fast.data.splits import DataSplits
from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.distributed import start_processes
from unikd_fast.engine.step import train_step
from unikd_fast.engine.zero import start_engine
from unikd_fast.values import Batch

CONFIG = Path(__file__).parents[1] / "configs" / "imagenet_r50_mbv1.json"
CUDA = torch.cuda.is_available()
IMAGES, BATCH = {"cpu": 256, "cuda": 1024}, {"cpu": 32, "cuda": 128}
ROUNDS = {"cpu": 7, "cuda": 5}
WORKERS = THREADS = 2
CIFAR_BATCH = 64
STORED = {"raw_256": 256, "raw_whole": 400}  # pixels of the short side; the photos have 400
RUN_BATCH, RUN_STEPS = {"cpu": 16, "cuda": 128}, 8
# On a CPU the smallest of the usual networks: of a larger one's step, loading is too small a part to be seen.
RUN_NETWORKS = {
    "cpu": ("torchvision/mobilenet_v3_small", "torchvision/shufflenet_v2_x0_5", "fp32", "kd"),
    "cuda": ("torchvision/resnet50", "timm/mobilenetv1_100", "bf16", "unikd"),
}

Record = Callable[[str, Any], None]

on_devices = pytest.mark.parametrize(
    "device",
    ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a GPU")])],
)


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Folders of photo-like JPEGs of 500 x 400 pixels, by device."""
    pytest.importorskip("nvidia.dali")
    made: dict[str, Path] = {}

    def of(device: str) -> Path:
        if device not in made:
            made[device] = write_photos(tmp_path_factory.mktemp("photos"), IMAGES[device])
        return made[device]

    return of


def files_loader(splits: DataSplits, device: str, kind: LoaderKind = "auto") -> Loader:
    data = DataSettings(name="image_folder", loader=kind, augmentation=RESIZED, workers=WORKERS, dali_threads=THREADS)
    return build_loader(splits, data, seed=0, global_batch_size=BATCH[device], device=device)


def run_through(batches: Callable[[], Iterable[Any]]) -> None:
    for _ in batches():
        pass


def epoch_of(loader: Loader) -> Callable[[], None]:
    return partial(run_through, lambda: loader.train(0))


def report(
    benchmark: Any,
    record: Record,
    device: str,
    case: str,
    target: Target,
    figures: dict[str, Any],
    run: Callable[[], Any],
) -> None:
    """Record the figures and the target, and run once more what was measured, which enters it in the table."""
    row = {"case": f"{case}, {device}", "variant": "ours", **figures}
    row["targets"] = judged = judge_all([target], row)
    record("benchmark_rows", [row])
    benchmark.group = row["case"]
    benchmark.extra_info.update(
        figures,
        target=f"{describe(judged[0])}: {'reached' if judged[0]['reached'] else 'MISSED'}",
        device=torch.cuda.get_device_name() if device == "cuda" else device,
        torch=torch.__version__,
        threads=torch.get_num_threads(),
    )
    benchmark.pedantic(run, rounds=1, warmup_rounds=0)
    if device == "cuda":
        raise_if_missed(row["case"], judged)


@on_devices
def test_dali_over_pil_in_processes(
    benchmark: Any, record_property: Record, photos: Callable[[str], Path], device: str
) -> None:
    splits = open_data(DataSettings(name="image_folder", root=str(photos(device)), image_size=224))
    dali, pil = (files_loader(splits, device, kind) for kind in ("dali", "torchvision"))
    assert_every_id_once(dali.train(0), splits, count=IMAGES[device])
    assert_near(dali.train(0), pil.train(0), splits)

    times = interleaved_medians({"dali": epoch_of(dali), "pil": epoch_of(pil)}, rounds=ROUNDS[device], warmup=1)
    figures = {
        "ratio": round(times["pil"] / times["dali"], 3),
        "images_per_s": {name: round(IMAGES[device] / seconds) for name, seconds in times.items()},
        "batch": BATCH[device],
        "dali_threads": THREADS,
        "pil_workers": WORKERS,
        "kilobytes": mean_kilobytes(photos(device)),
        "decoder": dali.pixels["decoder"],
    }
    case = "500x400 JPEG to 224 px views: DALI over PIL in processes"
    report(benchmark, record_property, device, case, Target("ratio", "at_least", 1.3), figures, epoch_of(dali))


@on_devices
def test_packed_raw_over_decoding(
    benchmark: Any, record_property: Record, photos: Callable[[str], Path], tmp_path: Path, device: str
) -> None:
    folder = open_data(DataSettings(name="image_folder", root=str(photos(device)), image_size=224))
    loaders = {"folder": files_loader(folder, device)}
    for name, size in STORED.items():
        pack_folder(photos(device), tmp_path / name, raw=size)
        stored = open_data(DataSettings(name="arrow", root=str(tmp_path / name), image_size=224))
        loaders[name] = files_loader(stored, device)
        # Stored at their own size the images are those that were decoded; shrunk ones give other views.
        whole = name == "raw_whole" and device == "cpu"
        assert_same(loaders[name].train(0), loaders["folder"].train(0), pixels=whole)
        assert_near(loaders[name].train(0), files_loader(stored, device, "torchvision").train(0), stored)

    times = interleaved_medians(
        {name: epoch_of(loader) for name, loader in loaders.items()}, rounds=ROUNDS[device], warmup=1
    )
    figures = {
        "ratio": round(times["folder"] / times["raw_256"], 3),
        "ratio_whole": round(times["folder"] / times["raw_whole"], 3),
        "images_per_s": {name: round(IMAGES[device] / seconds) for name, seconds in times.items()},
        "batch": BATCH[device],
        "loader": type(loaders["folder"]).__name__,
    }
    case = "224 px views: packed raw of 256 px over decoding 500x400 JPEG"
    report(
        benchmark, record_property, device, case, Target("ratio", "at_least", 2), figures, epoch_of(loaders["raw_256"])
    )
    shutil.rmtree(tmp_path)  # up to 1 GB, and pytest keeps three


def experiment(root: Path, device: str) -> Experiment:
    teacher, student, precision, method = RUN_NETWORKS[device]
    overrides = {
        "data.name": "image_folder",
        "data.root": root,
        "data.num_classes": CLASSES,
        "data.train_samples": RUN_STEPS * RUN_BATCH[device],
        "data.dali_threads": THREADS,
        "teacher.model": teacher,
        "teacher.weights": "random",
        "teacher.precision": precision,
        "student.model": student,
        "train.precision": precision,
        "train.global_batch_size": RUN_BATCH[device],
        "train.learning_rate": 0.001,
        "distill.method": method,
        **({"distill.unikd.head_steps": 2} if method == "unikd" else {}),
    }
    return build_experiment(
        load_config(CONFIG, [f"{key}={value}" for key, value in overrides.items()]), start_processes()
    )


@on_devices
def test_a_run_over_the_slower_of_step_and_loader(
    benchmark: Any, record_property: Record, photos: Callable[[str], Path], device: str
) -> None:
    """The wait for an epoch's first batch is left out. On a CPU both take the same cores: the sum is to be expected."""
    if device == "cpu" and CUDA:
        pytest.skip("the engine takes the GPU")
    of = experiment(photos(device), device)
    engine, teacher, method = start_engine(of.config, of.student_module, start_processes()), of.teacher, of.method
    assert teacher is not None
    engine.train()
    held = list(of.loader.train(0))
    method.prepare(teacher(batch.images) for batch in held[:2])
    starts: list[float] = []

    def train_on(batches: Callable[[], Iterable[Batch]]) -> float:
        losses = [train_step(engine, teacher, method, batch, update=True).total.detach() for batch in batches()]
        return torch.stack(losses).mean().item()

    def started() -> Iterable[Batch]:
        began = time.perf_counter()
        batches = of.loader.train(0)
        first = next(batches)
        starts.append(time.perf_counter() - began)
        yield first
        yield from batches

    # Correct before fast: the batches in memory are those that the loader gives, and the student learns from both.
    assert len(held) == RUN_STEPS
    assert_every_id_once(held, of.splits, count=len(held) * RUN_BATCH[device])
    assert_same(of.loader.train(0), held)
    losses = [train_on(batches) for _ in range(2) for batches in (started, lambda: held)]
    assert losses[-1] < losses[0]

    computations: dict[str, Callable[[], Any]] = {
        "step": lambda: train_on(lambda: held),
        "load": lambda: run_through(started),
        "fed": lambda: train_on(started),
    }
    starts.clear()
    times = interleaved_medians(computations, rounds=ROUNDS[device], warmup=0)
    start = statistics.median(starts)
    step, load, fed = times["step"], times["load"] - start, times["fed"] - start
    figures = {
        "ratio": round(fed / max(step, load), 3),
        "of_the_sum": round(fed / (step + load), 3),
        "ms_a_batch": {
            name: round(1000 * seconds / len(held), 2)
            for name, seconds in (("step", step), ("load", load), ("fed", fed))
        },
        "start_ms": round(1000 * start, 1),
        "batch": RUN_BATCH[device],
        "precision": RUN_NETWORKS[device][2],
        "loader": type(of.loader).__name__,
    }
    case = "run over the slower of step and loader, {} to {}".format(*RUN_NETWORKS[device])
    report(benchmark, record_property, device, case, Target("ratio", "at_most", 1.05), figures, computations["fed"])


@on_devices
def test_tensors_on_the_device_over_pil_in_processes(benchmark: Any, record_property: Record, device: str) -> None:
    splits = cifar_like()
    images = PilImages(splits)
    make = partial(build_loader, splits, seed=0, global_batch_size=CIFAR_BATCH, device=device)
    ours, plain = make(augmentation=PADDED), make(augmentation=Augmentation())
    samples = CIFAR_SAMPLES // CIFAR_BATCH * CIFAR_BATCH
    assert_every_id_once(ours.train(0), splits, count=samples)
    # The same normalisation, and under the same random numbers the same views as torchvision's transforms.
    for loader, augmentation in ((ours, PADDED), (plain, Augmentation())):
        batch = next(loader.train(0))
        ids = batch.sample_ids.cpu().numpy()
        views = view_parameters(augmentation, seed=0, epoch=0, sample_ids=ids)
        corners = views.crop_boxes(32, 32)[:, :2] + (0 if augmentation is PADDED else PADDED.padding)
        shown = zip(ids, *corners.T.tolist(), views.flip, strict=True)
        expected = [images.shown(i, top, left, flip) for i, top, left, flip in shown]
        torch.testing.assert_close(batch.images.cpu(), torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert sum(len(labels) for _, labels in pil_batches(images, CIFAR_BATCH, device, workers=WORKERS)) == samples

    peer = partial(run_through, lambda: pil_batches(images, CIFAR_BATCH, device, workers=WORKERS))
    times = interleaved_medians({"device": epoch_of(ours), "pil": peer}, rounds=3, warmup=0)
    figures = {
        "ratio": round(times["pil"] / times["device"], 3),
        "samples_per_s": {name: round(samples / seconds) for name, seconds in times.items()},
        "batch": CIFAR_BATCH,
        "pil_workers": WORKERS,
    }
    case = "CIFAR-100's shape: tensors on the device over PIL in processes"
    report(benchmark, record_property, device, case, Target("ratio", "at_least", 10), figures, epoch_of(ours))
