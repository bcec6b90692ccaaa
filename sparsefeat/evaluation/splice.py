"""Splice an SAE's reconstruction into the pipeline, in the place of the activations."""

from __future__ import annotations

from sparsefeat.features.attached import hookpoint_of, reconstructing
from sparsefeat.pipeline import Activations, Context, Hookpoint, Instrument, Replace
from sparsefeat.sae import SAE


class Splice(Instrument):
    """Instrument: every row becomes its reconstruction, in all conditions and all steps.

    The harshest test of an SAE: whatever it loses, the rest of the model has to do without.
    """

    def __init__(self, sae: SAE, at: str | Hookpoint | None = None) -> None:
        self.at = hookpoint_of(sae, at)
        self.sae = reconstructing(sae)

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def at_hookpoint(self, activations: Activations, context: Context) -> Replace:
        x = activations.rows
        return Replace(self.sae.decode(activations.code(self.sae), like=x).to(x.dtype))
