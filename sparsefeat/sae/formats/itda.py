"""ITDA (arXiv 2505.24360): `atoms.pt` [n_latents, d_model], unit vectors, and `metadata.yaml`, which has k.

There is no encoder: k steps of matching pursuit over the atoms, signed. The released code pursues the activations as they
are; the paper divides them by their norm first, which divides the code by it too and leaves the reconstruction the same.
`atom_indices.pt` [n_latents, 2] says which sequence and position every atom was: statistics "sequence" and "position".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
import yaml
from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.files import Described, read_yaml, weights
from sparsefeat.sae.formats.foreign_config import config_of, k_of, text
from sparsefeat.sae.formats.format import Format, Given

NAME, TITLE = "itda", "ITDA"
ATOMS, INDICES, METADATA = "atoms.pt", "atom_indices.pt", "metadata.yaml"
DEFAULT_K = 40  # of the released code, where metadata.yaml has none
HARMLESS = frozenset(
    {"activation_dim", "dict_size", "d_model", "n_atoms", "target_loss", "loss_threshold", "submodule"}
)
# Larger whole numbers are not exact in float32, which statistics are kept in.
EXACT = 2**24
# Norms this far from one change the pursuit's coefficients by as much.
UNIT_TOLERANCE = 1e-2


def detect(place: Path) -> bool:
    return (place / ATOMS).exists()


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    path = place / METADATA
    described = Described(path, read_yaml(path))
    with weights(place / ATOMS, alone=ATOMS) as held:
        shape = held.shape(ATOMS)
        if shape is None or len(shape) != 2:
            raise ValueError(f"{place / ATOMS} holds no matrix of floating numbers: [n_latents, d_model] was expected")
        atoms = held.take({ATOMS: shape})[ATOMS]
    n, d = shape
    norms = torch.linalg.vector_norm(atoms, dim=1, dtype=torch.float64)
    if not ((norms - 1).abs() < UNIT_TOLERANCE).all():
        raise ValueError(
            f"{place / ATOMS} has atoms of norms {norms.min():.3g} to {norms.max():.3g}: unit vectors were expected, "
            "call normalize_decoder() of the program that wrote it and save again"
        )
    tensors = {"W_dec": atoms, "b_pre": atoms.new_zeros(d), "b_out": atoms.new_zeros(d)}
    tensors |= _origins(place / INDICES, n) if (place / INDICES).exists() else {}
    plain = {name: v for name, v in described.plain.items() if isinstance(v, (str, int, float)) and name != "device"}
    config = config_of(
        path,
        d_model=d,
        n_latents=n,
        activation="matching_pursuit",
        k=k_of(path, described, given.k) if "k" in described or given.k else DEFAULT_K,
        normalizer="none",
        base_model=text(path, described, "lm_name"),
        metadata=plain,
        statistics=tuple(name.removeprefix("statistic_") for name in tensors if name.startswith("statistic_")),
    )
    described.check(HARMLESS)
    return config, tensors


def _origins(path: Path, n: int) -> dict[str, Tensor]:
    with weights(path, alone=INDICES) as held:
        indices = held.whole_numbers(INDICES)
    if indices is None or tuple(indices.shape) != (n, 2):
        raise ValueError(f"{path} holds no whole numbers of shape [{n}, 2]: atoms and indices do not belong together")
    if n and int(indices.abs().max()) >= EXACT:
        return {}
    return {"statistic_sequence": indices[:, 0].float(), "statistic_position": indices[:, 1].float()}


def write(folder: Path, config: SAEConfig, tensors: Mapping[str, Tensor]) -> None:
    if config.activation != "matching_pursuit":
        raise ValueError(f"{TITLE} cannot express activation {config.activation!r}: save in the native format instead")
    if config.normalizer not in ("none", "unit_norm") or tensors["b_pre"].any() or tensors["b_out"].any():
        raise ValueError(f"{TITLE} has atoms and no biases or normaliser: save in the native format instead")
    plain = {name: v for name, v in config.metadata.items() if isinstance(v, (str, int, float))}
    described = {**plain, "k": config.k, "activation_dim": config.d_model, "lm_name": config.base_model or ""}
    torch.save(tensors["W_dec"].detach().cpu().clone(), folder / ATOMS)
    origins = [f"statistic_{name}" for name in ("sequence", "position")]
    if all(name in tensors for name in origins):
        indices = torch.stack([tensors[name] for name in origins], 1)
    else:
        indices = torch.full((config.n_latents, 2), -1)
    torch.save(indices.long().cpu(), folder / INDICES)
    (folder / METADATA).write_text(yaml.safe_dump(described), encoding="utf-8")


FORMAT = Format(NAME, TITLE, (ATOMS, METADATA), detect, read, write, optional=(INDICES,))
