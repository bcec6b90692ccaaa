"""What a checkpoint format is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsefeat.sae.config import SAEConfig


@dataclass(frozen=True)
class Given:
    """What the caller of `load_sae` says of an SAE whose format does not store it."""

    k: int | None = None


@dataclass(frozen=True)
class Format:
    """One checkpoint format.

    name: short, as in `sparsefeat sae convert --format NAME`; title: what people call it.
    files: exact names of what must be there, optional of what may be; both are fetched from a hub. A format that is one
        file of any name has none.
    detect: whether this folder or file is of the format. read: open it. Both take a folder or a single file.
    write: into an empty folder; refuses in one sentence, before it writes anything, what the format cannot express.
        None where nothing is written in the format.
    """

    name: str
    title: str
    files: tuple[str, ...]
    detect: Callable[[Path], bool]
    read: Callable[[Path, Given], tuple[SAEConfig, dict[str, Tensor]]]
    write: Callable[[Path, SAEConfig, Mapping[str, Tensor]], None] | None = None
    optional: tuple[str, ...] = ()


def one_bias(
    W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, bias: Tensor, *, subtracted: bool = True
) -> dict[str, Tensor]:
    """The tensors of an SAE, weights `[n_latents, d_model]`, whose one bias `[d_model]` is added to its output and, if
    `subtracted`, taken from its input before."""
    b_pre = bias if subtracted else torch.zeros_like(bias)
    return {"W_enc": W_enc.contiguous(), "b_enc": b_enc, "W_dec": W_dec.contiguous(), "b_pre": b_pre, "b_out": bias}
