"""Conceptor: a concept as a weighted sum of the tokens of words.

Chefer et al., "The Hidden Language of Diffusion Models" (ICLR 2024). With w_i the token embeddings of a dictionary of
words and f an MLP that they share, Linear, ReLU, Linear,

    alpha_i = |f(w_i)|,   w* = sum over i of alpha_i w_i, rescaled to the mean norm of the token embeddings
    loss    = || target - model(x_t, t, "a photo of a" w*) ||^2 + sparsity (1 - cos(sum over the top N of alpha_i w_i, w*))

x_0 are images that the pipeline draws of the concept; everything but f is frozen.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefeat.arguments import finite, number, taking_gradients, whole
from sparsefeat.features.progress import progress_bar
from sparsefeat.features.prompts import encode_alone
from sparsefeat.pipeline import Activations, Call, Context, Hookpoint, Replace, attach
from sparsefeat.pipeline.call_arguments import check_call
from sparsefeat.steering.first_visits import check_prompts
from sparsefeat.steering.learning import Given, denoising_loss, drawn, without_guidance
from sparsefeat.steering.saved import SavableInstrument, register

VALIDATE_EVERY, VALIDATIONS = 50, 8
TOO_ALIKE = 0.9
"""Cosine with the concept's own token from which a word is left out of the dictionary."""


@dataclass(frozen=True)
class Decomposition:
    """The words of a concept, by falling weight: `weights [n]`, none negative, and `embeddings [n, width]`. `norm`: of w*."""

    words: tuple[str, ...]
    weights: Tensor
    embeddings: Tensor
    norm: float

    def __post_init__(self) -> None:
        shape = list(getattr(self.embeddings, "shape", []))
        if len(shape) != 2 or list(getattr(self.weights, "shape", [])) != shape[:1] or shape[0] != len(self.words):
            raise ValueError(
                f"{len(self.words)} words need weights [n] and embeddings [n, width]; decompose makes them."
            )
        finite("weights", self.weights)
        finite("embeddings", self.embeddings)
        number("norm", self.norm, 0, above=True)

    @property
    def vector(self) -> Tensor:
        """w* `[width]`."""
        total = self.weights @ self.embeddings
        return self.norm * total / total.norm().clamp_min(1e-12)

    def top(self, n: int = 50) -> Decomposition:
        """The n words of most weight alone, which are the explanation."""
        order = self.weights.argsort(descending=True, stable=True)[: whole("n", n)]
        return Decomposition(
            tuple(self.words[i] for i in order.tolist()), self.weights[order], self.embeddings[order], self.norm
        )

    def scaled(self, factors: Mapping[str, float]) -> Decomposition:
        """The same with the weights of some words multiplied: 0 takes one out."""
        unknown = [word for word in factors if word not in self.words]
        if unknown:
            raise ValueError(
                f"factors has {unknown[0]!r}, which is none of the words; they are {', '.join(self.words[:8])}..."
            )
        weights = self.weights.clone()
        for word, factor in factors.items():
            weights[self.words.index(word)] *= number(f"factors[{word!r}]", factor)
        return replace(self, weights=weights)


