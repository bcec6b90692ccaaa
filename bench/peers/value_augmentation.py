"""Attention maps from any attention that takes values wider than its queries: V' = [V | one-hot rows of the tokens].

The output's extra columns are the probabilities of those tokens, a head at a time.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsefeat.measure.ops.attention import AttentionCase
from sparsefeat.measure.timing import Provider

NAME = "values with one-hot rows, SDPA"
PACKAGE = None


def why_absent() -> str:
    return ""


def prepare(case: AttentionCase) -> tuple[AttentionCase, Tensor, Tensor]:
    marks = torch.eye(case.k.shape[2], case.selected, device=case.q.device, dtype=case.v.dtype)
    return case, case.empty_maps(), marks.expand(*case.k.shape[:2], *marks.shape)


def run(state: Any) -> tuple[Tensor, Tensor]:
    case, maps, marks = state
    d = case.v.shape[-1]
    out = F.scaled_dot_product_attention(case.q, case.k, torch.cat([case.v, marks], dim=-1))
    maps += out[:, :, case.image_rows, d:].sum(1, dtype=torch.float32)
    return out[..., :d], maps


def providers(op: str, dtype: str, device: str) -> list[Provider]:
    if op not in ("attention_map", "attention_tap"):
        return []
    return [Provider(NAME, run, prepare, lambda state, answer: (answer[0], answer[1].clone()))]
