"""Layers that bring a student's feature into the teacher's shape; they are trained with the student and thrown away."""

from __future__ import annotations

from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.methods.feature_probe import Place


def size_matching_conv(place: Place) -> nn.Module:
    """The convolution from the student's map to the teacher's: 3x3 with stride 2 (twice the size), 4x4 transposed with stride 2
    (half), else without padding and just as large as the sizes differ (1x1 if they agree).

    Raises:
        UsageError: the teacher's map is larger by another factor than two, or no maps are compared.
    """
    if len(place.student_shape) != 3 or len(place.teacher_shape) != 3:
        raise UsageError(f"A regressor needs maps (C, H, W), not {place}.")
    (inputs, *ours), (outputs, *theirs) = place.student_shape, place.teacher_shape
    if ours == [2 * side for side in theirs]:
        return nn.Conv2d(inputs, outputs, 3, stride=2, padding=1)
    if theirs == [2 * side for side in ours]:
        return nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)
    kernel = [1 + a - b for a, b in zip(ours, theirs, strict=True)]
    if min(kernel) < 1:
        raise UsageError(
            f"No regressor leads from {place}: the teacher's map must not be larger, unless it is exactly twice as large. Name "
            "layers of nearer sizes with student_layers and teacher_layers; at and reviewkd take any sizes."
        )
    return nn.Conv2d(inputs, outputs, (kernel[0], kernel[1]))


class Regressor(nn.Sequential):
    """Size-matching convolution, normalisation and ReLU; then `depth - 1` times a 3x3 convolution, normalisation and ReLU.

    The last ReLU is left out where the teacher's feature has negative values, which it could never reach. A plain regressor has convolutions
    alone.

    Args:
        place: the shapes, found by a dry forward.
        depth: convolutions, at least 1.
        plain: without normalisation and ReLU.
    """

    def __init__(self, place: Place, *, depth: int = 1, plain: bool = False) -> None:
        super().__init__()
        if depth < 1:
            raise UsageError(f"A regressor needs at least one convolution, not depth={depth}.")
        channels = place.teacher_shape[0]
        for i in range(depth):
            self.append(size_matching_conv(place) if i == 0 else nn.Conv2d(channels, channels, 3, padding=1))
            if not plain:
                self.append(nn.BatchNorm2d(channels))
                self.append(nn.ReLU())
        if place.signed and not plain:
            self.pop(-1)

    def forward(self, feature: Tensor) -> Tensor:
        """(N, *student_shape) -> (N, *teacher_shape).

        Raises:
            UsageError: the feature has another shape than the dry forward found.
        """
        try:
            mapped: Tensor = super().forward(feature)  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            raise UsageError(
                f"The regressor does not take features of shape {tuple(feature.shape[1:])} ({error}). It was built for another image "
                "size: give image_shape=(channels, height, width) of the training images."
            ) from error
        return mapped
