"""Blindspots: which latents a pipeline's images have less of than real ones, and which more.

"Conceptual Blindspots" (arXiv 2506.19708): with z_k the mean activation of latent k over an image's positions, of real
images X and generated ones X' with the same captions,

    delta_k = sigmoid(mean over X' of z_k - mean over X of z_k)        suppressed below 0.1, exaggerated above 0.9

The paper reads an image by a vision model; here the denoiser itself reads both sets, noised alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import finite, number, whole
from sparsefeat.attention.real_image import run_noised
from sparsefeat.features.attached import beside, hookpoint_of
from sparsefeat.pipeline import Activations, Call, Context, Hookpoint, Instrument
from sparsefeat.pipeline.call_arguments import check_call
from sparsefeat.sae import SAE


@dataclass(frozen=True)
class Blindspots:
    """Mean activations of every latent in every image, `[images, n_latents]`: of real ones and of generated ones.

    Raises:
        ValueError: other shapes, not the same latents, or numbers that are not finite.
    """

    real: Tensor
    generated: Tensor

    def __post_init__(self) -> None:
        shapes = [list(getattr(one, "shape", [])) for one in (self.real, self.generated)]
        if any(len(shape) != 2 or not shape[0] for shape in shapes) or shapes[0][1] != shapes[1][1]:
            raise ValueError(f"real and generated have shapes {shapes}; give [images, n_latents] of the same latents.")
        finite("real", self.real)
        finite("generated", self.generated)

    @property
    def difference(self) -> Tensor:
        """[n_latents], fp64: mean in generated images minus mean in real ones."""
        return self.generated.double().mean(0) - self.real.double().mean(0)

    @property
    def delta(self) -> Tensor:
        """[n_latents], fp64, 0 to 1; 0.5 is no difference. It depends on the scale of the activations."""
        return self.difference.sigmoid()

    def suppressed(self, below: float = 0.1) -> list[int]:
        """The latents that generated images lack, the most missing first.

        Raises:
            ValueError: `below` is not from 0 to 0.5.
        """
        number("below", below, 0, 0.5)
        order = self.delta.argsort(stable=True)
        return order[self.delta[order] < below].tolist()

    def exaggerated(self, above: float = 0.9) -> list[int]:
        """The latents that they have too much of, the most first.

        Raises:
            ValueError: `above` is not from 0.5 to 1.
        """
        number("above", above, 0.5, 1)
        order = self.delta.argsort(descending=True, stable=True)
        return order[self.delta[order] > above].tolist()

    @property
    def skewness(self) -> float:
        """Of delta over the latents: below 0 where more is lacking than is too much."""
        around = self.delta - self.delta.mean()
        return float((around**3).mean() / around.square().mean().sqrt().clamp_min(1e-300) ** 3)

    def correlation(self, other: Blindspots) -> float:
        """Pearson's r of two pipelines' deltas, of the same SAE.

        Raises:
            ValueError: `other` has another number of latents.
        """
        if self.delta.shape != other.delta.shape:
            raise ValueError(
                f"other is of {len(other.delta)} latents and this of {len(self.delta)}; compare those of one SAE."
            )
        return float(torch.corrcoef(torch.stack([self.delta, other.delta]))[0, 1])

    def distances(self) -> Tensor:
        """[images], fp64: |z' - z| of each pair, given in the same order; near 0 is a copy of the real image.

        Raises:
            ValueError: there are not as many real images as generated ones.
        """
        if len(self.real) != len(self.generated):
            raise ValueError(
                f"there are {len(self.real)} real images and {len(self.generated)} generated ones; distances need pairs."
            )
        return torch.linalg.vector_norm(self.generated.double() - self.real.double(), dim=1)

    @classmethod
    def of(
        cls,
        pipe: Any,
        sae: SAE,
        images: Sequence[Any],
        prompts: Sequence[str],
        *,
        noise: float = 0.5,
        seed: int = 0,
        at: str | Hookpoint | None = None,
        **call: Any,
    ) -> Blindspots:
        """Draw an image of each prompt, and read it and the real one, noised alike, by the denoiser.

        Args:
            images: real ones, PIL. prompts: their captions, as many.
            noise: the share of the schedule that they are noised to, as in `read_image`.
            seed: pair i is drawn and noised from seed + i.
            call: further arguments of the pipeline's call.

        Raises:
            TypeError: an argument that the pipeline's call does not take; `sae` is no SAE.
            ValueError: an argument that cannot be, by its name; not as many images as prompts.
        """
        check_call(pipe, call, cls.of, "return_dict")
        place = hookpoint_of(sae, at)
        if isinstance(prompts, str) or not isinstance(images, Sequence):
            raise ValueError("images and prompts must be lists, an image and its caption at the same place.")
        images = list(images)
        if len(images) != len(prompts) or not images:
            raise ValueError(
                f"images has {len(images)} entries and prompts {len(prompts)}; give a caption for each image."
            )
        number("noise", noise, 0, 1, above=True)
        whole("seed", seed, 0)
        means = _Means(sae, place)
        found: tuple[list[Tensor], list[Tensor]] = ([], [])
        for i, (real, prompt) in enumerate(zip(images, prompts, strict=True)):
            drawn = pipe(prompt, generator=torch.Generator().manual_seed(seed + i), **call).images[0]
            for kept, image in zip(found, (real, drawn), strict=True):
                run = run_noised(pipe, [means], image, prompt, noise=noise, seed=seed + i)
                kept.append(run[means])
        return cls(torch.stack(found[0]), torch.stack(found[1]))


class _Means(Instrument):
    """The mean code of the conditional rows of one image."""

    condition = "cond"

    def __init__(self, sae: SAE, at: Hookpoint):
        self.sae, self.at = sae, at

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def begin_call(self, call: Call) -> None:
        self._total, self._rows = torch.zeros(self.sae.n_latents, dtype=torch.float64), 0

    @torch.no_grad()
    def at_hookpoint(self, activations: Activations, context: Context) -> None:
        sae = beside(self.sae, activations, context)
        rows = activations.rows[context.row_condition()]
        code = sae.encode(rows)
        entries = code.indices.reshape(-1).long().cpu(), code.values.reshape(-1).double().cpu()
        self._total.index_add_(0, *entries)
        self._rows += len(rows)

    def end_call(self, call: Call) -> Tensor:
        return (self._total / max(self._rows, 1)).float()
