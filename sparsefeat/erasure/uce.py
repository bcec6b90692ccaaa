"""UCE: the weights that read the text, so changed that they take a concept for another (Gandikota et al., arXiv 2308.14761).

With c_e embeddings of a concept to erase (from its last token on), a_e those of its guide, c_p those of concepts to preserve, the
new weight minimises

    sum_e s_e |W' c_e - W a_e|^2 + sum_p s_p |W' c_p - W c_p|^2 + lambda |W' - W|^2

which has a closed form. Written as a change of W, with X the rows sqrt(s) c of all concepts:

    W' = W + W L R     L = [a_e - c_e]     R = the rows e of sqrt(s_e) (X X' + lambda)^-1 X

so the same two thin factors serve every weight that is given the same text, whatever it computes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefeat.arguments import finite, number
from sparsefeat.attention.seen_prompts import SeenPrompts
from sparsefeat.attribution.gradients import denoiser_name
from sparsefeat.pipeline import Call, Context, Enough, Instrument, UnknownConditionError, attach, resolve
from sparsefeat.pipeline.call_arguments import check_call
from sparsefeat.pipeline.context import HOW_TO_STATE, UNKNOWN
from sparsefeat.pipeline.families.registry import family_of
from sparsefeat.pipeline.hookpoints import components
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.pipeline.weights import plain_weight
from sparsefeat.steering.saved import SavableInstrument, register

# Which Linear modules are given the text, by the denoiser's argument: the published ones, of UNets and of FLUX and SD3.
_READERS = {
    "encoder_hidden_states": r".*attn2\.(to_k|to_v)|context_embedder",
    "pooled_projections": r"time_text_embed\.text_embedder\.linear_1",
}


@dataclass(frozen=True)
class TextMap:
    """Weights W at `paths` [*, d] become W + W left right; `left` [d, concepts], `right` [concepts, d]."""

    paths: tuple[str, ...]
    left: Tensor
    right: Tensor

    def __post_init__(self) -> None:
        if self.left.ndim != 2 or self.left.shape != self.right.T.shape or not self.paths:
            raise ValueError(
                f"left {list(self.left.shape)} and right {list(self.right.shape)} must be [d, concepts] and [concepts, d], of "
                f"at least one of paths={self.paths}."
            )
        finite("left", self.left)
        finite("right", self.right)

    def __call__(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        left, right = (factor.to(weight.device, wide) for factor in (self.left, self.right))
        return (weight.to(wide) + weight.to(wide) @ left @ right).to(weight.dtype)


def text_map(
    paths: Sequence[str],
    erase: Tensor,
    guide: Tensor,
    preserve: Tensor,
    scales: tuple[float, float],
    regularisation: float,
) -> TextMap:
    """The closed form, in fp64: embeddings [concepts, d] of what is erased, what stands in its place, what is preserved."""
    erase, guide, preserve = erase.double(), guide.double(), preserve.double()
    erase_scale, preserve_scale = scales
    x = torch.cat([erase_scale**0.5 * erase, preserve_scale**0.5 * preserve])
    gram = x @ x.T + regularisation * torch.eye(len(x), dtype=x.dtype, device=x.device)
    right = erase_scale**0.5 * torch.linalg.solve(gram, x)[: len(erase)]
    return TextMap(tuple(paths), (guide - erase).T.float().cpu(), right.float().cpu())


class TextEmbeddings:
    """What a pipeline's denoiser is given of texts, each read once: what several `UCE.fit` of one pipeline share.

    Args:
        pipe: any pipeline.
        modules: as in `UCE.fit`.
        call: arguments of the pipeline.
    """

    def __init__(self, pipe: Any, *, modules: Sequence[str] | None = None, **call: Any):
        check_call(pipe, call, UCE.fit)
        self.pipe: Any = pipe
        self.call: dict[str, Any] = call
        self.readers: dict[str, list[str]] = _readers(pipe, modules)
        """Paths of the weights that read text, by the denoiser's argument."""
        self._seen = _Embeddings(denoiser_name(pipe), tuple(self.readers))

    def new(self, texts: Sequence[str]) -> list[str]:
        """Those that are not read yet."""
        return [text for text in dict.fromkeys(texts) if text not in self._seen.found]

    def of(self, texts: Sequence[str]) -> dict[str, dict[str, _Given]]:
        """By text and the denoiser's argument; those that are new are read. What was read before an interrupt is kept."""
        if new := self.new(texts):
            with attach(self.pipe, self._seen):
                for text in new:
                    self._seen.text = text
                    self.pipe(text, **{"num_inference_steps": 1, "output_type": "latent", **self.call})
                    if text not in self._seen.found:
                        raise ValueError(
                            f"the denoiser of this {type(self.pipe).__name__} was not given the text {text!r}."
                        )
        return {text: self._seen.found[text] for text in texts}


