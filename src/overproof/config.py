"""A run's typed configuration: read from TOML, overridden by name, checked once, written out resolved."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from overproof.errors import UnknownNameError, UsageError
from overproof.registry import convert

Radius = Annotated[
    float, BeforeValidator(lambda value: convert(value, float, "radius") if isinstance(value, str) else value), Field(ge=0)
]
Beta = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class _Open(_Section):
    """A section whose further keys are options of the named entry, checked against the registry."""

    model_config = ConfigDict(extra="allow", frozen=True, allow_inf_nan=False)

    @property
    def options(self) -> dict[str, Any]:
        """Keys beyond the declared ones."""
        return dict(self.__pydantic_extra__ or {})


class DataConfig(_Open):
    """[data] - further keys are options of the source."""

    name: str = "digits"
    root: str | None = None
    validation: float = Field(0.1, ge=0, lt=1, description="share of the training images held out, per class")
    validation_from: Literal["train", "test"] = Field("train", description="the part that this share is held out of")
    split_seed: int = Field(0, description="seed of the validation split; the same for every seed of the run")
    long_tail: float | None = Field(
        None, ge=1, description="thin the training images out: so many times more of the first class than of the last"
    )
    limit_train: int | None = Field(None, ge=1)
    limit_test: int | None = Field(None, ge=1)
    attribute: str | None = Field(None, description="subgroups of the images: a column of a table, or of attribute_file")
    attribute_file: str | None = Field(None, description="CSV file that knows the subgroup of every image")
    augment: list[str] = Field(default_factory=list, description='such as ["crop", "flip", "cutout:8"]')
    extra: str | None = Field(None, description="images of a generator that each batch is filled up with, such as parquet:DIR")
    extra_share: float = Field(0.7, gt=0, lt=1, description="their share of each batch, as robust models are trained with")
    extra_options: dict[str, Any] = Field(default_factory=dict, description="options of their source")


class ModelConfig(_Open):
    """[model] - further keys are options of the builder."""

    name: str = "resnet20"
    pretrained: bool = False
    weights: str | None = Field(None, description="safetensors file or state dict to begin with")
    run: str | None = Field(None, description="a run whose network is taken over, name and options too, under a new last layer")
    which: Literal["best", "last"] | None = Field(None, description="weights of that run; the best if not said")


class TeacherConfig(_Open):
    """[teacher] - a finished run, or a model with weights; [standard_teacher] - beside a robust one, for methods with two."""

    run: str | None = None
    which: Literal["best", "last"] = "best"
    name: str | None = None
    pretrained: bool = False
    weights: str | None = None


class MethodConfig(_Open):
    """[method] - further keys are the method's options. Several methods, as a list or "kd,crd", are composed."""

    name: str = "ce"

    @model_validator(mode="before")
    @classmethod
    def _several(cls, value: Any) -> Any:
        table = dict(value) if isinstance(value, dict) else {"name": value}
        name = table.get("name")
        names = [part.strip() for part in name.split(",")] if isinstance(name, str) else name
        if isinstance(names, list) and len(names) > 1:
            return {**table, "name": "composed", "methods": names}
        return {**table, "name": names[0]} if isinstance(names, list) and names else value


