"""What the prompts and the negative prompts became: the embeddings that a row of the denoiser's batch is compared with.

They come from the pipeline's own `encode_prompt` and its like, whose returned names say which are negative, or, where
one call encodes one text, whose text does; where these say nothing, or there is no such method, from the runs of the text
encoders, whose ids say it (texts.py); and from embeddings among the arguments of the call.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from sparsefeat.pipeline.context import UNKNOWN, Call

ENCODERS = re.compile(r"_?encode_(?!vae|video|latent)\w*(prompt|image|text)\w*")
_EMBEDDING = re.compile(r"embed|hidden_states")
_OF_BOTH = ("negative_prompt", "do_classifier_free_guidance")  # what a method takes that encodes both
_NEGATIVE = re.compile(r"negative|uncond|null|zero")


@dataclass(frozen=True, eq=False)
class Reference:
    """What one text became under one condition."""

    condition: str
    image: int
    """The first image of the output list that it is for."""
    images: int
    """Of how many, one after the other."""
    tensor: torch.Tensor
    """[positions, channels], or [channels] where it is pooled."""


@dataclass
class Encoding:
    """One call of a method that encodes, while it runs: the texts it was given."""

    prompts: list[str]
    negatives: list[str]
    condition: str | None
    """That of everything it encodes, None where it encodes both."""
    inside: list[Callable[[], list[Reference]]] = field(default_factory=list)
    """What runs of text encoders, and methods that it called, tell: asked where its own result says nothing."""


@dataclass
class References:
    """The references of one call, in the order they came."""

    call: Call
    found: list[Reference] = field(default_factory=list)
    encodings: list[Encoding] = field(default_factory=list)
    """Those that are going on, the outermost first."""
    complete: list[Encoding] = field(default_factory=list)
    trusted: bool = True
    """Whether the loop is diffusers' own, in which what is encoded for a prompt is for the prompt."""

    def add_arguments(self) -> None:
        """The embeddings that the caller gave."""
        for name, value in self.call.arguments.items():
            if _EMBEDDING.search(name) and not name.startswith("ip_adapter"):
                self.found += self._named(name, value, None)

    def begin(self, method: Any, pipe: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A method that encodes was called."""
        signature = inspect.signature(method)
        try:
            arguments = signature.bind_partial(pipe, *args, **kwargs).arguments
        except TypeError:
            arguments = {}
        prompts, negatives = listed(arguments.get("prompt")), listed(arguments.get("negative_prompt"))
        if not self.complete and not self.encodings:  # given to the pipeline under names of its own
            self.call.learn(prompts, arguments)
        passes_on = any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values())
        both = passes_on or not signature.parameters.keys().isdisjoint(_OF_BOTH)
        condition = None if both else self._of_one(prompts, arguments)
        if both and not self.trusted:
            condition = self._as_the_call_has_it(prompts, negatives, arguments)
        self.encodings.append(Encoding(prompts, negatives, condition))

    def end(self, method: Any, pipe: Any, result: Any) -> None:
        """It is done, and `result` is what it returned; None if it failed."""
        encoding = self.encodings[-1]
        told = [] if result is None else self._returned(method, pipe, result, encoding.condition)
        if result is not None and not told and len(self.encodings) == 1:
            told = [reference for ask in encoding.inside for reference in ask()]
        self.encodings.pop()
        if self.encodings:  # the outer one's result is what the pipeline goes on with
            self.encodings[-1].inside += [lambda: told] if told else encoding.inside
        elif result is not None:
            self.complete.append(encoding)
            self.found += told

    def ran(self, ask: Callable[[], list[Reference]]) -> None:
        """A text encoder has run, of which `ask` says what its rows are."""
        if self.encodings:
            self.encodings[-1].inside.append(ask)
        else:
            self.found += ask()

    def _returned(self, method: Any, pipe: Any, result: Any, condition: str | None) -> list[Reference]:
        elements = result if isinstance(result, (tuple, list)) else (result,)
        overridden = [vars(cls)[method.__name__] for cls in type(pipe).__mro__ if method.__name__ in vars(cls)]
        said = (returned_names(inspect.unwrap(one), len(elements)) for one in (method, *overridden))
        names = next((names for names in said if any(names)), ("",) * len(elements))
        named = zip(names, elements, strict=True)
        return [reference for name, value in named for reference in self._named(name, value, condition)]

    def _as_the_call_has_it(self, prompts: list[str], negatives: list[str], arguments: Mapping[str, Any]) -> str | None:
        """The condition of what a method that encodes both is given for a prompt, in a loop that is not diffusers': the
        loop may encode its negative prompts by it too, one text at a time.
        """
        of_call = self.call.prompts
        if not prompts or of_call is None or negatives or arguments.get("do_classifier_free_guidance"):
            return None
        is_prompt = all(any(_is_of(text, whole) for whole in of_call) for text in prompts)
        if is_prompt == self._is_negative(prompts):  # neither, or the same words for both
            return UNKNOWN
        return "cond" if is_prompt else "uncond"

    def _of_one(self, prompts: list[str], arguments: Mapping[str, Any]) -> str | None:
        """The condition of a text that is encoded by itself."""
        call = self.call.arguments
        given = arguments.get("prompt_embeds")
        if given is not None:
            for name, condition in (("prompt_embeds", "cond"), ("negative_prompt_embeds", "uncond")):
                if given is call.get(name):
                    return condition
        is_prompt, is_negative = bool(prompts) and prompts == self.call.prompts, self._is_negative(prompts)
        if is_prompt and is_negative:  # the same words for both: the prompt goes first
            return "uncond" if any(encoding.condition == "cond" for encoding in self.complete) else "cond"
        return "cond" if is_prompt else "uncond" if is_negative else None

    def _is_negative(self, texts: list[str]) -> bool:
        arguments = self.call.arguments.items()
        negatives = {text for name, value in arguments if _NEGATIVE.search(name) for text in listed(value)}
        return bool(texts) and set(texts) <= (negatives or {""})

    def _named(self, name: str, value: Any, condition: str | None) -> list[Reference]:
        """What a value of this name is, unless its name or shape does not say it."""
        if isinstance(value, Mapping):
            inner = [self._named(f"{name}.{key}", element, condition) for key, element in value.items()]
            return [reference for each in inner for reference in each]
        rows = rows_of_texts(value)
        if not rows or not _EMBEDDING.search(name) or condition == UNKNOWN:
            return []
        if _NEGATIVE.search(name):
            condition = "uncond"
        elif condition is None:
            condition = "cond"
        n_images, each = self.call.n_images, self.call.images_per_prompt
        if n_images is None:
            n_images = len(rows)
        if len(rows) == n_images:
            rows = rows[::each]  # the rows of one prompt are the same
        elif len(rows) == 1:
            each = n_images
        elif len(rows) * each != n_images:
            return []  # several conditions in one tensor: which is which, the name does not say
        return [Reference(condition, i * each, each, row.detach()) for i, row in enumerate(rows)]


def _is_of(text: str, prompt: str) -> bool:
    """Whether a text is the prompt, a part of it, or the prompt with more around it."""
    return text == prompt or bool(text and prompt and (text in prompt or prompt in text))


def rows_of_texts(value: Any) -> list[torch.Tensor]:
    """The rows of a batch of embeddings: a float tensor [batch, (positions,) channels], of several layers [batch, positions,
    layers, channels], or a list of [positions, channels].
    """
    if isinstance(value, torch.Tensor):
        value = value.flatten(2) if value.ndim == 4 else value
        return list(value) if value.ndim in (2, 3) and value.is_floating_point() else []
    if isinstance(value, (list, tuple)) and all(isinstance(row, torch.Tensor) for row in value):
        return list(value) if all(row.ndim == 2 and row.is_floating_point() for row in value) else []
    return []


def listed(prompt: Any) -> list[str]:
    """A prompt or several, as a list of texts; empty for what is none."""
    if isinstance(prompt, str):
        return [prompt]
    is_texts = isinstance(prompt, (list, tuple)) and all(isinstance(text, str) for text in prompt)
    return list(prompt) if is_texts else []


@functools.lru_cache(maxsize=128)
def returned_names(method: Any, n: int) -> tuple[str, ...]:
    """The names of the n values that a method returns, by its source; empty names where that does not say them."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
    except (OSError, TypeError, SyntaxError):
        return ("",) * n
    returns = [node for node in ast.walk(tree) if isinstance(node, ast.Return)]
    for statement in sorted(returns, key=lambda node: node.lineno, reverse=True):
        value = statement.value
        elements = value.elts if isinstance(value, ast.Tuple) else [value]
        if len(elements) == n:
            return tuple(_name(element) for element in elements)
    return ("",) * n


def _name(element: ast.expr | None) -> str:
    """The variable in an expression: `negative_embeds.to(device) if guided else None` is `negative_embeds`."""
    while isinstance(element, (ast.Call, ast.Attribute, ast.Subscript, ast.IfExp)):
        parts = {ast.Call: "func", ast.IfExp: "body"}
        element = getattr(element, parts.get(type(element), "value"))
    return element.id if isinstance(element, ast.Name) else ""
