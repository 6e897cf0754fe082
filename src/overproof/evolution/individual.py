"""Generators as values: all weights in one row, and where their optimiser stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

Buffers = dict[str, Tensor]


@dataclass(frozen=True)
class Individual:
    """A generator of the population. Nothing in it is ever changed, so relatives share what they have in common.

    Args:
        weights: all parameters in a row (P,).
        moments: Adam's running means of the gradient and of its square, (P,) each; children inherit them.
        steps: optimiser steps taken.
        buffers: running statistics by name, if the network has any.
        origin: what made it: a mutation, "crossover" or "parent".
        score: fitness, comparable within one generation only.
        values: worth of each of its M images (M,), once evaluated.
        images: those images (M, ...), once evaluated.
    """

    weights: Tensor
    moments: tuple[Tensor, Tensor]
    steps: int = 0
    buffers: Buffers = field(default_factory=dict)
    origin: str = "parent"
    score: float = -math.inf
    values: Tensor | None = None
    images: Tensor | None = None

    def settled(self) -> Individual:
        """The same with storage of its own and without images: what lives on."""
        moments = (self.moments[0].clone(), self.moments[1].clone())
        return replace(self, weights=self.weights.clone(), moments=moments, values=None, images=None)


@dataclass(frozen=True)
class Adam:
    """Adam that changes nothing: new weights and moments come back, for several gradients at once.

    Args:
        lr: step size, above 0.
        betas: of the running means, each in [0, 1).
        eps: keeps the quotient finite.
    """

    lr: float = 1e-4
    betas: tuple[float, float] = (0.5, 0.999)
    eps: float = 1e-8

    def __call__(self, parent: Individual, gradients: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Weights and both moments (K, P) after one step from `parent` with each of the gradients (K, P)."""
        (beta1, beta2), time = self.betas, parent.steps + 1
        first = torch.lerp(parent.moments[0].expand_as(gradients), gradients, 1 - beta1)
        second = torch.addcmul(parent.moments[1] * beta2, gradients, gradients, value=1 - beta2)
        size = second.sqrt().div_(math.sqrt(1 - beta2**time)).add_(self.eps)
        return torch.addcdiv(parent.weights, first, size, value=-self.lr / (1 - beta1**time)), first, second


class Species:
    """What all individuals share: the structure of the network, and the optimiser.

    Args:
        network: noise (N, d) -> images; stays in train mode, its own weights are not used.
        adam: the optimiser.
    """

    def __init__(self, network: nn.Module, adam: Adam) -> None:
        self.network, self.adam = network.train(), adam
        self.names = [name for name, _ in network.named_parameters()]
        self.shapes = [parameter.shape for parameter in network.parameters()]
        self.sizes = [shape.numel() for shape in self.shapes]
        self.coupled = coupled(network)
        layers = list(network.children())
        inner = layers[:-1] if layers and isinstance(layers[-1], nn.Unflatten) else layers
        self.dense = isinstance(network, nn.Sequential) and len(layers) == len(network) and all(map(_is_dense, inner))

    def individual(self, network: nn.Module) -> Individual:
        """`network` as an individual, with a fresh optimiser."""
        weights = torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()])
        buffers = {name: buffer.detach().clone() for name, buffer in network.named_buffers()}
        return Individual(weights, (torch.zeros_like(weights), torch.zeros_like(weights)), buffers=buffers)

    def leaves(self, individual: Individual) -> list[Tensor]:
        """Its parameters in their shapes, for gradients."""
        parts = torch.split(individual.weights.detach(), self.sizes)
        return [part.view(shape).requires_grad_() for part, shape in zip(parts, self.shapes, strict=True)]

    def run(self, parameters: Sequence[Tensor], buffers: Buffers, noise: Tensor) -> tuple[Tensor, Buffers]:
        """Images (N, ...) of the noise (N, d), and the running statistics afterwards."""
        after = {name: buffer.clone() for name, buffer in buffers.items()}
        images: Tensor = functional_call(self.network, {**dict(zip(self.names, parameters, strict=True)), **after}, (noise,))
        return images, after

    @torch.no_grad()
    def images(self, individual: Individual, noise: Tensor) -> Individual:
        """The individual with its images of the noise."""
        made, buffers = self.run(self.leaves(individual), individual.buffers, noise)
        return replace(individual, images=made, buffers=buffers)

    @torch.no_grad()
    def all_images(self, individuals: Sequence[Individual], noise: Tensor) -> list[Individual]:
        """The individuals with their images of the same noise: in one go where small matrices would cost more to call than to multiply."""
        if len(individuals) < 2 or not self.dense:
            return [self.images(individual, noise) for individual in individuals]
        count, weights = len(individuals), torch.stack([individual.weights for individual in individuals])
        parts = iter(zip(torch.split(weights, self.sizes, dim=1), self.shapes, strict=True))
        made = noise.expand(count, *noise.shape)
        for layer in self.network.children():
            if isinstance(layer, nn.Linear):
                (matrices, shape), (biases, _) = next(parts), next(parts)
                made = torch.baddbmm(biases[:, None], made, matrices.view(count, *shape).mT)
            else:
                made = layer(made.flatten(0, 1)).unflatten(0, (count, len(noise)))
        return [replace(individual, images=images) for individual, images in zip(individuals, made, strict=True)]

    def children(self, parent: Individual, gradients: Tensor, origins: Sequence[str], buffers: Buffers) -> list[Individual]:
        """One optimiser step from `parent` with each of the gradients (K, P)."""
        rows = zip(*self.adam(parent, gradients), origins, strict=True)
        return [Individual(w, (first, second), parent.steps + 1, buffers, origin) for w, first, second, origin in rows]

    @torch.no_grad()
    def fill(self, individual: Individual) -> None:
        """Give the network itself the individual's weights."""
        for parameter, part in zip(self.network.parameters(), self.leaves(individual), strict=True):
            parameter.copy_(part)
        for name, buffer in self.network.named_buffers():
            buffer.copy_(individual.buffers[name])


def row(gradients: Sequence[Tensor]) -> Tensor:
    """Gradients of the parameters as one row (P,)."""
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def coupled(network: nn.Module) -> bool:
    """Whether, as it stands, what it gives for an image depends on the others of the batch: batch statistics, dropout."""
    return any(isinstance(part, _BatchNorm | _DropoutNd) and part.training for part in network.modules())


def per_sample(factors: Tensor, like: Tensor) -> Tensor:
    """Factors (N,) in a shape that multiplies `like` (N, ...)."""
    return factors.view(-1, *[1] * (like.dim() - 1))


def _is_dense(layer: nn.Module) -> bool:
    """Whether the layer is a matrix with a bias, or treats every image alone and has no weights."""
    if type(layer) is nn.Linear:  # parametrised ones, such as those of spectral_norm, have a class of their own
        return layer.bias is not None and set(dict(layer.named_parameters())) == {"weight", "bias"}
    return isinstance(layer, nn.ReLU | nn.LeakyReLU | nn.Tanh | nn.Sigmoid)
