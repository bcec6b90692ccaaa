"""Multi-Concept T2I-Zero (Tunanyan et al., 2023): concepts of one prompt kept from overpowering and mixing with each other.

Two instruments, which may be attached together. Both act on the conditional rows alone.

    with sf.attach(pipe, CorrectionBySimilarities(["fox", "rocket"]), CrossTokenNMS(["fox", "rocket"])):
        image = pipe("a fox and a rocket").images[0]
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from sparsefeat_kernels import attention_rows
from torch import Tensor

from sparsefeat.arguments import number, whole
from sparsefeat.attention.cross_attention import cross_attentions
from sparsefeat.attention.losses import smoothed
from sparsefeat.attention.word_embeddings import OfWords, WordEmbeddings
from sparsefeat.pipeline import (
    Activations,
    AttentionCall,
    Call,
    Context,
    Delta,
    Hookpoint,
    resolve,
)


class CorrectionBySimilarities(WordEmbeddings):
    """The embedding of every concept's token is drawn to what it has in common with its neighbours, before the denoiser.

        S = f_c * f   (elementwise, [tokens, d])      kept: the entries above the `quantile` of S
        weights = S where kept / max of these, in the rows within `window` tokens of c, else 0
        f_c <- (1 - strength) f_c + strength sum over rows of weights * f

    Args:
        words: the concepts; of a word of several tokens each is corrected. All are corrected from the embeddings as the
            text encoder gave them.
        strength: alpha; 0 changes nothing.
        window: gamma, in tokens to either side; the start token is never in it.
        quantile: of S, the share of entries that are left out. The paper leaves it open; 0.9 is ours.

    Raises:
        ValueError: an argument that cannot be, by its name.
    """

    def __init__(self, words: Sequence[str], strength: float = 0.25, window: int = 5, quantile: float = 0.9):
        super().__init__(words)
        self.strength: float = number("strength", strength, 0, 1)
        self.window: int = whole("window", window)
        self.quantile: float = number("quantile", quantile, 0, 1)

    def changed(self, embeddings: Tensor, words: Sequence[Sequence[int]], context: Context) -> Tensor:
        return self.corrected(embeddings, [token for of_word in words for token in of_word])

    def corrected(self, embeddings: Tensor, concepts: Sequence[int]) -> Tensor:
        """Embeddings [tokens, d] with those of the concepts' tokens corrected."""
        wide = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
        after = wide.clone()
        position = torch.arange(len(wide), device=wide.device)
        for concept in concepts:
            similar = wide[concept] * wide
            weights = torch.where(similar > similar.flatten().quantile(self.quantile), similar, 0)
            highest = weights.max()
            if not highest > 0:
                continue  # nothing of it is alike
            near = ((position - concept).abs() <= self.window) & (position > 0)
            drawn = (weights / highest * near[:, None] * wide).sum(0)
            after[concept] = (1 - self.strength) * wide[concept] + self.strength * drawn
        return after.to(embeddings.dtype)


