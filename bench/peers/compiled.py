"""The functions of linear_topk under torch.compile."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from bench.peers import linear_topk
from sparsefeat.measure.sae_case import SAECase
from sparsefeat.measure.timing import Provider

NAME = f"{linear_topk.NAME}, compiled"
PACKAGE = None


def why_absent() -> str:
    if not torch.cuda.is_available() and not any(map(shutil.which, ("g++", "clang++", "c++"))):
        return "torch.compile needs a C++ compiler, and there is none"
    return ""


def compiled(function: Any) -> Any:
    torch._dynamo.reset()  # one graph a figure: recompilations for other shapes would count against a limit
    return torch.compile(function, dynamic=False)


def encode_state(case: SAECase) -> Any:
    return compiled(linear_topk.encode), (case.x, case.W_enc, case.b_enc, case.b, case.k)


def forward_state(case: SAECase) -> Any:
    return compiled(linear_topk.forward), (case.x, case.W_enc, case.b_enc, case.W_dec, case.b, case.k)


def step_state(case: SAECase) -> Any:
    return (case, linear_topk.weights(case)), compiled(linear_topk.loss)


def providers(op: str, dtype: str, device: str) -> list[Provider]:
    encode = [Provider(NAME, lambda state: state[0](*state[1]), encode_state)]
    return {
        "topk_encode": encode if device == "cuda" else [],  # a CPU's ten minutes: its forward has the encoder too
        "forward": [Provider(NAME, lambda state: state[0](*state[1]), forward_state)],
        "training_step": [Provider(NAME, lambda state: linear_topk.step(*state), step_state)],
    }.get(op, [])
