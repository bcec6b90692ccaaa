"""`HeatMaps`: where in the image each word of the prompt is attended to, added up while the pipeline runs.

DAAM (Tang et al., "What the DAAM", ACL 2023) defines for a cross-attention

    D[t, y, x] = 1 / |L H|  sum over layers l, heads h of  max(0, resize( sum over steps s of P[s, l, h, (y, x), t] ))

with P the attention probabilities of the conditional rows, and a bicubic resize of every map to the largest grid. Here
the sums over heads, layers and steps are taken *before* the resize, in one buffer for each grid size, to which the kernels
add every layer's probabilities in place without ever holding them. The resize is linear, so the result differs from
DAAM's only where its clamp at zero acted on the overshoot of a single layer and head (maps on the largest grid are never
resized and agree exactly); `daam_exact=True` keeps layers and heads apart and clamps as DAAM does. Two more differences,
both towards the definition: rows are conditional because the pipeline said so, not because they stand in the second half
of the batch; and the grid may have any shape, of a video too.

Where the attention's own kernel gives the log-sum-exp of its rows, a map costs only the products of the image's queries
with the chosen words' keys: exp(scale q . k - lse).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import mapping, number, whole
from sparsefeat.attention.concepts import Concepts, Outputs
from sparsefeat.attention.encoded import EncodedPrompt
from sparsefeat.attention.heat_map_arguments import kept_of, names_of, weights_of, words_of
from sparsefeat.attention.reading import (
    DIRECTIONS,
    KINDS,
    OF_JOINT,
    Direction,
    Kind,
    Layer,
    layers_of,
    refuse_unknown_words,
)
from sparsefeat.attention.recording import HeatMapRecording
from sparsefeat.attention.seen_prompts import SeenPrompts
from sparsefeat.attention.sums import Attended, Grid, MapSum, Part, add_up, positions
from sparsefeat.attention.word_mask import WordMask
from sparsefeat.attention.words import NoSuchWordError
from sparsefeat.pipeline import AttentionCall, Call, Context, FrozenInstrument
from sparsefeat.pipeline.families.family import TextLayout
from sparsefeat.pipeline.step_window import Steps, StepWindow

SAID_FROM_BYTES = 1 << 23
MAX_BYTES = 1 << 30

StepWeights = Sequence[float] | Callable[[Context], float] | None


class HeatMaps(FrozenInstrument):
    """Instrument: heat maps of the words of the prompt, from the attention between image and text.

    Args:
        kind: what a map is.
            "cross": softmax over the text, of a cross-attention (DAAM's): UNets, PixArt, Sana, Wan.
            "joint": softmax over text and image, of a joint attention: SD3, FLUX, Qwen-Image and others.
            "text_renormalised": the same attention's softmax over its text alone.
            "query_query": softmax over the text's tokens of the products of image queries with *text queries*, both before
            the rotary embedding: the baseline that ConceptAttention was published with.
            "concept": ConceptAttention's: how well the attention's output at a position fits that of each of `concepts`,
            softmax over the concepts. FLUX, SD3, CogVideoX.
            Default: "cross" where text is attended to apart, else "joint"; "concept" where concepts are given.
        concepts: what to find, in or outside the prompt, of one or several tokens; what is left over goes to the nearest,
            so name the background too, concepts=["fox", "snow", "sky"].
        words: the words that will be asked for, or positions of tokens; only their tokens are added up. Default: every token.
        layers: module paths (or parts of them) of the attention modules to read, e.g. `"up_blocks.1"`. Default: every one;
            of a UNet those of the down and up blocks, as in DAAM; for concepts every block with a text stream, of FLUX
            the last fifth of those (15 to 18 of 19), as published.
        steps: when to read: (0.0, 0.5) is the first half of the schedule, [0, 1] the first two steps. Default: always.
        condition: "cond" for maps of the prompt, "uncond" for maps of the negative prompt.
        direction: "image_to_text": where pixels attend to a token. "text_to_image": where a token attends in the image (a
            joint attention's other rows; of "joint" the softmax is over all keys, of the two after it over the image).
        layer_weights: a factor for layers, by (a part of) their path: one number, or one for each head. Others have 1.
        step_weights: a factor for each step, as a list, or a function of the `Context`.
        keep: what is not added up but kept apart, of "layers", "heads" (which needs "layers"), "steps".
        daam_exact: clamp every layer's and head's resized map at zero before they are averaged, as DAAM does.
        max_bytes: a call whose maps would take more is refused before its first step.

    Memory: 4 bytes x tokens x images x the positions of every resolution (fp64: 8), times what is kept apart, said on
    stderr from 8 MiB on; twice where a `mask` was asked for (completed steps, and the step in hand).
    `run[maps]` is a `HeatMapRecording`.

    Raises ValueError at `attach` where the pipeline, or one of the modules, cannot be read in this way.
    """

    def __init__(
        self,
        kind: Kind | None = None,
        *,
        concepts: Sequence[str] | None = None,
        words: Sequence[str | int] | None = None,
        layers: str | Sequence[str] | None = None,
        steps: Steps = None,
        condition: str = "cond",
        direction: Direction = "image_to_text",
        layer_weights: Mapping[str, float | Sequence[float]] | None = None,
        step_weights: StepWeights = None,
        keep: Sequence[str] = (),
        daam_exact: bool = False,
        max_bytes: int = MAX_BYTES,
    ):
        if kind is not None and kind not in KINDS:
            raise ValueError(f"kind={kind!r} is not known; use one of {', '.join(map(repr, KINDS))}.")
        if direction not in DIRECTIONS:
            raise ValueError(f"direction={direction!r} is not known; use one of {', '.join(map(repr, DIRECTIONS))}.")
        if condition not in ("cond", "uncond"):
            raise ValueError(f"condition={condition!r} is not known; use 'cond' or, for the negative prompt, 'uncond'.")
        self.kind, self.direction, self.condition = kind, direction, condition
        self.reads_unturned: bool = kind == "query_query"
        self.words: tuple[str | int, ...] | None = words_of(words)
        self.concepts: tuple[str, ...] | None = names_of("concepts", concepts, "concepts=['fox', 'snow']")
        self.layers: tuple[str, ...] | None = names_of("layers", layers, "layers='up_blocks.1'")
        self.window: StepWindow = StepWindow.parse(steps)
        given_weights = mapping("layer_weights", layer_weights or {}, "parts of layers' paths to factors")
        self.layer_weights: dict[str, tuple[float, ...]] = {
            path: weights_of(path, given) for path, given in given_weights.items()
        }
        self.step_weights: StepWeights = step_weights
        if step_weights is not None and not callable(step_weights):
            if isinstance(step_weights, (str, Mapping)) or not isinstance(step_weights, Iterable):
                raise ValueError(f"step_weights={step_weights!r:.80} must be a list, a factor for each step.")
            self.step_weights = tuple(number(f"step_weights[{i}]", w, 0) for i, w in enumerate(step_weights))
        self.keep: tuple[str, ...] = kept_of(keep)
        self.daam_exact = daam_exact
        self._apart = {*self.keep, "layers", "heads"} if daam_exact else set(self.keep)
        self.max_bytes: int = whole("max_bytes", max_bytes)
        self._check_concepts()
        self._kind: Kind = self.kind or "cross"
        self._beside: Concepts | None = None
        self._layers: dict[str, Layer] = {}
        self._areas: dict[str, int] = {}
        self._texts = SeenPrompts(condition)
        self._call: Call | None = None
        self._is_mask = False
        self._start()

    def _start(self) -> None:
        self._done: dict[Part, MapSum] = {}
        self._now: dict[Part, MapSum] = {}
        self._seen: dict[tuple[str, int], int] = {}
        self._groups: dict[Any, Tensor] = {}
        self._n_tokens = 0
        self._columns: tuple[int, ...] | None = None
        self._layout: TextLayout | None = None
        self._called = self._had_rows = False

    def _check_concepts(self) -> None:
        if self.concepts is None:
            if self.kind == "concept":
                raise ValueError("kind='concept' maps concepts=[...]; name them, as in concepts=['fox', 'snow'].")
            return
        self.kind = self.kind or "concept"
        others = {"words": self.words, "daam_exact": self.daam_exact, "keep=['heads']": "heads" in self.keep}
        wrong = [name for name, given in others.items() if given]
        if self.kind != "concept" or wrong or self.direction != "image_to_text":
            said = wrong[0] if wrong else f"kind={self.kind!r}, direction={self.direction!r}"
            raise ValueError(f"concepts= are maps of their own, over all heads; leave {said} out.")
        if len(set(self.concepts)) < 2:
            raise ValueError(
                f"concepts={list(self.concepts)!r} are told from one another; name two different ones at least."
            )
        if any(len(weights) > 1 for weights in self.layer_weights.values()):
            raise ValueError(
                "layer_weights has one number for each head, and concepts= are maps over all heads; give one."
            )

    def conditions(self) -> tuple[str, ...]:
        return (self.condition,)

    def active(self, context: Context) -> bool:
        return self.window.contains(context)

    def attentions(self, pipe: Any) -> tuple[str, ...]:
        self._beside = None
        if self.concepts is not None:
            self._beside = Concepts(pipe, self.concepts, self.layers)
            self._kind, layers = "concept", self._beside.read
        else:
            self._kind, layers = layers_of(pipe, self.kind, self.layers)
            if self._kind in OF_JOINT:
                refuse_unknown_words(
                    pipe, [(layer.family, layer.root) for layer in layers], self.words or (), "HeatMaps"
                )
        if self.direction == "text_to_image" and self._kind not in OF_JOINT:
            raise ValueError(
                f"direction='text_to_image' asks where text attends in the image, and in {type(pipe).__name__} only the "
                "image attends to the text: leave direction= out."
            )
        self._layers = {layer.path: layer for layer in layers}
        for part in self.layer_weights:
            if not any(part in path for path in self._layers):
                raise ValueError(
                    f"layer_weights names {part!r}, which is in none of the layers: {', '.join(self._layers)}."
                )
        grids = {each.path: each.family.default_grid(pipe, each.root, each.path.partition(".")[2]) for each in layers}
        self._areas = {path: 1 if grid is None else positions(grid) for path, grid in grids.items()}
        return tuple(self._layers) if self._beside is None else tuple(layer.path for layer in self._beside.passed)

    def components(self, pipe: Any) -> tuple[str, ...]:
        model = () if self._beside is None else (self._beside.root_name,)
        return (*self._texts.components(pipe), *model)

    def prepare(self, pipe: Any) -> None:
        self._texts.prepare(pipe)

    def begin_call(self, call: Call) -> None:
        self._start()
        self._call = call
        self._texts.begin_call(call)
        if self._beside is not None:
            self._beside.begin_call(call)

    def at_component(self, name: str, arguments: Mapping[str, Any], context: Context) -> None:
        """A text encoder runs, and is given the prompts; or the model, beside which the concepts run."""
        if self._beside is not None and name == self._beside.root_name:
            beside = [row for row, condition in enumerate(context.condition) if condition == self.condition]
            self._beside.begin_run(arguments, beside)
            return
        self._texts.at_component(name, arguments, context)

    # One attention

    def at_attention(self, call: AttentionCall, context: Context) -> None:
        rows = [row for row, condition in enumerate(context.condition) if condition == self.condition]
        self._called, self._had_rows = True, self._had_rows or bool(rows)
        if not rows or not call.reads_text or context.recomputing:
            return
        attended: Attended | Outputs | None
        if self._beside is not None:
            attended = self._beside.at(call)
        else:
            attended = Attended(call, self._kind, self.direction)
            self._check(attended)
        if attended is None:
            return
        grid, frames = _grid_of(attended, context)
        heads, apart = call.query.shape[1], "heads" in self._apart
        n_images = max(max(context.prompt_index) + 1, (self._call.n_images if self._call else None) or 0)
        tokens = self._begin(attended, grid, n_images, heads, context)
        part = Part(
            grid,
            call.path if "layers" in self._apart else None,
            context.step if "steps" in self._apart else None,
        )
        weights, step_weight = self._head_weights(call.path, heads), self._step_weight(context)
        held = self._now.get(part)
        if held is None:
            dtype = torch.float64 if call.query.dtype == torch.float64 else torch.float32
            shape = (n_images, heads if apart else 1, positions(grid), self._n_columns)
            kept = weights if apart else torch.ones(1, dtype=torch.float32)
            held = MapSum(call.query.new_zeros(shape, dtype=dtype), [0.0] * n_images, kept)
            self._now[part] = held
        image_of = tuple(
            image if condition == self.condition else -1
            for image, condition in zip(context.prompt_index, context.condition, strict=True)
        )
        factor = torch.full((1,), step_weight, dtype=torch.float32) if apart else weights * step_weight
        n_columns = self._n_columns
        if attended.tokens < self._n_tokens:  # a shorter text than another of its batch
            n_columns = attended.tokens if self._columns is None else sum(c < attended.tokens for c in self._columns)
            tokens = None if tokens is None else tokens[:n_columns]
        attended.add_to(
            held.total.view(-1, positions(grid) // frames, self._n_columns)[..., :n_columns],
            self._group(image_of, heads if apart else 1, frames, call.query.device),
            None if bool((factor == 1).all()) else factor.to(call.query.device),
            tokens,
            apart,
        )
        one = self._beside is not None  # map of all heads
        maps_of_row = (1.0 if apart else float(weights[0] if one else weights.sum())) * step_weight / frames
        for row in rows:
            held.count[context.prompt_index[row]] += maps_of_row
        for image in {context.prompt_index[row] for row in rows}:
            self._seen[call.path, image] = self._seen.get((call.path, image), 0) + 1

    def _check(self, attended: Attended) -> None:
        call = attended.call
        if self._kind not in OF_JOINT:
            return
        if "text" not in call.streams or "image" not in call.streams:
            raise ValueError(
                f"{call.path} attends within the {' and '.join(call.streams) or 'image'} alone: leave this module out of "
                "HeatMaps(layers=...)."
            )
        if call.key.shape[2] != call.query.shape[2]:
            raise ValueError(
                f"{call.path} has {call.key.shape[2]} keys for {call.query.shape[2]} queries (a cache of keys?), so which "
                "of them are the text's cannot be told: turn the cache off."
            )

    def _begin(
        self, attended: Attended | Outputs, grid: Grid, n_images: int, heads: int, context: Context
    ) -> Tensor | None:
        """The positions of the tokens to add up, None for all; in a call's first attention also what they will take."""
        device = attended.call.query.device
        if not self._n_tokens:
            self._n_tokens = attended.call.text_tokens or attended.tokens
            self._layout = self._text_layout(attended.call.path)
            self._columns = self._positions()
            self._say(attended.call, grid, n_images, heads, context)
        elif self._n_tokens != (attended.call.text_tokens or attended.tokens) and self._columns is None:
            raise ValueError(
                f"{attended.call.path} has {attended.tokens} text keys where others had {self._n_tokens}, so their maps "
                "cannot be added: attach one HeatMaps for each, with layers=."
            )
        if self._columns is None:
            return None
        if ("tokens", device) not in self._groups:
            self._groups["tokens", device] = torch.tensor(self._columns, device=device)
        return self._groups["tokens", device]

    @property
    def _n_columns(self) -> int:
        return self._n_tokens if self._columns is None else len(self._columns)

    def _text_layout(self, path: str) -> TextLayout | None:
        layer = self._layers.get(path)
        if layer is None or self._call is None:
            return None
        return layer.family.text_layout(self._call.pipe, layer.root, self._call.arguments)

    def _positions(self) -> tuple[int, ...] | None:
        """Those of the tokens of `words`, in any of the prompts."""
        if self.words is None:
            return None
        found = {word for word in self.words if isinstance(word, int)}
        if max(found, default=0) >= self._n_tokens:
            raise ValueError(f"words={list(self.words)!r} names a position past the {self._n_tokens} tokens there are.")
        named = [word for word in self.words if isinstance(word, str)]
        prompts = None if self._call is None else self._prompts()
        if prompts is None and named:
            raise ValueError(
                "words= cannot be found, as the prompts of this call are not known (it was given embeddings, not text): "
                "name token positions instead, words=[2, 3] and .map([2, 3])."
            )
        for word in named:
            errors = []
            for prompt in prompts or ():
                try:
                    found |= set(prompt.indices(self._n_tokens, word))
                except NoSuchWordError as error:
                    errors.append(error)
            if len(errors) == len(prompts or ()):
                raise errors[0]
        return tuple(sorted(found))

    def _say(self, call: AttentionCall, grid: Grid, n_images: int, heads: int, context: Context) -> None:
        """Print what the maps of this call will take, and refuse what is more than `max_bytes`."""
        areas = {path: positions(grid) * area / self._areas[call.path] for path, area in self._areas.items()}
        of_all = sum(areas.values()) if "layers" in self._apart else sum(set(areas.values()))
        times = (heads if "heads" in self._apart else 1) * (context.n_steps or 1 if "steps" in self._apart else 1)
        size = 8 if call.query.dtype == torch.float64 else 4
        takes = int(size * self._n_columns * n_images * of_all * times * (2 if self._is_mask else 1))
        said = f"HeatMaps: the maps of {self._n_columns} tokens of {n_images} image(s) take {takes / 2**20:.1f} MiB"
        if takes > self.max_bytes:
            raise ValueError(
                f"{said}, more than max_bytes={self.max_bytes}: name words=[...], keep less apart, read fewer layers=, or "
                "raise max_bytes="
            )
        if takes >= SAID_FROM_BYTES:
            print(f"{said}.", file=sys.stderr)

    def _head_weights(self, path: str, heads: int) -> Tensor:
        weights = torch.ones(heads, dtype=torch.float32)
        for part, given in self.layer_weights.items():
            if part in path:
                if len(given) not in (1, heads):
                    raise ValueError(f"layer_weights[{part!r}] has {len(given)} numbers, and {path} has {heads} heads.")
                weights = weights * torch.tensor(given, dtype=torch.float32)
        return weights

    def _step_weight(self, context: Context) -> float:
        if self.step_weights is None:
            return 1.0
        if callable(self.step_weights):
            return number("step_weights(context)", self.step_weights(context), 0)
        step = context.step or 0
        if step >= len(self.step_weights) or len(self.step_weights) != (context.n_steps or len(self.step_weights)):
            raise ValueError(
                f"step_weights has {len(self.step_weights)} numbers, and the call has {context.n_steps} steps."
            )
        return self.step_weights[step]

    def _group(self, image_of: tuple[int, ...], heads: int, frames: int, device: torch.device) -> Tensor:
        """The map that each row (each head of it, where they are kept apart) adds to. Made once for a call: a copy from
        the host waits for everything that runs there.
        """
        key = (image_of, heads, frames, device)
        if key not in self._groups:
            rows = [
                (image * heads + head) * frames + row % frames if image >= 0 else -1
                for row, image in enumerate(image_of)
                for head in range(heads)
            ]
            self._groups[key] = torch.tensor(rows, device=device)
        return self._groups[key]

    # Steps and calls

    def end_step(self, context: Context) -> None:
        if self._is_mask:
            self._complete()

    def _complete(self) -> None:
        add_up(self._now, self._done)
        self._now = {}

    def end_call(self, call: Call) -> HeatMapRecording:
        self._complete()
        recording = self._recording(call)
        self._done, self._call, self._groups = {}, None, {}
        return recording

    def _recording(self, call: Call) -> HeatMapRecording:
        return HeatMapRecording(
            sums=dict(self._done),
            kind=self._kind,
            direction=self.direction,
            condition=self.condition,
            n_tokens=self._n_tokens,
            columns=self._columns,
            evaluations=max(self._seen.values(), default=0),
            prompts=self._prompts(),
            images_per_prompt=call.images_per_prompt,
            exact=self.daam_exact,
            concepts=self.concepts,
            without=self._without(call),
        )

    def _without(self, call: Call) -> str:
        """Why there are no maps, if there are none."""
        if not self._called:
            return f"none of the {call.n_steps} steps that ran is among its own; look at its steps="
        if not self._had_rows:
            return f"no row was {self.condition!r} in it; look at condition= and at the guidance"
        return "no attention to the text was seen in it; was a prompt given?"

    def _prompts(self) -> tuple[EncodedPrompt, ...] | None:
        # Of a joint attention whose family does not say where the tokens stand, the number of keys does not tell it.
        return self._texts.prompts(self._layout, self._kind not in OF_JOINT or self._layout is not None)

    # Masks of edits

    def mask(self, word: str, threshold: float | None = None, occurrence: int | None = None) -> WordMask:
        """A mask for `Steer(mask=...)`: the word's map of each image, over the steps completed so far.

        Attach both, `attach(pipe, maps, Steer(sae, ..., mask=maps.mask("fox")))`. Values are min-max scaled to [0, 1],
        or 0 and 1 by `threshold`. During the first step nothing is completed and the mask is zero; so is that of
        an image whose prompt does not have the word, among several prompts.

        Raises:
            ValueError: `word` is none, or `threshold` not from 0 to 1. In the call: the maps are not attached.
        """
        self._is_mask = True
        if not isinstance(word, str) or not word.strip():
            raise ValueError(f"word={word!r:.80} is no word; name a word of the prompt.")
        if threshold is not None:
            number("threshold", threshold, 0, 1)
        return WordMask(self, word, threshold, occurrence)

    def so_far(self, what: str) -> HeatMapRecording | None:
        """The maps of the call that is going on, over its completed steps; None where there is none yet.

        Raises:
            ValueError: the maps are not attached.
        """
        if self._call is None:
            raise ValueError(
                f"{what} of HeatMaps that are not attached; attach them with the Steer, attach(pipe, maps, steer)."
            )
        return self._recording(self._call) if self._done else None


def _grid_of(attended: Attended | Outputs, context: Context) -> tuple[Grid, int]:
    """The grid of the image's positions, and how many frames of it are folded into the batch."""
    start, stop = attended.image
    grid = context.grid
    if grid is not None and positions(grid) == stop - start:
        return tuple(grid), 1
    if grid is not None and len(grid) == 3 and positions(grid[1:]) == stop - start:
        return tuple(grid), grid[0]
    raise ValueError(
        f"{attended.call.path} attends from {stop - start} positions, which is not the image grid {grid}; leave this "
        "module out of HeatMaps(layers=...)."
    )
