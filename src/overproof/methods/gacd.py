"""Guided adversarial contrastive distillation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from overproof.attacks.threats import Norm
from overproof.errors import UsageError
from overproof.features import INPUT
from overproof.losses.contrast import weighted
from overproof.losses.divergences import cross_entropy
from overproof.losses.feature_distances import wide
from overproof.losses.reliability import trust
from overproof.methods.feature_objective import FeatureObjective, View, hard_labels, shaped
from overproof.methods.feature_probe import ImageShape
from overproof.methods.gacd_contrast import Contrast, Negatives
from overproof.methods.robust_objective import AttackMode, RobustObjective
from overproof.methods.shared_forward import Lesson
from overproof.networks import in_mode
from overproof.types import Batch, Output, Progress

Source = Literal["clean", "adv"]
Pairs = Literal["adv", "both"]
Trusted = Literal["prob", "correct01", "none"]


class GACD(RobustObjective, FeatureObjective):
    """Features of adversarial images find the robust teacher's features of the same images: robustness travels in features.

    L = ce_weight mean_n CE(y_n, S(x~_n)) + weight sum_n w_n c_n / sum_n w_n,  x~ = PGD(CE(S(.), y)) from a uniform start
    batch: c_n = -log( e^{t_n.s_n / tau} / sum_j e^{t_n.s_j / tau} ), j over n and the batch's images of other classes
    bank:  c_n = -log h(t_n, s_n) - sum_j log(1 - h(t_j, s_n)),  h = e^u / (e^u + m / M),  u = t.s / tau - log Z

    t and s are linear heads over the penultimate vectors of T(x) and S(x~), scaled to length 1; w_n is the teacher's probability
    of y_n, for where it errs it should not be followed. The bank holds the teacher's own vectors of all M images, whose head is
    applied when they are read. Z is set at the first batch so that the mean of e^u is 1 / M, and kept.

    Args:
        student: images -> logits (N, K).
        teacher: adversarially trained, images -> logits, frozen; of other classes if need be, with sample_weight="none".
        weight: of the contrast, at least 0 (with a bank about 0.8).
        temperature: tau > 0 (with a bank 0.07).
        dim: length of t and s.
        negatives: "batch"; "all": every row of the bank that counts; a number: so many drawn for each image.
        mask_same_class: images of one's own class are no negatives.
        anchor: images of which the teacher's features are taken.
        pairs: "adv": S(x~) is the positive; "both": S(x) too, with the same anchor, and the mean of both.
        labels_on: images of the cross-entropy; "clean": adversarial ones act through the features alone. In a sum of methods, which
            has a cross-entropy of its own on clean images, "adv" adds that of the adversarial ones.
        ce_weight: of the labels, at least 0; 0: features only, and the last layer is left to `overproof probe-linear`.
        sample_weight: w: "prob", "correct01" (1 where the teacher is right, else 0) or "none" (1).
        weight_on: images on which the teacher is judged.
        normalise_weight: divide by sum w; else by N.
        symmetric: add a teacher-anchored term against a bank of the student's vectors. It trains the teacher's head alone.
        head_share: share of the training, its last part, in which the features are frozen and the last layer learns alone.
            Before that the labels reach nothing but the last layer, so that there is a decision to attack. 0: one stage, in
            which they reach everything. (The learning rate must not have come to nothing by then.)
        samples: number M of training images, for the bank; None: it grows with the indices that come.
        student_layers, teacher_layers: one layer each; None: the vectors that the last linear layers read.
        image_shape: see `FeatureObjective`.
        norm, eps, step_size, steps, attack_mode: see `RobustObjective`.

    Raises:
        UsageError: an option out of range, options that exclude each other, an unknown layer, an index beyond the bank, or
            in-batch negatives with one image.

    Reference: Bai, Chen, Zhao, Wen, Jiang, Kot, 2020, arXiv 2009.09922; bounds after Tian, Krishnan, Isola, ICLR 2020.

    Differences from the paper: built from its abstract and from contrastive representation distillation, on which it stands;
    what the paper may do otherwise is an option. Defaults are for sets of few classes. Two stages train the last layer in the
    first one too, without effect on the features. With augmentation the bank holds each image as it was last seen.
    """

    partial: ClassVar[bool] = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        weight: float = 0.3,
        temperature: float = 0.3,
        dim: int = 128,
        negatives: Negatives = "batch",
        mask_same_class: bool = True,
        anchor: Source = "clean",
        pairs: Pairs = "both",
        labels_on: Source = "adv",
        ce_weight: float = 1.0,
        sample_weight: Trusted = "prob",
        weight_on: Source = "clean",
        normalise_weight: bool = True,
        symmetric: bool = False,
        head_share: float = 0.0,
        samples: int | None = None,
        student_layers: tuple[str, ...] | None = None,
        teacher_layers: tuple[str, ...] | None = None,
        image_shape: ImageShape | None = None,
        norm: Norm = "Linf",
        eps: float = 8 / 255,
        step_size: float | None = None,
        steps: int = 10,
        attack_mode: AttackMode = "eval",
    ) -> None:
        super().__init__(student, teacher, norm=norm, eps=eps, step_size=step_size, steps=steps, attack_mode=attack_mode)
        sources = {"anchor": anchor, "labels_on": labels_on, "weight_on": weight_on}
        for kind, given in ((Source, sources), (Pairs, {"pairs": pairs}), (Trusted, {"sample_weight": sample_weight})):
            for name, value in given.items():
                if value not in get_args(kind):
                    raise UsageError(f"gacd: {name}={value!r} is unknown; known are {', '.join(get_args(kind))}.")
        if min(weight, ce_weight) < 0 or not 0 <= head_share < 1 or (head_share > 0 and ce_weight == 0):
            raise UsageError(
                "gacd: needs weight, ce_weight >= 0 and head_share in [0, 1), and a last layer that is fitted needs ce_weight > 0; "
                f"not {weight}, {ce_weight}, {head_share}."
            )
        self.weight, self.ce_weight, self.head_share, self.image_shape = weight, ce_weight, head_share, image_shape
        self._logs: dict[str, Tensor] = {}
        self.anchor, self.pairs, self.labels_on = anchor, pairs, labels_on
        self.sample_weight, self.weight_on, self.normalise_weight = sample_weight, weight_on, normalise_weight
        self.needs_same_classes = sample_weight != "none"
        self.watch_vectors(student_layers, teacher_layers)
        self.contrast = Contrast(
            self.places[0].student_shape[0],
            self.places[0].teacher_shape[0],
            dim=dim,
            temperature=temperature,
            negatives=negatives,
            mask_same_class=mask_same_class,
            symmetric=symmetric,
            samples=samples,
        )
        if head_share and not isinstance(self._last_layer, nn.Linear):
            raise UsageError(
                f"gacd: with head_share the features must be what the student's last linear layer reads, not {self.places[0].student!r}; "
                "leave student_layers out."
            )

    @property
    def taught(self) -> tuple[Source, ...]:
        """Images that the teacher has to see."""
        wanted: set[Source] = {self.anchor}
        if self.sample_weight != "none":
            wanted.add(self.weight_on)
        return tuple(sorted(wanted))

    @property
    def _last_layer(self) -> nn.Module:
        return self.student.get_submodule(self.places[0].student.removesuffix(INPUT))

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's losses."""
        if self.head_share and progress.fraction >= 1 - self.head_share:
            return self._fit_last_layer(batch)
        sources: dict[Source, Batch] = {"clean": batch, "adv": self._harden(batch)}
        lessons = {name: self.teach(sources[name]) for name in self.taught}
        shown: set[Source] = {"adv", self.labels_on}
        if self.pairs == "both":
            shown.add("clean")
        seen = {name: self.look(sources[name], lessons[self.anchor]) for name in sorted(shown)}
        features = {name: self.view(found).features[0] for name, found in seen.items()}
        losses, logs = self._guided(features, lessons, batch)
        answer = seen[self.labels_on]
        logits = self._fitted(answer.features[self.places[0].student]) if self.head_share else answer.logits
        if self.ce_weight:
            losses = {"ce": self.ce_weight * cross_entropy(logits, batch.labels).mean(), **losses}
        return Output(losses, logits, logs)

    def compare(self, view: View, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The contrast as a part of a sum of methods, over their forward pass of the clean images."""
        if self._taps is None:  # released by the sum, which looks at clean images only
            self.watch(self.places)
        self._share = self.share(progress)
        hard, place = self._harden(batch), self.places[0]
        lessons: dict[Source, Lesson] = {"clean": Lesson(view.teacher_logits, {place.teacher: view.teacher_features[0]})}
        if "adv" in self.taught:
            lessons["adv"] = self.teach(hard)
        seen = self.look(hard, lessons["clean"])
        features: dict[Source, Tensor] = {"clean": view.features[0], "adv": self.view(seen).features[0]}
        losses, self._logs = self._guided(features, lessons, batch)
        if self.labels_on == "adv" and self.ce_weight:  # the sum's own cross-entropy is that of the clean images
            losses["adversarial"] = self.ce_weight * cross_entropy(seen.logits, batch.labels).mean()
        return losses

    def join(self) -> None:
        """Become part of a sum.

        Raises:
            UsageError: with head_share.
        """
        if self.head_share:
            raise UsageError("gacd with head_share trains in two stages and cannot be part of another method.")
        super().join()

    def told(self) -> dict[str, Tensor]:
        """What there is to log about the terms that were made last."""
        return self._logs

    def _harden(self, batch: Batch) -> Batch:
        return replace(batch, images=self.against_labels(batch))

    def _guided(
        self, features: Mapping[Source, Tensor], lessons: Mapping[Source, Lesson], batch: Batch
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """The weighted term; and for the log the bound in nats, and how far the teacher is followed."""
        place = self.places[0]
        positives = [features["adv"], features["clean"]] if self.pairs == "both" else [features["adv"]]
        anchor = shaped(lessons[self.anchor].features[place.teacher], place, place.teacher)
        values, bound = self.contrast(positives, anchor, batch.index, hard_labels(batch.labels))
        weights = self._weights(lessons, batch.labels)
        loss = weighted(values, weights, normalise=self.normalise_weight).mean()
        return {"gacd": self.weight * loss}, {"information": bound.detach(), "sample weight": weights.mean()}

    def _weights(self, lessons: Mapping[Source, Lesson], labels: Tensor) -> Tensor:
        if self.sample_weight == "none":
            return torch.ones(len(labels), device=labels.device)
        logits = lessons[self.weight_on].logits
        if self.sample_weight == "prob":
            return trust(logits, labels, beta=1.0)
        return (logits.argmax(dim=1) == hard_labels(labels)).float()

    def _fit_last_layer(self, batch: Batch) -> Output:
        """The second stage: features as they are in use, in eval mode, and nothing but the last layer learns."""
        assert self._taps is not None
        chosen = self._harden(batch) if self.labels_on == "adv" else batch
        with in_mode(self.student), torch.no_grad():
            features = self._taps[0](chosen.images)[1]
        logits = self._fitted(features[self.places[0].student])
        return Output({"ce": self.ce_weight * cross_entropy(logits, batch.labels).mean()}, logits)

    def _fitted(self, feature: Tensor) -> Tensor:
        """Logits over the features, to which no gradient goes back."""
        # Autocast may hold a copy of the layer that was made without gradients; in full precision it is not used.
        with torch.autocast(feature.device.type, enabled=False):
            logits: Tensor = self._last_layer(wide(feature.detach()))
        return logits
