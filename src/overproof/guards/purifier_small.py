"""A small convolutional purifier that imitates a large one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.guards.cache_build import for_model
from overproof.guards.purifier import NIMPurifier
from overproof.guards.purifier_base import Level, Purifier, checked, trained
from overproof.losses.denoising import NoiseLevels, add_noise


class Residual(nn.Module):
    """Convolutions that say what to take away from a noisy image; the level of the noise is a channel of its own.

    They work on squares of 2 x 2 pixels, at a quarter of the cost; images of odd size are padded by their edge.

    Args:
        channels: of the images.
        width: channels of the hidden layers, at least 1.
        depth: convolutions, at least 2.
    """

    def __init__(self, channels: int, *, width: int, depth: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs in (4 * channels + 1, *[width] * (depth - 2)):
            layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 4 * channels, 3, padding=1))

    def forward(self, noisy: Tensor, level: float | Tensor) -> Tensor:
        """Noisy images (N, C, H, W) and their level, a number or (N,), in grey levels -> images, not clamped."""
        height, width = noisy.shape[2:]
        squares = F.pixel_unshuffle(F.pad(noisy, (0, width % 2, 0, height % 2), mode="replicate"), 2)
        plane = torch.ones_like(squares[:, :1]) * (level.view(-1, 1, 1, 1) if isinstance(level, Tensor) else level) / 255
        noise = F.pixel_shuffle(self.layers(torch.cat([squares, plane], dim=1)), 2)
        return noisy - noise[:, :, :height, :width]


class SmallPurifier(Purifier):
    """Noise, then a few convolutions that have learned to rebuild images as `NIMPurifier` does, at a fraction of its multiplications.

    L = mean_n ||g(x_n + sigma_n / 255 z_n, sigma_n) - D(x_n, x_n + sigma_n / 255 z_n)||^2, sigma_n ~ U(0, high)

    It sees the noisy image alone: no statistics of the input pass beside the noise, whatever its teacher does.

    Args:
        sigma, draws: see `Purifier`.
        width, depth: channels of the hidden layers, at least 1, and convolutions, at least 2.
        high: largest level of the training, in grey levels, above 0; what the teacher was not trained for still counts as above.
        epochs, batch_size, lr, seed: of the imitation.

    Raises:
        UsageError: an option out of range.

    Reference: the teacher is of You, Liu, Han, Xu, NeurIPS 2023, arXiv 2302.01056; noise as a residual: Zhang et al., TIP 2017,
    arXiv 1608.03981; its level as a channel: Zhang, Zuo, Zhang, TIP 2018, arXiv 1710.04026 (there too on squares of pixels).

    Differences from the papers: the targets are the teacher's images; no normalisation layers.
    """

    network: nn.Module | None

    def __init__(
        self,
        *,
        sigma: Level = 70.0,
        draws: int = 1,
        width: int = 16,
        depth: int = 5,
        high: float = 150.0,
        epochs: int = 50,
        batch_size: int = 128,
        lr: float = 2e-3,
        seed: int = 0,
    ) -> None:
        super().__init__(sigma=sigma, draws=draws, epochs=epochs, batch_size=batch_size, lr=lr, seed=seed)
        if width < 1 or depth < 2 or not high > 0:
            raise UsageError(f"SmallPurifier(width={width}, depth={depth}, high={high}): at least 1, 2, and above 0.")
        self.width, self.depth, self.high = width, depth, high
        self.register_module("network", None)

    def fit(self, model: nn.Module, images: Tensor, labels: Tensor, *, teacher: NIMPurifier | None = None) -> Self:
        """Imitate the teacher on these images.

        Args:
            model: before which the purifier will stand; it is not asked.
            images: (N, C, H, W), floats in [0, 1] or uint8.
            labels: not needed.
            teacher: fitted, of images of this shape; None: one is fitted first, for as many epochs.

        Raises:
            UsageError: a teacher of other images, or a masked one.
            DataError: images that are none.
        """
        shape, like = checked(images, "purifier"), for_model(images[:1], model)
        guide = NIMPurifier(epochs=self.epochs, seed=self.seed).fit(model, images, labels) if teacher is None else teacher
        guide.require_fitted()
        if guide.facts["kind"] != "noise" or tuple(guide.facts["shape"]) != shape:
            raise UsageError(
                f"The teacher is a purifier of the kind {guide.facts['kind']!r} for images of shape {tuple(guide.facts['shape'])}; needed is "
                f"one that removes noise from images of shape {shape}."
            )
        self.build({"shape": list(shape)})
        network, levels = self._net, NoiseLevels(law="uniform", high=self.high)
        network.requires_grad_(True).to(like.device)

        def loss(batch: Tensor) -> Tensor:
            sigma = levels.draw(batch)
            spoiled = add_noise(batch, sigma, torch.randn_like(batch))
            with torch.no_grad():
                target = guide.cleaned(batch.to(like.dtype), spoiled.to(like.dtype), sigma).to(batch.dtype)
            found: Tensor = network(spoiled, sigma)
            return (found - target).square().mean()

        trained(network, images, loss, guard=self, device=like.device)
        network.to(like.dtype).requires_grad_(False)
        facts = {"kind": "noise", "high": min(self.high, guide.facts["high"]), "shape": list(shape)}
        about = {"teacher_stats": guide.facts["stats"], "teacher_parameters": guide.facts["parameters"]}
        return self.settle(model, images, {**facts, **about})

    def build(self, facts: Mapping[str, Any]) -> None:
        """The convolutions, freshly drawn from the seed."""
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(self.seed)
            self.network = Residual(int(facts["shape"][0]), width=self.width, depth=self.depth).requires_grad_(False).eval()

    def cleaned(self, images: Tensor, noisy: Tensor, level: float | Tensor) -> Tensor:
        """clamp(g(x~, sigma))."""
        found: Tensor = self._net(noisy, level)
        return found.clamp(0, 1)

    @property
    def _net(self) -> nn.Module:
        assert isinstance(self.network, nn.Module)
        return self.network
