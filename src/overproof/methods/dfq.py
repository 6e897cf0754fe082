"""Data-free adversarial distillation with the statistics of the teacher's normalisations."""

from __future__ import annotations

from torch import nn

from overproof.methods.data_free import DataFree
from overproof.methods.data_free_parts import Game, Made, Mode, Scale, Source
from overproof.methods.feature_probe import ImageShape


class DFQ(DataFree):
    """The generator's images are hard, and look to the teacher's normalisations as its training images did.

    L_S = mean_n KL(T(x_n) || S(x_n)),  L_G = - adversarial L_S + onehot CE + balance sum_k p_k log p_k + statistics sum_l gap_l

    in the terms of `DataFree`.

    Args:
        student, teacher: images -> logits (N, K); the teacher is frozen and has BatchNorm layers.
        adversarial, onehot, balance, statistics: weights, at least 0.
        student_steps, student_mode, shared, replay: see `Game`.
        generator, latent, width, mean, std, image_shape: see `Source`.
        generator_lr: of the generator's Adam.

    Raises:
        UsageError: a teacher without BatchNorm, values out of range, or an image that the generator cannot make.

    Reference: Choi, Choi, El-Khamy, Lee: Data-Free Network Quantization With Adversarial Knowledge Distillation, CVPR Workshops
    2020, arXiv 2005.04136.

    Differences from the paper: weights and turns are those under which later work compares it (1, 1, 20, 1 and 10 turns), for
    distillation into a smaller network; nothing is quantised, and there is one generator.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        adversarial: float = 1.0,
        onehot: float = 1.0,
        balance: float = 20.0,
        statistics: float = 1.0,
        student_steps: int = 10,
        student_mode: Mode = "train",
        shared: bool = False,
        replay: float = 0.0,
        generator: Made = "upsampling",
        latent: int = 256,
        width: int = 64,
        generator_lr: float = 1e-3,
        mean: Scale = None,
        std: Scale = None,
        image_shape: ImageShape | None = None,
    ) -> None:
        game = Game(
            criterion="kl", adversarial=adversarial, onehot=onehot, balance=balance, statistics=statistics,
            student_steps=student_steps, student_mode=student_mode, shared=shared, replay=replay,
        )  # fmt: skip
        source = Source(
            generator=generator, latent=latent, width=width, lr=generator_lr, mean=mean, std=std, image_shape=image_shape
        )
        super().__init__(student, teacher, game=game, source=source)
