"""EleutherAI's sparsify (distribution eai-sparsify): SparseCoder, its Triton decoder on a GPU."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import importable
from sparsefeat.measure.sae_case import AUXK, SAECase
from sparsefeat.measure.timing import Provider

NAME = "sparsify"
PACKAGE = "eai-sparsify"


def why_absent() -> str:
    if not torch.cuda.is_available():  # its Triton decoder is chosen at import, whatever the device
        os.environ.setdefault("SPARSIFY_DISABLE_TRITON", "1")
    return importable("sparsify")


def coder(case: SAECase) -> Any:
    from sparsify import SparseCoder, SparseCoderConfig

    config = SparseCoderConfig(num_latents=len(case.W_enc), k=case.k, normalize_decoder=False)
    made = SparseCoder(case.x.shape[1], config, device="meta", dtype=case.W_enc.dtype)
    made.encoder.weight, made.encoder.bias = (nn.Parameter(t.detach()) for t in (case.W_enc, case.b_enc))
    made.W_dec, made.b_dec = (nn.Parameter(t.detach()) for t in (case.W_dec, case.b))
    return made


def decode(state: Any) -> Tensor:
    made, values, indices = state
    return made.decode(values, indices)


def forward(state: Any) -> Tensor:
    case, made = state
    found = made.encode(case.x)
    return made.decode(found.top_acts, found.top_indices)


def step(state: Any) -> dict[str, Tensor]:
    case, made = state
    out = made(case.x, dead_mask=case.is_dead)
    loss = out.fvu + AUXK * out.auxk_loss
    weights = (made.encoder.weight, made.encoder.bias, made.W_dec, made.b_dec)
    gradients = torch.autograd.grad(loss, weights)
    return {"loss": loss.detach(), **dict(zip(("W_enc", "b_enc", "W_dec"), gradients[:3], strict=True))}


def with_coder(case: SAECase) -> tuple[SAECase, Any]:
    return case, coder(case)


def providers(op: str, dtype: str, device: str) -> list[Provider]:
    return {
        "topk_encode": [
            Provider(NAME, lambda s: s[1].encode(s[0].x), with_coder, lambda s, found: (found[0], found[1]))
        ],
        "sparse_decode": [
            Provider(NAME, decode, lambda c: (coder(c), c.values.to(c.W_dec.dtype), c.indices.long())),
        ],
        "forward": [Provider(NAME, forward, with_coder)],
        "training_step": [Provider(NAME, step, with_coder, note="its AuxK gradient does not reach the encoder")],
    }.get(op, [])
