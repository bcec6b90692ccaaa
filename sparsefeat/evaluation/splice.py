"""Put an SAE's reconstruction, or nothing, in the place of the activations."""

from __future__ import annotations

from torch import Tensor

from sparsefeat.features.attached import beside, hookpoint_of, reconstructing
from sparsefeat.pipeline import Activations, Context, FrozenInstrument, Hookpoint, Replace
from sparsefeat.sae import SAE


class Splice(FrozenInstrument):
    """Instrument: every row becomes its reconstruction, in all conditions and all steps.

    The harshest test of an SAE: whatever it loses, the rest of the model has to do without.

    Raises:
        TypeError: `sae` is no SAE.
        ValueError: it is a transcoder, or does not know its hookpoint.
    """

    def __init__(self, sae: SAE, at: str | Hookpoint | None = None) -> None:
        self.at: Hookpoint = hookpoint_of(sae, at)
        self.sae: SAE = reconstructing(sae)

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def at_hookpoint(self, activations: Activations, context: Context) -> Replace:
        x, sae = activations.rows, beside(self.sae, activations, context)
        return Replace(sae.decode(activations.code(sae), like=x).to(x.dtype))


class Ablate(FrozenInstrument):
    """Instrument: every row becomes `row [d_model]`, such as zeros, or the mean: what the block says is lost."""

    def __init__(self, at: str | Hookpoint, row: Tensor) -> None:
        self.at: Hookpoint = at if isinstance(at, Hookpoint) else Hookpoint.parse(at)
        self.row = row

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def at_hookpoint(self, activations: Activations, context: Context) -> Replace:
        x = activations.rows
        return Replace(self.row.to(x.device, x.dtype).expand_as(x))
