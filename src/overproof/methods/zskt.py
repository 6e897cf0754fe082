"""Zero-shot knowledge transfer by adversarial belief matching."""

from __future__ import annotations

from torch import nn

from overproof.methods.data_free import DataFree
from overproof.methods.data_free_parts import Game, Made, Mode, Scale, Source
from overproof.methods.feature_probe import ImageShape


class ZSKT(DataFree):
    """The generator looks for images on which the predictions of student and teacher differ; there the student imitates them.

    min_S max_G E_z KL(softmax(T(G(z))) || softmax(S(G(z)))), z ~ N(0, I), at temperature 1

    Args:
        student, teacher: images -> logits (N, K); the teacher is frozen.
        student_steps, student_mode, shared, replay: see `Game`.
        generator, latent, width, mean, std, image_shape: see `Source`.
        generator_lr: of the generator's Adam.

    Raises:
        UsageError: values out of range, or an image that the generator cannot make.

    Reference: Micaelli, Storkey: Zero-shot Knowledge Transfer via Adversarial Belief Matching, NeurIPS 2019, arXiv 1905.09768.

    Differences from the paper: without its attention term, which asks for features of equal sizes: what is here works for any two
    networks.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        student_steps: int = 10,
        student_mode: Mode = "train",
        shared: bool = False,
        replay: float = 0.0,
        generator: Made = "upsampling",
        latent: int = 100,
        width: int = 64,
        generator_lr: float = 1e-3,
        mean: Scale = None,
        std: Scale = None,
        image_shape: ImageShape | None = None,
    ) -> None:
        game = Game(criterion="kl", student_steps=student_steps, student_mode=student_mode, shared=shared, replay=replay)
        source = Source(
            generator=generator, latent=latent, width=width, lr=generator_lr, mean=mean, std=std, image_shape=image_shape
        )
        super().__init__(student, teacher, game=game, source=source)
