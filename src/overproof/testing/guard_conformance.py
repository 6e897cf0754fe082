"""The public conformance suite of guards."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from overproof.attacks.base import predictions
from overproof.attacks.randomness import Streams
from overproof.errors import UsageError
from overproof.folder import plain
from overproof.guards.base import Answer, Guard, Judgement
from overproof.guards.guarded import Guarded
from overproof.testing.conformance import CLASSES, _assert_same, _state, small_batch, small_model

IMAGES = 160


def check_guard(build: Callable[[], Guard]) -> None:
    """Assert the contract of a guard.

    It refuses to work before it is fitted. Fitting and asking leave the model's tensors, modes, gradients and flags as they
    were, whatever mode it is in. The same data and seed give the same guard, and the same streams the same answer; a batch
    gives what its images give one by one. Options, findings and tensors go through JSON and safetensors and come back the same;
    another model is refused; `describe` is JSON-able; `Guarded` gives a verdict.

    Args:
        build: makes the guard, not fitted yet, such as the class itself.

    Raises:
        AssertionError: names what was broken.
    """
    model, images, labels = _setting()
    guard = build()
    _assert_refused(lambda: guard(model, images[:1]), "a guard that is not fitted answered")
    model.train()
    model[1].eval()  # type: ignore[index]
    before, pixels = _state(model), images.clone()
    torch.manual_seed(0)
    assert guard.fit(model, images, labels) is guard, "fit does not return the guard"
    guard.tune(model, *_others(model))
    answer = _tensors(guard(model, images[:5], _streams(5)), 5)
    _assert_as_before(before, model)
    assert torch.equal(pixels, images), "the guard changed the images"
    assert guard.fitted, "a fitted guard does not know it"
    json.dumps(plain(guard.describe()))
    for name, value in _tensors(guard(model, images[:5], _streams(5)), 5).items():
        assert torch.equal(value, answer[name]), f"the same streams gave another {name!r}"
    _assert_alone(guard, model, images, answer)
    _assert_repeats(build, guard, model, (images, labels))
    _assert_restored(guard, model, images, answer)
    _assert_guarded(guard, model, images)


def _setting() -> tuple[nn.Module, Tensor, Tensor]:
    """In double precision, as batches of other sizes round differently; all classes occur, and their boundaries are near."""
    model = small_model(3).double().eval()
    images = small_batch(IMAGES, seed=4).images.double()
    with torch.no_grad():
        model[-1].bias -= model(images).mean(dim=0)  # type: ignore[index]
    return model, images, predictions(model, images)


def _others(model: nn.Module) -> tuple[Tensor, Tensor]:
    images = small_batch(40, seed=5).images.double()
    return images, predictions(model, images)


def _streams(count: int) -> Streams:
    return Streams.named(torch.arange(count), "check")


def _tensors(result: Any, count: int) -> dict[str, Tensor]:
    """Everything in a guard's answer, checked for its shape."""
    if isinstance(result, Tensor):
        found = {"images": result}
    elif isinstance(result, Answer):
        assert result.logits.shape == (count, CLASSES), f"logits have shape {tuple(result.logits.shape)}"
        found = {"logits": result.logits, **result.parts}
    else:
        assert isinstance(result, Judgement), f"a guard gave {type(result).__name__}"
        assert result.score.shape == result.rejected.shape == (count,), "score and rejected are not a number per image"
        assert result.rejected.dtype == torch.bool, "rejected is not boolean"
        found = {"score": result.score, "rejected": result.rejected, **result.parts}
    for name, value in found.items():
        assert len(value) == count, f"{name!r} has {len(value)} rows for {count} images"
        assert not bool(value.isnan().any()), f"{name!r} holds NaN"
    return {name: value.detach() for name, value in found.items()}


def _assert_as_before(before: Mapping[str, Any], model: nn.Module) -> None:
    # A guard may keep an idle hook on the layers that it reads.
    _assert_same({**before, "hooks": _state(model)["hooks"]}, model, "the guard")


def _assert_refused(call: Callable[[], Any], what: str) -> None:
    try:
        call()
    except UsageError:
        return
    raise AssertionError(what)


def _assert_alone(guard: Guard, model: nn.Module, images: Tensor, answer: Mapping[str, Tensor]) -> None:
    streams = _streams(5)
    for row in range(5):
        alone = _tensors(guard(model, images[row : row + 1], streams.rows(torch.tensor([row]))), 1)
        for name, value in alone.items():
            assert torch.allclose(value, answer[name][row : row + 1], atol=1e-8), f"{name!r} of an image depends on its batch"


def _assert_repeats(build: Callable[[], Guard], guard: Guard, model: nn.Module, data: tuple[Tensor, Tensor]) -> None:
    again = build()
    torch.manual_seed(0)
    again.fit(model, *data)
    again.tune(model, *_others(model))
    for name, value in again.state().items():
        assert torch.equal(value, guard.state()[name]), f"fitting again gave another {name!r}"
    assert again.facts == guard.facts, "fitting again found other facts"


def _assert_restored(guard: Guard, model: nn.Module, images: Tensor, answer: Mapping[str, Tensor]) -> None:
    options, facts = (json.loads(json.dumps(value, allow_nan=False)) for value in (guard.options(), guard.facts))
    tensors = load(save({name: value.contiguous().clone() for name, value in guard.state().items()}))
    other = type(guard)(**{key: tuple(value) if isinstance(value, list) else value for key, value in options.items()})
    other.restore(tensors, facts)
    for name, value in _tensors(other(model, images[:5], _streams(5)), 5).items():
        assert torch.equal(value, answer[name]), f"restored, it gives another {name!r}"
    _assert_refused(lambda: other.check(small_model(8).double()), "another model was taken for the one it was fitted for")
    moved = other.to("cpu")
    assert moved is other, "the guard cannot be moved"


def _assert_guarded(guard: Guard, model: nn.Module, images: Tensor) -> None:
    verdict = Guarded(model.eval(), **{guard.place: guard})(images[:4], _streams(4))
    assert verdict.probabilities.shape == (4, CLASSES), "a verdict has other probabilities"
    assert torch.allclose(verdict.probabilities.sum(dim=1), torch.ones(4, dtype=images.dtype)), (
        "probabilities do not add up to 1"
    )
    assert verdict.rejected.shape == verdict.score.shape == (4,), "a verdict is not a row per image"
