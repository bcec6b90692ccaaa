"""Overwrite: a block's own contribution is discarded and something else put in its place."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from sparsefeat.arguments import number
from sparsefeat.features.attached import beside, hookpoint_of
from sparsefeat.pipeline import Activations, Context, FrozenInstrument, Hookpoint, Replace
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.sae import SAE
from sparsefeat.steering.where import check_condition, condition_signs


class Overwrite(FrozenInstrument):
    """Instrument: the activations become `sum over latents of amount * d_latent` at every position, and nothing else.

    At a `diff` hookpoint the block's output is then its input plus that: the feature icons of sdxl-unbox (arXiv
    2410.22366), what a latent draws by itself; with no latents, a block that is switched off.

    Args:
        amounts: latent -> amount; {} for nothing at all.
        condition: rows that get the latents; the others get nothing, and all rows lose what the block computed.
        steps, at: as in `Steer`.
    """

    def __init__(
        self,
        sae: SAE,
        amounts: Mapping[int, float],
        *,
        condition: str = "cond",
        steps: Steps = None,
        at: str | Hookpoint | None = None,
    ):
        self.sae = sae
        self.amounts: dict[int, float] = {
            latent: number(f"amounts[{latent}]", amount) for latent, amount in amounts.items()
        }
        sae.directions(list(amounts))  # names a latent that does not exist
        self.condition: str = check_condition(condition)
        self.window: StepWindow = StepWindow.parse(steps)
        self.at: Hookpoint = hookpoint_of(sae, at)

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def active(self, context: Context) -> bool:
        return self.window.contains(context)

    @torch.no_grad()
    def at_hookpoint(self, activations: Activations, context: Context) -> Replace:
        x = activations.rows
        sae = beside(self.sae, activations, context)
        signs = condition_signs(self.condition, context).to(x.device).repeat_interleave(context.positions)
        amounts = torch.tensor(list(self.amounts.values()), dtype=torch.float32, device=x.device)
        drawn = amounts @ sae.directions(list(self.amounts)).float()
        scale = sae.row_scale(x)
        return Replace(signs[:, None] * drawn * (1 if scale is None else scale.float()))
