"""A word's map as the mask of an edit, while the pipeline runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sparsefeat.attention.words import NoSuchWordError
from sparsefeat.pipeline import Context

if TYPE_CHECKING:
    from sparsefeat.attention.heat_maps import HeatMaps


@dataclass(frozen=True)
class WordMask:
    """Callable of the context -> [batch, *grid], the word's map of each batch entry's image, over the steps completed so
    far; made by `HeatMaps.mask`.
    """

    maps: HeatMaps
    word: str
    threshold: float | None
    occurrence: int | None

    def __call__(self, context: Context) -> Tensor:
        recording = self.maps.so_far(f"mask= is the map of {self.word!r}")
        if recording is None:
            height, width = context.grid[-2:] if context.grid is not None else (1, 1)
            return torch.zeros(context.batch, height, width, dtype=torch.float32)
        found = {}
        of_row = [image for _, image in context.entries]
        for image in set(of_row):
            try:
                heat = recording.word(self.word, image, self.occurrence)
            except NoSuchWordError:
                if len(recording.prompts or ()) == 1:
                    raise
                found[image] = torch.zeros(recording.grid, dtype=torch.float32, device=recording.device)
                continue
            values = heat.scaled() if self.threshold is None else heat.mask(self.threshold).to(heat.values.dtype)
            found[image] = values
        return torch.stack([found[image] for image in of_row])