def decompose(
    pipe: Any,
    concept: str,
    *,
    template: str = "a photo of a {}",
    dictionary: Sequence[str] | None = None,
    size: int = 5000,
    images: int = 100,
    top: int = 50,
    sparsity: float = 0.001,
    hidden: int = 256,
    steps: int = 500,
    batch: int = 6,
    lr: float = 1e-3,
    seed: int = 0,
    **call: Any,
) -> Decomposition:
    """Draw images of the concept and learn the weights. For Stable Diffusion, whose text is that of one CLIP.

    Args:
        concept: a word or phrase. template: with `{}` in its place.
        dictionary: words of one token each. Default: the tokenizer's `size` whole words nearest to the concept's by their
            token embeddings (published: by CLIP's images of it), without the concept's own and what is nearly that.
        images, top, sparsity, hidden, steps, batch, lr: the published ones are the defaults. The weights with the least
            loss on eight held-out draws, looked at every 50 steps, are kept (published: by CLIP's similarity).
        seed: image i has the noise of seed + i; all else is drawn from a generator of seed.
        call: further arguments of the pipeline's call.

    Raises:
        ValueError: an argument that cannot be, by its name; every word of the dictionary stands in the template; a pipeline
            whose text is not that of one CLIP. TypeError: an argument that the pipeline's call does not take.
    """
    check_call(pipe, call, decompose, "output_type", "return_dict")
    taking_gradients("decompose")
    if not isinstance(template, str) or template.count("{}") != 1:
        raise ValueError(
            f"template={template!r} must have {{}} in the place of the concept once, as in 'a photo of a {{}}'."
        )
    (concept,) = check_prompts("concept", [concept], least=1)
    counts = {"size": size, "images": images, "top": top, "hidden": hidden, "steps": steps, "batch": batch}
    for name, given in counts.items():
        whole(name, given)
    whole("seed", seed, 0)
    sparsity, lr = number("sparsity", sparsity, 0), number("lr", lr, 0, above=True)
    table = _table(pipe)
    words, ids = _dictionary(pipe, table, concept, dictionary, size)
    vectors = table[ids]
    norm = float(table.norm(dim=1).mean())
    clean = drawn(pipe, [template.format(concept)] * images, seed, call)
    seen = Given("unet")
    with attach(pipe, seen):
        pipe(template.format(words[0]), output_type="latent", **without_guidance(pipe, call))
    levels = seen.levels(pipe, "decompose")
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        weigh = nn.Sequential(nn.Linear(vectors.shape[1], hidden), nn.ReLU(), nn.Linear(hidden, 1)).to(vectors)
    around = _tokens(pipe, template.format(""))
    free = [i for i, token in enumerate(ids) if token not in around]
    if not free:
        raise ValueError(
            "every word of the dictionary stands in the template, where w* takes the place of one; give others."
        )
    prompt, token = template.format(words[free[0]]), ids[free[0]]

    def loss_of(at: int, chosen: Tensor, noise: Tensor) -> Tensor:
        alpha = weigh(vectors)[:, 0].abs()
        total = alpha @ vectors
        star = norm * total / total.norm().clamp_min(1e-12)
        with _exchanged(pipe, token, star):
            text = _encoded(pipe, prompt)
        given = {"encoder_hidden_states": text.expand(len(chosen), -1, -1)}
        best = alpha.topk(min(top, len(alpha))).indices
        alike = F.cosine_similarity(alpha[best] @ vectors[best], star, dim=0)
        return denoising_loss(pipe.unet, seen.given[at], levels[at], clean[chosen], noise, **given) + sparsity * (
            1 - alike
        )

    def draw(n: int) -> tuple[int, Tensor, Tensor]:
        at = int(torch.randint(len(levels), (), generator=generator))
        chosen = torch.randint(images, (n,), generator=generator)
        return at, chosen, torch.randn(clean[chosen].shape, generator=generator, dtype=torch.float32).to(clean)

    _learn(weigh, lr, steps, loss_of, lambda: draw(batch))
    with torch.no_grad():
        alpha = weigh(vectors)[:, 0].abs().cpu()
    return Decomposition(words, alpha, vectors.cpu(), norm).top(len(words))


def _learn(
    network: nn.Module,
    lr: float,
    steps: int,
    loss_of: Callable[[int, Tensor, Tensor], Tensor],
    draw: Callable[[], tuple[int, Tensor, Tensor]],
) -> None:
    """Adam on a fresh draw a step; the network is left as it was where its loss on held-out draws was least."""
    optimiser = torch.optim.Adam(network.parameters(), lr=lr)
    held = [draw() for _ in range(VALIDATIONS)]
    least, kept = torch.inf, copy.deepcopy(network.state_dict())
    parameters = list(network.parameters())
    with progress_bar(steps, "decomposing", "steps") as bar:
        for step in range(steps + 1):
            if step % VALIDATE_EVERY == 0 or step >= steps - 1:
                with torch.no_grad():
                    loss = sum(float(loss_of(*one)) for one in held)
                if loss < least:
                    least, kept = loss, copy.deepcopy(network.state_dict())
            if step == steps:
                break
            with taking_gradients("decompose"):
                gradients = torch.autograd.grad(loss_of(*draw()), parameters)
            for parameter, gradient in zip(parameters, gradients, strict=True):
                parameter.grad = gradient
            optimiser.step()
            bar.update()
    network.load_state_dict(kept)


