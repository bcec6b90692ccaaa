"""Concepts read from the middle of a denoiser and set there: CB-AE and Concept Controller (Kulkarni et al., "Interpretable
Generative Models through Post-hoc Concept Bottlenecks", CVPR 2025, arXiv 2503.19377).

With w the activations of one image at a hookpoint, all positions in one vector, E and D small networks:

    c = E(w)      logits: a block for every concept, one for each of its values, and `unknown` ones for all else
    CB-AE         w' = D(c'), c' = c with the largest logit of the concept's block and the wanted value's exchanged
    Controller    w' = w + delta, |delta| <= epsilon: delta <- -epsilon sign(d/d delta CE(softmax E(w + delta), wanted)),
                  so many times, from 0, each in the place of the one before

E and D are four linear layers with LeakyReLU(0.1) and batch normalisation between. `bottleneck_training.py` learns them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefeat.arguments import number, taking_gradients, whole
from sparsefeat.pipeline import Activations, Context, Delta, Hookpoint, Replace
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.steering.saved import SavableInstrument, register
from sparsefeat.steering.where import check_condition, condition_signs

HIDDEN, UNKNOWN = 512, 40
"""Published: the width of the networks, and how many logits belong to no concept."""
LATE = (0.6, 1.0)
"""The part of the schedule that is edited; published: timesteps of at most 400 of 1,000."""


def layers(*widths: int) -> nn.Sequential:
    """Linear layers of these widths, LeakyReLU(0.1) and batch normalisation after each but the last."""
    found: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        found += [nn.Linear(before, after), nn.LeakyReLU(0.1), nn.BatchNorm1d(after)]
    return nn.Sequential(*found[:-2])


@dataclass(frozen=True, eq=False)
class ConceptModel:
    """E, and of a CB-AE D, of one hookpoint.

    concepts: concept -> its values, in the order of the logits. grid: (height, width) that they were learned at.
    """

    at: Hookpoint
    concepts: Mapping[str, tuple[str, ...]]
    width: int
    grid: tuple[int, int]
    encoder: nn.Sequential
    decoder: nn.Sequential | None = None

    @classmethod
    def new(
        cls, at: Hookpoint, concepts: Mapping[str, tuple[str, ...]], width: int, grid: tuple[int, int], decoder: bool
    ) -> ConceptModel:
        """Not learned yet."""
        entries, logits = width * grid[0] * grid[1], sum(map(len, concepts.values())) + UNKNOWN
        hidden = (HIDDEN,) * 3
        back = layers(logits, *hidden, entries) if decoder else None
        return cls(at, dict(concepts), width, grid, layers(entries, *hidden, logits), back)

    def block(self, concept: str) -> slice:
        """Where the concept's logits are."""
        start = 0
        for name, values in self.concepts.items():
            if name == concept:
                return slice(start, start + len(values))
            start += len(values)
        raise ValueError(f"{concept!r} is none of the concepts; use one of {', '.join(self.concepts)}.")

    def place(self, concept: str, value: str) -> int:
        """Which logit of the concept's block is the value's."""
        self.block(concept)
        values = self.concepts[concept]
        if value not in values:
            raise ValueError(f"{value!r} is no value of {concept!r}; use one of {', '.join(values)}.")
        return values.index(value)

    def exchanged(self, logits: Tensor, concept: str, wanted: int) -> Tensor:
        """`logits [n, logits]` with the largest of the concept's block and the wanted value's exchanged."""
        block = self.block(concept)
        own = logits[:, block]
        largest = own.argmax(1, keepdim=True)
        order = torch.arange(own.shape[1], device=own.device).expand(own.shape).clone()
        order.scatter_(1, largest, wanted)
        order[:, wanted] = largest[:, 0]
        return torch.cat([logits[:, : block.start], own.gather(1, order), logits[:, block.stop :]], 1)

    @torch.no_grad()
    def read(self, w: Tensor) -> dict[str, Tensor]:
        """concept -> probability of each value `[n, values]`, of vectors `[n, width * height * width of the grid]`."""
        logits = self.encoder(w.float())
        return {concept: logits[:, self.block(concept)].softmax(1) for concept in self.concepts}

    def set(
        self, wanted: Mapping[str, str], *, strength: float = 1.0, steps: Steps = LATE, condition: str = "cond"
    ) -> SetConcepts:
        """CB-AE's edit: concept -> value."""
        return SetConcepts(self, wanted, strength=strength, steps=steps, condition=condition)

    def push(
        self,
        wanted: Mapping[str, str],
        *,
        epsilon: float = 1.0,
        iterations: int = 50,
        steps: Steps = LATE,
        condition: str = "cond",
    ) -> PushConcepts:
        """The controller's edit: concept -> value. epsilon, iterations: the published for a diffusion model."""
        return PushConcepts(self, wanted, epsilon=epsilon, iterations=iterations, steps=steps, condition=condition)