class CrossTokenNMS(OfWords):
    """At every position only the word with the highest map is attended to among the words; the others' tokens get
    nothing there.

        A = probabilities averaged over heads, of each word the mean of its tokens, smoothed 3 x 3 (sigma 1)
        P[head, position, token of word w] <- 0   where w is not the word with the highest A at the position

    Probabilities of other tokens stay as they are. What the suppressed tokens would have put into the module's output is
    subtracted from it, which is the same.

    Args:
        words: at least two.
        layers: parts of the paths of cross-attention modules; default all.

    Raises:
        ValueError: fewer than two words.
    """

    def __init__(self, words: Sequence[str], layers: Sequence[str] | None = None):
        super().__init__(words)
        if len(self.words) < 2:
            raise ValueError(f"words={words!r} must be two at least, between which the positions are shared out.")
        self.layers: tuple[str, ...] | None = (
            None if layers is None else (layers,) if isinstance(layers, str) else tuple(layers)
        )
        self._paths: tuple[str, ...] = ()
        self._projections: dict[str, Any] = {}
        self._removed: dict[str, Tensor] = {}

    def prepare(self, pipe: Any) -> None:
        super().prepare(pipe)
        found = list(cross_attentions(pipe, "CrossTokenNMS"))
        chosen = [path for path in found if self.layers is None or any(part in path for part in self.layers)]
        if not chosen:
            raise ValueError(f"layers={self.layers!r} match no cross-attention module; there are: {', '.join(found)}.")
        self._paths = tuple(chosen)

    def attentions(self, pipe: Any) -> tuple[str, ...]:
        return self._paths

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return tuple(Hookpoint(path) for path in self._paths)

    def begin_call(self, call: Call) -> None:
        super().begin_call(call)
        self._removed = {}

    def at_attention(self, call: AttentionCall, context: Context) -> None:
        if call.index > 0 or context.grid is None:
            return
        if len(context.grid) != 2:
            raise ValueError(
                f"{call.path} attends from the {context.grid[0]} frames of a video, of which CrossTokenNMS shares out no "
                "positions; use it with pipelines that make images."
            )
        removed = torch.zeros_like(call.query, dtype=torch.promote_types(call.query.dtype, torch.float32))
        for row, (condition, image) in enumerate(zip(context.condition, context.prompt_index, strict=True)):
            if condition == "cond":
                words = self.tokens(image, call.key.shape[2], call.path.partition(".")[0])
                removed[row] = _suppressed(call, row, words, context.grid)
        self._removed[call.path] = removed.transpose(1, 2).flatten(2)  # [batch, positions, heads * head_dim]

    def at_hookpoint(self, activations: Activations, context: Context) -> Delta | None:
        path = str(context.hookpoint)
        removed = self._removed.pop(path, None)
        if removed is None:
            return None
        module = resolve(self._call.pipe, path).module
        project = module.to_out[0]
        of = removed.to(activations.tensor.dtype)
        with self._call.as_the_pipeline(of.device):
            change = project(torch.zeros_like(of[:1, :1])) - project(of)  # its bias is not of what is removed
        return Delta(change.flatten(0, 1) / getattr(module, "rescale_output_factor", 1.0))


def _suppressed(call: AttentionCall, row: int, words: Sequence[Sequence[int]], grid: tuple[int, ...]) -> Tensor:
    """[heads, positions, head_dim]: what the tokens of the words that are not the highest put into one row's output."""
    query, key, value = (t[row : row + 1].detach() for t in (call.query, call.key, call.value))
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    mask = call.mask
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())] if mask.dim() < 4 else mask
        mask = mask if len(mask) == 1 else mask[row : row + 1]
    lse = attention_rows(query, key, call.scale, mask)[0][0]  # [heads, positions]
    tokens = torch.tensor([token for of_word in words for token in of_word], device=query.device)
    wide = lse.dtype
    scores = query[0].to(wide) @ key[0, :, tokens].to(wide).transpose(1, 2) * call.scale
    if mask is not None:
        bias = mask.expand(1, *scores.shape[:2], key.shape[2])[0][..., tokens]
        scores = scores.masked_fill(~bias, -torch.inf) if bias.dtype == torch.bool else scores + bias
    probabilities = (scores - lse[..., None]).exp()  # [heads, positions, tokens of the words]
    of_word = torch.tensor([i for i, found in enumerate(words) for _ in found], device=query.device)
    mean = probabilities.mean(0)
    maps = torch.stack([mean[:, of_word == i].mean(1) for i in range(len(words))])
    highest = smoothed(maps.unflatten(1, grid[-2:]), sigma=1.0).flatten(1).argmax(0)  # [positions]
    loses = highest[:, None] != of_word[None, :]
    return (probabilities * loses) @ value[0, :, tokens].to(wide)
