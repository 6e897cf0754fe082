"""SoKD's detector of distinctive areas: one head looks at both networks and says where both have something to say."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof.errors import UsageError

Overlap = Literal["sum", "square", "union"]
TIE = 1e-6  # differences of heat, which lies in [0.5, 1), below which cells are as good as each other


class AreaHead(nn.Module):
    """Three branches over a map (N, C, H, W), each 3x3 convolution, ReLU, 1x1 convolution, ReLU.

    Args:
        channels: C.
        kinds: channels of the heat map.
    """

    def __init__(self, channels: int, kinds: int) -> None:
        super().__init__()
        self.kinds = kinds
        self.first = nn.Conv2d(
            channels, 3 * channels, 3, padding=1
        )  # of all branches: one large convolution is faster than three
        self.last = nn.ModuleList(nn.Conv2d(channels, outputs, 1) for outputs in (kinds, 2, 2))

    def forward(self, feature: Tensor) -> Tensor:
        """(N, kinds + 4, H, W): heat in [0.5, 1), then width, height and the centre's offset (x, y) in cells, at least 0."""
        inside = self.first(feature).relu().chunk(3, dim=1)
        heat, size, offset = (last(part).relu() for last, part in zip(self.last, inside, strict=True))
        return torch.cat([heat.sigmoid(), size, offset], dim=1)

    @staticmethod
    def died(spread: float | None, weight: float) -> dict[str, str]:
        """What a person should know if the heat spreads so much over the cells (None: there is no head)."""
        if spread is None or spread >= TIE:
            return {}
        told = (
            f"sokd: the head that looks for areas has died (its heat spreads by {spread:.2g}), and its boxes lie at random. Its own term "
            f"asks for that: lower method.area_loss_weight (now {weight:g}; the authors' 1000 is meant for hundreds of epochs)."
        )
        return {"heat spread": told}


def find_boxes(areas: Tensor, count: int, *, smallest: float = 0.0, generator: torch.Generator | None = None) -> Tensor:
    """The corners of the `count` hottest boxes, (N, count, 4) as x1, y1, x2, y2: whole cells, ends included.

    Local maxima of the heat over 3x3 cells, the highest first; centre = cell + offset, corners = centre -+ size / 2, kept
    inside the map and truncated.

    Args:
        areas: what `AreaHead` says of the student, (N, kinds + 4, H, W).
        count: boxes P, at most H W.
        smallest: least width and height of a box, as a share of the map's.
        generator: by which cells of equal heat are drawn; None: as they come, which in a flat map are always the same few.
    """
    heat, (height, width) = areas[:, :-4], areas.shape[2:]
    peaks = (heat * (heat == F.max_pool2d(heat, 3, stride=1, padding=1))).flatten(1)
    if generator is not None:
        peaks = peaks + TIE * torch.rand(peaks.shape, generator=generator, device=peaks.device, dtype=peaks.dtype)
    cell = peaks.topk(count, dim=1).indices % (height * width)
    column, row = cell % width, cell // width
    there = areas[:, -4:].flatten(2).gather(2, cell[:, None].expand(-1, 4, -1))
    wide, high, dx, dy = there.unbind(dim=1)
    wide, high = wide.clamp_min(smallest * width), high.clamp_min(smallest * height)
    x, y = column + dx, row + dy
    corners = torch.stack([x - wide / 2, y - high / 2, x + wide / 2, y + high / 2], dim=2)
    limits = torch.tensor([width - 1, height - 1, width - 1, height - 1], device=areas.device, dtype=corners.dtype)
    return torch.minimum(corners.clamp_min(0), limits).long()


def box_shares(head: AreaHead, feature: Tensor, count: int, *, smallest: float = 0.0) -> Tensor:
    """The hottest boxes of a map, (N, count, 4) as x1, y1, x2, y2 in shares of its width and height, ends excluded."""
    boxes = find_boxes(head(feature).float(), count, smallest=smallest)
    height, width = feature.shape[2:]
    ends = torch.tensor([0, 0, 1, 1], device=boxes.device)
    return (boxes + ends) / torch.tensor([width, height, width, height], device=boxes.device)


def enough_cells(count: int, height: int, width: int) -> None:
    """Refuse more boxes than the map has cells.

    Raises:
        UsageError: more boxes than cells.
    """
    if count > height * width:
        raise UsageError(
            f"sokd: areas={count} boxes do not fit into a map of {height} x {width} cells. Lower areas, or name larger layers "
            "(base_options or hint_options: student_layers, teacher_layers)."
        )


def count_boxes(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """How many boxes cover each cell, (N, 1, H, W); boxes (N, P, 4) as `find_boxes` gives them."""
    rows, columns = (torch.arange(side, device=boxes.device) for side in size)
    x1, y1, x2, y2 = boxes[..., None].unbind(dim=2)
    inside_x = (columns >= x1) & (columns <= x2)
    inside_y = (rows >= y1) & (rows <= y2)
    return (inside_y[:, :, :, None] & inside_x[:, :, None, :]).sum(dim=1, keepdim=True)


def cell_weights(counts: Tensor, overlap: Overlap) -> Tensor:
    """Weights of the squared difference: n (the paper's sum over boxes), n^2 (the authors' code) or min(n, 1)."""
    return counts if overlap == "sum" else counts.square() if overlap == "square" else counts.clamp_max(1)
