"""Fast data-free distillation: a generator learns where to begin, and makes each batch of images in a few steps."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from overproof.data.augmentation import Cutout, HorizontalFlip, RandomCrop, build_augment
from overproof.errors import UsageError
from overproof.losses.divergences import cross_entropy, kl_divergence
from overproof.losses.synthesis import batch_statistics, in_full, relative_discrepancy, statistics_gap
from overproof.methods.data_free import DataFree
from overproof.methods.data_free_parts import Game, Made, Scale, Source, figures
from overproof.methods.data_free_pool import BytePool
from overproof.methods.feature_probe import ImageShape
from overproof.models.generators import Head
from overproof.networks import frozen, in_mode
from overproof.types import Output

SMOOTH = (RandomCrop, HorizontalFlip, Cutout)  # augmentations that gradients pass


class FastDFKD(DataFree):
    """A generator that has learned where to begin makes each batch in a few steps; the student learns from all images made so far.

    inner, i = 1..I: a = augment(G_i(z_i)),  (G_{i+1}, z_{i+1}) = Adam step down dL_i from (G_i, z_i), G_1 = G,
        L_i = statistics sum_l gap_l + onehot mean_n CE(T(a_n), y_n) - adversarial mean_n 1[S and T agree] KL(T(a_n) || S(a_n))
    meta: Adam step of G down sum_i dL_i / dG_i
    student: L_S = tau^2 mean_n KL(softmax(T(a_n) / tau) || softmax(S(a_n) / tau)), a_n augmented images of the pool

    y_n are classes at random. gap_l is the distance of (1 - momentum) times the batch's statistics plus momentum times those of earlier
    batches from what the l-th normalisation of the teacher remembers. Of the I images of a noise vector those of the step with the
    smallest L_i are kept, as bytes. A step of the training is a turn of the generator and `student_steps` of the student; before the
    first one the generator has `warmup` turns, without the adversarial term.

    Args:
        student, teacher: images -> logits (N, K); the teacher is frozen and has BatchNorm layers.
        inner_steps: I, at least 1. The paper has 2, 5 and 10, with generator_lr 5e-3, 3e-3 and 2e-3.
        statistics, onehot, adversarial: weights, at least 0.
        momentum: of the statistics of earlier batches, in [0, 1).
        generator_lr, latent_lr: of the inner Adam; that of the meta step is I generator_lr. Neither follows the schedule.
        warmup: turns of the generator before the student begins, at least 1.
        student_steps: turns of the student for each of the generator; say train.steps_per_epoch with that in mind.
        temperature: tau > 0.
        pool: images that are kept, at least a batch; the oldest make room. They are part of every checkpoint, a byte for each number
            (157 MB by default at 3 x 32 x 32).
        augment: of the images, before anybody sees them: "crop", "flip" and "cutout", see `data.augmentation`; () for none.
        generator, latent, width, head, mean, std, image_shape: see `Source`; by default images fill [0, 1], and with another head they
            are cut off there when they are kept.

    Raises:
        UsageError: a teacher without BatchNorm, values out of range, or an image that the generator cannot make.

    Reference: Fang, Mo, Wang, Song, Bei, Zhang, Song: Up to 100x Faster Data-free Knowledge Distillation, AAAI 2022, arXiv
    2112.06253.

    Differences from the paper: images of the pool are drawn with replacement; the oldest leave it when it is full; the first layer of
    the generator is not drawn anew in the middle of the training; the generator's normalisations remember what they see, so that it
    can be sampled. Formulas and defaults (ResNet-34 to ResNet-18) are those of the released code.
    """

    rounds: Tensor

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        inner_steps: int = 5,
        statistics: float = 10.0,
        onehot: float = 0.5,
        adversarial: float = 1.33,
        momentum: float = 0.9,
        generator_lr: float = 3e-3,
        latent_lr: float = 0.01,
        warmup: int = 20,
        student_steps: int = 400,
        temperature: float = 20.0,
        pool: int = 51200,
        augment: tuple[str, ...] = ("crop", "flip"),
        generator: Made = "upsampling",
        latent: int = 256,
        width: int = 64,
        head: Head = "sigmoid",
        mean: Scale = None,
        std: Scale = None,
        image_shape: ImageShape | None = None,
    ) -> None:
        game = Game(
            criterion="kl",
            adversarial=adversarial,
            onehot=onehot,
            statistics=statistics,
            student_steps=student_steps,
            pool=pool,
        )
        source = Source(
            generator=generator, latent=latent, width=width, head=head, lr=generator_lr, betas=(0.5, 0.999), mean=mean, std=std,
            image_shape=image_shape,
        )  # fmt: skip
        if not statistics + onehot > 0:
            raise UsageError(
                "fast-dfkd: before the student begins, the generator looks for statistics or onehot: one must be above 0."
            )
        if inner_steps < 1 or warmup < 1 or not 0 <= momentum < 1 or not latent_lr > 0 or not temperature > 0:
            raise UsageError(
                f"fast-dfkd: inner_steps={inner_steps} and warmup={warmup} must be at least 1, momentum={momentum} in [0, 1), latent_lr="
                f"{latent_lr} and temperature={temperature} above 0."
            )
        self.augment = build_augment(augment)
        if self.augment is not None and not all(isinstance(step, SMOOTH) for step in self.augment.steps):
            raise UsageError(f"fast-dfkd: augment={list(augment)}: gradients pass crop, flip and cutout; leave the others out.")
        super().__init__(student, teacher, game=game, source=source)
        self.inner_steps, self.momentum, self.latent_lr = inner_steps, momentum, latent_lr
        self.warmup, self.temperature = warmup, temperature
        self.made = BytePool(pool, self.generator.shape)
        self.register_buffer("rounds", torch.zeros((), dtype=torch.long))
        for number, (_, pair) in enumerate(self._known()):
            for part, like in zip(("mean", "var"), pair, strict=True):
                self.register_buffer(f"past_{part}_{number}", torch.zeros_like(like))

    @property
    def turns(self) -> tuple[str, ...]:
        """The generator, several times at the very beginning, and then the student."""
        first = 1 if int(self.rounds) else self.warmup
        return (*("generator",) * first, *("student",) * self.game.student_steps)

    def settings(self, phase: str) -> dict[str, Any]:
        """Adam for the meta step, whose gradient is a sum over the inner ones; its rate stays."""
        own = super().settings(phase)
        return {**own, "lr": own["lr"] * self.inner_steps, "schedule": "constant", "warmup": 0.0} if own else {}

    def _imitation(self, count: int) -> Output:
        with torch.no_grad():
            images = self._changed(self._recalled(count))
            target = self._answer(images)
        logits = self.student(images)
        tau = self.temperature
        loss = tau**2 * kl_divergence(in_full(target), in_full(logits), temperature=tau).mean()
        logs = {"relative discrepancy": relative_discrepancy(target, logits)}
        return Output({"imitation": loss}, logits, logs, labels=target.argmax(dim=1))

    def _generation(self, count: int) -> Output:
        if count > self.game.pool:
            raise UsageError(
                f"fast-dfkd: a pool of {self.game.pool} images has no room for a batch of {count}: raise method.pool."
            )
        meta = dict(self.generator.named_parameters())
        weights = {name: p.detach().clone().requires_grad_() for name, p in meta.items()}
        noise = self.generator.draw(count).requires_grad_()
        groups: list[dict[str, Any]] = [{"params": list(weights.values())}, {"params": [noise], "lr": self.latent_lr}]
        optimizer = torch.optim.Adam(groups, self.source.lr, betas=self.source.betas)
        sums = {name: torch.zeros_like(p) for name, p in weights.items()}
        hard, classes = self.game.adversarial > 0 and int(self.rounds) >= self.warmup, None
        best: tuple[float, Tensor, Tensor, dict[str, Tensor]] | None = None
        for _ in range(self.inner_steps):
            images = torch.func.functional_call(self.generator, weights, (noise,))
            changed = self._changed(images)
            target, seen = self._inspect(changed)
            if classes is None:
                classes = torch.randint(target.shape[1], (count,), device=target.device)
            terms, own = self._wishes(changed, target, classes, seen, hard=hard)
            total = torch.stack(list(terms.values())).sum()
            if best is None or float(total.detach()) < best[0]:
                values = {name: value.detach() for name, value in terms.items()}
                best = (float(total.detach()), images.detach(), target.detach(), values)
            gradients = torch.autograd.grad(total, [*weights.values(), noise])
            for (name, p), gradient in zip((*weights.items(), ("", noise)), gradients, strict=True):
                p.grad = gradient
                if name:
                    sums[name] += gradient
            optimizer.step()
        assert best is not None
        self._remember(own)
        self.made.keep(best[1])
        self.rounds += 1
        path = torch.stack([(meta[name] * gradient).sum() for name, gradient in sums.items()]).sum()
        first, *rest = best[3].items()
        losses = {first[0]: first[1] + path - path.detach(), **dict(rest)}
        return Output(losses, best[2], figures(best[1], best[2]), labels=best[2].argmax(dim=1))

    def _wishes(
        self, images: Tensor, target: Tensor, classes: Tensor, seen: dict[str, Tensor], *, hard: bool
    ) -> tuple[dict[str, Tensor], list[tuple[Tensor, Tensor]]]:
        """Terms of L_i, the adversarial one if it is to be `hard`, and the batch's statistics at each normalisation."""
        game, terms, answer = self.game, {}, in_full(target)
        own = [batch_statistics(in_full(seen[name])) for name, _ in self._known()]
        if game.statistics:
            gaps = [
                statistics_gap(self._mixed(n, pair), *known[1])
                for n, (pair, known) in enumerate(zip(own, self._known(), strict=True))
            ]
            terms["statistics"] = game.statistics * torch.stack(gaps).sum()
        if game.onehot:
            terms["one-hot"] = game.onehot * cross_entropy(answer, classes).mean()
        if hard:
            with in_mode(self.student), frozen(self.student):
                logits = in_full(self.student(images))
            agree = (logits.argmax(dim=1) == answer.argmax(dim=1)).to(logits.dtype)
            terms["adversarial"] = -game.adversarial * (agree * kl_divergence(answer, logits)).mean()
        return terms, own

    def _mixed(self, number: int, own: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Statistics of the batch together with those of the batches before, if there were any."""
        share = self.momentum * (self.rounds > 0).to(own[0].dtype)  # nobody waits for a device to know
        mean, var = (share * past + (1 - share) * new for past, new in zip(self._past(number), own, strict=True))
        return mean, var

    def _past(self, number: int) -> list[Tensor]:
        return [self.get_buffer(f"past_{part}_{number}") for part in ("mean", "var")]

    def _remember(self, own: list[tuple[Tensor, Tensor]]) -> None:
        for number, pair in enumerate(own):
            for past, new in zip(self._past(number), self._mixed(number, pair), strict=True):
                past.copy_(new.detach())

    def _recalled(self, count: int) -> Tensor:
        """Images of the pool; before there are any, what the generator makes."""
        if int(self.rounds):
            return self.made.recall(count).to(self.generator.shift.dtype)
        images: Tensor = self.generator(self.generator.draw(count))
        return images

    def _changed(self, images: Tensor) -> Tensor:
        if self.augment is None:
            return images
        return self.augment(images, images.new_zeros(len(images)), torch.default_generator)[0]
