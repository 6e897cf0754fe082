"""The contrast of guided adversarial distillation: heads over both networks' features, and how well pairs find each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.losses.contrast import candidates_in, info_nce, noise_contrast
from overproof.losses.feature_distances import wide
from overproof.methods.feature_bank import Bank, draw, log_mean

Negatives = int | Literal["batch", "all"]
MOMENTUM = 0.5  # of the student's rows, as in contrastive representation distillation


class Contrast(nn.Module):
    """A lower bound of what the student's features tell about the teacher's, as a loss per image.

    Args:
        student_dim, teacher_dim: lengths of the two networks' vectors.
        dim: length of the embeddings, at least 1.
        temperature: tau > 0.
        negatives: "batch"; "all" rows of the bank that count; or so many drawn from them for each image.
        mask_same_class: images of one's own class are no negatives.
        symmetric: add the teacher-anchored term against a bank of the student's embeddings.
        samples: rows of the bank; None: it grows.

    Raises:
        UsageError: a size below 1, temperature not positive, or symmetric without a bank.
    """

    def __init__(
        self,
        student_dim: int,
        teacher_dim: int,
        *,
        dim: int,
        temperature: float,
        negatives: Negatives,
        mask_same_class: bool,
        symmetric: bool,
        samples: int | None,
    ) -> None:
        super().__init__()
        if not isinstance(negatives, int) and negatives not in ("batch", "all"):
            raise UsageError(f'gacd: negatives={negatives!r} is unknown; known are "batch", "all" and numbers.')
        count = negatives if isinstance(negatives, int) else 1
        if min(dim, count) < 1 or temperature <= 0 or (samples is not None and samples < 2):
            raise UsageError(
                f"gacd: needs dim, negatives >= 1, temperature > 0 and samples >= 2, not {dim}, {negatives}, {temperature}, {samples}."
            )
        if symmetric and negatives == "batch":
            raise UsageError('gacd: symmetric=True needs a bank of the student\'s features: negatives="all" or a number.')
        self.temperature, self.negatives = temperature, negatives
        self.mask_same_class, self.symmetric = mask_same_class, symmetric
        self.student_head, self.teacher_head = nn.Linear(student_dim, dim), nn.Linear(teacher_dim, dim)
        # Of the frozen teacher its own vectors are kept: they never grow old, and the head learns from every row.
        students = dim if symmetric else 0
        self.bank = None if negatives == "batch" else Bank(students, samples, momentum=MOMENTUM, teacher_dim=teacher_dim)

    def forward(self, features: Sequence[Tensor], anchor: Tensor, index: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The loss per image, and the bound in nats.

        Args:
            features: the student's vectors (N, d_s), once for each positive; the loss is the mean over them.
            anchor: the teacher's (N, d_t), without gradient.
            index: numbers of the images in the training set (N,).
            labels: their classes (N,).
        """
        # Unit vectors and scores / tau lose their order in half precision.
        with torch.autocast(anchor.device.type, enabled=False):
            ours = [F.normalize(self.student_head(wide(feature)), dim=1) for feature in features]
            theirs = F.normalize(self.teacher_head(wide(anchor)), dim=1)
            if self.bank is None:
                return self._in_batch(ours, theirs, labels)
            self.bank.open(index, labels)
            self.bank.store(index, anchor)
            return self._in_bank(self.bank, ours, theirs, index, labels)

    def _in_batch(self, ours: list[Tensor], theirs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        if len(labels) < 2:
            raise UsageError(
                'gacd with negatives="batch" compares images of a batch with each other; give at least two (train.batch_size), or '
                "use the bank."
            )
        keep = candidates_in(labels, same_class=not self.mask_same_class)
        values = torch.stack([info_nce(theirs, mine, temperature=self.temperature, keep=keep) for mine in ours]).mean(dim=0)
        return values, (keep.sum(dim=1).log() - values).mean()

    def _in_bank(self, bank: Bank, ours: list[Tensor], theirs: Tensor, index: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Noise-contrastive estimation; the first call sets Z."""
        drawn: Tensor | None = None
        keep = bank.others(index, labels, same_class=not self.mask_same_class)
        if isinstance(self.negatives, int):
            drawn = draw(keep, min(self.negatives, len(bank)))
            keep = keep.gather(1, drawn)
        rows = F.normalize(self.teacher_head(bank.teacher), dim=1)
        tests = [((mine * theirs).sum(dim=1), mine @ rows.T) for mine in ours]
        if self.symmetric:
            tests.append(((theirs * bank.student[index]).sum(dim=1), theirs @ bank.student.T))
        picked = [(own, scores if drawn is None else scores.gather(1, drawn)) for own, scores in tests]
        pairs = [(own / self.temperature, others / self.temperature) for own, others in picked]
        if not bool(bank.begun):  # log (Z / M): then it does not matter that a bank is still growing
            bank.set_scale(torch.stack([log_mean(*pair, keep) for pair in (pairs[0], pairs[-1])]).detach())
        log_noise = keep.sum(dim=1).clamp_min(1).to(theirs.dtype).log()
        scales = [bank.log_z[0]] * len(ours) + [bank.log_z[1]] * self.symmetric
        terms = [noise_contrast(p - z, n - z, log_noise, keep=keep) for (p, n), z in zip(pairs, scales, strict=True)]
        values = torch.stack(terms[: len(ours)]).mean(dim=0)
        bound = (log_noise - values).mean()
        if self.symmetric:
            values = values + terms[-1]
            if self.training:
                bank.remember(index, ours[0])
        return values, bound
