"""A step of training as peers take it: on our networks' weights and our batch, with the settings of our recipe.

Each peer is built from a `Run` of ours and returns what takes one step and returns its loss: the forward passes of
teacher and student, the loss, its backward pass and the update.
"""

import copy
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from loss_peers import dkd, mdistiller_kd
from torch import Tensor, nn

from unikd_fast.engine.build import Experiment, build_experiment
from unikd_fast.engine.distributed import start_processes
from unikd_fast.engine.gradients import GradientWatch
from unikd_fast.engine.metrics import LossMeter
from unikd_fast.engine.step import EagerSteps
from unikd_fast.engine.timing import UNTIMED, Throughput
from unikd_fast.engine.zero import start_engine
from unikd_fast.recipes.experiments import read_experiment

EPOCHS = 240  # trained already, so that every ramp is at its end

Step = Callable[[], float]


class Run:
    """Our own run of a recipe, on generated images and random weights; called, it takes a step and returns the loss.

    Steps are those of a run, with the watch of the gradients and the sums for the log. The teacher is in fp32 with its
    BatchNorms, as the peers' are.

    Args:
        recipe: name of the recipe.
        settings: overrides of its settings.
    """

    def __init__(self, recipe: str, *settings: str) -> None:
        teacher = ("teacher.weights=random", "teacher.precision=fp32", "teacher.fold_batch_norm=false")
        own = ("data.name=synthetic", "data.root=null", "train.precision=fp32", *teacher, *settings)
        processes = start_processes()
        self.built: Experiment = build_experiment(read_experiment(None, recipe, own), processes)
        config, module, method = self.built.config, self.built.student_module, self.built.method
        self.train, self.batch = config.train, next(self.built.loader.train(0))
        normalise(self.built.teacher.network.plain, self.batch.images)
        self.student, self.teacher = (copy.deepcopy(n.plain) for n in (self.built.student, self.built.teacher.network))
        self.adapter, self.method = copy.deepcopy(method.adapter), method
        engine = start_engine(config, module, processes)
        engine.train()
        watch = GradientWatch(engine, skip=False)
        self._meter = LossMeter(processes, method.term_names, watch)
        self._steps = EagerSteps(self.built, engine, watch, self._meter, None, UNTIMED)
        self._throughput = Throughput(processes, global_batch_size=len(self.batch.labels), loader_rate=None)
        self._throughput.begin(0)
        self._step = EPOCHS * self.built.steps_per_epoch

    def __call__(self) -> float:
        rate = self.train.learning_rate
        self._steps.take(iter([(self.batch, None)]), self._throughput, self._step, learning_rate=rate)
        return self._meter.read()["total"]

    def trained(self, *modules: nn.Module) -> torch.optim.SGD:
        """Return the optimiser of the recipe for a peer's modules."""
        parameters = [parameter for module in modules for parameter in module.parameters()]
        rate, decay = self.train.learning_rate, self.train.weight_decay
        return torch.optim.SGD(parameters, lr=rate, momentum=self.train.momentum, weight_decay=decay)


@torch.no_grad()
def normalise(network: nn.Module, images: Tensor) -> None:
    """Give the BatchNorms of an untrained network the statistics of a batch, without which its features explode."""
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()
    network(images)
    network.eval()


def copy_weights(source: nn.Module, target: nn.Module) -> None:
    """Copy parameters and buffers in the order in which both networks have them."""
    theirs = target.state_dict()
    ours = source.state_dict().values()
    assert [t.shape for t in ours] == [t.shape for t in theirs.values()], "the networks differ"
    target.load_state_dict(dict(zip(theirs, ours, strict=True)))


# A plain loop.


