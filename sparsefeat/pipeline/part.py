"""Where in a module's output or arguments a stream's tensor lies: an element of a tuple, and which rows of a sequence.

Joint models run image and text tokens in one sequence, and some give it back whole: of [text; image] only the rows of
the stream that is meant are read and written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Part:
    index: int = 0
    """The element of an output that is a tuple."""
    name: str | None = None
    """The argument of an input; None is the first."""
    start: int | tuple[int, ...] = 0
    """The first row of dimension 1, or one for each batch entry where texts of different lengths come before."""
    length: int | None = None
    """How many rows; None is all of them, in a tensor of any layout."""

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """The stream's rows of the tensor, [B, length, C]; the tensor itself where it holds nothing else."""
        if self.length is None or (self.start == 0 and self.length == whole.shape[1]):
            return whole
        if isinstance(self.start, int):
            return whole[:, self.start : self.start + self.length]
        return torch.stack([entry[s : s + self.length] for entry, s in zip(whole, self.start, strict=True)])

    def into(self, whole: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        """A new tensor like `whole` with the stream's rows replaced. `whole` is not written to."""
        if rows.shape == whole.shape:
            return rows
        assert self.length is not None
        if isinstance(self.start, int):
            return torch.cat([whole[:, : self.start], rows, whole[:, self.start + self.length :]], dim=1)
        entries = zip(whole, rows, self.start, strict=True)
        return torch.stack([torch.cat([entry[:s], r, entry[s + self.length :]]) for entry, r, s in entries])
