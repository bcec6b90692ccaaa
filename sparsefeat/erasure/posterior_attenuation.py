"""APP: latents attenuated by how much they say of the concept (arXiv 2508.15094, for language models; no code is public).

With p_i(z | c) the density of latent i's activation z over the rows of concept c's prompts, as a histogram, and priors pi_c,

    z'_i = z_i (1 - P(c* | z_i)),    P(c* | z) = pi_c* p_i(z | c*) / sum_c pi_c p_i(z | c)

for the chosen latents: an activation that only the concept has goes, one that others have as often is kept in proportion. The
paper leaves the estimator open; assumed are bins of equal ratio, and that an activation that no concept had is left alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from sparsefeat_kernels import SparseCode
from torch import Tensor

from sparsefeat.arguments import kept, number, whole
from sparsefeat.features.attached import beside, hookpoint_of, reconstructing
from sparsefeat.features.collecting import check_prompts, collect_statistics
from sparsefeat.features.scores import normalized_mean_difference
from sparsefeat.features.statistics import Statistics
from sparsefeat.pipeline import Activations, Context, Delta, Hookpoint
from sparsefeat.pipeline.call_arguments import GIVEN_TO_SEVERAL, check_call
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.sae import SAE
from sparsefeat.steering.saved import SavableInstrument, register
from sparsefeat.steering.steer import row_weights
from sparsefeat.steering.where import check_condition

# Edges from 10^-4 to 10^4, eight to a decade: neighbouring bins differ by a third, whatever the SAE's scale.
EDGES = 10.0 ** (torch.arange(8 * 8 + 1, dtype=torch.float64) / 8 - 4)


def bin_of(z: Tensor) -> Tensor:
    """int64, the bin of each activation above 0: of len(EDGES) + 1, the first and last unbounded."""
    return torch.bucketize(z.double(), EDGES.to(z.device), right=True)


class Histograms(Statistics):
    """Statistics that also count how often each latent's positive activations fall into each bin, over all timesteps."""

    def __init__(self, concepts: Sequence[str], n_latents: int):
        super().__init__(concepts, n_latents)
        self.counts: Tensor = torch.zeros(len(self.concepts), n_latents, len(EDGES) + 1, dtype=torch.int32)

    def add(self, code: SparseCode, concept: Tensor, timestep: float) -> None:
        super().add(code, concept, timestep)
        group = concept.cpu().long()[code.row_ids.cpu().flatten()]
        values, latents = code.values.detach().cpu().flatten(), code.indices.cpu().flatten().long()
        counted = (group >= 0) & (values > 0)
        places = (group[counted], latents[counted], bin_of(values[counted]))
        self.counts.index_put_(places, torch.ones(int(counted.sum()), dtype=torch.int32), accumulate=True)

    def take(self, part: Statistics) -> None:
        assert isinstance(part, Histograms)
        super().take(part)
        self.counts[self.places(part.concepts)] += part.counts

    def posterior(self, concept: str, latents: Tensor, prior: float | None = None) -> Tensor:
        """fp32 [latents, bins], P(concept | activation in the bin); 0 where no concept had one.

        prior: of the concept; the others share the rest. Default: all alike.
        """
        mine = self.concepts.index(concept)
        priors = torch.full((len(self.concepts),), 1 / len(self.concepts), dtype=torch.float64)
        if prior is not None:
            priors.fill_((1 - prior) / (len(self.concepts) - 1))
            priors[mine] = prior
        rows = torch.tensor([max(self.rows(one), 1) for one in self.concepts], dtype=torch.float64)
        density = self.counts[:, latents].double() * (priors / rows)[:, None, None]
        total = density.sum(0)
        return torch.where(total > 0, density[mine] / total, 0.0).float()