def plain(run: Run) -> Step:
    """The same step as a loop of a few lines of PyTorch."""
    student, teacher, (images, labels, *_) = run.student.train(), run.teacher.eval(), run.batch
    name, settings = run.built.config.distill.method, run.method.settings
    adapter: nn.Module = run.adapter if name == "fitnet" else nn.Identity()
    optimizer = run.trained(student, adapter)

    def of_logits() -> Tensor:
        with torch.no_grad():
            target = teacher(images)
        logits = student(images)
        ce = F.cross_entropy(logits, labels)
        if name == "dkd":
            return ce + dkd(logits, target, labels)
        return settings.ce_weight * ce + settings.beta * mdistiller_kd(logits, target, settings.temperature)

    def of_levels() -> Tensor:
        with torch.no_grad():
            wanted, _ = levels_of(teacher, images)
        levels, logits = levels_of(student, images)
        ce = F.cross_entropy(logits, labels)
        if name == "at":
            maps = ((attention(own), attention(other)) for own, other in zip(levels, wanted, strict=True))
            return ce + settings.weight * sum(((own - other) ** 2).mean() for own, other in maps)
        regressed = F.relu(adapter.norm(adapter.convolution(levels[settings.level])), inplace=True)
        return ce + settings.weight * F.mse_loss(regressed, wanted[settings.level])

    loss_of = of_logits if name in ("kd", "dkd") else of_levels

    def step() -> float:
        optimizer.zero_grad()
        loss = loss_of()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def levels_of(network: Any, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """Return the ends of the three stages and the logits."""
    x = network.relu(network.bn1(network.conv1(images)))
    levels = []
    for stage in (network.layer1, network.layer2, network.layer3):
        x = stage(x)
        levels.append(x)
    return levels, network.fc(network.avgpool(x).flatten(1))


def attention(level: Tensor) -> Tensor:
    return F.normalize(level.pow(2).mean(1).flatten(1))


# mdistiller.


def mdistiller(run: Run) -> Step:
    """The step of mdistiller's trainer, with its distiller and its networks, from a checkout at MDISTILLER_ROOT."""
    root = checkout()
    trainers = pytest.importorskip("mdistiller.engine.trainer", exc_type=ImportError)
    from mdistiller.distillers import distiller_dict
    from mdistiller.engine.cfg import CFG

    name = run.built.config.distill.method
    cfg = CFG.clone()
    imagenet = run.built.config.data.image_size == 224
    folder = root / "configs" / ("imagenet/r50_mv1" if imagenet else "cifar100")
    file = folder / f"{name}.yaml"
    cfg.merge_from_file(str(file if file.exists() else folder / name / "res32x4_res8x4.yaml"))
    cfg.SOLVER.LR = run.train.learning_rate
    if imagenet:
        from mdistiller.models.imagenet import MobileNetV1, resnet50

        student, teacher = MobileNetV1(), resnet50()
    else:
        from mdistiller.models.cifar.resnet import resnet8x4, resnet32x4

        student, teacher = resnet8x4(num_classes=100), resnet32x4(num_classes=100)
    samples = (len(run.built.splits.train),) if name == "crd" else ()
    torch.manual_seed(0)
    distiller = distiller_dict[cfg.DISTILLER.TYPE](student, teacher, cfg, *samples)
    copy_weights(run.student, student)  # only now: to learn its shapes FitNet runs both networks in training mode
    copy_weights(run.teacher, teacher)
    images, labels, ids, _ = run.batch
    draw: Callable[[], tuple[Tensor, ...]] = tuple
    if name == "fitnet":
        copy_weights(run.adapter, distiller.conv_reg)
    if name == "reviewkd":
        for fusion, abf in zip(reversed(run.adapter.fusions), distiller.abfs, strict=True):
            copy_weights(fusion, abf)
    if name == "crd":
        draw = crd_negatives(run, distiller, cfg.CRD.NCE.K)
    trainer_class = trainers.CRDTrainer if name == "crd" else trainers.BaseTrainer
    trainer = trainer_class.__new__(trainer_class)  # without the folder and the files of its log
    trainer.cfg, trainer.distiller = cfg, nn.DataParallel(distiller).train()
    trainer.optimizer = trainer.init_optimizer(cfg)
    from mdistiller.engine.utils import AverageMeter

    def step() -> float:
        meters = {key: AverageMeter() for key in ("training_time", "data_time", "losses", "top1", "top5")}
        trainer.train_iter((images, labels, ids, *draw()), EPOCHS, meters)
        return float(meters["losses"].avg)

    return step


def checkout() -> Path:
    """Return the folder of the checkout, whose package can then be imported; skip the test without one."""
    given = os.environ.get("MDISTILLER_ROOT")
    if given is None:
        pytest.skip("set MDISTILLER_ROOT to a checkout of github.com/megvii-research/mdistiller")
    root = Path(given)
    if str(root) not in sys.path:
        sys.path.append(str(root))
    return root


def crd_negatives(run: Run, distiller: Any, count: int) -> Callable[[], tuple[Tensor]]:
    """Return what draws CRD's positive and negatives as mdistiller's loader does; the first of them are ours.

    Its loader's processes draw them, and we in the step: both count, since it is the processor's time that is compared.
    """
    copy_weights(run.adapter.embed, distiller.embed_s.linear)
    copy_weights(run.method.companion, distiller.embed_t.linear)
    banks, labels, ids = run.method.banks, run.batch.labels, run.batch.sample_ids
    rows = banks.rows(torch.arange(len(banks)))
    distiller.contrast.memory_v1.copy_(banks.student[rows])
    distiller.contrast.memory_v2.copy_(banks.teacher[rows])
    drawn = rows.argsort()[banks.negatives(rows[ids], labels, count)]
    first = [torch.cat([ids[:, None], drawn], dim=1)]
    classes = np.asarray(run.built.splits.train.labels)
    source = np.random.RandomState(0)  # not a Generator, which draws in another way and faster
    others = [np.flatnonzero(classes != label) for label in range(run.built.splits.num_classes)]

    def draw() -> tuple[Tensor]:
        if first:
            return (first.pop(),)
        pairs = zip(ids.tolist(), labels.tolist(), strict=True)
        drawn = [np.hstack(([i], source.choice(others[label], count, replace=False))) for i, label in pairs]
        return (torch.from_numpy(np.stack(drawn)),)

    return draw


# torchdistill and timm.


def torchdistill(run: Run) -> Step:
    """The step of torchdistill's box, whose levels come from its hooks."""
    pytest.importorskip("torchdistill")
    from torchdistill.core.distillation import DistillationBox

    name, settings, (images, labels, *_) = run.built.config.distill.method, run.method.settings, run.batch
    ends = {"path": ".", "io": "output"}
    of_logits = {
        "input": {"is_from_teacher": False, "module_path": ".", "io": "output"},
        "target": {"uses_label": True},
    }
    ce = {"criterion": {"key": "CrossEntropyLoss", "kwargs": {}}, "weight": 1.0}
    terms: dict[str, Any] = {"ce": {**ce, "criterion_wrapper": {"key": "SimpleLossWrapper", "kwargs": of_logits}}}
    hooks: dict[str, Any] = {}
    if name == "kd":
        of_both = {f"{role}_module_{key}": end for role in ("student", "teacher") for key, end in ends.items()}
        weights = {"temperature": settings.temperature, "alpha": settings.ce_weight, "beta": settings.beta}
        terms = {"kd": {"criterion": {"key": "KDLoss", "kwargs": {**of_both, **weights}}, "weight": 1.0}}
    else:
        stages = ("layer1", "layer2", "layer3")
        hooks = {"forward_hook": {"output": list(stages)}}
        pairs = {s: {role: {"path": s, "io": "output"} for role in ("student", "teacher")} for s in stages}
        terms["at"] = {"criterion": {"key": "ATLoss", "kwargs": {"at_pairs": pairs}}, "weight": settings.weight}
    network = {"forward_proc": "forward_batch_only", **hooks}
    rates = {"lr": run.train.learning_rate, "momentum": run.train.momentum, "weight_decay": run.train.weight_decay}
    config = {
        "num_epochs": 1,
        "teacher": {**network, "requires_grad": False},
        "student": network,
        "optimizer": {"key": "SGD", "kwargs": rates},
        "criterion": {"key": "WeightedSumLoss", "kwargs": {"sub_terms": terms}},
    }
    box = DistillationBox(run.teacher.eval(), run.student.train(), {}, config, torch.device("cpu"), None, False, 1.0)

    def step() -> float:
        loss = box.forward_process(images, labels)
        box.post_forward_process(loss)
        return loss.item()

    return step


def timm(run: Run) -> Step:
    """The step of timm's script of training with its task of distillation."""
    task_class = getattr(pytest.importorskip("timm.task"), "LogitDistillationTask", None)
    if task_class is None:
        pytest.skip("this timm has no LogitDistillationTask")
    settings, (images, labels, *_) = run.method.settings, run.batch
    classes, statistics = run.built.splits.num_classes, {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
    for network in (run.student, run.teacher):
        network.pretrained_cfg, network.num_classes, network.in_chans = statistics, classes, 3
    task = task_class(
        run.student,
        run.teacher,
        nn.CrossEntropyLoss(),
        distill_loss_weight=settings.beta,
        task_loss_weight=settings.ce_weight,
        temperature=settings.temperature,
        verbose=False,
    ).train()
    optimizer = run.trained(run.student)

    def step() -> float:
        loss = task(images, labels)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step
