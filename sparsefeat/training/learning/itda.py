"""ITDA (arXiv 2505.24360, after arXiv 2505.17769): a dictionary of data points, found in one pass without gradients."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from sparsefeat_kernels import matching_pursuit, sparse_decode
from torch import Tensor

from sparsefeat.arguments import finite, number, whole
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.sae.config import PURSUITS

AT_A_TIME = 256  # rows that are tried against the same dictionary
ALIKE = 1 - 1e-6  # cosine from which two rows are the same atom


@torch.no_grad()
def build_itda(
    batches: Iterable[Tensor],
    n_latents: int,
    k: int = 40,
    threshold: float = 0.01,
    *,
    activation: str = "matching_pursuit",
    hookpoint: str | None = None,
    base_model: str | None = None,
) -> SAE:
    """An SAE whose decoder rows are rows of the data, of unit norm, and whose encoder is a pursuit over them.

    A row becomes an atom if the dictionary so far does not reconstruct it: with x and x_hat of unit norm, where
    |x - x_hat|^2 > threshold (of rows tried at once, none that another of them reconstructs). The first atoms are the first `k` rows that differ. It ends with the batches, or with
    `n_latents` atoms; the SAE has as many latents as it has atoms. Rows of zeros are passed over.

    Args:
        batches: of rows `[rows, d_model]`, each gone through `AT_A_TIME` at a time.
        n_latents: the most atoms. k: steps of the pursuit. threshold: above, from 0 to 4.
        activation: "matching_pursuit" (davidkaczer/itda) or "gradient_pursuit" (the paper).

    Raises:
        ValueError: naming the argument; fewer than k rows that differ.
    """
    whole("k", k)
    whole("n_latents", n_latents, k)
    number("threshold", threshold, 0, 4)
    if activation not in PURSUITS:
        raise ValueError(f"activation is {activation!r}: choose one of {', '.join(PURSUITS)}")
    method = activation.removesuffix("_pursuit")
    atoms: Tensor | None = None
    for batch in batches:
        rows = finite("batches", batch).reshape(-1, batch.shape[-1])
        for part in rows.to(torch.promote_types(rows.dtype, torch.float32)).split(AT_A_TIME):
            norm = torch.linalg.vector_norm(part, dim=1, keepdim=True)
            unit = (part / norm)[norm[:, 0] > 0]
            atoms = unit[:0] if atoms is None else atoms
            first = k - len(atoms)
            if first > 0:
                atoms, unit = _first_atoms(atoms, unit, first)
            if len(atoms) >= k and len(unit):
                values, indices = matching_pursuit(unit, atoms, k, method)
                found = sparse_decode(values, indices, atoms, atoms.new_zeros(atoms.shape[1]))
                length = torch.linalg.vector_norm(found, dim=1, keepdim=True)
                missed = (unit - found / length.clamp_min(torch.finfo(length.dtype).tiny)).square().sum(1)
                atoms = torch.cat([atoms, _unlike(unit[missed > threshold], threshold)])[:n_latents]
        if atoms is not None and len(atoms) == n_latents:
            break
    if atoms is None or len(atoms) < k:
        found_rows = 0 if atoms is None else len(atoms)
        raise ValueError(f"k is {k} but there are {found_rows} rows that differ: make it smaller, or collect more")
    config = SAEConfig(
        atoms.shape[1],
        len(atoms),
        activation=activation,
        k=k,
        normalizer="unit_norm",
        hookpoint=hookpoint,
        base_model=base_model,
        metadata={"itda_threshold": float(threshold)},
    )
    sae = SAE(config).to(atoms.device, atoms.dtype)
    sae.W_dec.copy_(atoms)
    return sae.eval()


def _unlike(unit: Tensor, threshold: float) -> Tensor:
    """Of rows of one part, those that no earlier one among them reconstructs by itself."""
    alike = 2 - 2 * (unit @ unit.T).abs() <= threshold
    kept = torch.zeros(len(unit), dtype=torch.bool, device=unit.device)
    for number_of in range(len(unit)):
        kept[number_of] = not bool((alike[number_of] & kept).any())
    return unit[kept]


def _first_atoms(atoms: Tensor, unit: Tensor, wanted: int) -> tuple[Tensor, Tensor]:
    """`wanted` rows more that are no copy of an atom, one after the other; and the rows after them."""
    for number_of, row in enumerate(unit):
        if not len(atoms) or float((atoms @ row).max()) < ALIKE:
            atoms = torch.cat([atoms, row[None]])
            wanted -= 1
        if not wanted:
            return atoms, unit[number_of + 1 :]
    return atoms, unit[:0]