@register("sparsefeat.erasure:PosteriorAttenuation")
class PosteriorAttenuation(SavableInstrument):
    """Instrument: APP's edit. Made by `PosteriorAttenuation.fit`.

    Args:
        latents: int64 [F], which are attenuated.
        posterior: [F, bins], P(concept | activation), from `Histograms.posterior`.
        concept: a name, for the record.
        condition, steps, at: as in `Steer`; condition "cond+uncond-" has no meaning here.

    Raises:
        TypeError: `sae` is no SAE.
        ValueError: an argument that cannot be, by its name; `posterior` is not of these latents, or not of
            probabilities.
    """

    kept: ClassVar[tuple[str, ...]] = ("latents", "posterior", "concept")

    def __init__(
        self,
        sae: SAE,
        latents: Tensor | Sequence[int],
        posterior: Tensor,
        concept: str = "",
        *,
        condition: str = "both",
        steps: Steps = None,
        at: str | Hookpoint | None = None,
    ):
        self.at: Hookpoint = hookpoint_of(sae, at)
        self.sae: SAE = reconstructing(sae)
        sae.directions(latents)  # names a latent that does not exist
        self.latents: Tensor = torch.as_tensor(latents, dtype=torch.int64).cpu().clone()
        sae.directions(self.latents)  # names a latent that does not exist
        if posterior.shape != (len(self.latents), len(EDGES) + 1):
            raise ValueError(
                f"posterior has shape {list(posterior.shape)}; {len(self.latents)} latents need "
                f"{[len(self.latents), len(EDGES) + 1]}."
            )
        self.posterior: Tensor = kept("posterior", posterior).float().cpu()
        if len(posterior) and not 0 <= float(posterior.min()) <= float(posterior.max()) <= 1:
            raise ValueError("posterior must hold probabilities, 0 to 1.")
        if condition == "cond+uncond-":
            raise ValueError('condition="cond+uncond-" would add to one half what it takes from the other; use "both".')
        self.concept: str = str(concept)
        self.condition: str = check_condition(condition)
        self.window: StepWindow = StepWindow.parse(steps)

    @classmethod
    def fit(
        cls,
        pipe: Any,
        sae: SAE,
        concept: str,
        prompts: Mapping[str, Sequence[str]],
        *,
        n_latents: int = 32,
        prior: float | None = None,
        condition: str = "both",
        steps: Steps = None,
        at: str | Hookpoint | None = None,
        batch_size: int = 4,
        seed: int | None = 0,
        **call: Any,
    ) -> PosteriorAttenuation:
        """Run the pipeline on every concept's prompts, count activations, and choose the concept's latents by SAeUron's score.

        Args:
            concept: a key of `prompts`, which need at least one other's.
            n_latents: how many are attenuated.
            prior: P(concept), 0 to 1; default the same for every concept. Higher takes more away.
            batch_size, seed, call: of the runs; see `collect_statistics`.

        Raises:
            TypeError: `sae` is no SAE; an argument that the pipeline's call does not take.
            ValueError: an argument that cannot be, by its name; a concept that is no key of `prompts`, or the only one;
                no latent is more active with it.
        """
        hookpoint_of(sae, at)
        check_call(pipe, call, cls.fit, *GIVEN_TO_SEVERAL)
        check_prompts(prompts)
        if concept not in prompts or len(prompts) < 2:
            raise ValueError(
                f"concept={concept!r} must be a key of prompts={list(prompts)}, which need another concept."
            )
        whole("n_latents", n_latents, 1, sae.n_latents)
        if prior is not None:
            number("prior", prior, 0, 1)
        cls(sae, [], torch.zeros(0, len(EDGES) + 1, dtype=torch.float32), condition=condition, steps=steps, at=at)
        counted = Histograms(list(prompts), sae.n_latents)
        collect_statistics(pipe, sae, prompts, at=at, batch_size=batch_size, seed=seed, statistics=counted, **call)
        scores = normalized_mean_difference(counted.mean(concept), counted.mean(counted.others(concept)))
        order = scores.argsort(descending=True, stable=True)[:n_latents]
        latents = order[scores[order] > 0].sort().values
        if not len(latents):
            raise ValueError(f"no latent is more active with {concept!r} than without; give prompts that differ.")
        posterior = counted.posterior(concept, latents, prior)
        return cls(sae, latents, posterior, concept, condition=condition, steps=steps, at=at)

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def active(self, context: Context) -> bool:
        return self.window.contains(context)

    def at_hookpoint(self, activations: Activations, context: Context) -> Delta | None:
        x = activations.rows
        sae = beside(self.sae, activations, context)
        z = activations.code(sae).select(self.latents.to(x.device)).float()
        table = self.posterior.to(x.device)
        probability = table[torch.arange(len(table), device=x.device), bin_of(z)]
        lost = torch.where(z > 0, z * probability, 0)
        if not bool((lost != 0).any()):
            return None
        change = -(lost @ sae.directions(self.latents).float())
        scale = sae.row_scale(x)
        change = change if scale is None else change * scale.float()
        return Delta(change * row_weights(self.condition, None, context, len(x), 0).to(x.device)[:, None])

    def __repr__(self) -> str:
        return f"PosteriorAttenuation({self.concept}: {len(self.latents)} latents at {self.at})"