@register("sparsefeat.steering:ConceptTokens")
class ConceptTokens(SavableInstrument):
    """Instrument: where a prompt has the word, the text encoder is given a decomposition's w* in the place of its token.

    Args:
        decomposition: of `decompose`, its `top`, or `scaled`. word: of one token of the tokenizer.

    Raises:
        ValueError: `decomposition` is none; `word` is no text.
    """

    condition = "cond"

    def __init__(self, decomposition: Decomposition, word: str):
        if not isinstance(decomposition, Decomposition):
            raise ValueError(f"decomposition is {type(decomposition).__name__}; give what decompose makes.")
        self.word: str = check_prompts("word", [word], least=1)[0]
        self.decomposition = decomposition
        self._path = ""
        self._token = -1
        self._ids: Tensor | None = None

    def prepare(self, pipe: Any) -> None:
        _table(pipe)
        tokens = _tokens(pipe, self.word)
        if len(tokens) != 1:
            raise ValueError(f"word={self.word!r} is {len(tokens)} tokens; give a word that is one.")
        (self._token,) = tokens
        embedding = pipe.text_encoder.get_input_embeddings()
        path = next(path for path, module in pipe.text_encoder.named_modules() if module is embedding)
        self._path = f"text_encoder.{path}"

    def components(self, pipe: Any) -> tuple[str, ...]:
        return ("text_encoder",)

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (Hookpoint(self._path),)

    def expected_width(self, hookpoint: Hookpoint) -> int | None:
        return self.decomposition.embeddings.shape[1]

    def begin_call(self, call: Call) -> None:
        self._ids = None

    def at_component(self, name: str, arguments: Mapping[str, Any], context: Context) -> None:
        self._ids = arguments.get("input_ids")

    def at_hookpoint(self, activations: Activations, context: Context) -> Replace | None:
        if self._ids is None:
            return None
        chosen = (self._ids.flatten() == self._token) & context.row_condition()
        star = self.decomposition.vector.to(activations.rows)
        return Replace(torch.where(chosen[:, None], star, activations.rows)) if chosen.any() else None

    def to_saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        of = self.decomposition
        config = {"word": self.word, "words": list(of.words), "norm": of.norm}
        return config, {"weights": of.weights, "embeddings": of.embeddings}

    @classmethod
    def from_saved(cls, sae: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> ConceptTokens:
        of = Decomposition(tuple(config["words"]), tensors["weights"], tensors["embeddings"], config["norm"])
        return cls(of, config["word"])


def _table(pipe: Any) -> Tensor:
    """The token embeddings `[tokens, width]` of a pipeline with one CLIP and a UNet."""
    encoder, second = getattr(pipe, "text_encoder", None), getattr(pipe, "text_encoder_2", None)
    if (
        encoder is None
        or second is not None
        or getattr(pipe, "unet", None) is None
        or "CLIP" not in type(encoder).__name__
    ):
        raise ValueError(
            f"{type(pipe).__name__} has not one CLIP and a unet, of which a concept's tokens are taken; use Stable Diffusion 1 "
            "or 2."
        )
    return encoder.get_input_embeddings().weight.detach()


def _tokens(pipe: Any, text: str) -> list[int]:
    return pipe.tokenizer(text, add_special_tokens=False).input_ids


def _dictionary(
    pipe: Any, table: Tensor, concept: str, dictionary: Sequence[str] | None, size: int
) -> tuple[tuple[str, ...], list[int]]:
    """Words, and the token of each."""
    own = _tokens(pipe, concept)
    if dictionary is not None:
        words = check_prompts("dictionary", dictionary)
        tokens = [_tokens(pipe, word) for word in words]
        wrong = [word for word, ids in zip(words, tokens, strict=True) if len(ids) != 1 or ids[0] in own]
        if wrong:
            raise ValueError(
                f"dictionary has {wrong[0]!r}, which is not one token, or is the concept's own; leave it out."
            )
        return tuple(words), [ids[0] for ids in tokens]
    vocabulary = pipe.tokenizer.get_vocab()
    whole_words = {name.removesuffix("</w>"): token for name, token in vocabulary.items() if name.endswith("</w>")}
    kept = {word: token for word, token in whole_words.items() if word.isalpha() and token not in own}
    if len(kept) < 2:
        raise ValueError("the tokenizer has no whole words (of CLIP, they end in </w>); give dictionary=.")
    tokens_kept = torch.tensor(list(kept.values()))
    alike = F.cosine_similarity(table[tokens_kept], table[own].mean(0)[None])
    alike[alike > TOO_ALIKE] = -torch.inf
    order = alike.argsort(descending=True, stable=True)[:size]
    names = list(kept)
    chosen = [i for i in order.tolist() if alike[i] > -torch.inf]
    return tuple(names[i] for i in chosen), [int(tokens_kept[i]) for i in chosen]


@contextmanager
def _exchanged(pipe: Any, token: int, star: Tensor) -> Iterator[None]:
    """Within, the text encoder is given `star` in the place of one token's embedding."""

    def exchange(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> Tensor:
        ids = args[0] if args else kwargs["input"]
        return torch.where((ids == token)[..., None], star.to(output), output)

    hook = pipe.text_encoder.get_input_embeddings().register_forward_hook(exchange, with_kwargs=True)
    try:
        yield
    finally:
        hook.remove()


def _encoded(pipe: Any, prompt: str) -> Tensor:
    """[1, tokens, width], with gradients where they are on."""
    encode = inspect.unwrap(encode_alone)
    device = getattr(pipe, "_execution_device", None) or pipe.device
    return encode(pipe, {"prompt": [prompt]}, {}, device=device)[0]
