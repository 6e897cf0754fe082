"""Which weights are the best, when training has gone on for long enough, and the alarm of one-step training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from overproof.config import TrainConfig
from overproof.errors import UsageError

FALL, POINTS, STAYS = 0.5, 0.1, 0.8  # of the robust accuracy at its peak, absolute, and of the one-step accuracy then
GAP, SHARE = 0.5, 0.2  # between the two accuracies, and of the one in the other, where there never was a peak


class Selection:
    """Looks at what validation finds, epoch by epoch; never at the test set.

    Args:
        config: `select`, `patience` and `collapse` of [train].
        validated: whether there is a validation split.

    Attributes:
        best: epoch, measure and value of the best epoch so far; empty before the first.
        peak: epoch, robust and one-step accuracy of the most robust epoch of a one-step method; "collapsed": when it fell.

    Raises:
        UsageError: a choice that needs a validation split where there is none.
    """

    def __init__(self, config: TrainConfig, *, validated: bool) -> None:
        if not validated and (config.patience or config.select != "auto" or config.collapse == "stop"):
            raise UsageError(
                f"train.select={config.select!r}, train.patience={config.patience} and train.collapse={config.collapse!r} look at a "
                "validation split, and there is none: hold one out with data.validation=0.1 (in Python: validation_data)."
            )
        self.config = config
        self.best: dict[str, Any] = {}
        self.peak: dict[str, Any] = {}

    def better(self, epoch: int, found: Mapping[str, float]) -> bool:
        """Take in what validation `found` in `epoch`; whether its weights are the best so far."""
        measure = self.config.select
        if measure == "auto":
            measure = "robust" if "robust" in found else "clean"
        if found and self.best and found[measure] <= self.best["value"]:
            return False
        self.best = {"epoch": epoch, "measure": measure, "value": found.get(measure, 0.0)}
        return True

    def alarm(self, epoch: int, found: Mapping[str, float]) -> str:
        """What to say if one-step training has collapsed in `epoch` (catastrophic overfitting), and was well before; else ""."""
        if "one-step" not in found:
            return ""
        now = {"robust": found["robust"], "one-step": found["one-step"]}
        if not collapsed(self.peak, now):
            if now["robust"] >= self.peak.get("robust", 0.0):
                self.peak = {"epoch": epoch, **now}
            self.peak.pop("collapsed", None)
            return ""
        if "collapsed" in self.peak:
            return ""
        before = {"epoch": 0, "robust": 0.0, "one-step": 0.0, **self.peak}
        self.peak = {**before, "collapsed": epoch}
        return _words(epoch, before, now, stops=self.config.collapse == "stop")

    def reason(self, epoch: int) -> str:
        """Why training should end after `epoch`; "" if it should go on."""
        patience, best = self.config.patience, self.best
        if self.config.collapse == "stop" and "collapsed" in self.peak:
            return f"one-step training collapsed in epoch {self.peak['collapsed'] + 1}"
        if patience and best and epoch - best["epoch"] >= patience:
            return (
                f"for {patience} epoch(s) no better {best['measure']} accuracy on the validation split than {best['value']:.3f} in "
                f"epoch {best['epoch'] + 1}"
            )
        return ""


def collapsed(peak: Mapping[str, float], now: Mapping[str, float]) -> bool:
    """Whether a model holds against one step and no more, though it once did: or never did, as after a collapse in the first epoch.

    Both accuracies fall together when a model is merely undone, and the robust one a little when it overfits: neither is meant.
    """
    robust, step = now["robust"], now["one-step"]
    if robust <= SHARE * step and step - robust >= GAP:
        return True
    fallen = peak.get("robust", 0.0) - robust
    return bool(peak) and robust <= FALL * peak["robust"] and fallen >= POINTS and step >= STAYS * peak["one-step"]


def _words(epoch: int, before: Mapping[str, Any], now: Mapping[str, float], *, stops: bool) -> str:
    known = before["robust"] > now["robust"]
    fell = f"fell from {before['robust']:.3f} in epoch {before['epoch'] + 1} to" if known else "is only"
    was = f" ({before['one-step']:.3f} then)" if known else ""
    return (
        f"catastrophic overfitting in epoch {epoch + 1}: the validation accuracy under PGD {fell} {now['robust']:.3f}, while under the "
        f"one step of the training it is {now['one-step']:.3f}{was}. The model has learned to fool that step and nothing else. "
        f"{'Training ends here.' if stops else 'Training goes on; train.collapse=stop would end it here.'} The best weights so far are "
        "in weights/best.safetensors, the whole state in checkpoint.pt. Begin again with method.steps=2 or more, a smaller "
        "method.step_size, or train.eps_warmup."
    )
