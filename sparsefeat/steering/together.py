"""Several instruments as one, to attach and to save."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor

from sparsefeat.features.folders import write_folder
from sparsefeat.pipeline import Instrument
from sparsefeat.steering.saved import SavableInstrument, register
from sparsefeat.whole import whole_folder

KIND = "sparsefeat.steering:Together"


@register(KIND)
class Together(SavableInstrument):
    """Several instruments in the place of one: `attach(pipe, Together(steer, erase))` is `attach(pipe, steer, erase)`.

    Recordings are asked for by the instruments themselves, `run[steer]`.

    Args:
        instruments: in the order in which they act at one hookpoint. To save them each must be one that can be saved.

    Raises:
        ValueError: none is given.
    """

    def __init__(self, *instruments: Instrument):
        if not instruments or not all(isinstance(one, Instrument) for one in instruments):
            raise ValueError("Together takes one or more instruments, as in Together(steer, erase).")
        self.instruments = instruments

    def members(self) -> tuple[Instrument, ...]:
        return tuple(part for instrument in self.instruments for part in instrument.members())

    def save(self, folder: str | os.PathLike[str], include_sae: bool = True, *, overwrite: bool = False) -> None:
        """Write each instrument in a folder of its own, and every SAE once, for `load_instrument(folder)`.

        Raises:
            ValueError: one of them cannot be saved, or `include_sae` is False: an SAE would have to be given for each.
            FileExistsError: something is in `folder`; an earlier instrument is replaced with `overwrite`.
        """
        parts = self.members()
        for part in parts:
            if not isinstance(part, SavableInstrument):
                raise ValueError(f"{type(part).__name__} cannot be saved; leave it out of Together.")
        if not include_sae:
            raise ValueError("include_sae=False is not for several instruments together; save each by itself.")
        saes: list[Any] = []
        places: list[int | None] = []
        for part in parts:
            sae = getattr(part, "sae", None)
            if sae is not None and not any(sae is other for other in saes):
                saes.append(sae)
            places.append(None if sae is None else next(i for i, other in enumerate(saes) if other is sae))
        with whole_folder(folder, replace="instrument.json" if overwrite else None) as unfinished:
            for i, part in enumerate(parts):
                assert isinstance(part, SavableInstrument)
                part.save(unfinished / f"part-{i}", include_sae=False)
            for i, sae in enumerate(saes):
                sae.save(unfinished / f"sae-{i}")
            settings = {"saes_of_parts": places}
            write_folder(unfinished, "instrument", {"kind": KIND, "format": 1, "sae": None, "settings": settings}, {})

    @classmethod
    def from_saved(cls, sae: None, config: dict[str, Any], tensors: dict[str, Tensor]) -> Together:
        return cls(*config["parts"])
