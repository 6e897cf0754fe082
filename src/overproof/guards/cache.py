"""The cache: training images that look alike to the network take part in its answer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, Self, get_args

import torch
from torch import Tensor, nn

from overproof.attacks.randomness import Streams
from overproof.data import stratified_subset
from overproof.data.pixels import check_labels
from overproof.errors import UsageError
from overproof.guards.base import Answer
from overproof.guards.cache_build import Pictures, for_model, remember
from overproof.guards.cache_items import KeyType
from overproof.guards.cache_keys import choose_layers
from overproof.guards.cache_memory import CacheMemory
from overproof.guards.cache_tuning import LAMS, POOLED_THETAS, THETAS, best_of, grid_search
from overproof.guards.cache_votes import evidence_of_all, evidence_of_nearest, log_shares, sweep, sweep_nearest


class Cache(CacheMemory):
    """A classifier gets a memory; nothing is trained.

    p(c|x) = (1 - lam) p_net(c|x) + lam p_cache(c|x),  p_cache(c|x) ~ sum_{i: y_i = c} exp(theta k(x) . k_i)

    with k the features of a few layers, joined and scaled to length one, and (k_i, y_i) the training images. All in logarithms:
    nothing overflows, and an attack finds its gradient.

    Args:
        layers: tap names, the name of a published set ("resnet32", ...), or None for that of the architecture.
        theta: inverse temperature, at least 0; 0 gives the class frequencies, infinity the nearest neighbour.
        lam: share of the cache in [0, 1]; 1: the cache alone (theta 70 suits it), 0: the network alone.
        mirror: mirrored images are items too; not for digits and letters.
        pool: side to which feature maps are averaged, 1 for their mean; None keeps them. Wants a larger theta.
        separate: scale each layer to length one before they are joined.
        dtype: of the keys: "float32", "float16", "bfloat16", "int8" (one scale a key) or "float64".
        centres: items a class, found by k-means, each weighing as much as the images it stands for; None keeps all.
        limit: images, drawn at random with the classes in proportion; None takes all.
        top_k: only so many nearest items vote; None: all.
        index: "matrix" compares with every key; "faiss" asks an index of kind `index_kind` and needs top_k.
        index_kind: a FAISS factory string such as "Flat" or "IVF1024,PQ64".
        block: keys compared at a time; memory grows with it and not with the cache.
        gradient: False answers without a graph, for serving.
        seed: of the random subset and of k-means.

    Raises:
        UsageError: an option out of range.

    Reference: Orhan, NeurIPS 2018, arXiv 1805.08709; k-means: Orhan and Lake, arXiv 1906.08416.

    Differences from the paper: sums are taken in logarithms; `separate`, `dtype`, `centres`, `top_k` and `index` are additions;
    ResNet-56 is read after the inner activations, not before their normalisation; images are tuned on as they are, without
    their mirror images; `limit` keeps the classes in proportion.
    """

    def __init__(
        self,
        *,
        layers: str | tuple[str, ...] | None = None,
        theta: float = 80.0,
        lam: float = 0.5,
        mirror: bool = True,
        pool: int | None = None,
        separate: bool = False,
        dtype: KeyType = "float32",
        centres: int | None = None,
        limit: int | None = None,
        top_k: int | None = None,
        index: Literal["matrix", "faiss"] = "matrix",
        index_kind: str = "Flat",
        block: int = 1024,
        gradient: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.layers, self.theta, self.lam, self.mirror = layers, theta, lam, mirror
        self.pool, self.separate, self.dtype, self.centres, self.limit = pool, separate, dtype, centres, limit
        self.top_k, self.index, self.index_kind, self.block = top_k, index, index_kind, block
        self.gradient, self.seed = gradient, seed
        self._check_options()

    def _check_options(self) -> None:
        for name in ("pool", "centres", "limit", "top_k", "block"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UsageError(f"Cache({name}={value}): at least 1.")
        if not (0 <= self.theta < math.inf and 0 <= self.lam <= 1):
            raise UsageError(
                f"Cache(theta={self.theta}, lam={self.lam}): theta must be finite and at least 0, lam lie in [0, 1]."
            )
        for name, known in (("dtype", get_args(KeyType)), ("index", ("matrix", "faiss"))):
            if getattr(self, name) not in known:
                raise UsageError(f"Cache({name}={getattr(self, name)!r}): known are {', '.join(known)}.")
        if self.index == "faiss" and (self.top_k is None or self.dtype != "float32"):
            raise UsageError(
                f'Cache(index="faiss", top_k={self.top_k}, dtype={self.dtype!r}): an index finds the nearest items, so say how many '
                "with top_k=50; it keeps the keys in a form of its own, so leave out dtype."
            )

    def fit(self, model: nn.Module, images: Tensor, labels: Tensor, *, index: Tensor | None = None) -> Self:
        """Remember labelled images.

        Args:
            model: images (N, C, H, W) in [0, 1] -> logits (N, K), left as it is.
            images: uint8, or floats in [0, 1].
            labels: true classes (N,).
            index: positions (N,) of the images in their data set; 0 to N-1 if None.

        Raises:
            DataError: bad images or labels, or features that are all zero.
            UsageError, UnknownNameError: no such layers.
        """
        given = Pictures.checked(images, labels, index)
        if self.limit is not None:
            given = given.at(stratified_subset(given.labels, self.limit, self.seed))
        self.forget()
        self.facts |= {"layers": list(choose_layers(model, self.layers)), "images": len(given)}
        self.remember(model)
        self._learn(model, given, self.centres)
        return self

    def add(self, model: nn.Module, images: Tensor, labels: Tensor, *, index: Tensor | None = None) -> Self:
        """Remember further images; with `centres`, each of the new ones stands for itself. Arguments as for `fit`."""
        self.check(model)
        given = Pictures.checked(images, labels, index, first=int(self.items.source.max()) + 1)
        self._learn(model, given, None)
        self.facts["images"] += len(given)
        return self

    def _learn(self, model: nn.Module, given: Pictures, centres: int | None) -> None:
        with torch.no_grad():
            classes = self.read(model, for_model(given.images[:1], model))[0].shape[1]
            check_labels(given.labels, len(given), "cache", classes=classes)
            items = remember(
                lambda part: self.read(model, part),
                model,
                given,
                layers=self.facts["layers"],
                mirror=self.mirror,
                dtype=self.dtype,
                centres=centres,
                seed=self.seed,
            )
            self.keep(items, given.images)

    def tune(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        *,
        thetas: Sequence[float] | None = None,
        lams: Sequence[float] = LAMS,
    ) -> dict[str, Any]:
        """Choose theta and lam on validation images, from one comparison for the whole grid; a cache alone (lam = 1) stays alone.

        Args:
            model, images, labels: as for `fit`, other images.
            thetas: 10 to 90 if None, 50 to 450 for pooled features.
            lams: shares of the cache.

        Returns:
            Accuracies over the grid (see `grid_search`), "theta" and "lam" that were chosen, and "theta_alone" that suits lam = 1;
            kept in `facts` too.

        Raises:
            UsageError: not fitted, an empty grid, or the images are in the cache.
        """
        self.check(model)
        given, alone = Pictures.checked(images, labels, None), self.lam == 1
        thetas = (THETAS if self.pool is None else POOLED_THETAS) if thetas is None else thetas
        self.check_unseen(images)
        found = grid_search((self.grid_answer(model, part, thetas) for part in given.batches()), thetas, lams)
        self.theta, self.lam = best_of(found, alone=alone)
        self.facts["tuning"] = {**found, "theta": self.theta, "lam": self.lam, "theta_alone": best_of(found, alone=True)[0]}
        return dict(self.facts["tuning"])

    def grid_answer(self, model: nn.Module, part: Pictures, thetas: Sequence[float]) -> tuple[Tensor, Tensor, Tensor]:
        """What `grid_search` wants to know: log p_net (N, K), log p_cache (T, N, K) for every theta, labels (N,)."""
        with torch.no_grad():
            logits, queries = self.read(model, for_model(part.images, model))
            if self.top_k is None:
                evidence = sweep(queries, self.items, thetas, self.block)
            else:
                evidence = sweep_nearest(queries, self.items, thetas, self.block, self.top_k)
            return (
                logits.to(queries.dtype).log_softmax(dim=1),
                log_shares(evidence, logits.shape[1]),
                part.labels.to(queries.device),
            )

    def forward(self, model: nn.Module, images: Tensor, streams: Streams | None = None) -> Answer:
        """Images (N, C, H, W) in [0, 1] -> logarithm of the mixture (N, K); with lam = 0 the network's own logits.

        An image whose features are all zero resembles nothing: all items weigh the same.

        Its parts: log-probabilities (N, K) of the "network" and of the "cache"; with top_k the "bound" (N,) on the total
        variation that the items left out could make.

        Raises:
            UsageError: not fitted, or keys of another length than those of the cache.
        """
        return self._answer(model, images, gradient=self.gradient, top_k=self.top_k)

    def smoothly(self, model: nn.Module, images: Tensor, streams: Streams | None = None) -> Answer:
        """The same for attacks: with a gradient, and all items vote, as that of the nearest alone vanishes where they agree.

        An index cannot compare with all keys; there the nearest vote alone, and attacks are blind where these agree.
        """
        return self._answer(model, images, gradient=True, top_k=self.top_k if self.index == "faiss" else None)

    def _answer(self, model: nn.Module, images: Tensor, *, gradient: bool, top_k: int | None) -> Answer:
        self.require_fitted()
        with torch.set_grad_enabled(gradient and torch.is_grad_enabled()):
            logits, queries = self.read(model, images)
            parts = {"network": logits.to(queries.dtype).log_softmax(dim=1)}
            if self.lam == 0:
                return Answer(logits, parts)
            parts |= self._votes(queries, top_k)
            if self.lam == 1:
                return Answer(parts["cache"], parts)
            mixed = torch.logaddexp(parts["network"] + math.log1p(-self.lam), parts["cache"] + math.log(self.lam))
            return Answer(mixed, parts)

    def _votes(self, queries: Tensor, top_k: int | None) -> dict[str, Tensor]:
        parts: dict[str, Tensor] = {}
        with torch.autocast(queries.device.type, enabled=False):
            if top_k is None:
                evidence = evidence_of_all(queries, self.items, self.theta, self.block)
            else:
                evidence, parts["bound"] = evidence_of_nearest(queries, self.items, self.theta, self.block, top_k)
        return {"cache": log_shares(evidence, self.facts["classes"]), **parts}

    def describe(self) -> dict[str, Any]:
        """Options, layers, numbers of images and items, length and bytes of the keys, and what was tuned."""
        tensors = self.state().values() if self.fitted else ()
        size = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
        facts = {key: value for key, value in self.facts.items() if key != "model"}
        return {**self.options(), **facts, "items": len(self.labels), "bytes": size}
