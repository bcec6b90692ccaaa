"""What `ScoreEdit` makes of the predictions for several prompts. Each rule is one published method.

eps(c) is the denoiser's prediction for prompt c and eps() the unconditional one. Where the coefficients of the predictions
at one place sum to one (all rules here but the second term of `ScaleConcept`), the same holds for v-prediction, samples and
the velocities of flow matching: at given latents each of them is a constant times eps and another constant.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsefeat.arguments import number, whole
from sparsefeat.steering.scores.inversion import Inversion
from sparsefeat.steering.scores.predictions import Predictions


@dataclass(frozen=True)
class Rule:
    """What is added to the predictions of some rows."""

    conditions: ClassVar[tuple[str, ...]] = ("cond",)
    """Of the rows that are changed."""

    def prompts(self) -> list[str]:
        """The prompts that are run beside the call's own."""
        raise NotImplementedError

    def is_nothing(self) -> bool:
        """Whether it adds zero whatever is predicted: then nothing is run beside."""
        return False

    def change(self, at: Predictions) -> Tensor:
        """What is added to `at.own`, of the same shape."""
        raise NotImplementedError

    def remedy(self) -> str:
        """What to look at where it added zero all the same."""
        return "look at its prompts and at mask="


@dataclass(frozen=True)
class Compose(Rule):
    """Composable Diffusion (Liu et al., ECCV 2022): prompts joined ("and", weight above 0) and negated ("not", below 0).

        eps' = eps() + g [eps(c) - eps() + sum over prompts of weight (eps(c_i) - eps())]

    c is the call's prompt and g its guidance scale; without guidance g is 1. The paper's weights are g times these.

    Args:
        weights: prompt -> weight, beside the call's own prompt, which has weight 1.

    Raises:
        ValueError: weights that do not map the texts of prompts to finite numbers.
    """

    weights: Mapping[str, float]

    def __post_init__(self) -> None:
        if not isinstance(self.weights, Mapping) or not self.weights:
            raise ValueError(
                f"weights={self.weights!r} must be prompt -> weight, as in {{'snow': 1.0, 'a tree': -1.0}}."
            )
        weights = {_text("weights", c): number(f"weights[{c!r}]", w) for c, w in self.weights.items()}
        object.__setattr__(self, "weights", weights)

    def prompts(self) -> list[str]:
        return [text for text, weight in self.weights.items() if weight]

    def is_nothing(self) -> bool:
        return not any(self.weights.values())

    def change(self, at: Predictions) -> Tensor:
        without = at.without()
        return sum((self.weights[text] * (at.of(text) - without) for text in self.prompts()), torch.zeros_like(at.own))


@dataclass(frozen=True)
class Slider(Rule):
    """A Concept Slider without training (Gandikota et al., arXiv 2311.12092, whose LoRAs are trained towards this):

        eps' = eps_g + scale (eps(positive) - eps(negative)),   eps_g: what the pipeline makes of its guidance

    Args:
        positive, negative: the two ends. The published sliders act from a tenth to a quarter of the schedule on, so that
            the image keeps its composition: `ScoreEdit(..., steps=(0.2, 1.0))`.
        scale: below 0 towards `negative`.

    Raises:
        ValueError: a prompt that is no text; `scale` is not finite.
    """

    positive: str
    negative: str
    scale: float = 1.0
    conditions: ClassVar[tuple[str, ...]] = ("cond", "uncond")  # added to both, it passes through guidance as it is

    def __post_init__(self) -> None:
        _text("positive", self.positive)
        _text("negative", self.negative)
        object.__setattr__(self, "scale", number("scale", self.scale))

    def prompts(self) -> list[str]:
        return [self.positive, self.negative]

    def is_nothing(self) -> bool:
        return self.scale == 0

    def change(self, at: Predictions) -> Tensor:
        return self.scale * (at.of(self.positive) - at.of(self.negative))


