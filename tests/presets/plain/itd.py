"""Interpret-then-Deactivate (arXiv 2503.09446), written out.

The SAE sees the output x of a CLIP layer, z = relu(topk(E (x - b_pre) + b_lat)). Token 0 begins every text.

    selection   of each prompt by itself, unpadded: a_i = max over tokens 1.. of z_i, its M largest latents;
                F = union over erased prompts minus union over remaining prompts
    edit        z'_{p,i} = strength z_{p,i} for i in F and p >= 1, xhat' = z' D + b_pre
    error       mse(prompt) = mean over the prompt's tokens (0 among them, padding not) and dimensions of (xhat' - x)^2;
                "max_token" takes the mean over dimensions and the maximum over tokens
    tau         0.99 times the smallest error of the erased prompts
    gate        x' = xhat' at every position if mse(prompt) >= tau, else x

The released code has: tau of the celebrities by "max_token" and their gate by "mean"; tau of the styles at strength -6
and inference at -8; tau None for nudity, with which it fails (here None edits always); an error over padded tokens,
padding being to the longest prompt of the batch. Each is an argument below.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch

from tests.presets.plain.dense import DenseSAE, decode, topk_then_relu
from tests.presets.plain.sites import module_at, rewritten

Reduce = Literal["mean", "max_token"]


def unpadded(pipe: Any, text: str) -> torch.Tensor:
    """[1, tokens]: the text's own tokens, the first and the last of CLIP's marks included."""
    tokenizer = pipe.tokenizer
    return tokenizer(text, truncation=True, max_length=tokenizer.model_max_length, return_tensors="pt").input_ids


def layer_output(pipe: Any, path: str, text: str) -> torch.Tensor:
    """[tokens, d] of one text without padding."""
    found: list[torch.Tensor] = []
    with torch.no_grad(), rewritten(module_at(pipe, path), lambda _came_in, output: found.append(output)):
        pipe.text_encoder(unpadded(pipe, text))
    return found[0][0]


def top_latents(sae: DenseSAE, x: torch.Tensor, M: int, only_active: bool = True) -> set[int]:
    """The M latents of the highest maximum over tokens 1..; of equal ones the lowest index.

    A latent that is zero at every token is not taken, though there be fewer than M others; the released top-M would
    fill up with such latents in no stated order (`only_active=False`, here the lowest indices).
    """
    highest = topk_then_relu(sae, x)[1:].amax(dim=0)
    order = torch.sort(highest, descending=True, stable=True).indices[:M]
    return {int(i) for i in order if highest[i] > 0 or not only_active}


def select(
    pipe: Any, path: str, sae: DenseSAE, erase: Sequence[str], remain: Sequence[str], M: int, only_active: bool = True
) -> list[int]:
    """F in ascending order."""

    def union(texts: Sequence[str]) -> set[int]:
        return set().union(*(top_latents(sae, layer_output(pipe, path, text), M, only_active) for text in texts))

    return sorted(union(erase) - union(remain))


def deactivated(sae: DenseSAE, x: torch.Tensor, F: Sequence[int], strength: float) -> torch.Tensor:
    """xhat' of [tokens, d], in float64."""
    z = topk_then_relu(sae, x)
    z[1:, list(F)] *= strength
    return decode(sae, z)


def error(edited: torch.Tensor, x: torch.Tensor, reduce: Reduce = "mean") -> float:
    """Of [tokens, d]."""
    squares = (edited - x.double()) ** 2
    return float(squares.mean() if reduce == "mean" else squares.mean(dim=1).max())


def tau(
    pipe: Any,
    path: str,
    sae: DenseSAE,
    F: Sequence[int],
    erase: Sequence[str],
    strength: float = -8.0,
    reduce: Reduce = "mean",
) -> float:
    """The threshold of the gate, from the erased prompts one by one, unpadded."""
    hidden = [layer_output(pipe, path, text) for text in erase]
    return 0.99 * min(error(deactivated(sae, x, F, strength), x, reduce) for x in hidden)


@contextmanager
def deactivate(
    pipe: Any,
    path: str,
    sae: DenseSAE,
    F: Sequence[int],
    prompts: Sequence[str],
    *,
    tau: float | None,
    strength: float = -8.0,
    gate_reduce: Reduce = "mean",
    gate_tokens: Literal["unpadded", "all"] = "unpadded",
) -> Iterator[list[bool]]:
    """Edit the first call of the text encoder, which has to be that of `prompts`; the negative prompts' is left alone.

    Yields a list that after the call holds whether each prompt was edited.
    """
    edited: list[bool] = []

    def rule(_came_in: torch.Tensor, output: torch.Tensor) -> torch.Tensor | None:
        if edited:
            return None
        new = output.double().clone()
        for row, prompt in enumerate(prompts):
            x = output[row]
            reconstruction = deactivated(sae, x, F, strength)
            tokens = unpadded(pipe, prompt).shape[1] if gate_tokens == "unpadded" else len(x)
            edited.append(tau is None or error(reconstruction[:tokens], x[:tokens], gate_reduce) >= tau)
            if edited[row]:
                new[row] = reconstruction
        assert len(output) == len(prompts)
        return new

    with rewritten(module_at(pipe, path), rule):
        yield edited
