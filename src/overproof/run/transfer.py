"""A network that begins as another run's, under a new last layer."""

from __future__ import annotations

from torch import nn

from overproof.config import ModelConfig, RunConfig, resolve
from overproof.errors import UsageError
from overproof.folder import RunFolder
from overproof.models.heads import with_new_head
from overproof.models.weights import load_model


def named_by_run(config: RunConfig) -> RunConfig:
    """The configuration with name and options of the model as the run says from which it is taken, if it is.

    Raises:
        UsageError: the model is to begin with other weights too.
    """
    model = config.model
    if not model.run:
        return config
    if model.pretrained or model.weights:
        raise UsageError(f"[model] run={model.run} brings its own weights; leave out `pretrained` and `weights`.")
    if not RunFolder(model.run).exists:
        return config  # said when it is needed: the run may be still to come
    known = resolve(RunFolder(model.run).config).model
    taken = ModelConfig(**{**known.options, "name": known.name, "run": model.run, "which": model.which})
    return config.model_copy(update={"model": taken})


def transferred(model: ModelConfig, classes: int, *, source: nn.Module | None = None, trusted: bool = False) -> nn.Module:
    """The network of the run that `model` names, or a copy of `source`, with a new last layer for `classes` classes.

    Raises:
        FolderError: no such run, or weights that do not fit.
        UsageError: nobody knows how many classes there are.
    """
    if classes < 1:
        raise UsageError(
            "How many classes these data have is not known, and the new last layer has to know: give an ImageSet(images, labels, "
            "classes=...), a pair of tensors, or Splits."
        )
    if source is None:
        source = load_model(RunFolder(str(model.run)).require().path, model.which or "best", trusted=trusted)
    return with_new_head(source, classes)
