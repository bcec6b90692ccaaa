"""TokenDirection: a direction added to the embeddings of chosen words, more of it step by step (SAEdit, arXiv 2510.05081).

Of pairs of sentences, without and with an attribute, an SAE of the text encoder's last output gives each latent's largest
value over the sentence's own tokens, a and b `[n_latents]`:

    m_p   b where b / (a + 1e-6) is above its 99.5th percentile over the latents, else 0        of pair p
    v     the first right singular vector of the rows m_p, times its singular value / sqrt(pairs); its sign so that the
          sum of its products with the m_p is positive
    direction = sum over latents of v_i d_i
    edit at step i of N   e' = e + strength min(exp(15 growth i / N) - 1, 1) direction   at the words' tokens

The published program knows N = 40, and puts the SAE's reconstruction in the place of e; here its error is kept. What is
public says neither how v is scaled nor the cap: both are ours.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparsefeat.arguments import kept, number
from sparsefeat.attention.word_embeddings import WordEmbeddings
from sparsefeat.features.attached import hookpoint_of
from sparsefeat.features.prompts import layer_outputs_and_tokens
from sparsefeat.pipeline import Context
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.sae import SAE
from sparsefeat.steering.saved import SavableInstrument, register


@register("sparsefeat.steering:TokenDirection")
class TokenDirection(WordEmbeddings, SavableInstrument):
    """Instrument: the edit above, of what the denoiser is given of the conditional prompt.

    Args:
        words: of the prompt, each a word or phrase.
        direction: `[width]` of the text that the denoiser is given: FLUX's T5 4096, SD 1.5's CLIP 768.
        strength: factor; below 0 turns it round.
        growth: how fast it grows (the published factor), above 0; None: the same at every step.
        steps: as in `Steer`.

    Raises:
        TypeError: `direction` is no tensor.
        ValueError: an argument that cannot be, by its name; `direction` is no finite vector.
    """

    kept: ClassVar[tuple[str, ...]] = ("words", "direction", "strength", "growth")

    def __init__(
        self,
        words: Sequence[str],
        direction: Tensor,
        strength: float = 1.0,
        *,
        growth: float | None = None,
        steps: Steps = None,
    ):
        super().__init__(words)
        if not isinstance(direction, Tensor):
            raise TypeError(f"direction is {type(direction).__name__}, not a tensor; give torch.as_tensor(direction).")
        if direction.ndim != 1:
            raise ValueError(f"direction has shape {list(direction.shape)}; give [width].")
        self.direction: Tensor = kept("direction", direction)
        self.strength: float = number("strength", strength)
        self.growth: float | None = None if growth is None else number("growth", growth, 0, above=True)
        self.window: StepWindow = StepWindow.parse(steps)

    @classmethod
    def fit(
        cls,
        pipe: Any,
        sae: SAE,
        pairs: Sequence[tuple[str, str]],
        words: Sequence[str],
        strength: float = 1.0,
        *,
        percentile: float = 99.5,
        growth: float | None = None,
        steps: Steps = None,
    ) -> TokenDirection:
        """Find the direction from pairs of sentences (without, with).

        sae: of the text encoder's last output, which the denoiser is given ("text_encoder.final_layer_norm" of SD 1.5,
        "text_encoder_2.encoder.final_layer_norm" of FLUX).

        Raises:
            TypeError: `sae` is no SAE.
            ValueError: an argument that cannot be, by its name; no latent tells the sentences of a pair apart.
        """
        at = hookpoint_of(sae, None)
        if isinstance(pairs, str) or not pairs or not all(_is_pair(pair) for pair in pairs):
            raise ValueError(f"pairs={pairs!r:.60} must be pairs of sentences, [('a man', 'an old man'), ...].")
        number("percentile", percentile, 0, 100)
        masked = []
        for pair in pairs:
            without, with_it = (_peaks(sae, *found) for found in layer_outputs_and_tokens(pipe, at, list(pair), {}))
            ratio = with_it / (without + 1e-6)
            masked.append(torch.where(ratio > ratio.quantile(percentile / 100), with_it, 0))
        rows = torch.stack(masked)
        if not rows.any():
            raise ValueError(
                "no latent is more active in the second sentences of pairs than in the first; give others."
            )
        _, values, right = torch.linalg.svd(rows, full_matrices=False)
        code = right[0] * values[0] / math.sqrt(len(rows))
        code = code * (rows @ code).sum().sign()
        return cls(words, (code @ sae.W_dec.detach().to(code)).float(), strength, growth=growth, steps=steps)

    def prepare(self, pipe: Any) -> None:
        if getattr(pipe, "text_encoder_3", None) is not None:
            raise ValueError(
                f"{type(pipe).__name__} puts the texts of several encoders one after the other, of which TokenDirection cannot "
                "tell the direction's; use a pipeline whose denoiser is given one text."
            )
        super().prepare(pipe)

    def acts(self, context: Context) -> bool:
        return self.window.contains(context) and self.factor(context.step or 0, context.n_steps or 1) != 0

    def factor(self, step: int, n_steps: int) -> float:
        """What the direction is multiplied by at one step."""
        if self.growth is None:
            return self.strength
        exponent = 15 * self.growth * step / n_steps
        return self.strength * min(math.expm1(min(exponent, 1.0)), 1.0)

    def changed(self, embeddings: Tensor, words: Sequence[Sequence[int]], context: Context) -> Tensor:
        if len(self.direction) != embeddings.shape[1]:
            raise ValueError(
                f"direction has {len(self.direction)} entries and the text that the denoiser is given is "
                f"{embeddings.shape[1]} wide; fit it to this pipeline's last text layer."
            )
        wide = torch.promote_types(embeddings.dtype, torch.float32)
        after = embeddings.to(wide)
        tokens = [token for of_word in words for token in of_word]
        moved = self.factor(context.step or 0, context.n_steps or 1) * self.direction.to(embeddings.device, wide)
        after = after.index_add(0, torch.tensor(tokens, device=after.device), moved.expand(len(tokens), -1))
        return after.to(embeddings.dtype)


def _is_pair(pair: Any) -> bool:
    return isinstance(pair, (tuple, list)) and len(pair) == 2 and all(isinstance(text, str) and text for text in pair)


@torch.no_grad()
def _peaks(sae: SAE, rows: Tensor, own: Any) -> Tensor:
    """[n_latents], fp64: the largest value of each latent over a sentence's own tokens."""
    return sae.encode(rows[own.start : own.stop].to(sae.device)).dense().double().amax(0).clamp_min(0).cpu()
