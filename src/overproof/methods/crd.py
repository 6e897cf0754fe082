"""Contrastive representation distillation."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.losses.contrast import candidates_in, info_nce, noise_contrast
from overproof.losses.feature_distances import wide
from overproof.methods.feature_bank import Bank, log_mean
from overproof.methods.feature_objective import FeatureObjective, View, hard_labels
from overproof.methods.feature_probe import ImageShape
from overproof.types import Batch, Progress

Negatives = int | Literal["all", "batch"]


class CRD(FeatureObjective):
    """Embeddings of one image by both networks find each other among those of other images.

    L = ce_weight mean_n CE(y_n, S(x_n)) + weight mean_n (nce(s_n; teacher's bank) + nce(t_n; student's bank))
    nce = -log h(+) - sum_j log(1 - h(-_j)),  h = e^u / (e^u + m / M),  u = s.t / tau - log Z

    s and t are linear heads over the penultimate vectors, scaled to length 1. Z is set at the first batch so that the mean of
    e^u is 1 / M, for each side, and kept. The student learns from the first term: the second trains the teacher's head alone.

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        weight: of both terms, at least 0.
        negatives: how many are drawn for each image from the bank's other classes; "all": every row of another class, a
            different estimator without sampling; "batch": InfoNCE within the batch, no bank.
        positive: "exact": the image's own row; "relax": a random row of its class.
        dim: length of the embeddings.
        temperature: tau > 0.
        momentum: share of the old row when the bank is updated, in [0, 1).
        samples: number M of training images; None: the bank grows with the indices that come.
        student_layers, teacher_layers: one layer each; None: the vectors that the last linear layers read.
        ce_weight, image_shape: see `FeatureObjective`.

    Raises:
        UsageError: an option out of range, an unknown layer, an index beyond the bank, or in-batch negatives with one image.

    Reference: Tian, Krishnan, Isola, ICLR 2020, arXiv 1910.10699.

    Differences from the paper: negatives are drawn with replacement, at most M, among rows that an image
    has filled. Scores are matrix products with the whole bank,
    of which the drawn ones are picked: the same estimator without gathering m rows for each image.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        weight: float = 0.8,
        negatives: Negatives = 16384,
        positive: Literal["exact", "relax"] = "exact",
        dim: int = 128,
        temperature: float = 0.07,
        momentum: float = 0.5,
        samples: int | None = None,
        student_layers: tuple[str, ...] | None = None,
        teacher_layers: tuple[str, ...] | None = None,
        ce_weight: float = 1.0,
        image_shape: ImageShape | None = None,
    ) -> None:
        super().__init__(student, teacher, ce_weight=ce_weight, image_shape=image_shape)
        if positive not in ("exact", "relax") or (not isinstance(negatives, int) and negatives not in ("batch", "all")):
            raise UsageError(
                f'crd: positive={positive!r}, negatives={negatives!r}; known are "exact" and "relax", and "batch", "all" and numbers.'
            )
        numbers = weight >= 0 and temperature > 0 and dim >= 1 and 0 <= momentum < 1
        if not numbers or (isinstance(negatives, int) and negatives < 1) or (samples is not None and samples < 2):
            raise UsageError(
                f"crd: needs weight >= 0, negatives >= 1, dim >= 1, temperature > 0, momentum in [0, 1) and samples >= 2, not {weight}, "
                f"{negatives}, {dim}, {temperature}, {momentum}, {samples}."
            )
        self.weight, self.negatives, self.positive, self.temperature = weight, negatives, positive, temperature
        self.watch_vectors(student_layers, teacher_layers)
        self.student_head = nn.Linear(self.places[0].student_shape[0], dim)
        self.teacher_head = nn.Linear(self.places[0].teacher_shape[0], dim)
        self.bank = None if negatives == "batch" else Bank(dim, samples, momentum=momentum)

    def compare(self, view: View, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The contrastive terms."""
        # Unit vectors and scores / 0.07 lose their order in half precision.
        with torch.autocast(view.logits.device.type, enabled=False):
            ours = F.normalize(self.student_head(wide(view.features[0])), dim=1)
            theirs = F.normalize(self.teacher_head(wide(view.teacher_features[0])), dim=1)
            labels = hard_labels(batch.labels)
            if self.bank is None:
                return {"crd": self.weight * self._in_batch(ours, theirs, labels).mean()}
            self.bank.open(batch.index, labels)
            student, teacher = self._against_bank(self.bank, ours, theirs, batch.index, labels)
        if self.training:
            self.bank.remember(batch.index, ours, theirs)
        return {"crd-student": self.weight * student.mean(), "crd-teacher": self.weight * teacher.mean()}

    def _in_batch(self, ours: Tensor, theirs: Tensor, labels: Tensor) -> Tensor:
        if len(ours) < 2:
            raise UsageError(
                'crd with negatives="batch" compares images of a batch with each other; give at least two (train.batch_size), or use '
                "the bank."
            )
        return info_nce(theirs, ours, temperature=self.temperature, keep=candidates_in(labels))

    def _against_bank(self, bank: Bank, ours: Tensor, theirs: Tensor, index: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Both sides' terms, a value per image; the first call sets Z."""
        partner = index if self.positive == "exact" else bank.draw_same(labels)
        if isinstance(self.negatives, int):
            drawn, keep = bank.draw_others(labels, min(self.negatives, len(bank))), None
            count = torch.full((len(labels),), drawn.shape[1], device=labels.device)
        else:
            drawn, keep = None, bank.others(index, labels)
            count = keep.sum(dim=1).clamp_min(1)
        log_noise = count.to(ours.dtype).log() - math.log(len(bank))
        scores = [vectors @ rows.T / self.temperature for vectors, rows in ((ours, bank.teacher), (theirs, bank.student))]
        picked = [
            (score.gather(1, partner[:, None]).squeeze(1), score if drawn is None else score.gather(1, drawn))
            for score in scores
        ]
        if not bool(bank.begun):
            bank.set_scale(torch.stack([log_mean(*pair, keep) for pair in picked]).detach() + math.log(len(bank)))
        first, second = (
            noise_contrast(pair[0] - log_z, pair[1] - log_z, log_noise, keep=keep)
            for pair, log_z in zip(picked, bank.log_z.unbind(), strict=True)
        )
        return first, second