@register("sparsefeat.erasure:UCE")
class UCE(SavableInstrument):
    """Instrument: concepts are read as others, by changed weights that come back to the bit. Made by `UCE.fit`.

    Weights are the same for all rows: there is no `condition`. What reads text beside the changed weights (SDXL's pooled text)
    still reads the concept.

    Args:
        maps: how the weights change, one for each of the denoiser's text arguments.
        concepts: names, for the record.
        steps: window of steps as in `Steer`; default all.

    Raises:
        ValueError: there is no map.
    """

    def __init__(self, maps: Sequence[TextMap], concepts: Sequence[str] = (), *, steps: Steps = None):
        if not maps or not all(isinstance(one, TextMap) for one in maps):
            raise ValueError("maps= must be at least one TextMap; UCE.fit makes them.")
        self.maps: tuple[TextMap, ...] = tuple(maps)
        self.concepts: tuple[str, ...] = tuple(concepts)
        self.window: StepWindow = StepWindow.parse(steps)

    @classmethod
    def fit(
        cls,
        pipe: Any,
        erase: str | Sequence[str],
        *,
        guide: str | Sequence[str] = "",
        preserve: str | Sequence[str] = (),
        erase_scale: float = 1.0,
        preserve_scale: float = 1.0,
        regularisation: float = 0.5,
        tokens: str = "onward",
        modules: Sequence[str] | None = None,
        steps: Steps = None,
        texts: TextEmbeddings | None = None,
        **call: Any,
    ) -> UCE:
        """Embed the concepts by calls of the pipeline that end where its denoiser begins, and solve.

        Args:
            erase: concepts, "fox" or several.
            guide: what each is read as, one for all or one for each; "" (the published for objects) is the empty prompt.
            preserve: concepts that are to be read as before.
            erase_scale, preserve_scale, regularisation: s_e, s_p and lambda; the released program's by default.
            tokens: "onward", the paper's program: all positions from the concept's last token to the end, padding too, each as
                the guide's at the same distance, and every position of what is preserved; CLIP's padding says what a prompt is
                about. "last", the present program: the last token alone; where the denoiser is given texts of several
                encoders one after the other (Stable Diffusion 3), the one way there is.
            modules: paths of Linear modules that are given the text; default, of UNets the keys and values of the
                cross-attention, of FLUX and Stable Diffusion 3 `context_embedder` and the first layer for the pooled text.
            texts: what earlier fits read with this pipeline, with its own modules and arguments; this one adds to it.
            call: arguments of the pipeline, such as max_sequence_length, height and width.

        Raises:
            ValueError: texts that cannot be told apart in what the denoiser is given, modules that do not read text.
        """
        erased, preserved = _texts("erase", erase), _texts("preserve", preserve) if preserve else []
        guides = [guide] * len(erased) if isinstance(guide, str) else list(guide)
        if len(guides) != len(erased) or not all(isinstance(one, str) for one in guides):
            raise ValueError(
                f"guide={guide!r} must be one text, or one for each of the {len(erased)} concepts to erase."
            )
        scales = number("erase_scale", erase_scale, 0, above=True), number("preserve_scale", preserve_scale, 0)
        number("regularisation", regularisation, 0, above=True)
        if tokens not in ("last", "onward"):
            raise ValueError(f"tokens={tokens!r} is not known; use 'last' or 'onward'.")
        StepWindow.parse(steps)
        if texts is None:
            texts = TextEmbeddings(pipe, modules=modules, **call)
        elif texts.pipe is not pipe or modules is not None or call:
            raise ValueError(
                "texts= is read with a pipeline, modules and arguments of its own; give that pipeline alone."
            )
        embedded = texts.of([*erased, *guides, *preserved])
        maps = []
        for argument, paths in texts.readers.items():
            of = {text: given[argument] for text, given in embedded.items() if argument in given}
            counts = {len(given.last) for given in of.values()}
            if len(of) != len(embedded) or len(counts) != 1:
                raise ValueError(
                    f"the denoiser was not given {argument} of as many encoders for every text; give modules=."
                )
            if tokens == "onward" and counts != {1}:
                raise ValueError("tokens='onward' needs one text among those the denoiser is given; use 'last' here.")
            pairs = [_paired(of[text], of[other], tokens) for text, other in zip(erased, guides, strict=True)]
            c, a = (torch.cat([pair[side] for pair in pairs]) for side in (0, 1))
            p = torch.cat([c[:0], *(of[text].rows if tokens == "onward" else of[text].ends for text in preserved)])
            for path in paths:
                if plain_weight(resolve(pipe, path)).shape[1:] != c.shape[1:]:
                    raise ValueError(
                        f"{path} is not given the text, which is {c.shape[1]} wide; give modules that are."
                    )
            maps.append(text_map(paths, c, a, p, scales, regularisation))
        return cls(maps, erased, steps=steps)

    def weights(self, pipe: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        changes: dict[str, Callable[[Tensor], Tensor]] = {}
        for one in self.maps:
            for path in one.paths:
                found = tuple(plain_weight(resolve(pipe, path)).shape)
                if found[1:] != (len(one.left),):
                    raise ValueError(
                        f"the weight of {path} is {list(found)} in this {type(pipe).__name__} and the text {len(one.left)} "
                        "wide: it was fitted on another model."
                    )
                changes[path] = one
        return changes

    def active(self, context: Context) -> bool:
        return self.window.contains(context)

    def to_saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {f"{side}.{i}": getattr(one, side) for i, one in enumerate(self.maps) for side in ("left", "right")}
        return {"concepts": list(self.concepts), "paths": [list(one.paths) for one in self.maps]}, tensors

    @classmethod
    def from_saved(cls, sae: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> UCE:
        maps = [
            TextMap(tuple(paths), tensors[f"left.{i}"], tensors[f"right.{i}"])
            for i, paths in enumerate(config["paths"])
        ]
        return cls(maps, config["concepts"])

    def __repr__(self) -> str:
        return f"UCE({', '.join(self.concepts)}: {sum(len(one.paths) for one in self.maps)} weights)"


def _texts(name: str, given: str | Sequence[str]) -> list[str]:
    texts = [given] if isinstance(given, str) else list(given)
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(f"{name}={given!r} must be a concept, as 'fox', or a list of concepts.")
    return texts


def _readers(pipe: Any, modules: Sequence[str] | None) -> dict[str, list[str]]:
    """Paths of the weights that read text, by the denoiser's argument."""
    if modules is not None:
        return {"encoder_hidden_states": [resolve(pipe, path).path for path in _texts("modules", modules)]}
    name = denoiser_name(pipe)
    root = getattr(components(pipe)[name], "_orig_mod", components(pipe)[name])
    # PEFT's wrapper is no Linear: found, so that it is refused by name.
    named = {
        path.replace(".base_layer", ""): None for path, module in root.named_modules() if isinstance(module, nn.Linear)
    }
    readers = {
        argument: [f"{name}.{path}" for path in named if re.fullmatch(pattern, path)]
        for argument, pattern in _READERS.items()
    }
    if not readers["encoder_hidden_states"]:
        raise ValueError(
            f"which weights of {type(root).__name__} read the text is not known; name the Linear modules that are given it, "
            "modules=[...]."
        )
    found = {argument: paths for argument, paths in readers.items() if paths}
    for path in (path for paths in found.values() for path in paths):
        plain_weight(resolve(pipe, path))
    return found


@dataclass(frozen=True)
class _Given:
    """What the denoiser is given of one text: `rows` [positions, d], and where the last token of each encoder's is."""

    rows: Tensor
    last: list[int]

    @property
    def ends(self) -> Tensor:
        return self.rows[self.last]


def _paired(erase: _Given, guide: _Given, tokens: str) -> tuple[Tensor, Tensor]:
    if tokens == "last":
        return erase.ends, guide.ends
    length = min(len(one.rows) - one.last[0] for one in (erase, guide))
    return erase.rows[erase.last[0] :][:length], guide.rows[guide.last[0] :][:length]


class _Embeddings(Instrument):
    """What the denoiser is given of each text, by argument."""

    def __init__(self, denoiser: str, arguments: tuple[str, ...]):
        self.denoiser, self.wanted = denoiser, arguments
        self.text = ""
        self.found: dict[str, dict[str, _Given]] = {}
        self._prompts = SeenPrompts()

    def components(self, pipe: Any) -> tuple[str, ...]:
        return (self.denoiser, *self._prompts.components(pipe))

    def prepare(self, pipe: Any) -> None:
        self._prompts.prepare(pipe)

    def begin_call(self, call: Call) -> None:
        self._call = call
        self._prompts.begin_call(call)

    def at_component(self, name: str, arguments: Mapping[str, Any], context: Context) -> None:
        if name != self.denoiser:
            self._prompts.at_component(name, arguments, context)
            return
        if UNKNOWN in context.condition:
            raise UnknownConditionError(f"which rows of {name} are the prompt's cannot be told: {HOW_TO_STATE}")
        if "cond" not in context.condition:
            return
        row = context.condition.index("cond")
        self.found[self.text] = {
            argument: rows
            for argument in self.wanted
            if (rows := self._rows(argument, arguments.get(argument), row)) is not None
        }
        raise Enough

    def _rows(self, argument: str, given: Any, row: int) -> _Given | None:
        if not isinstance(given, Tensor) or given.ndim not in (2, 3):
            return None
        own = given[row].detach()
        if own.ndim == 1:  # pooled: one for the text
            return _Given(own[None], [0])
        root = components(self._call.pipe)[self.denoiser]
        layout = family_of(root).text_layout(self._call.pipe, root, self._call.arguments)
        prompts = self._prompts.prompts(layout)
        assert prompts is not None
        return _Given(own, prompts[0].last(len(own)))
