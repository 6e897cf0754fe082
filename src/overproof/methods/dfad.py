"""Data-free adversarial distillation."""

from __future__ import annotations

from torch import nn

from overproof.methods.data_free import DataFree
from overproof.methods.data_free_parts import Criterion, Game, Images, Made, Mode, Scale, Source
from overproof.methods.feature_probe import ImageShape
from overproof.models.generators import Head


class DFAD(DataFree):
    """A generator looks for images on which student and teacher differ; there the student imitates the teacher.

    min_S max_G D(S, T; G),  D = E_z (1/K) ||T(G(z)) - S(G(z))||_1,  z ~ N(0, I)

    of logits, without temperature: student_steps steps on D for the student, then one on -D, or on -log(1 + D), for the generator,
    each on fresh noise. The rest of what a generator can look for (see `DataFree`) has weight 0 and may be added.

    Args:
        student, teacher: images -> logits (N, K); the teacher is frozen.
        criterion, log_form, adversarial, onehot, balance, statistics, activation, student_steps, student_mode, shared, replay, pool:
            see `Game`. The paper takes log_form for segmentation.
        images, generator, latent, width, head, mean, std, image_shape: see `Source`. The paper has latent 100 for MNIST, and a
            dcgan for 128 pixels. "noise" and "untrained" are its baselines.
        generator_lr: of the generator's Adam, with betas `generator_betas`; the schedule is the student's.

    Raises:
        UsageError: values out of range, or an image that the generator cannot make.

    Reference: Fang, Song, Shen, Wang, Chen, Song: Data-Free Adversarial Distillation, 2019, arXiv 1912.11006.

    Differences from the paper: what it reports is the best accuracy on the test set; here a validation split chooses the best
    weights, if there is one, and the last ones are measured beside them.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        criterion: Criterion = "l1",
        log_form: bool = False,
        adversarial: float = 1.0,
        onehot: float = 0.0,
        balance: float = 0.0,
        statistics: float = 0.0,
        activation: float = 0.0,
        student_steps: int = 5,
        student_mode: Mode = "train",
        shared: bool = False,
        replay: float = 0.0,
        pool: int = 2048,
        images: Images = "generated",
        generator: Made = "upsampling",
        latent: int = 256,
        width: int = 64,
        head: Head | None = None,
        generator_lr: float = 1e-3,
        generator_betas: tuple[float, float] = (0.9, 0.999),
        mean: Scale = None,
        std: Scale = None,
        image_shape: ImageShape | None = None,
    ) -> None:
        game = Game(
            criterion=criterion, log_form=log_form, adversarial=adversarial, onehot=onehot, balance=balance, statistics=statistics,
            activation=activation, student_steps=student_steps, student_mode=student_mode, shared=shared, replay=replay, pool=pool,
        )  # fmt: skip
        source = Source(
            images=images, generator=generator, latent=latent, width=width, head=head, lr=generator_lr, betas=generator_betas,
            mean=mean, std=std, image_shape=image_shape,
        )  # fmt: skip
        super().__init__(student, teacher, game=game, source=source)
