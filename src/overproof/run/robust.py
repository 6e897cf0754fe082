"""What a configuration asks of robust training beyond its method: a generator's images, a radius that grows, a watch on flatness."""

from __future__ import annotations

from overproof.config import RunConfig
from overproof.data import DATA
from overproof.data.modifiers import split_name
from overproof.errors import UsageError
from overproof.methods import METHODS
from overproof.methods.objective import Objective
from overproof.methods.robust_objective import RobustObjective
from overproof.registry import Entry


def check_extra(config: RunConfig, *, named: bool) -> None:
    """Refuse extra data that cannot be served, before anything is built or written.

    Args:
        config: whose `data.extra` is checked.
        named: whether that is the name of a source, and not an object of the caller's.

    Raises:
        UsageError: no such source or option, or a cache that knows only the training images.
    """
    data = config.data
    if data.extra is None:
        return
    if config.train.cache_teacher:
        raise UsageError(
            "train.cache_teacher=true knows the teacher's logits on the training images only. Drop it, or data.extra."
        )
    if named:
        kind, _, place = split_name(data.extra)[0].partition(":")
        entry = DATA.get(kind)
        entry.check(data.extra_options, "data source")
        if entry.positional() and not place:
            raise UsageError(f"data.extra={data.extra!r} needs to be told where: {kind}:{entry.positional()[0].upper()}.")


def warm_up(objective: Objective, epochs: float) -> None:
    """Let the radius of every inner attack grow over `epochs`.

    Raises:
        UsageError: there is none.
    """
    robust = [part for part in objective.modules() if isinstance(part, RobustObjective)]
    if epochs and not robust:
        raise UsageError(
            f"train.eps_warmup={epochs:g}: {type(objective).__name__} attacks nothing while it trains, so no radius can grow. Drop it, or "
            "use a robust method (pgd-at, trades, ...)."
        )
    for part in robust:
        part.eps_warmup = epochs


def watched(config: RunConfig) -> bool:
    """Whether the evaluation measures flatness too: as the configuration says, else for methods with a penalty on it."""
    if config.evaluation.fisher is not None:
        return config.evaluation.fisher
    names = [config.method.name, *config.method.options.get("methods", ())]
    return any(name in METHODS and "penalty" in METHODS.get(name).tags for name in names)


def with_attack(config: RunConfig, entry: Entry) -> RunConfig:
    """The configuration with PGD-20 under the threat of a robust method, if its evaluation names no attack."""
    given = entry.check(config.method.options)
    if entry.name == "composed":  # the threat is that of its first robust part
        names, of_parts = given.get("methods", entry.options()["methods"].default), given.get("options") or {}
        robust = next((name for name in names if name in METHODS and "robust" in METHODS.get(name).tags), None)
        if robust is None:
            return config
        entry = METHODS.get(robust)
        given = entry.check(of_parts.get(robust, {}))
    options = {**{o.name: o.default for o in entry.options().values()}, **given}
    if "robust" not in entry.tags or config.evaluation.attacks or not {"eps", "norm"} <= set(options):
        return config
    attack = {"attack": "pgd", "steps": 20, "eps": options["eps"], "norm": options["norm"]}
    evaluation = config.evaluation.model_copy(update={"attacks": {"pgd-20": attack}})
    return config.model_copy(update={"evaluation": evaluation})