@dataclass(frozen=True)
class ScaleConcept(Rule):
    """ScalingConcept (Huang et al., arXiv 2410.24151): a concept of an image made stronger (omega above 1) or weaker.

        s_i = omega max(0, 1 - i / (N - 1))^gamma,   step i of N
        eps' = eps_g + s_i (eps(c) - eps())
                     + s_i (eps((z + z_inv) / 2, c) - eps(z, c))      in the first `exit_steps` steps, of an inversion

    Of a real image: `Inversion.of(pipe, image, c)`, and call the pipeline with prompt "", `latents=inversion.start` and as
    many steps. Of an image that is generated, with its own prompt.

    Args:
        concept: c. omega, gamma, exit_steps: the paper's are 5, 3, 15 (faces 3, 3, 15).
        inversion: of the image; with `exit_steps` above 0.

    Raises:
        ValueError: an argument that cannot be, by its name; `exit_steps` without an inversion, or one without the
            other.
    """

    concept: str
    omega: float = 5.0
    gamma: float = 3.0
    exit_steps: int = 0
    inversion: Inversion | None = None
    conditions: ClassVar[tuple[str, ...]] = ("cond", "uncond")

    def __post_init__(self) -> None:
        _text("concept", self.concept)
        object.__setattr__(self, "omega", number("omega", self.omega))
        object.__setattr__(self, "gamma", number("gamma", self.gamma, 0))
        whole("exit_steps", self.exit_steps, 0)
        if self.inversion is not None and not isinstance(self.inversion, Inversion):
            raise ValueError(f"inversion is {type(self.inversion).__name__}; give Inversion.of(pipe, image, concept).")
        if (self.inversion is None) != (self.exit_steps == 0):
            raise ValueError(
                f"exit_steps={self.exit_steps} and inversion={'None' if self.inversion is None else 'an Inversion'} belong "
                "together: give both, or neither."
            )

    def prompts(self) -> list[str]:
        return [self.concept, ""]

    def is_nothing(self) -> bool:
        return self.omega == 0

    def change(self, at: Predictions) -> Tensor:
        strength = self.omega * max(0.0, 1 - at.step / max(at.n_steps - 1, 1)) ** self.gamma
        if strength == 0:
            return torch.zeros_like(at.own)
        with_it = at.of(self.concept)
        change = with_it - at.of("")
        if self.inversion is not None and at.step < self.exit_steps:
            inverted = self.inversion.at(at.step, at.n_steps, at.latents)
            level = at.level
            between = 0.5 * (at.latents + inverted)
            noise = level.noise(between, at.of(self.concept, between)) - level.noise(at.latents, with_it)
            change = change + level.change_of_prediction(noise)
        return strength * change


@dataclass(frozen=True)
class ConceptAlgebra(Rule):
    """Concept Algebra (Wang et al., arXiv 2302.03693): one concept of the prompt exchanged for that of another.

        A = [eps(p_1) .. eps(p_n)] / sqrt(n), without the mean over the prompts;   A = Q S V^T
        Q <- its first K columns, K the least with sum of S_i^2 up to K / sum of all > keep
        eps' = eps(c) + gamma Q Q^T (eps(target) - eps(c)),   then guidance

    Args:
        target: the prompt whose concept is wanted.
        span: prompts that differ in the concept alone, two at least; more span more of it.
        keep: 0.9, 0.5 for styles in the published programs. They stop at a timestep: `ScoreEdit(..., steps=...)`.
        gamma: 0 (nothing) to 1.

    Raises:
        ValueError: an argument that cannot be, by its name; fewer than two prompts in `span`.
    """

    target: str
    span: Sequence[str]
    keep: float = 0.9
    gamma: float = 1.0

    def __post_init__(self) -> None:
        _text("target", self.target)
        span = [] if isinstance(self.span, str) else list(self.span)
        if len(span) < 2 or not all(isinstance(text, str) for text in span):
            raise ValueError(f"span={self.span!r} must be a list of two prompts or more, which differ in the concept.")
        object.__setattr__(self, "span", tuple(span))
        object.__setattr__(self, "keep", number("keep", self.keep, 0, 1))
        object.__setattr__(self, "gamma", number("gamma", self.gamma))

    def prompts(self) -> list[str]:
        return [self.target, *self.span]

    def is_nothing(self) -> bool:
        return self.gamma == 0

    def change(self, at: Predictions) -> Tensor:
        spanned = torch.stack([at.of(text).flatten(1) for text in self.span], 2)  # [images, d, n]
        wanted = at.of(self.target) - at.own
        moved = [
            basis @ (basis.T @ difference)
            for basis, difference in zip(map(self._basis, spanned), wanted.flatten(1), strict=True)
        ]
        return self.gamma * torch.stack(moved).view_as(wanted)

    def _basis(self, spanned: Tensor) -> Tensor:
        """[d, K] of [d, n]; no column where the prompts do not differ."""
        centred = (spanned - spanned.mean(1, keepdim=True)) / math.sqrt(spanned.shape[1])
        left, values, _ = torch.linalg.svd(centred, full_matrices=False)
        energy = values.square()
        if not energy.sum() > 0:
            return left[:, :0]
        enough = (energy.cumsum(0) / energy.sum() > self.keep).nonzero()
        return left[:, : int(enough[0]) + 1] if len(enough) else left


