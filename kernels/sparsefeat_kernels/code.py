"""SparseCode: the sparse activations of a batch of rows, and the questions asked of one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["SparseCode", "check_code", "check_indices", "selected_values", "within"]


@dataclass(frozen=True, eq=False)
class SparseCode:
    """The codes of `rows` activations over a dictionary of `n_latents`; a pytree whose leaves are its tensors.

    Padded form (every row has k entries): `values` [rows, k] floating, `indices` [rows, k] int32. Entries that stand
    for nothing have value 0 and any index in range.
    CSR form (rows of different lengths): `values` and `indices` [entries], `row_offsets` [rows + 1] int64; row r owns
    the entries from row_offsets[r] up to row_offsets[r + 1].

    An entry whose value is 0 is the same as no entry. Two entries of one row with the same index count as their sum.

    Example:
        >>> code = SparseCode(torch.tensor([[3.0, 1.0], [2.0, 0.0]]), torch.tensor([[4, 0], [1, 0]]).int(), 5)
        >>> code.dense()
        tensor([[1., 0., 0., 0., 3.],
                [0., 2., 0., 0., 0.]])
    """

    values: Tensor
    indices: Tensor
    n_latents: int
    row_offsets: Tensor | None = None

    def __post_init__(self) -> None:
        for name in ("values", "indices", "row_offsets"):
            given = getattr(self, name)
            if not isinstance(given, Tensor) and not (given is None and name == "row_offsets"):
                raise TypeError(f"{name} must be a tensor, got {type(given).__name__}")
        n_latents: Any = self.n_latents
        if isinstance(n_latents, (bool, Tensor)) or not hasattr(n_latents, "__index__") or n_latents < 0:
            raise ValueError(f"n_latents must be a whole number of at least 0, got {self.n_latents!r:.80}")
        if self.values.shape != self.indices.shape:
            raise ValueError(
                f"values and indices must have one shape, got {tuple(self.values.shape)} and "
                f"{tuple(self.indices.shape)}"
            )
        dimensions = 2 if self.row_offsets is None else 1
        if self.values.dim() != dimensions:
            form = "padded: without row_offsets" if self.row_offsets is None else "CSR: with row_offsets"
            raise ValueError(
                f"values must have {dimensions} dimension(s) in this form ({form}), got shape {tuple(self.values.shape)}"
            )
        if not self.values.is_floating_point():
            raise TypeError(f"values must be floating point, got {self.values.dtype}")
        if self.indices.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"indices must be int32, got {self.indices.dtype}")
        if self.indices.device != self.values.device:
            raise ValueError(f"indices must be on values' device {self.values.device}, got {self.indices.device}")

    @staticmethod
    def padded_from_dense(z: Tensor) -> SparseCode:
        """The padded code of a dense [rows, n_latents] tensor: nonzero entries, largest magnitude first, ties by index."""
        if z.dim() != 2:
            raise ValueError(f"z must be [rows, n_latents], got shape {tuple(z.shape)}")
        k = int((z != 0).sum(1).max()) if z.numel() else 0
        order = z.abs().sort(dim=1, descending=True, stable=True).indices[:, :k]
        return SparseCode(z.gather(1, order), order.to(torch.int32), z.shape[1])

    @property
    def rows(self) -> int:
        return self.values.shape[0] if self.row_offsets is None else self.row_offsets.shape[0] - 1

    @property
    def row_ids(self) -> Tensor:
        """The row of every entry, int64, in the shape of `values`."""
        if self.row_offsets is None:
            rows = torch.arange(self.values.shape[0], device=self.values.device)
            return rows[:, None].expand(self.values.shape)
        lengths = self.row_offsets.diff()
        rows = torch.arange(self.rows, device=self.values.device)
        return torch.repeat_interleave(rows, lengths, output_size=self.values.shape[0])

    def to(self, device: torch.device | str) -> SparseCode:
        offsets = None if self.row_offsets is None else self.row_offsets.to(device)
        return SparseCode(self.values.to(device), self.indices.to(device), self.n_latents, offsets)

    def dense(self) -> Tensor:
        """The code as a [rows, n_latents] tensor: for tests and very small dictionaries only.

        Raises:
            IndexError: an index out of range, where a look at it can be had: a negative one would count from the end.
        """
        looked_at = not self.indices.is_meta and not torch.compiler.is_compiling()
        if looked_at:
            check_indices(self.indices, self.n_latents)
        out = self.values.new_zeros(self.rows, self.n_latents)
        entries = (self.row_ids.reshape(-1), self.indices.reshape(-1).long())
        return out.index_put_(entries, self.values.reshape(-1), accumulate=True)

    def select(self, latents: Tensor | Sequence[int]) -> Tensor:
        """[rows, F] values of the chosen latents, 0 where one is not active in the row. Scratch: [rows, F] + the code."""
        latents = latents if isinstance(latents, Tensor) else torch.as_tensor(latents, device="cpu")
        # Only where the look waits for no GPU, and nothing traces.
        here = latents.device.type == "cpu" and not torch.compiler.is_compiling()
        if here and latents.numel() and (latents.is_floating_point() or not within(latents, self.n_latents)):
            raise IndexError(
                f"latents must be whole numbers from 0 to {self.n_latents - 1}, got {latents.tolist()!s:.80}"
            )
        latents = latents.to(self.values.device)
        return selected_values(self.values, self.indices, self.row_ids, self.rows, latents)

    def slice_rows(self, start: int, stop: int) -> SparseCode:
        """The code of rows start .. stop - 1 (as a slice: bounds are clipped, negative ones count from the end)."""
        start, stop, _ = slice(start, stop).indices(self.rows)
        stop = max(start, stop)
        if self.row_offsets is None:
            return SparseCode(self.values[start:stop], self.indices[start:stop], self.n_latents)
        offsets = self.row_offsets[start : stop + 1]
        first, last = int(offsets[0]), int(offsets[-1])
        return SparseCode(self.values[first:last], self.indices[first:last], self.n_latents, offsets - first)


def check_code(values: Tensor, indices: Tensor, device: torch.device, beside: str, called: str = "values") -> None:
    """Refuse what is not a padded code on `device`, the device of the argument named `beside`.

    called: the name of `values`. indices are of the same kind: "aux_indices" of "aux_values".
    """
    its_indices = "aux_indices" if called.startswith("aux_") else "indices"
    if values.dim() != 2 or values.shape != indices.shape:
        raise ValueError(
            f"{called} and {its_indices} must both be [rows, k], got shapes {tuple(values.shape)} and {tuple(indices.shape)}"
        )
    if not values.is_floating_point():
        raise TypeError(f"{called} must be floating point, got {values.dtype}")
    if indices.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{its_indices} must be int32 or int64, got {indices.dtype}")
    for name, tensor in ((called, values), (its_indices, indices)):
        if tensor.device != device:
            raise ValueError(f"{name} must be on {beside}'s device {device}, got {tensor.device}; move one of them")


def within(numbers: Tensor, size: int) -> bool:
    """Whether all are from 0 to size - 1."""
    if not numbers.numel():
        return True
    smallest, largest = map(int, numbers.aminmax())
    return 0 <= smallest <= largest < size


def check_indices(indices: Tensor, n_latents: int) -> None:
    if not within(indices, n_latents):
        smallest, largest = map(int, indices.aminmax())
        raise IndexError(f"indices must lie in 0 .. {n_latents - 1}, got values from {smallest} to {largest}")


def selected_values(values: Tensor, indices: Tensor, row_ids: Tensor, rows: int, latents: Tensor) -> Tensor:
    """[rows, F] values of `latents` in a code given by its entries. A latent asked for twice is answered twice."""
    # A latent asked for twice has two slots, of which the first is filled: how many differ, nobody has to wait for.
    wanted = latents.long().sort().values
    table = values.new_zeros(rows, wanted.shape[0])
    if table.numel() and values.numel():
        columns = indices.reshape(-1).long()
        slots = torch.searchsorted(wanted, columns).clamp_(max=wanted.shape[0] - 1)
        found = torch.where(wanted[slots] == columns, values.reshape(-1), 0)
        # Entries that are not asked for add 0 to some slot; at most one entry of a row adds more to any slot.
        table.index_put_((row_ids.reshape(-1), slots), found, accumulate=True)
    return table[:, torch.searchsorted(wanted, latents.long())]


def _flatten(code: SparseCode) -> tuple[list[Any], int]:
    return [code.values, code.indices, code.row_offsets], code.n_latents


def _unflatten(leaves: Any, n_latents: int) -> SparseCode:
    # Past __post_init__: pytree functions put arbitrary objects in the place of tensors.
    values, indices, row_offsets = leaves
    code = object.__new__(SparseCode)
    for name, value in (
        ("values", values),
        ("indices", indices),
        ("n_latents", n_latents),
        ("row_offsets", row_offsets),
    ):
        object.__setattr__(code, name, value)
    return code


pytree.register_pytree_node(SparseCode, _flatten, _unflatten, serialized_type_name="sparsefeat_kernels.code.SparseCode")
