"""Concept Steerers (arXiv 2501.19066), written out.

The SAE sees the output h of a text encoder's layer. With x_C the prompt that names the concept, padded as prompts are:

    v_p = lambda sum_i relu(E (h_p(x_C) - b_pre) + b_lat)_i d_i      every position p; no top-k, no output bias
    SD, SDXL   the first call of a text encoder (the prompt)             h_p += v_p
               the second call (the negative prompt)                     h_p -= v_p
    FLUX       the only call of the T5                                   h_p += v_p

For SDXL one SAE sees both encoders' layers side by side; the first columns of v go back to the first encoder, the
rest to the second. The vector does not depend on the prompt that is steered. All positions take part, the beginning of
text and the padding among them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from tests.presets.plain.dense import DenseSAE, relu
from tests.presets.plain.sites import module_at, rewritten


@dataclass(frozen=True)
class TextSite:
    layer: str
    """`text_encoder.text_model.encoder.layers.9` as published; the path in the pipeline at hand."""
    tokenizer: str
    """The pipeline's attribute: "tokenizer" or "tokenizer_2"."""

    @property
    def encoder(self) -> str:
        return self.layer.partition(".")[0]


def layer_output(pipe: Any, site: TextSite, text: str, length: int | None = None) -> torch.Tensor:
    """[tokens, d]: the layer's output for one text, padded to `length` or the tokenizer's own."""
    tokenizer = getattr(pipe, site.tokenizer)
    ids = tokenizer(
        text,
        padding="max_length",
        max_length=length or tokenizer.model_max_length,
        truncation=True,
        return_tensors="pt",
    ).input_ids
    found: list[torch.Tensor] = []
    with torch.no_grad(), rewritten(module_at(pipe, site.layer), lambda _came_in, output: found.append(output)):
        getattr(pipe, site.encoder)(ids)
    return found[0][0]


def concept_vector(
    pipe: Any, sae: DenseSAE, sites: Sequence[TextSite], concept: str, strength: float, length: int | None = None
) -> list[torch.Tensor]:
    """v of each site, [tokens, width of the site] in float64."""
    hidden = [layer_output(pipe, site, concept, length) for site in sites]
    v = strength * (relu(sae, torch.cat(hidden, dim=1)) @ sae.D.double())
    return list(v.split([h.shape[1] for h in hidden], dim=1))


@contextmanager
def steer(
    pipe: Any, sites: Sequence[TextSite], vectors: Sequence[torch.Tensor], signs: Sequence[float] = (1.0, -1.0)
) -> Iterator:
    """`signs` are those of an encoder's calls in their order, (1,) for FLUX; later calls are left alone. Good for one
    run of the pipeline."""
    with ExitStack() as stack:
        for site, v in zip(sites, vectors, strict=True):
            stack.enter_context(_add_by_call(module_at(pipe, site.layer), v, signs))
        yield


def _add_by_call(layer: Any, v: torch.Tensor, signs: Sequence[float]) -> Any:
    remaining = iter(signs)

    def rule(_came_in: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        sign = next(remaining, None)
        return None if sign is None else output.double() + sign * v

    return rewritten(layer, rule)
