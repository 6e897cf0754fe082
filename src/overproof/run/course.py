"""What [evolution] of a configuration says: the evolution itself, its networks, its length and its tests."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

from overproof.config import RunConfig
from overproof.data import DATA, build_augment
from overproof.data.modifiers import split_name
from overproof.data.toys import TOYS
from overproof.errors import UnknownNameError, UsageError
from overproof.evolution import EVOLUTIONS
from overproof.evolution.settings import CEGAN
from overproof.models.generators import GENERATORS, Law
from overproof.registry import Entry

LOOKS = 20
ON_THE_PLANE: dict[str, Any] = {
    "generator": "mlp", "critic": "mlp_critic", "latent": 2, "law": "normal", "width": 512, "he": True,
    "batch_size": 64, "discriminator_steps": 1, "gradient_penalty": 0.0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Course:
    """How an evolution is run.

    Args:
        generations: in all, at least 1.
        test_every: generations between looks at samples; 0: twenty looks in all.
        test_samples: samples that are looked at, beside at most as many real images or points; at least 2.
        generator: transposed, dcgan, upsampling, mlp.
        latent: length of the noise.
        law: of the noise, uniform on [-1, 1] or normal.
        width: of the generator's last feature map, or of the layers of an mlp.
        critic: critic (convolutions) or mlp_critic.
        critic_width: of its first feature map or of its layers; the generator's if None.
        he: linear layers of an mlp begin with He's normal law and no bias, not with torch's start; the plane's default.
        features: which the Fréchet distance compares: those of the "judge", if there is one, or of "inception".
    """

    generations: int = 2000
    test_every: int = 0
    test_samples: int = 2000
    generator: str = "transposed"
    latent: int = 100
    law: Law = "uniform"
    width: int = 128
    critic: Literal["critic", "mlp_critic"] = "critic"
    critic_width: int | None = None
    he: bool = False
    features: Literal["judge", "inception"] = "judge"

    def __post_init__(self) -> None:
        least = {"generations": 1, "test_every": 0, "test_samples": 2, "latent": 1, "width": 1}
        for name, lowest in least.items():
            if getattr(self, name) < lowest:
                raise UsageError(f"evolution.{name}={getattr(self, name)} must be at least {lowest}.")
        if self.critic_width is not None and self.critic_width < 1:
            raise UsageError(f"evolution.critic_width={self.critic_width} must be at least 1.")
        if self.generator not in GENERATORS:
            raise UnknownNameError("generator", self.generator, GENERATORS)

    @property
    def between(self) -> int:
        """Generations between looks."""
        return self.test_every or max(self.generations // LOOKS, 1)


def planned(config: RunConfig) -> tuple[Course, CEGAN, str]:
    """The course, the evolution and its name that a configuration stands for.

    On the plane the defaults are those of the authors' toy experiments, for images those of their script for 32x32.

    Raises:
        UsageError: an unknown key, or a value that does not fit.
    """
    given = dict(config.evolution or {})
    name = str(given.pop("name", "cegan"))
    entry, course = EVOLUTIONS.get(name), Entry("course", Course)
    of_course, of_entry = course.options(), entry.options()
    for key in given:
        if key not in of_course and key not in of_entry:
            raise UnknownNameError(f"key of [evolution] for {name!r}:", key, {*of_course, *of_entry, "name"})
    if config.data.name in TOYS:
        weakest = dict(ON_THE_PLANE)
        if given.get("discriminator_loss") == "wgan":
            del weakest["gradient_penalty"]
        given = {**weakest, **given}
    parts = [{key: value for key, value in given.items() if key in known} for known in (of_course, of_entry)]
    settings: CEGAN = entry.load()(**entry.check(parts[1], "evolution"))
    return Course(**course.check(parts[0], "evolution")), settings, name


def checked_evolution(config: RunConfig) -> RunConfig:
    """The configuration with every option of its evolution written out, checked before anything is built or written.

    Raises:
        UsageError: an unknown name or option, a verb that does not evolve, or what points of the plane cannot have.
    """
    if config.verb != "evolve":
        raise UsageError(f"[evolution] belongs to verb = 'evolve', not to {config.verb!r}; use `overproof evolve`.")
    course, settings, name = planned(config)
    if config.data.name in TOYS:
        if config.judge is not None or course.features == "inception":
            raise UsageError(
                f"{config.data.name} are points of the plane: there is nothing for a judge or Inception to look at."
            )
        if course.generator != "mlp" or course.critic != "mlp_critic":
            raise UsageError(
                f"{config.data.name} are points of the plane: only the generator mlp and the critic mlp_critic fit."
            )
        if config.data.augment:
            raise UsageError(
                f"data.augment={config.data.augment} is for images, and {config.data.name} are points of the plane."
            )
    elif split_name(config.data.name)[0].partition(":")[0] not in DATA and not config.data.name.startswith("("):
        raise UnknownNameError("data", config.data.name, {*DATA.names(), *TOYS})
    build_augment(config.data.augment, classes=2)
    if any(text.startswith(("mixup", "cutmix")) for text in config.data.augment):
        raise UsageError(
            f"data.augment={config.data.augment}: a generator would learn to make mixed images; leave mixup and cutmix out."
        )
    return config.model_copy(update={"evolution": {"name": name, **asdict(course), **asdict(settings)}})
