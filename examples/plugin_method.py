"""A method in one file, as a plug-in.

    overproof train --data digits --model mlp --epochs 20 --lr 0.05 --out runs/plugin-teacher
    overproof distill --plugin examples/plugin_method.py --data digits --teacher runs/plugin-teacher --student mlp \\
        --method margin-kd --epochs 20 --lr 0.01 --set method.weight=0.01 --out runs/plugin-student
"""

from __future__ import annotations

from torch import Tensor, nn

from overproof import METHODS, Batch, Objective, Output, Progress
from overproof.losses.divergences import cross_entropy


def gap(logits: Tensor) -> Tensor:
    """Distance between the two largest logits, (N,)."""
    first, second = logits.topk(2, dim=1).values.unbind(dim=1)
    return first - second


@METHODS.register("margin-kd", tags=("distillation", "logits"))
class MarginKD(Objective):
    """The student imitates how sure the teacher is: the gap between its two largest logits.

    L = mean_n CE(y_n, S(x_n)) + weight mean_n (gap(S(x_n)) - gap(T(x_n)))^2
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, *, weight: float = 0.01) -> None:
        super().__init__(student, teacher)
        self.weight = weight

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's losses."""
        target, logits = self.teacher_logits(batch), self.student(batch.images)
        margin = (gap(logits) - gap(target)).square().mean()
        return Output({"ce": cross_entropy(logits, batch.labels).mean(), "margin": self.weight * margin}, logits)
