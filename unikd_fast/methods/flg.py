"""FLG: logit distillation with a term for the embeddings, weighted by their effect on the logits. Our own form."""

from torch import Tensor, nn
from torch.nn import functional as F

from unikd_fast.kernels.reference import at_least_fp32, autocast_off
from unikd_fast.losses import unikd_loss
from unikd_fast.methods.context import RunContext
from unikd_fast.methods.method import Method, Needs
from unikd_fast.settings import NonNegative, Positive, settings
from unikd_fast.values import Batch, Features, Loss, StudentOutput, Target


@settings
class FLGSettings:
    """KL of the logits, and the embedding's gap as the teacher's classifier sees it."""

    ce_weight: NonNegative = 1.0
    """w, weight of the cross-entropy. In a hybrid it is counted once."""
    beta: NonNegative = 1.0
    """Weight of the KL of the logits."""
    gamma: NonNegative = 1.0
    """Weight of the embedding's gap."""
    temperature: Positive = 4.0
    """Softmax temperature τ of both terms."""


class FLG(Method[FLGSettings]):
    """L = w L_CE + beta τ² KL(p(τ) || q(τ)) + 1/2 gamma Δhᵀ Wᵀ (diag p - p pᵀ) W Δh, the last averaged over the batch.

    Δh = h_t - A h_s is the difference of the embeddings; A (D_t, D_s) is trained with the student, W (K, D_t) is the
    teacher's last weight, p = p(τ) its probabilities. The original formula was not found; this one is ours. The last
    term is the second order in Δh of τ² KL(p || p'), p' from the logits z_t - W Δh: directions of the embedding that
    the teacher's classifier ignores cost nothing, nor do classes that it rules out. It is half the variance over
    classes of u = W Δh under p, and computed as such.
    """

    settings_class = FLGSettings
    needs = Needs(embedding=True)

    def __init__(self, settings: FLGSettings, context: RunContext) -> None:
        super().__init__(settings, context)
        self.classifier_weight = at_least_fp32(context.classifier_weight)
        self.adapter: Projection = Projection(context.student_width, context.teacher_width).to(context.device)

    @property
    def term_names(self) -> tuple[str, ...]:
        return ("ce", "logit_kl", "embedding_gap")

    def target(self, teacher: Features, second: Features | None = None) -> Target:
        return super().target(teacher, second)._replace(extra=teacher.embedding)

    def loss(self, student: StudentOutput, target: Target | None, batch: Batch) -> Loss:
        assert target is not None
        assert isinstance(target.logits, Tensor)
        found = unikd_loss(
            student.logits,
            target.logits,
            batch.labels,
            ce_weight=self.ce_weight,
            beta=self.settings.beta,
            temperature=self.settings.temperature,
            label_smoothing=self.label_smoothing,
            impl=self.impl,
        )
        gap = self._gap(at_least_fp32(target.extra) - at_least_fp32(student.adapted), target.logits)
        terms = {"ce": found.ce, "logit_kl": found.logit_kl, "embedding_gap": gap.detach()}
        return Loss(found.total + self.settings.gamma * gap, terms)

    def device_bytes(self, batch: int) -> int:
        """Return the bytes of W."""
        return self.classifier_weight.nbytes

    def _gap(self, delta: Tensor, teacher_logits: Tensor) -> Tensor:
        """Return 1/2 Var_p(W Δh), averaged over the batch, for Δh (N, D_t)."""
        p = (at_least_fp32(teacher_logits) / self.settings.temperature).softmax(dim=-1)
        with autocast_off(delta.device):
            moved = F.linear(delta, self.classifier_weight.to(delta.dtype))
        centred = moved - (p * moved).sum(dim=-1, keepdim=True)
        return 0.5 * (p * centred.square()).sum(dim=-1).mean()


class Projection(nn.Module):
    """A: maps the student's embedding (N, D_s) to (N, D_t), in fp32 under autocast too."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(student_width, teacher_width, bias=False)

    def forward(self, features: Features) -> Tensor:
        assert features.embedding is not None
        with autocast_off(features.embedding.device):
            embedding = at_least_fp32(features.embedding)
            return F.linear(embedding, self.linear.weight.to(embedding.dtype))
