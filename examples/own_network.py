"""Distil a torchvision ResNet-18 into a network of your own, from tensors in memory, and attack the result.

    python examples/own_network.py

The images are scikit-learn's real digits, enlarged to 32x32 colour; put your own tensors in their place.
"""

from __future__ import annotations

import torchvision
from torch import nn

import overproof


def pictures(part: overproof.ImageSet) -> tuple:
    """Digits as 32x32 colour images in [0, 1]."""
    images = nn.functional.interpolate(part.images / 255, size=32, mode="bilinear")
    return images.expand(-1, 3, -1, -1).contiguous(), part.labels


def main() -> None:
    """Train the teacher, distil, evaluate."""
    digits = overproof.load_data("digits")
    train, validation, test = (pictures(part) for part in (digits.train, digits.validation, digits.test))

    network = torchvision.models.resnet18(num_classes=10)
    teacher = overproof.Classifier(network, mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
    overproof.train(teacher, train, validation_data=validation, epochs=4, optimizer="adamw", lr=1e-3)

    student = nn.Sequential(
        nn.Conv2d(3, 16, 5, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 5, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 25, 10),
    )
    run = overproof.distill(
        student, teacher, train, validation_data=validation, method="kd", epochs=15, lr=0.02, temperature=4.0
    )
    print(overproof.evaluate(run.model, test, attacks={"pgd": overproof.PGD(eps=8 / 255)}, teacher=teacher))


if __name__ == "__main__":
    main()