class TrainConfig(_Section):
    """[train] - how the objective is optimised."""

    epochs: int = Field(10, ge=1)
    batch_size: int = Field(128, ge=1, description="images per step and device")
    steps_per_epoch: int | None = Field(None, ge=1, description="for methods that train without data; 50 if not said")
    optimizer: Literal["sgd", "adam", "adamw", "rmsprop"] = "sgd"
    lr: float = Field(0.1, gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    betas: tuple[Beta, Beta] = Field((0.9, 0.999), description="of adam and adamw")
    weight_decay: float = Field(5e-4, ge=0)
    schedule: Literal["cosine", "multi-step", "one-cycle", "constant"] = "cosine"
    milestones: list[Share] = Field([0.5, 0.75], description="shares of the training after which lr is multiplied by gamma")
    gamma: float = Field(0.1, gt=0)
    warmup: float = Field(0.0, ge=0, description="epochs of linear warm-up")
    clip: float | None = Field(None, gt=0, description="largest norm of the gradient")
    averaging: Literal["none", "ema", "swa"] = "none"
    ema_decay: float = Field(0.999, ge=0, lt=1)
    swa_start: float = Field(0.75, ge=0, lt=1, description="share of the training after which weights are averaged")
    awp: float = Field(0.0, ge=0, lt=1, description="adversarial weight perturbation, a share of the weights; paper: 0.005")
    awp_warmup: int = Field(0, ge=0, description="epochs before it begins")
    eps_warmup: float = Field(0.0, ge=0, description="epochs over which the radius of a robust method grows to its full size")
    precision: Literal["32", "bf16-mixed", "16-mixed"] = "32"
    compile: bool = False
    channels_last: bool = False
    accelerator: str = "auto"
    devices: int | str = 1
    nodes: int = Field(1, ge=1)
    strategy: Literal["auto", "ddp"] = "auto"
    workers: int = Field(2, ge=0, description="loader processes for data that do not fit into memory")
    cache_teacher: bool = Field(False, description="run the teacher once per image; only without augmentation")
    validation_limit: int = Field(1000, ge=0, description="validation images that are attacked each epoch; 0: all")
    validation_steps: int = Field(10, ge=1, description="PGD steps of the validation attack of robust methods")
    validation_eps: Radius = Field(0.0, description="radius of that attack, for any method; 0: the method's own, if it has one")
    select: Literal["auto", "clean", "robust"] = Field("auto", description="what the best weights are best in")
    patience: int = Field(0, ge=0, description="epochs without better weights after which training ends; 0: it goes on")
    collapse: Literal["warn", "stop"] = Field("warn", description="what to do when one-step training collapses")
    checkpoint_seconds: float = Field(60, ge=0, description="between checkpoints inside an epoch; each epoch ends with one")
    loggers: list[Literal["csv", "tensorboard", "wandb", "mlflow"]] = Field(default_factory=list)

    @field_validator("precision", mode="before")
    @classmethod
    def _number_or_name(cls, value: Any) -> Any:
        return str(value)


class EvaluationConfig(_Section):
    """[evaluation] - what is measured on the test set when training ends."""

    attacks: dict[str, dict[str, Any]] = Field(default_factory=dict, description="by name; key `attack` names the entry")
    curve: list[Radius] = Field(default_factory=list)
    batch_size: int = Field(256, ge=1)
    weights: list[Literal["best", "last"]] = Field(default=["best", "last"])
    fisher: bool | None = Field(None, description="measure flatness too; not said: for methods with a penalty on it")


class RunConfig(_Section):
    """Everything that defines a run."""

    verb: Literal["train", "distill", "evolve"] = "train"
    seed: int = Field(0, ge=0, lt=2**31)
    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    teacher: TeacherConfig | None = None
    standard_teacher: TeacherConfig | None = None
    method: MethodConfig = MethodConfig()
    train: TrainConfig = TrainConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    evolution: dict[str, Any] | None = Field(
        None, description="with verb evolve, for model, method and train; see run/course.py"
    )
    judge: TeacherConfig | None = Field(None, description="a classifier that names what generators make")

    def table(self) -> dict[str, Any]:
        """As plain values, for TOML."""
        unused = {"model", "method", "train", "evaluation"} if self.verb == "evolve" else None
        table: dict[str, Any] = _without_none(self.model_dump(mode="json", exclude=unused))
        return table


def _without_none(value: Any) -> Any:
    """TOML cannot say None: what is not there takes its default when it is read."""
    return {k: _without_none(v) for k, v in value.items() if v is not None} if isinstance(value, dict) else value


def resolve(*layers: Mapping[str, Any], overrides: Iterable[str] = ()) -> RunConfig:
    """Merge tables from weakest to strongest, apply "section.key=value" overrides, and check the result.

    Raises:
        UsageError: a key is unknown (the nearest is offered), or a value is out of range; names the key and the value.
    """
    table: dict[str, Any] = {}
    for layer in layers:
        table = merge(table, layer)
    for text in overrides:
        table = merge(table, parse_override(text))
    try:
        return RunConfig.model_validate(table)
    except ValidationError as error:
        raise _readable(error) from None


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid on `base`, table by table; other values replace."""
    merged = dict(base)
    for key, value in over.items():
        known = merged.get(key)
        merged[key] = merge(known, value) if isinstance(known, Mapping) and isinstance(value, Mapping) else value
    return merged


def parse_override(text: str) -> dict[str, Any]:
    """The table that "section.key=value" stands for; the value is read as TOML, else as text.

    Raises:
        UsageError: no "=" or no key.
    """
    path, equals, raw = text.partition("=")
    keys = [part.strip() for part in path.split(".")]
    if not equals or not all(keys):
        raise UsageError(f"--set {text!r}: write section.key=value, for example train.lr=0.05.")
    try:
        value: Any = tomllib.loads(f"v = {raw}")["v"]
    except tomllib.TOMLDecodeError:
        value = raw.strip()
    for key in reversed(keys):
        value = {key: value}
    table: dict[str, Any] = value
    return table


def _readable(error: ValidationError) -> UsageError:
    first = error.errors()[0]
    keys = [str(part) for part in first["loc"]]
    place = ".".join(keys)
    if first["type"] == "extra_forbidden":
        section = RunConfig
        for key in keys[:-1]:
            section = _section(section, key)
        return UnknownNameError(f"key {place!r} of the configuration:", keys[-1], section.model_fields)
    return UsageError(f"Configuration, {place} = {first['input']!r}: {first['msg'].lower()}.")


def _section(section: Any, key: str) -> Any:
    annotation = section.model_fields[key].annotation
    options = [a for a in (annotation, *getattr(annotation, "__args__", ())) if isinstance(a, type)]
    return next((a for a in options if issubclass(a, BaseModel)), section)


def read_config(path: str | Path) -> dict[str, Any]:
    """A TOML table from disk."""
    from overproof.folder import read_toml

    return read_toml(Path(path))