_VIEWS: dict[str, tuple[Any, Any]] = {
    "flip": (lambda x: x.flip(-2), lambda x: x.flip(-2)),
    "mirror": (lambda x: x.flip(-1), lambda x: x.flip(-1)),
    "rotate90": (lambda x: x.rot90(1, (-2, -1)), lambda x: x.rot90(-1, (-2, -1))),
    "rotate180": (lambda x: x.rot90(2, (-2, -1)), lambda x: x.rot90(2, (-2, -1))),
    "rotate270": (lambda x: x.rot90(-1, (-2, -1)), lambda x: x.rot90(1, (-2, -1))),
    "negative": (lambda x: -x, lambda x: -x),
}


@dataclass(frozen=True)
class Views(Rule):
    """Visual anagrams (Geng et al., CVPR 2024): an image that shows one prompt upright and another when it is turned.

        eps' = mean of eps(x, c) and, over views V, V^-1 eps(V x, c_V)

    of the latents x, under the same guidance. Latents are not pixels: a model of pixels (DeepFloyd IF, the paper's) turns
    cleanly, one of latents roughly.

    Args:
        views: view -> its prompt; views are "flip" (upside down), "mirror", "rotate90" (counter-clockwise), "rotate180",
            "rotate270" and "negative" (of the latents). The call's own prompt is seen upright.

    Raises:
        ValueError: a view that there is not, a prompt that is no text.
    """

    views: Mapping[str, str]
    conditions: ClassVar[tuple[str, ...]] = ("cond", "uncond")

    def __post_init__(self) -> None:
        unknown = set(self.views) - set(_VIEWS) if isinstance(self.views, Mapping) else {self.views}
        if unknown or not self.views:
            raise ValueError(f"views={self.views!r} must be view -> prompt, views being {', '.join(_VIEWS)}.")
        object.__setattr__(self, "views", {view: _text(f"views[{view!r}]", c) for view, c in self.views.items()})

    def prompts(self) -> list[str]:
        return list(self.views.values())

    def change(self, at: Predictions) -> Tensor:
        x = at.latents
        if x.ndim < 4:
            raise ValueError(
                "this denoiser is given its latents packed into tokens, which cannot be turned; Views needs one that is given "
                "[batch, channels, height, width] (Stable Diffusion, SDXL, SD3)."
            )
        if x.shape[-1] != x.shape[-2] and {"rotate90", "rotate270"} & set(self.views):
            raise ValueError(f"latents of {list(x.shape[-2:])} cannot be turned by 90 degrees; ask for a square image.")
        total = at.own.clone()
        for view, text in self.views.items():
            turned, back = _VIEWS[view]
            seen = turned(x)
            total += back(at.of(text, seen) if at.condition == "cond" else at.at(seen))
        return total / (1 + len(self.views)) - at.own


def _text(name: str, given: Any) -> str:
    if not isinstance(given, str):
        raise ValueError(f"{name}={given!r} must be the text of a prompt.")
    return given