class _Edit(SavableInstrument):
    """What the two edits share: which rows, when, and how they are kept."""

    options: tuple[str, ...]
    """Arguments of the subclass's own."""

    def __init__(self, model: ConceptModel, wanted: Mapping[str, str], steps: Steps, condition: str):
        if not isinstance(wanted, Mapping) or not wanted:
            raise ValueError(f"wanted={wanted!r} must be concept -> value, as in {{'style': 'mono'}}.")
        self.model, self.wanted, self.at = model, dict(wanted), model.at
        self.places = {concept: model.place(concept, value) for concept, value in wanted.items()}
        self.window, self.condition = StepWindow.parse(steps), check_condition(condition)
        if condition == "cond+uncond-":
            raise ValueError('condition="cond+uncond-" has no meaning here; use "cond", "uncond" or "both".')

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def expected_width(self, hookpoint: Hookpoint) -> int | None:
        return self.model.width

    def active(self, context: Context) -> bool:
        return self.window.contains(context)

    def chosen(self, activations: Activations, context: Context) -> tuple[Tensor, Tensor]:
        """Which batch rows, and their vectors `[n, entries]` in fp32."""
        if context.grid != self.model.grid:
            raise ValueError(
                f"the concepts of {self.at} were learned on a grid of {self.model.grid}, and this call's is {context.grid}; "
                "draw at the size that they were learned at."
            )
        w = activations.rows.reshape(context.batch, -1)
        rows = condition_signs(self.condition, context).nonzero()[:, 0].to(w.device)
        for network in filter(None, (self.model.encoder, self.model.decoder)):
            network.to(w.device)
        return rows, w[rows].float()

    def to_saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        model = self.model
        config = {
            "concepts": [[concept, list(values)] for concept, values in model.concepts.items()],
            "width": model.width,
            "grid": list(model.grid),
            "decoder": model.decoder is not None,
            "wanted": self.wanted,
            **{name: getattr(self, name) for name in self.options},
        }
        networks = {"encoder": model.encoder} | ({} if model.decoder is None else {"decoder": model.decoder})
        return config, {
            f"{of}.{name}": t for of, network in networks.items() for name, t in network.state_dict().items()
        }

    @classmethod
    def from_saved(cls, sae: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> _Edit:
        concepts = {concept: tuple(values) for concept, values in config["concepts"]}
        height, width = config["grid"]
        model = ConceptModel.new(config["at"], concepts, config["width"], (height, width), config["decoder"])
        for of, network in (("encoder", model.encoder), ("decoder", model.decoder)):
            if network is not None:
                own = {name.partition(".")[2]: t for name, t in tensors.items() if name.startswith(f"{of}.")}
                network.load_state_dict(own)
                network.requires_grad_(False).eval()
        options = {name: config[name] for name in (*cls.options, "condition")}
        return cls(model, config["wanted"], **options)


@register("sparsefeat.steering:SetConcepts")
class SetConcepts(_Edit):
    """Instrument: CB-AE's edit above, (1 - strength) w + strength w'. Made by `ConceptModel.set`."""

    options: tuple[str, ...] = ("strength",)

    def __init__(
        self,
        model: ConceptModel,
        wanted: Mapping[str, str],
        *,
        strength: float = 1.0,
        steps: Steps = LATE,
        condition: str = "cond",
    ):
        super().__init__(model, wanted, steps, condition)
        if model.decoder is None:
            raise ValueError("model has no decoder, so nothing can be set; use its push, or fit_concept_bottleneck.")
        self.strength: float = number("strength", strength)

    @torch.no_grad()
    def at_hookpoint(self, activations: Activations, context: Context) -> Replace | None:
        rows, w = self.chosen(activations, context)
        assert self.model.decoder is not None
        logits = self.model.encoder(w)
        for concept, wanted in self.places.items():
            logits = self.model.exchanged(logits, concept, wanted)
        after = w + self.strength * (self.model.decoder(logits) - w)
        every = activations.rows.reshape(context.batch, -1).index_copy(0, rows, after.to(activations.rows.dtype))
        return Replace(every.reshape(activations.rows.shape))


@register("sparsefeat.steering:PushConcepts")
class PushConcepts(_Edit):
    """Instrument: the concept controller's edit above. Made by `ConceptModel.push`."""

    options: tuple[str, ...] = ("epsilon", "iterations")

    def __init__(
        self,
        model: ConceptModel,
        wanted: Mapping[str, str],
        *,
        epsilon: float = 1.0,
        iterations: int = 50,
        steps: Steps = LATE,
        condition: str = "cond",
    ):
        super().__init__(model, wanted, steps, condition)
        self.epsilon: float = number("epsilon", epsilon, 0, above=True)
        self.iterations: int = whole("iterations", iterations)

    def at_hookpoint(self, activations: Activations, context: Context) -> Delta | None:
        rows, w = self.chosen(activations, context)
        w, delta = w.detach(), torch.zeros_like(w)
        for _ in range(self.iterations):
            leaf = delta.requires_grad_()
            with taking_gradients("PushConcepts"):
                logits = self.model.encoder(w + leaf)
                loss = sum(
                    F.cross_entropy(logits[:, self.model.block(c)], torch.full_like(rows, wanted), reduction="sum")
                    for c, wanted in self.places.items()
                )
                (slope,) = torch.autograd.grad(loss, leaf)
            delta = -self.epsilon * slope.sign()
        every = torch.zeros_like(activations.rows.reshape(context.batch, -1), dtype=torch.float32)
        return Delta(every.index_copy(0, rows, delta).reshape(activations.rows.shape))
