"""What methods without data share: a generator makes the images, and student and generator take turns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.features import Tap
from overproof.folding import Follower
from overproof.losses.divergences import cross_entropy
from overproof.losses.synthesis import batch_statistics, imbalance, in_full, relative_discrepancy, statistics_gap
from overproof.methods.data_free_parts import DISTANCES, Game, Source, figures, normalisations, watched_layers
from overproof.methods.data_free_pool import Pool
from overproof.methods.objective import Objective
from overproof.models.generators import Generator
from overproof.networks import frozen, in_mode
from overproof.types import Batch, Output, Progress

LOST, CONSTANT = 0.7, 1.0  # relative discrepancy of a student that does not follow; and of constant answers
BETTER = 0.97  # an epoch that gets no further than this share of the one before


class DataFree(Objective):
    """The student imitates the teacher on images of a generator, which looks for images on which they differ.

    student:    L_S = mean_n d(T(x_n), S(x_n)), x = G(z) held fixed
    generator:  L_G = - adversarial f(mean_n d(T(x_n), S(x_n))) + onehot mean_n CE(T(x_n), argmax T(x_n)) + balance sum_k p_k log p_k
                      + statistics sum_l (||mean_l - m_l|| + ||var_l - v_l||) - activation mean |h|

    with noise z, f(D) = D or log(1 + D), p the mean prediction of the batch, m_l, v_l what the teacher's normalisations remember
    and h its penultimate features. Of the batch that the loop hands over only the number of images is used.

    Gradients are taken only with respect to what a phase trains: the teacher and, while the student learns, the generator run
    without a graph; while the generator learns, no weight of the other two gets a gradient. The teacher runs through a copy with
    its normalisations folded into the convolutions, where that gives the same logits.

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        game: distances, weights and turns.
        source: what makes the images.

    Raises:
        UsageError: a teacher that keeps no statistics where they are asked for, or an image that the generator cannot make.
    """

    phases = ("student", "generator")
    before: Tensor

    def __init__(self, student: nn.Module, teacher: nn.Module, *, game: Game, source: Source) -> None:
        super().__init__(student, teacher)
        if game.shared and source.images != "generated":
            raise UsageError(f"shared=true needs a generator that learns, but images={source.images!r}: drop one of them.")
        self.game, self.source = game, source
        self.generator = source.build(student, teacher)
        self.normalisations = normalisations(teacher, self.generator.shape) if game.statistics else {}
        self.pool = Pool(game.pool, self.generator.shape, teacher) if game.replay else None
        self._copy = Follower(frozen=True)
        self._tap: tuple[Tap] | None = None
        self._ahead: tuple[list[Tensor], Tensor, Tensor, Tensor] | None = None
        self.register_buffer("before", torch.tensor(-1.0))  # relative discrepancy of the epoch before; below 0: none

    @property
    def turns(self) -> tuple[str, ...]:
        """`student_steps` turns of the student, then one of the generator; first that one if it works for the student too."""
        students = ("student",) * self.game.student_steps
        if self.source.images != "generated":
            return students
        return ("generator", *students) if self.game.shared else (*students, "generator")

    def trainable(self, phase: str = "train") -> Iterator[nn.Parameter]:
        """The generator's parameters in its phase, else the student's."""
        part = self.generator if phase == "generator" else self.student
        return (p for p in part.parameters() if p.requires_grad)

    def settings(self, phase: str) -> dict[str, Any]:
        """Adam for the generator, without weight decay."""
        adam = {"optimizer": "adam", "lr": self.source.lr, "betas": self.source.betas, "weight_decay": 0.0}
        return adam if phase == "generator" else {}

    def artefacts(self) -> dict[str, Generator]:
        """The generator, if it was trained."""
        return {"generator": self.generator} if self.source.images == "generated" else {}

    def describe(self) -> dict[str, Any]:
        """Where the images came from."""
        spec = self.generator.spec or {}
        numbers = {name: getattr(self.generator, name).flatten().tolist() for name in ("shift", "scale")}
        facts = {"images": self.source.images, "generator": spec.get("name"), "shape": list(self.generator.shape)}
        return {**facts, **numbers, "generator_parameters": sum(p.numel() for p in self.generator.parameters())}

    def forward(self, batch: Batch, progress: Progress, phase: str = "student") -> Output:
        """One turn of the student, or of the generator."""
        if len(batch) < 2:
            raise UsageError(
                f"A generator with batch statistics cannot make {len(batch)} image alone: every batch needs 2 or more (train.batch_size)."
            )
        return self._generation(len(batch)) if phase == "generator" else self._imitation(len(batch))

    def _imitation(self, count: int) -> Output:
        if self._ahead is not None:
            return self._gradient_at_hand()
        images, target = self._material(count)
        logits = self.student(images)
        distance = DISTANCES[self.game.criterion](in_full(target), in_full(logits)).mean()
        logs = {"relative discrepancy": relative_discrepancy(target, logits)}
        if self.source.images != "generated":
            logs |= figures(images, target)
        return Output({"imitation": distance}, logits, logs, labels=target.argmax(dim=1))

    @torch.no_grad()
    def _material(self, count: int) -> tuple[Tensor, Tensor]:
        """Images and the teacher's logits: fresh ones, and a share of earlier ones if they are replayed."""
        # Two fresh ones at least: the generator normalises over them.
        again = self.pool.recall(min(int(self.game.replay * count), count - 2)) if self.pool is not None else None
        fresh = self.generator(self.generator.draw(count - (len(again[0]) if again is not None else 0)))
        target = self._answer(fresh)
        if self.pool is None or again is None:
            return fresh, target
        self.pool.keep(fresh, target)
        return torch.cat([fresh, again[0]]), torch.cat([in_full(target), again[1].to(in_full(target))])

    def _generation(self, count: int) -> Output:
        images = self.generator(self.generator.draw(count))
        target, seen = self._inspect(images)
        terms, logits = self._requests(target, seen), target.detach()
        logs = figures(images.detach(), target.detach())
        if not self.game.adversarial:
            return Output(terms, logits, logs, labels=logits.argmax(dim=1))
        with in_mode(self.student, "eval" if self.game.student_mode == "eval" else "keep"):
            if self.game.shared:
                logits = self.student(images)
            else:
                with frozen(self.student):
                    logits = self.student(images)
        distance = DISTANCES[self.game.criterion](in_full(target), in_full(logits)).mean()
        terms["adversarial"] = -self.game.adversarial * (distance.log1p() if self.game.log_form else distance)
        if self.game.shared:
            terms = self._split(terms, images, distance, logits, target)
        return Output(terms, logits.detach(), logs, labels=target.detach().argmax(dim=1))

    def _requests(self, target: Tensor, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What is asked of the images beside being hard, by name."""
        game, logits = self.game, in_full(target)
        terms: dict[str, Tensor] = {}
        if game.onehot:
            terms["one-hot"] = game.onehot * cross_entropy(logits, logits.argmax(dim=1)).mean()
        if game.balance:
            terms["balance"] = game.balance * imbalance(logits)
        if game.statistics:
            gaps = [statistics_gap(batch_statistics(in_full(seen[name])), *known) for name, known in self._known()]
            terms["statistics"] = game.statistics * torch.stack(gaps).sum()
        if game.activation:
            terms["activation"] = -game.activation * in_full(list(seen.values())[-1]).abs().mean()
        return terms

    def _known(self) -> list[tuple[str, tuple[Tensor, Tensor]]]:
        """What each normalisation receives, by tap name, with the mean and variance that it remembers."""
        kept = {
            name: (norm.get_buffer("running_mean"), norm.get_buffer("running_var"))
            for name, norm in self.normalisations.items()
        }
        return [(f"{name}:input", pair) for name, pair in kept.items()]

    def _split(
        self, terms: dict[str, Tensor], images: Tensor, distance: Tensor, logits: Tensor, target: Tensor
    ) -> dict[str, Tensor]:
        """One backward pass for both: the student's gradient is kept for its next turn, the images' becomes the generator's path."""
        weights = [p for p in self.student.parameters() if p.requires_grad]
        total = torch.stack(list(terms.values())).sum()
        at_images, *at_weights = torch.autograd.grad(total, [images, *weights], allow_unused=True)
        slope = -self.game.adversarial / (1 + distance.detach() if self.game.log_form else 1.0)
        own = [torch.zeros_like(w) if g is None else g / slope for w, g in zip(weights, at_weights, strict=True)]
        self._ahead = (own, distance.detach(), logits.detach(), target.detach())
        path = (images * at_images).sum()
        found = {name: value.detach() for name, value in terms.items()}
        return {**found, "adversarial": found["adversarial"] + path - path.detach()}

    def _gradient_at_hand(self) -> Output:
        """A turn of the student whose gradient the generator's turn has found."""
        assert self._ahead is not None
        (gradients, distance, logits, target), self._ahead = self._ahead, None
        weights = [p for p in self.student.parameters() if p.requires_grad]
        path = torch.stack([(w * g).sum() for w, g in zip(weights, gradients, strict=True)]).sum()
        logs = {"relative discrepancy": relative_discrepancy(target, logits)}
        return Output({"imitation": distance + path - path.detach()}, logits, logs, labels=target.argmax(dim=1))

    def _inspect(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The teacher's logits with their graph, and the features that are asked for."""
        assert self.teacher is not None
        if not (self.game.statistics or self.game.activation):
            return self._answer(images), {}
        if self._tap is None:
            self._served(images)  # a copy made after the tap would leave the watched normalisations unfolded
            self._tap = (Tap(self.teacher, watched_layers(self.teacher, self.normalisations, last=self.game.activation > 0)),)
        target, seen = self._tap[0](images)
        return target, seen

    def _answer(self, images: Tensor) -> Tensor:
        return self._served(images)(images)  # type: ignore[no-any-return]

    def _served(self, images: Tensor) -> nn.Module:
        """The teacher, or a cheaper copy that gives the same logits."""
        assert self.teacher is not None
        return self._copy.now(self.teacher, images)

    def concerns(self, means: Mapping[str, float]) -> dict[str, str]:
        """A student that diverges, and a generator that has collapsed, with the quantity that says so."""
        found, relative, before = {}, means.get("relative discrepancy", 0.0), float(self.before)
        share, diversity = means.get("fakes/largest class", 0.0), means.get("fakes/diversity", 1.0)
        self.before.fill_(means.get("relative discrepancy", before))
        first = before < 0
        # No better than in the epoch before, because a beginner gets better; in the first, worse than constant answers.
        if relative > (CONSTANT if first else max(LOST, BETTER * before)):
            ago = "" if first else f"{before:.2f} an epoch ago; "
            found["divergence"] = (
                f"the student diverges: on the images that it learns from its logits are wrong by {relative:.2f} times the size of the "
                f"teacher's ({ago}constant answers reach 1). Take more student_steps, or a smaller train.lr or generator_lr."
            )
        if self.source.images == "generated" and (share > 0.9 or diversity < 0.05):
            found["collapse"] = (
                f"the generator has collapsed: the teacher sees one class in {share:.0%} of its images, and from image to image pixels "
                f"vary by {diversity:.1%} of all their variation. Take a smaller generator_lr, or add method.balance=1."
            )
        return found
