"""ITDA (arXiv 2505.24360): `atoms.pt` [n_latents, d_model], unit vectors, and `metadata.yaml`, which has k.

There is no encoder: k steps of matching pursuit over the atoms, signed. The released code pursues the activations as they
are; the paper divides them by their norm first, which divides the code by it too and leaves the reconstruction the same.
`atom_indices.pt` [n_latents, 2] says which sequence and position every atom was: statistics "sequence" and "position".
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.formats.format import Format, Given, check_tensors, read_torch

NAME, TITLE = "itda", "ITDA"
ATOMS, INDICES, METADATA = "atoms.pt", "atom_indices.pt", "metadata.yaml"
DEFAULT_K = 40  # of the released code, where metadata.yaml has none
# Larger whole numbers are not exact in float32, which statistics are kept in.
EXACT = 2**24
# Norms this far from one change the pursuit's coefficients by as much.
UNIT_TOLERANCE = 1e-2


def detect(place: Path) -> bool:
    return (place / ATOMS).is_file()


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    described = _metadata(place / METADATA)
    atoms = read_torch(place / ATOMS)
    if not isinstance(atoms, Tensor) or atoms.ndim != 2 or not atoms.is_floating_point():
        raise ValueError(f"{place / ATOMS} holds no matrix of floating numbers: [n_latents, d_model] was expected")
    n, d = atoms.shape
    norms = torch.linalg.vector_norm(atoms.double(), dim=1)
    if not ((norms - 1).abs() < UNIT_TOLERANCE).all():
        raise ValueError(
            f"{place / ATOMS} has atoms of norms {norms.min():.3g} to {norms.max():.3g}: unit vectors were expected, "
            "call normalize_decoder() of the program that wrote it and save again"
        )
    tensors = {"W_dec": atoms, "b_pre": atoms.new_zeros(d), "b_out": atoms.new_zeros(d)}
    tensors |= _origins(place / INDICES, n) if (place / INDICES).is_file() else {}
    k = given.k if given.k is not None else described.get("k", DEFAULT_K)
    config = SAEConfig(
        int(d),
        int(n),
        activation="matching_pursuit",
        k=k,
        normalizer="none",
        base_model=described.get("lm_name") or None,
        metadata={name: v for name, v in described.items() if isinstance(v, (str, int, float)) and name != "device"},
        statistics=tuple(name.removeprefix("statistic_") for name in tensors if name.startswith("statistic_")),
    )
    return config, tensors


def _metadata(path: Path) -> dict[str, Any]:
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} is missing: an ITDA folder needs it, copy it there too") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path} is not plain YAML ({str(error).split(chr(10))[0]}): copy or download it again"
        ) from None
    if not isinstance(values, dict) or not all(isinstance(name, str) for name in values):
        raise ValueError(f"{path} holds a {type(values).__name__}: names and values were expected")
    return values


def _origins(path: Path, n: int) -> dict[str, Tensor]:
    indices = read_torch(path)
    if not isinstance(indices, Tensor) or tuple(indices.shape) != (n, 2) or indices.is_floating_point():
        raise ValueError(f"{path} holds no whole numbers of shape [{n}, 2]: atoms and indices do not belong together")
    if int(indices.abs().max()) >= EXACT:
        return {}
    return {"statistic_sequence": indices[:, 0].float(), "statistic_position": indices[:, 1].float()}


def write(folder: Path, config: SAEConfig, tensors: Mapping[str, Tensor]) -> None:
    if config.activation != "matching_pursuit":
        raise ValueError(f"{TITLE} cannot express activation {config.activation!r}: save in the native format instead")
    if config.normalizer not in ("none", "unit_norm") or tensors["b_pre"].any() or tensors["b_out"].any():
        raise ValueError(f"{TITLE} has atoms and no biases or normaliser: save in the native format instead")
    t = check_tensors(folder, tensors, {"W_dec": (config.n_latents, config.d_model)})
    plain = {name: v for name, v in config.metadata.items() if isinstance(v, (str, int, float))}
    described = {**plain, "k": config.k, "activation_dim": config.d_model, "lm_name": config.base_model or ""}
    torch.save(t["W_dec"].detach().cpu().clone(), folder / ATOMS)
    origins = [f"statistic_{name}" for name in ("sequence", "position")]
    if all(name in tensors for name in origins):
        indices = torch.stack([tensors[name] for name in origins], 1)
    else:
        indices = torch.full((config.n_latents, 2), -1)
    torch.save(indices.long().cpu(), folder / INDICES)
    (folder / METADATA).write_text(yaml.safe_dump(described), encoding="utf-8")


FORMAT = Format(NAME, TITLE, (ATOMS, METADATA), detect, read, write, optional=(INDICES,))
