"""KempnerInstitute's overcomplete: TopKSAE. It has no training step here: its AuxK is another function (the codes that
were not chosen, not the latents that are dead)."""

from __future__ import annotations

import contextlib
import importlib.util
import sys
import types
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from matplotlib import cm, colormaps
from torch import Tensor, nn

from bench.peers import importable
from sparsefeat.measure.sae_case import SAECase
from sparsefeat.measure.timing import Provider

NAME = "overcomplete"
PACKAGE = "overcomplete"
NOTE = "no bias before the encoder or after the decoder: the first is folded into b_enc, the second added untimed"


@contextlib.contextmanager
def what_its_import_needs() -> Iterator[None]:
    """overcomplete imports its model zoo (torchvision) and its plots (matplotlib.cm.get_cmap) with everything else, and
    nothing here uses them. Where they cannot be had (torchvision's builds go with other builds of torch, matplotlib has
    dropped that function), stand-ins let the import pass; they are taken away after it."""
    modules: dict[str, Any] = {}
    if importable("torchvision"):
        zoo: Any = types.ModuleType("torchvision")
        zoo.transforms = types.ModuleType("torchvision.transforms")
        modules = {"torchvision": zoo, "torchvision.transforms": zoo.transforms}
    with contextlib.ExitStack() as undo:
        sys.modules.update(modules)
        for name in modules:
            undo.callback(sys.modules.pop, name)
        if not hasattr(cm, "get_cmap"):
            undo.enter_context(mock.patch.object(cm, "get_cmap", colormaps.__getitem__, create=True))
        importlib.import_module("overcomplete")
        yield


def why_absent() -> str:
    if importlib.util.find_spec("overcomplete") is None:
        return "not installed"
    try:
        with what_its_import_needs():
            return ""
    except Exception as error:
        return f"cannot be imported: {type(error).__name__}: {error}"


def sae(case: SAECase) -> Any:
    from overcomplete.sae import TopKSAE

    device = case.x.device.type
    with torch.device("meta"):
        made = TopKSAE(case.x.shape[1], len(case.W_enc), case.k, None, {"normalization": "identity"}, device="meta")
    linear = made.encoder.final_block[0]
    linear.weight = nn.Parameter(case.W_enc.detach())
    linear.bias = nn.Parameter((case.b_enc - case.W_enc @ case.b).detach())
    made.dictionary._weights = nn.Parameter(case.W_dec.detach())
    made.dictionary.multiplier = torch.zeros((), device=device, dtype=case.W_dec.dtype)
    made.device = made.dictionary.device = device
    return made.eval()


def with_sae(case: SAECase) -> tuple[SAECase, Any]:
    return case, sae(case)


def biased(state: Any, answer: Tensor) -> Tensor:
    return answer + state[0].b


def providers(op: str, dtype: str, device: str) -> list[Provider]:
    return {
        "topk_encode": [Provider(NAME, lambda s: s[1].encode(s[0].x), with_sae, lambda s, found: found[1], note=NOTE)],
        "sparse_decode": [
            Provider(
                NAME, lambda s: s[1].decode(s[2]), lambda c: (*with_sae(c), c.dense_code.to(c.W_dec.dtype)), biased,
                note=NOTE,
            )
        ],
        "forward": [Provider(NAME, lambda s: s[1](s[0].x)[2], with_sae, biased, note=NOTE)],
    }.get(op, [])  # fmt: skip
