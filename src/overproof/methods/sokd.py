"""Student-oriented refinement of the teacher's knowledge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from overproof.errors import UsageError
from overproof.features import penultimate
from overproof.methods.feature_objective import FeatureObjective
from overproof.methods.feature_parts import Compound, make_part
from overproof.methods.feature_probe import ImageShape, pooled_map
from overproof.methods.shared_forward import Seen
from overproof.methods.sokd_areas import AreaHead, Overlap, box_shares, cell_weights, count_boxes, enough_cells, find_boxes
from overproof.methods.sokd_policy import NAMES, Policy
from overproof.methods.sokd_search import Parameters, called_with, consistency, first_order, unrolled
from overproof.methods.sokd_views import Step, refine_all, with_refined
from overproof.types import Batch, Output, Progress

DECAY = 5e-4  # of the step ahead: what the benchmark trains students with


class SoKD(Compound):
    """A plug-in for feature distillers: the teacher's features are refined by a learned policy, and compared where both look.

    L = ce_weight mean_n CE(y_n, S(x_n)) + base_weight L_base(F^s, F~^t; cell weights) + area_loss_weight mean (D(F^s) - D(F~^t))^2

    F~^t is F^t after two operations (of nine) drawn from the policy; D is a head over the adapted student map and F~^t, whose
    P hottest boxes say where the base method compares. Policy, head and adapters are thrown away after training.

    Where the base has no adapter to the teacher's shape (all but fitnet and reviewkd) a FitNet term is added, in whose maps the
    boxes are found: logit methods gain feature terms, and vectors are pooled from the refined map they come from.

    Args:
        student: images -> logits (N, K).
        teacher: images -> logits (N, K), frozen.
        base: name of the method that is plugged into.
        base_options: its options.
        base_weight: factor of its terms; None: 10 for fitnet (1000 in all, as in the authors' code), 1 for the others.
        hint_options: options of the FitNet term that is added where the base has no such maps.
        search: how the policy learns: "first-order" from the distance of F~^t to the student, "unrolled" from the loss one
            step ahead on images held back from that step.
        search_epochs: epochs in which it learns; afterwards it is frozen, and still drawn from.
        search_images: "halves" of the batch for the step and the loss ahead of it, or the "same" images for both (authors' code).
        subpolicies: number of pairs of operations, 2 to 36.
        policy_lr: of the policy's Adam, positive.
        unroll_step: length of the step ahead, positive.
        areas: boxes P; 0: the whole map, without a head.
        area_loss_weight: of the head's term, at least 0.
        overlap: cells in n boxes count "sum" n (paper), "square" n^2 (authors' code) or "union" once.
        smallest_box: least width and height of a box, as a share of the map's: a head whose ReLUs have died (its own term asks for
            that) would leave single cells. 0: as in the authors' code.
        ce_weight, image_shape: see `SharedForward`.
        samples: number of training images, for a base that remembers each.

    Raises:
        UsageError: an option out of range, a base or an option of it that is unknown, networks without maps, or more boxes than
            cells.

    Reference: Shen, Huang, Zhu, Fan, Zhang, 2024, arXiv 2409.18785; search after Li et al., ECCV 2020, arXiv 2003.03780.

    Differences from the paper: built from its abstract, a summary and the authors' development code. All 36 pairs by default
    (that code draws 35); translations scaled as meant; the finite differences of the search are replaced by what they estimate,
    with a running mean as baseline; held-back images; first-order search by default; boxes keep a smallest size, and cells
    of equal heat are drawn by chance, so that a head that has died looks everywhere; what happens to bases other than FitNet is inferred.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        base: str = "fitnet",
        base_options: dict[str, Any] | None = None,
        base_weight: float | None = None,
        hint_options: dict[str, Any] | None = None,
        search: Literal["first-order", "unrolled"] = "first-order",
        search_epochs: int = 20,
        search_images: Literal["halves", "same"] = "halves",
        subpolicies: int = 36,
        policy_lr: float = 3e-4,
        unroll_step: float = 0.01,
        areas: int = 8,
        area_loss_weight: float = 1000.0,
        overlap: Overlap = "sum",
        smallest_box: float = 0.25,
        ce_weight: float = 1.0,
        samples: int | None = None,
        image_shape: ImageShape | None = None,
    ) -> None:
        super().__init__(student, teacher, ce_weight=ce_weight, image_shape=image_shape)
        if min(search_epochs, areas, area_loss_weight, smallest_box, base_weight or 0) < 0 or unroll_step <= 0:
            raise UsageError(
                "sokd: search_epochs, areas, area_loss_weight, smallest_box and base_weight must be at least 0 and unroll_step positive, "
                f"not {search_epochs}, {areas}, {area_loss_weight}, {smallest_box}, {base_weight} and {unroll_step}."
            )
        self.search, self.search_epochs, self.search_images = search, search_epochs, search_images
        self.unroll_step = unroll_step
        self.areas, self.area_loss_weight, self.overlap, self.smallest_box = areas, area_loss_weight, overlap, smallest_box
        part = make_part(base, student, teacher, options=base_options or {}, image_shape=image_shape, samples=samples)
        parts = [part]
        if not part.mapped:
            parts.append(make_part("fitnet", student, teacher, options=hint_options or {}, image_shape=image_shape))
        elif hint_options:
            raise UsageError(f"sokd: hint_options have no use with base={base!r}, in whose own maps areas are found.")
        self.parts = nn.ModuleList(parts)
        self.factors = [p.refined_factor for p in parts]
        if base_weight is not None:
            self.factors[0] = base_weight
        self.policy = Policy(subpolicies, lr=policy_lr)
        self._set_up()
        self._step: Step | None = None
        self._logs: dict[str, Tensor] = {}

    def _set_up(self) -> None:
        """Find where boxes are looked for, and which maps become vectors."""
        assert self.teacher is not None
        parts: list[FeatureObjective] = list(self.parts)  # type: ignore[arg-type]
        spatial = [i for i, place in enumerate(parts[-1].places) if place.spatial]
        self.spot = spatial[(len(spatial) - 1) // 2]
        channels, height, width = parts[-1].places[self.spot].teacher_shape
        enough_cells(self.areas, height, width)
        images = self.probe_images()
        kinds = self.teach(
            Batch(images.to(next(self.teacher.parameters()).device), *[torch.zeros(len(images))] * 2)
        ).logits.shape[1]
        self.head = AreaHead(channels, kinds) if self.areas else None
        places = [place for part in parts for place in part.places]
        self.pools: dict[str, str] = {}
        for place in places:
            vector = not place.spatial and place.teacher == penultimate(self.teacher)
            if vector and (found := pooled_map(self.teacher, images)) is not None:
                self.pools[place.teacher] = found
        self.watch(places, teacher_extra=list(self.pools.values()))

    def forward(self, batch: Batch, progress: Progress, phase: str = "train") -> Output:
        """One step's losses; in the search epochs also a step of the policy."""
        if phase != "train":  # the search evaluates the loss at other parameters
            assert self._step is not None
            seen = self.look(batch, self._step.lesson)
            return Output(self.losses(seen, batch, progress), seen.logits)
        lesson = self.teach(batch)
        searching = self.training and torch.is_grad_enabled() and progress.epoch < self.search_epochs
        leaves = self.policy.leaves() if searching else {name: getattr(self.policy, name) for name in NAMES}
        draw = self.policy.draw(leaves)
        gradients = None
        if searching and self.search == "unrolled":
            gradients = self._look_ahead(batch, progress, Step(draw, leaves, lesson, attached=True))
        self._step = Step(draw, leaves, lesson, search=searching and self.search == "first-order")
        try:
            seen = self.look(batch, lesson)
            losses = self.losses(seen, batch, progress)
        finally:
            self._step = None
        if gradients is not None:
            self.policy.update(gradients)
        return Output(losses, seen.logits, {**self.told(), **self._logs, **(self.policy.figures() if searching else {})})

    def terms(self, seen: Seen, batch: Batch, progress: Progress) -> dict[str, Tensor]:
        """The base method's terms on refined features, and the head's."""
        step = self._step
        assert step is not None
        parts: list[FeatureObjective] = list(self.parts)  # type: ignore[arg-type]
        views = [part.view(seen) for part in parts]
        refined = refine_all(self.policy, step, self.pools, parts=parts, views=views, seen=seen)
        place = parts[-1].places[self.spot]
        ours, theirs = views[-1].features[self.spot], refined[place.teacher]
        if step.search:
            first_order(self.policy, step.leaves, consistency(theirs, ours))
        if not step.attached:
            refined = {name: value.detach() for name, value in refined.items()}
        weights, found = self._find_areas(ours, refined[place.teacher], step.draw.seed)
        plain = views[-1].teacher_features[self.spot]
        with torch.no_grad():
            self._logs |= {"refined gap": consistency(theirs, ours), "plain gap": consistency(plain, ours)}
        for factor, part, view in zip(self.factors, parts, views, strict=True):
            terms = part.compare(with_refined(part, view, refined, weights), batch, progress)
            found |= {name: factor * value for name, value in terms.items()}
        return found

    def _find_areas(self, ours: Tensor, theirs: Tensor, seed: int) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Weights of the cells (N, 1, H, W), and the head's term; the weights carry no gradient."""
        self._logs = {}
        if self.head is None:
            return None, {}
        enough_cells(self.areas, *ours.shape[2:])
        # Apart, so that no gradient is computed for the teacher's map.
        mine, his = self.head(ours).float(), self.head(theirs.to(ours.dtype)).float()
        with torch.no_grad():
            chance = torch.Generator(mine.device).manual_seed(seed)
            boxes = find_boxes(mine, self.areas, smallest=self.smallest_box, generator=chance)
            counts = count_boxes(boxes, (ours.shape[2], ours.shape[3])).to(ours.dtype)
            self._logs = {"coverage": (counts > 0).float().mean(), "heat spread": mine[:, :-4].std(dim=(2, 3)).mean()}
        return cell_weights(counts, self.overlap), {"sokd-areas": self.area_loss_weight * (mine - his).square().mean()}

    def _look_ahead(self, batch: Batch, progress: Progress, step: Step) -> dict[str, Tensor]:
        """The policy's gradients by the unrolled search; nothing else changes."""
        if self.student._compiled_call_impl is not None:
            raise UsageError(
                'sokd: search="unrolled" differentiates twice, which compiled networks cannot: set train.compile=false.'
            )
        if torch.is_autocast_enabled(kind := batch.images.device.type) and torch.get_autocast_dtype(kind) == torch.float16:
            raise UsageError(
                'sokd: the gradients of search="unrolled" vanish in float16: set train.precision="bf16-mixed", or search="first-order".'
            )
        middle, count = len(batch) // 2, len(batch)
        halves = self.search_images == "halves" and middle > 0
        first, second = (slice(0, middle), slice(middle, count)) if halves else (slice(0, count),) * 2

        def loss_on(rows: slice, attached: bool) -> Any:
            part = replace(batch, images=batch.images[rows], labels=batch.labels[rows], index=batch.index[rows])

            def loss(parameters: Parameters) -> Tensor:
                self._step = replace(step, lesson=step.lesson.rows(rows), attached=attached)
                output: Output = called_with(self, parameters, (part, progress, "search"))
                return torch.stack(list(output.losses.values())).sum()

            return loss

        parameters: Parameters = {name: value for name, value in self.named_parameters() if value.requires_grad}
        inner, outer = loss_on(first, True), loss_on(second, False)
        return unrolled(
            self.policy, step.draw, step.leaves, parameters, inner=inner, outer=outer, step=self.unroll_step, decay=DECAY
        )

    def concerns(self, means: Mapping[str, float]) -> dict[str, str]:
        """Those of all parts, and a head that has died."""
        return {**super().concerns(means), **AreaHead.died(means.get("heat spread"), self.area_loss_weight)}

    def describe(self) -> dict[str, Any]:
        """The learned policy and the size of what is thrown away, in plain values."""
        return {**super().describe(), "searched_steps": int(self.policy.steps), "policy": self.policy.table()}

    def illustrate(self, batch: Batch) -> dict[str, Tensor]:
        """Where the head looks: boxes (N, P, 4) of both networks, x1, y1, x2, y2 as shares of the image; {} without a head."""
        if self.head is None:
            return {}
        view = self.parts[-1].view(self.look(batch, self.teach(batch)))  # type: ignore[operator]
        maps = {"student_boxes": view.features[self.spot], "teacher_boxes": view.teacher_features[self.spot]}
        boxes = {n: box_shares(self.head, f, self.areas, smallest=self.smallest_box) for n, f in maps.items()}
        return {"images": batch.images, **boxes}
