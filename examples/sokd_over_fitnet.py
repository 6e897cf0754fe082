"""SoKD over FitNet between two networks of your own: any modules of images in [0, 1] -> logits, any data.

python examples/sokd_over_fitnet.py
"""

from __future__ import annotations

from torch import nn

import overproof


def network(width: int) -> nn.Module:
    """Yours goes here."""
    first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU())
    second = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.BatchNorm2d(2 * width), nn.ReLU())
    return nn.Sequential(first, second, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10))


if __name__ == "__main__":
    teacher, student = network(32), network(8)
    overproof.train(teacher, "digits", epochs=15, lr=0.05, batch_size=64)
    options = {"base": "fitnet", "base_weight": 0.1, "area_loss_weight": 1.0, "areas": 4, "search_epochs": 5}
    run = overproof.distill(student, teacher, "digits", method="sokd", epochs=15, lr=0.05, batch_size=64, **options)
    print(run.folder)
