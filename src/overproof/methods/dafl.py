"""Data-free learning of student networks."""

from __future__ import annotations

from torch import nn

from overproof.methods.data_free import DataFree
from overproof.methods.data_free_parts import Game, Made, Scale, Source
from overproof.methods.feature_probe import ImageShape


class DAFL(DataFree):
    """The generator makes images about which the teacher is sure, of all classes alike; there the student imitates the teacher.

    L_G = onehot mean_n CE(T(x_n), argmax T(x_n)) + balance sum_k p_k log p_k - activation mean |h|,  L_S = mean_n KL(T(x_n) || S(x_n))

    with p the mean prediction of the batch and h the teacher's penultimate features. The generator does not know of the student.

    Args:
        student, teacher: images -> logits (N, K); the teacher is frozen.
        onehot, balance, activation: weights, at least 0; 5 with a decimal logarithm is 2.17 with a natural one.
        student_steps, replay: see `Game`.
        generator, latent, width, mean, std, image_shape: see `Source`.
        generator_lr: of the generator's Adam; the authors take 0.2 for MNIST, 0.02 and other weights (0.05, 5, 0.01) for CIFAR.

    Raises:
        UsageError: values out of range, or an image that the generator cannot make.

    Reference: Chen, Wang, Xu, Yang, Liu, Shi, Xu, Xu, Tian: Data-Free Learning of Student Networks, ICCV 2019, arXiv 1904.01186.

    Differences from the paper: each step is made on fresh noise, where the authors' code makes both steps
    on the same batch. The rate of the generator's Adam is that of the other methods without data.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        onehot: float = 1.0,
        balance: float = 2.17,
        activation: float = 0.1,
        student_steps: int = 1,
        replay: float = 0.0,
        generator: Made = "upsampling",
        latent: int = 100,
        width: int = 64,
        generator_lr: float = 1e-3,
        mean: Scale = None,
        std: Scale = None,
        image_shape: ImageShape | None = None,
    ) -> None:
        game = Game(
            criterion="kl", adversarial=0.0, onehot=onehot, balance=balance, activation=activation, student_steps=student_steps,
            replay=replay,
        )  # fmt: skip
        source = Source(
            generator=generator, latent=latent, width=width, lr=generator_lr, mean=mean, std=std, image_shape=image_shape
        )
        super().__init__(student, teacher, game=game, source=source)
