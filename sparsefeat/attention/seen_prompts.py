"""What the prompts of a call became, seen where the text encoders are given their ids."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparsefeat.attention.cross_attention import cross_attentions_of
from sparsefeat.attention.encoded import EncodedPrompt, Rows
from sparsefeat.pipeline import Call, Context
from sparsefeat.pipeline.families.family import TextLayout
from sparsefeat.pipeline.families.registry import family_of
from sparsefeat.pipeline.knowing.references import listed
from sparsefeat.pipeline.knowing.texts import tokenizer_of

ENCODERS = ("text_encoder", "text_encoder_2", "text_encoder_3", "text_encoder_4")


class SeenPrompts:
    """For instruments that look words up: they listen to `components`, and hand on `prepare`, `begin_call` and
    `at_component`. `condition`: "cond" for the prompts, "uncond" for the negative ones.
    """

    def __init__(self, condition: str = "cond") -> None:
        self.condition = condition
        self._tokenizers: dict[str, Any] = {}
        self.begin_call(Call())

    def components(self, pipe: Any) -> tuple[str, ...]:
        return tuple(name for name in ENCODERS if getattr(pipe, name, None) is not None)

    def prepare(self, pipe: Any) -> None:
        found = {name: tokenizer_of(pipe, name) for name in self.components(pipe)}
        self._tokenizers = {name: tokenizer for name, tokenizer in found.items() if tokenizer is not None}

    def begin_call(self, call: Call) -> None:
        self._call = call
        # By encoder and prompt: the ids of each of its runs, and which of them the attention mask keeps.
        self._runs: dict[tuple[str, int], list[tuple[tuple[int, ...], tuple[bool, ...]]]] = {}

    def at_component(self, name: str, arguments: Mapping[str, Any], context: Context) -> None:
        """A text encoder runs: what it is given for the prompts."""
        ids, mask = arguments.get("input_ids"), arguments.get("attention_mask")
        if not isinstance(ids, Tensor) or ids.ndim != 2 or len(ids) != len(context.condition):
            return
        masked = isinstance(mask, Tensor) and mask.shape == ids.shape
        kept = mask.bool().tolist() if masked and mask is not None else [[True] * ids.shape[1]] * len(ids)
        rows = zip(ids.tolist(), kept, context.condition, context.prompt_index, strict=True)
        for row, own, condition, image in rows:
            if condition == self.condition:
                runs = self._runs.setdefault((name, image // self._call.images_per_prompt), [])
                runs.append((tuple(row), tuple(own)))

    def prompts(self, layout: TextLayout | None = None, known: bool = True) -> tuple[EncodedPrompt, ...] | None:
        """Every prompt of the call, None when it was given embeddings. `layout`: where the tokens stand, as the model's
        family says; `known` False: it cannot be told, from the number of keys neither.
        """
        call = self._call
        if call.prompts is None:
            return None
        n_prompts, texts = len(call.prompts), call.prompts
        if self.condition == "uncond":
            texts = self._texts("prompt", n_prompts) or [""] * n_prompts
        own = {name: self._texts(name.replace("text_encoder", "prompt"), n_prompts) for name in ENCODERS[1:]}
        found = []
        for index, text in enumerate(texts):
            rows = tuple(
                Rows(tokenizer, ids, name, kept, own[name][index] if own.get(name) else None)
                for name, tokenizer in self._tokenizers.items()
                if known and (name, index) in self._runs
                for ids, kept in [tuple(zip(*self._runs[name, index], strict=True))]
            )
            found.append(EncodedPrompt(text, rows, type(call.pipe).__name__, layout))
        return tuple(found)

    def _texts(self, argument: str, n_prompts: int) -> list[str]:
        """What the call says in `argument`, `prompt_2` for one, one text a prompt; none where it does not say it."""
        texts = listed(self._call.arguments.get(f"negative_{argument}" if self.condition == "uncond" else argument))
        texts = texts * n_prompts if len(texts) == 1 else texts
        return texts if len(texts) == n_prompts else []

    def tokens(self, image: int, keys: int, word: str, root: nn.Module) -> tuple[int, ...]:
        """The positions of a word among the keys of an image's attention to the text in a model; ValueError where they
        cannot be told.
        """
        prompts = self._of(root)
        if prompts is None:
            raise ValueError(
                f"where word={word!r} stands cannot be told, as the call was given embeddings, not text; name token "
                "positions instead, as in words=[2, (3, 4)]."
            )
        return prompts[image // self._call.images_per_prompt].indices(keys, word)

    def marks(self, image: int, keys: int, root: nn.Module) -> tuple[bool, bool]:
        """Whether the first key, and the last, are marks or padding, as CLIP's are, or unknown: T5 begins with the first word,
        and Gemma ends with the last.
        """
        prompts = self._of(root)
        if prompts is None:
            return True, True
        of_words = {
            token.index for token in prompts[image // self._call.images_per_prompt].tokens(keys) if not token.special
        }
        return 0 not in of_words, keys - 1 not in of_words

    def _of(self, root: nn.Module) -> tuple[EncodedPrompt, ...] | None:
        layout = family_of(root).text_layout(self._call.pipe, root, self._call.arguments)
        # Of a joint attention whose family does not say where the tokens stand, the number of keys does not tell it.
        return self.prompts(layout, layout is not None or bool(cross_attentions_of(root)))
