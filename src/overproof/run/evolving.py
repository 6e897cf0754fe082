"""evolve: a population of generators learns to make images like those of a set, and the run is kept."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from overproof.config import RunConfig, resolve
from overproof.data import ImageSet, Splits, build_augment, make_loader
from overproof.data.loaders import brings_batches
from overproof.data.order import generator_for
from overproof.data.toys import TOYS, Toy
from overproof.errors import UsageError
from overproof.evaluation.generative import need_inception
from overproof.evolution.population import Evolution
from overproof.features import penultimate
from overproof.folder import RunFolder, write_json, write_toml
from overproof.models.generators import critic, make_generator, mlp_critic
from overproof.models.sampling import load_generator
from overproof.networks import borrowed
from overproof.run.course import Course, checked_evolution, planned
from overproof.run.environment import claim, environment, free
from overproof.run.execute import Run, holding
from overproof.run.looking import Looker
from overproof.run.prepare import USER, data_of
from overproof.run.teachers import make_teacher
from overproof.training.evolving import Evolver

CRITICS = {"critic": critic, "mlp_critic": mlp_critic}


def evolve(
    data: Any,
    *,
    name: str = "cegan",
    judge: nn.Module | str | Path | None = None,
    out: str | Path | None = None,
    data_options: Mapping[str, Any] | None = None,
    seed: int = 0,
    resume: bool = False,
    **options: Any,
) -> Run:
    """Let a population of generators learn to make what `data` are, and keep the run.

    Args:
        data: a registered name, 8-gaussians, 25-gaussians, swiss-roll, `Splits`, `ImageSet`, a Dataset of (image, label), a pair of
            tensors, or images (N, C, H, W) in [0, 1].
        name: cegan, egan, iegan, gan.
        judge: a classifier of such images, or its run folder: what classes do the samples show?
        out: run folder; the next free `runs/NAME-n` if None.
        data_options: options of a registered set.
        seed: of everything.
        resume: continue the run in `out`.
        **options: of the evolution (mutations, fitness, ...) and of its course (generations, generator, latent, ...).

    Returns:
        The finished run; its `model` is the generator, noise (N, d) -> images.

    Raises:
        UsageError: an unknown option, name or combination.
    """
    own = not isinstance(data, str)
    layer: dict[str, Any] = {"verb": "evolve", "seed": seed, "evolution": {"name": name, **options}}
    layer["data"] = {"name": USER if own else data, **(data_options or {})}
    if judge is not None:
        layer["judge"] = {"name": USER} if isinstance(judge, nn.Module) else {"run": str(judge)}
    module = judge if isinstance(judge, nn.Module) else None
    given = _images(data) if own else None
    return execute_evolution(resolve(layer), out or free(name, resume=resume), data=given, judge=module, resume=resume)


def execute_evolution(
    config: RunConfig,
    out: str | Path,
    *,
    data: Any = None,
    judge: nn.Module | None = None,
    resume: bool = False,
    deadline: float | None = None,
    trusted: bool = False,
) -> Run:
    """Evolve, keep, look at the result; see `execute`.

    Args:
        config: with verb = "evolve".
        out: run folder to be made, or with `resume` to be continued.
        data: images instead of those that the configuration names.
        judge: a classifier instead of the one that it names.
        resume: continue an unfinished run; a finished one is returned as it is.
        deadline: `time.monotonic()` at which to stop with a checkpoint.
        trusted: allow a judge's folder that names a package.module:callable to import and run it.
    """
    folder, config = RunFolder(out), checked_evolution(config)
    made = claim(folder, config, resume)
    if folder.exists and folder.status.get("state") == "done":
        return Run(folder, load_generator(folder.path), folder.evaluations)
    with holding(folder, made), borrowed(judge):
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        scene = _scene(config, data, judge, folder=folder, device=device, trusted=trusted)
        write_toml(folder.path / "config.toml", config.table())
        write_json(folder.path / "environment.json", environment(device))
        folder.write_status("running", message="")
        evolver = Evolver(
            scene.look.evolution, scene.reals, scene.look, folder=folder, seed=config.seed, deadline=deadline,
            generations=scene.course.generations, test_every=scene.course.between,
        )  # fmt: skip
        evolver.run()
        scene.look.finish(evolver.selected, evolver.warnings)
        folder.write_status("done", message="")
    return Run(folder, load_generator(folder.path), folder.evaluations)


@dataclass(frozen=True)
class _Points:
    """Points of the plane, drawn when they are needed."""

    toy: Toy
    count: int
    seed: int
    device: torch.device
    compared = "fresh points"

    def __call__(self, start: int) -> Iterator[Tensor]:
        for number in itertools.count(start):
            yield self.toy.draw(self.count, generator_for("real", self.seed, number)).to(self.device)

    def some(self, count: int) -> Tensor:
        """Points that no generation sees."""
        return self.toy.draw(count, generator_for("reference", self.seed))


@dataclass(frozen=True)
class _Images:
    """Images of a loader, in [-1, 1]."""

    loader: Any
    others: Any
    compared: str

    def __call__(self, start: int) -> Iterator[Tensor]:
        epoch, first = divmod(start, len(self.loader))
        while True:
            for batch in self.loader.batches(epoch, first):
                yield 2 * batch.images - 1
            epoch, first = epoch + 1, 0

    def some(self, count: int) -> Tensor:
        """Images in [0, 1] to compare samples with, at most `count`, always the same."""
        found: Tensor = next(iter(make_loader(self.others, count, shuffle=True).batches(0))).images
        return found


@dataclass(frozen=True)
class _Scene:
    """Everything that a run needs, built."""

    course: Course
    reals: _Points | _Images
    look: Looker


def _scene(
    config: RunConfig, data: Any, judge: nn.Module | None, *, folder: RunFolder, device: torch.device, trusted: bool
) -> _Scene:
    course, settings, _ = planned(config)
    toy = TOYS[config.data.name]() if data is None and config.data.name in TOYS else None
    splits = None if toy is not None else data if data is not None else data_of(config)
    reals = (
        _Points(toy, settings.real, config.seed, device) if toy is not None else _reals(config, splits, settings.real, device)
    )
    if course.features == "inception":
        need_inception("A Fréchet distance")
    real = reals.some(course.test_samples)
    shape = tuple(real.shape[1:])
    if judge is None and config.judge is not None:
        judge = make_teacher(config.judge, splits, trusted=trusted, place="judge")
    if judge is not None:
        _try_judge(judge.to(device), real[:2].to(device), features=course.features == "judge")
    torch.manual_seed(config.seed)
    how: dict[str, Any] = {"law": course.law, "width": course.width}
    if toy is None:
        how |= {"shift": 0.5, "scale": 0.5, "head": "tanh"}
    generators = [make_generator(course.generator, course.latent, shape, **how).to(device) for _ in range(settings.population)]
    opponent = CRITICS[course.critic](shape, width=course.critic_width or course.width).to(device)
    for network in (*generators, opponent) if course.he else ():
        _begin_as_he(network)
    evolution = Evolution(settings, [g.net for g in generators], opponent, draw=generators[0].draw)
    look = Looker(
        evolution, generators[0], folder.path, real, count=course.test_samples, generations=course.generations, toy=toy,
        judge=judge, inception=course.features == "inception", compared=reals.compared,
    )  # fmt: skip
    return _Scene(course, reals, look)


def _begin_as_he(network: nn.Module) -> None:
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)
            nn.init.zeros_(layer.bias)


def _reals(config: RunConfig, data: Any, count: int, device: torch.device) -> _Images:
    """Loader of the images of each generation, and the images that samples are compared with."""
    train, test = (data.train, data.test) if isinstance(data, Splits) else (data, data)
    test = train if test is None else test
    if brings_batches(train) or not hasattr(train, "__len__"):
        raise UsageError(
            f"The images come as a {type(train).__name__}, which brings batches of its own or has no length; a generation takes its own "
            "number of images, and a run must go on where it stopped. Give a Dataset, an ImageSet or a tensor."
        )
    if len(train) < count:
        raise UsageError(
            f"A generation takes {count} real images, and there are {len(train)}: lower evolution.batch_size, "
            "evolution.discriminator_steps or (with the fitness egan) evolution.evaluation_size."
        )
    classes = len(getattr(train, "classes", ()))
    augment = build_augment(config.data.augment, classes=max(classes, 2))
    how: dict[str, Any] = {"seed": config.seed, "augment": augment, "device": device}
    return _Images(
        make_loader(train, count, shuffle=True, drop_last=True, **how),
        test,
        f"{'training' if test is train else 'test'} images",
    )


@torch.no_grad()
def _try_judge(judge: nn.Module, images: Tensor, *, features: bool) -> None:
    try:
        shape = tuple(judge.eval()(images).shape)
    except (RuntimeError, ValueError) as error:
        raise UsageError(f"The judge cannot take images of shape {tuple(images.shape[1:])}: {error}") from error
    if len(shape) != 2 or shape[1] < 2:
        raise UsageError(f"The judge gives {shape} for two images; a classifier gives logits (2, K).")
    if features:
        penultimate(judge)  # or an error now, not after the last generation


def _images(data: Any) -> Any:
    """Images without labels become a set with a single label, and a pair of tensors a set."""
    if isinstance(data, tuple | list) and len(data) == 2 and all(isinstance(part, Tensor) for part in data):
        return ImageSet(*data)
    if isinstance(data, Tensor):
        return ImageSet(data, torch.zeros(len(data), dtype=torch.long), classes=1)
    return data
