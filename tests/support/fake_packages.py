"""Packages in the layout of codebases that no package index holds, written to a folder and imported from there."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KD = """
import torch
from .base import Distiller

def kd_loss(logits_student, logits_teacher, temperature):
    log_q = torch.log_softmax(logits_student / temperature, 1)
    p = torch.softmax(logits_teacher / temperature, 1)
    return (p * (p.log() - log_q)).sum(1).mean() * temperature ** 2

class KD(Distiller):
    def forward_train(self, s, t):
        return kd_loss(s, t, 4.0)
"""
DKD = """
import torch

def dkd_loss(logits_student, logits_teacher, target, alpha, beta, temperature):
    n, k = logits_student.shape
    hit = torch.eye(k, dtype=logits_student.dtype, device=logits_student.device)[target]
    p, q = (torch.softmax(x / temperature, 1) for x in (logits_teacher, logits_student))
    p_y, q_y = (p * hit).sum(1), (q * hit).sum(1)
    p_n, q_n = (p * (1 - hit)).sum(1), (q * (1 - hit)).sum(1)
    tckd = p_y * (p_y / q_y).log() + p_n * (p_n / q_n).log()
    a, b = (torch.softmax(x / temperature - 1000 * hit, 1) for x in (logits_teacher, logits_student))
    nckd = (a * ((a + hit).log() - (b + hit).log())).sum(1)
    return (alpha * tckd.sum() + beta * nckd.sum()) * temperature ** 2 / n
"""
MDISTILLER = {
    "mdistiller/__init__.py": "__version__ = '0.0.test'",
    "mdistiller/distillers/__init__.py": "from .KD import KD\nfrom .DKD import dkd_loss\ntable = {'dkd': dkd_loss}",
    "mdistiller/distillers/base.py": "class Distiller: pass",
    "mdistiller/distillers/KD.py": KD,
    "mdistiller/distillers/DKD.py": DKD,
    "mdistiller/distillers/other.py": "from .KD import kd_loss as base_loss",
    "mdistiller/engine.py": "from .distillers.KD import kd_loss",  # not imported by the rest
}
MMRAZOR = {
    "mmrazor/__init__.py": "",
    "mmrazor/registry.py": "class Registry:\n    def __init__(self): self._module_dict = {}\nMODELS = Registry()",
    "mmrazor/models/__init__.py": "",
    "mmrazor/models/losses/__init__.py": """
from .cwd import ChannelWiseDivergence
from .kl_divergence import KLDivergence
""",
    "mmrazor/models/losses/cwd.py": """
import torch

class ChannelWiseDivergence(torch.nn.Module):
    def __init__(self, tau=1.0, loss_weight=1.0):
        super().__init__()
        self.tau, self.weight = tau, loss_weight

    def forward(self, preds_S, preds_T):
        log_q, log_p = (torch.log_softmax(x.flatten(2) / self.tau, 2) for x in (preds_S, preds_T))
        rows = (log_p.exp() * (log_p - log_q)).sum(2)
        return self.weight * self.tau ** 2 * rows.mean()
""",
    "mmrazor/models/losses/kl_divergence.py": """
import torch
from mmrazor.registry import MODELS

class KLDivergence(torch.nn.Module):
    def __init__(self, tau=1.0, reduction='batchmean', loss_weight=1.0, teacher_detach=True):
        super().__init__()
        self.tau, self.reduction, self.weight, self.detach = tau, reduction, loss_weight, teacher_detach

    def forward(self, preds_S, preds_T):
        preds_T = preds_T.detach() if self.detach else preds_T
        p, log_q = torch.softmax(preds_T / self.tau, 1), torch.log_softmax(preds_S / self.tau, 1)
        return self.weight * self.tau ** 2 * torch.nn.functional.kl_div(log_q, p, reduction=self.reduction)

MODELS._module_dict['KLDivergence'] = KLDivergence
""",
}
FLAT = {
    "losses.py": """
import torch
import torch.nn.functional as F

class DistillationLoss(torch.nn.Module):
    def __init__(self, base_criterion, teacher_model, distillation_type, alpha, tau):
        super().__init__()
        self.base, self.teacher, self.kind, self.alpha, self.tau = (
            base_criterion, teacher_model, distillation_type, alpha, tau)

    def forward(self, inputs, outputs, labels):
        outputs, kd = outputs
        with torch.no_grad():
            t = self.teacher(inputs)
        if self.kind == 'soft':
            log_q, log_p = (torch.log_softmax(x / self.tau, 1) for x in (kd, t))
            loss = (log_p.exp() * (log_p - log_q)).sum() * self.tau ** 2 / kd.numel()
        else:
            loss = F.cross_entropy(kd, t.argmax(1))
        return self.base(outputs, labels) * (1 - self.alpha) + loss * self.alpha
""",
    "distiller_zoo/__init__.py": "from .KD import DistillKL",
    "distiller_zoo/KD.py": """
import torch

class DistillKL(torch.nn.Module):
    def __init__(self, T):
        super().__init__()
        self.T = T

    def forward(self, y_s, y_t):
        p, log_q = torch.softmax(y_t / self.T, 1), torch.log_softmax(y_s / self.T, 1)
        return (p * (p.log() - log_q)).sum() * self.T ** 2 / y_s.shape[0]
""",
}


@contextmanager
def importable(folder: Path, files: dict[str, str]) -> Iterator[None]:
    """Write the files, and let them be imported until the block ends."""
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    before = set(sys.modules)
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        tops = {name.partition("/")[0].removesuffix(".py") for name in files}
        for name in set(sys.modules) - before:
            if name.partition(".")[0] in tops:
                del sys.modules[name]
