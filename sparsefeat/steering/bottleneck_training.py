"""CB-AE and Concept Controller, learned on a frozen denoiser (arXiv 2503.19377; `bottleneck.py` has the edits).

Pictures are drawn from labelled prompts. With x a noised picture at a step of the window, w the activations at the hookpoint,
x0(w) the clean latents that the denoiser then predicts, y the labels, M a classifier of images and CE summed over the concepts
that are labelled, a batch of pictures lowers by Adam

    controller   CE(E(w), y)
    CB-AE        |w^ - w|^2 + |x0(w^) - x0|^2 + |x0(w^) - x0(w)|^2 + CE(E(w), y),     w^ = D(E(w)), squares as means

and CB-AE then, by another Adam, what an edit is to do: with c' the logits with a concept set to a value drawn at random, y' the
labels with it, and w' = D(c'),

    CE(E(w'), y') + CE(M(x0(w')), y')                                                  the second where there is a classifier

With a classifier the labels are its own of the drawn pictures, where it is confident. Images are compared as latents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparsefeat.arguments import number, taking_gradients, whole
from sparsefeat.features.progress import progress_bar
from sparsefeat.pipeline import Activations, Context, Hookpoint, Instrument, Replace, attach
from sparsefeat.pipeline.call_arguments import GIVEN_TO_SEVERAL, check_call, for_several
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.steering.bottleneck import LATE, ConceptModel
from sparsefeat.steering.discover import Shaped
from sparsefeat.steering.first_visits import check_place
from sparsefeat.steering.learning import drawn, said_of, without_guidance
from sparsefeat.steering.scores.levels import NoiseLevel

Labelled = Mapping[str, Mapping[str, str]]
"""prompt -> concept -> value; a concept that is left out is not known of the prompt."""
Classifier = Callable[[Tensor], Mapping[str, Tensor]]
"""Images [n, 3, height, width] in 0 to 1 -> concept -> logits [n, values], in the order of `concepts_of`."""

IGNORED = -100
"""The label that cross entropy leaves out."""


def concepts_of(prompts: Labelled) -> dict[str, tuple[str, ...]]:
    """concept -> its values, both in the order in which the prompts first have them."""
    found: dict[str, list[str]] = {}
    for labels in prompts.values():
        for concept, value in labels.items():
            values = found.setdefault(concept, [])
            if value not in values:
                values.append(value)
    return {concept: tuple(values) for concept, values in found.items()}


class _Middle(Instrument):
    """Keeps a hookpoint's activations, or puts others in their place: vectors [images, entries]."""

    def __init__(self, at: Hookpoint):
        self.at = at
        self.seen = torch.zeros(0, dtype=torch.float32)
        self.instead: Tensor | None = None

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def at_hookpoint(self, activations: Activations, context: Context) -> Replace | None:
        if self.instead is not None:
            return Replace(self.instead.view(activations.rows.shape).to(activations.rows.dtype))
        self.seen = activations.rows.detach().reshape(context.batch, -1).float()
        return None


def learn_concepts(
    pipe: Any,
    at: str | Hookpoint,
    prompts: Labelled,
    *,
    decoder: bool = True,
    classifier: Classifier | None = None,
    confidence: float = 0.9,
    images: int = 1,
    epochs: int = 50,
    batch: int = 8,
    lr: float = 2e-4,
    steps: Steps = LATE,
    seed: int = 0,
    **call: Any,
) -> ConceptModel:
    """Draw the prompts and learn a CB-AE, whose `.set({"style": "mono"})` is the edit, and `.push` the controller's.

    Args:
        at: hookpoint in the middle of the denoiser; the paper's is "unet.mid_block".
        prompts: each with its values of the concepts: {"a mono emoji of a fox": {"style": "mono"}, ...}.
        decoder: False learns a concept controller, the encoder alone.
        classifier: M, which the gradient goes through, in the place of the prompts' labels.
        confidence: of M, below which a picture has no label. Published: 0.9 for diffusion models.
        images: pictures of each prompt. epochs: how often each prompt is seen. Published: 50,000 batches in all.
        batch: prompts at a time, at least 2. lr: Adam's, with betas 0.5 and 0.99.
        steps: the window of the schedule that is learned.
        seed: of the pictures and of what is drawn while learning. call: arguments of the pipeline.

    Raises:
        ValueError: an argument that cannot be, by its name; prompts that show fewer than two values of a concept; none of
            the call's steps is among `steps`. TypeError: an argument that the pipeline's call does not take.
    """
    images, epochs, batch = whole("images", images), whole("epochs", epochs), whole("batch", batch, 2)
    lr, seed = number("lr", lr, 0, above=True), whole("seed", seed, 0)
    number("confidence", confidence, 0, 1)
    window = StepWindow.parse(steps)
    check_call(pipe, call, learn_concepts, "output_type", "return_dict", *GIVEN_TO_SEVERAL)
    taking_gradients("learn_concepts")
    place = check_place(at)
    if not isinstance(prompts, Mapping) or not all(isinstance(labels, Mapping) for labels in prompts.values()):
        raise ValueError("prompts must be prompt -> {concept: value}, {'a mono fox': {'style': 'mono'}, ...}.")
    concepts = concepts_of(prompts)
    few = [concept for concept, values in concepts.items() if len(values) < 2]
    if not concepts or few or len(prompts) < 2:
        raise ValueError(f"prompts= must show at least two values of every concept; {few or 'there are none'}.")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(prompts), generator=generator).tolist()
    texts = [list(prompts)[i] for i in order]
    groups = torch.arange(len(texts)).tensor_split(max(1, len(texts) // batch))
    parts = []
    for group in groups:
        some = [texts[i] for i in group]
        noises = [seed + image * len(texts) + int(group[0]) for image in range(images)]
        parts.append((some, *_drawn(pipe, place, some, seed, noises, call)))
    _, seen, clean = parts[-1]
    root = getattr(pipe, seen.name)
    levels = seen.levels(pipe, "a concept bottleneck")
    within = [i for i in range(len(levels)) if window.has(i, i / len(levels))]
    if not within:
        raise ValueError(f"steps={steps!r} has none of this call's {len(levels)} steps; widen it.")
    height, width = seen.grid
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ConceptModel.new(place, concepts, seen.width, (height, width), decoder)
    networks = [network.to(clean[0].device) for network in (model.encoder, model.decoder) if network is not None]
    optimisers = [_adam(networks, lr) for _ in range(2 if decoder else 1)]
    middle = _Middle(place)
    bar = progress_bar(epochs, "learning concepts", "epochs")
    with attach(pipe, middle) as session, bar:
        for _ in range(epochs):
            for part in torch.randperm(len(parts), generator=generator).tolist():
                some, seen, drawings = parts[part]
                latents = drawings[int(torch.randint(images, (), generator=generator))]
                step = within[int(torch.randint(len(within), (), generator=generator))]
                noise = torch.randn(latents.shape, generator=generator, dtype=torch.float32).to(latents)
                noised = _Noised(session, middle, root, some, seen.given[step], levels[step], latents, noise)
                with torch.no_grad():
                    if classifier is None:
                        labels = _labels(prompts, some, concepts)
                    else:
                        labels = _confident(classifier(decoded(pipe, latents)), confidence)
                    plain = noised.clean()
                labels = {concept: label.to(latents.device) for concept, label in labels.items()}
                w = middle.seen
                with taking_gradients("learn_concepts"):
                    loss = _reading(model, w, labels, noised, latents, plain)
                    _descend(optimisers[0], networks, loss)
                    if model.decoder is not None:
                        changed, wanted = _intervention(model, model.encoder(w), labels, generator)
                        back = model.decoder(changed)
                        told = None if classifier is None else classifier(decoded(pipe, noised.clean(back)))
                        _descend(optimisers[1], networks, _changing(model, back, wanted, told))
            bar.update()
    for network in networks:
        network.requires_grad_(False).eval()
    return model


def _drawn(
    pipe: Any, place: Hookpoint, texts: list[str], seed: int, noises: Sequence[int], call: Mapping[str, Any]
) -> tuple[Shaped, list[Tensor]]:
    """What the denoiser is given for the texts without guidance, and their clean latents for each seed of noise."""
    seen = Shaped(place)
    with attach(pipe, seen), torch.no_grad():
        noise = torch.Generator().manual_seed(seed)
        pipe(texts, generator=noise, output_type="latent", **for_several(without_guidance(pipe, call), len(texts)))
    return seen, [drawn(pipe, texts, one, call) for one in noises]


@dataclass(frozen=True, eq=False)
class _Noised:
    """Pictures at one step, and what the denoiser then takes their clean latents for."""

    session: Any
    middle: _Middle
    root: Any
    texts: list[str]
    arguments: Mapping[str, Any]
    level: NoiseLevel
    latents: Tensor
    noise: Tensor

    def clean(self, w: Tensor | None = None) -> Tensor:
        """x0, where the activations at the hookpoint are w."""
        x = self.level.noised(self.latents, self.noise)
        self.middle.instead = w
        with self.session.call(self.texts):
            said = said_of(self.root, self.arguments, range(len(self.texts)), x)
        return self.level.clean(x.float(), said)


def _reading(
    model: ConceptModel, w: Tensor, labels: Mapping[str, Tensor], noised: _Noised, latents: Tensor, plain: Tensor
) -> Tensor:
    """The first loss."""
    logits = model.encoder(w)
    loss = _cross_entropy(model, logits, labels)
    if model.decoder is None:
        return loss
    back = model.decoder(logits)
    image = noised.clean(back)
    return loss + F.mse_loss(back, w) + F.mse_loss(image, latents.float()) + F.mse_loss(image, plain)


def _changing(
    model: ConceptModel, back: Tensor, wanted: Mapping[str, Tensor], told: Mapping[str, Tensor] | None
) -> Tensor:
    """The second loss; told: what the classifier says of the pictures with `back`."""
    loss = _cross_entropy(model, model.encoder(back), wanted)
    if told is None:
        return loss
    return loss + _summed([F.cross_entropy(told[c], y) for c, y in wanted.items() if (y >= 0).any()])


def _adam(networks: Sequence[nn.Module], lr: float) -> torch.optim.Adam:
    return torch.optim.Adam([p for network in networks for p in network.parameters()], lr=lr, betas=(0.5, 0.99))


def _descend(optimiser: torch.optim.Adam, networks: Iterable[nn.Module], loss: Tensor) -> None:
    parameters = [p for network in networks for p in network.parameters()]
    for parameter, slope in zip(parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
        parameter.grad = slope
    optimiser.step()


def _labels(prompts: Labelled, texts: Sequence[str], concepts: Mapping[str, tuple[str, ...]]) -> dict[str, Tensor]:
    """concept -> int64 [texts], the number of the value; IGNORED where a prompt does not say it."""
    return {
        concept: torch.tensor(
            [values.index(prompts[text][concept]) if concept in prompts[text] else IGNORED for text in texts]
        )
        for concept, values in concepts.items()
    }


def _confident(told: Mapping[str, Tensor], confidence: float) -> dict[str, Tensor]:
    """The same from a classifier's logits."""
    found = {}
    for concept, logits in told.items():
        probability, label = logits.softmax(1).max(1)
        found[concept] = torch.where(probability >= confidence, label, IGNORED)
    return found


def _cross_entropy(model: ConceptModel, logits: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
    terms = [F.cross_entropy(logits[:, model.block(c)], y) for c, y in labels.items() if (y >= 0).any()]
    return _summed(terms) if terms else logits.sum() * 0


def _summed(terms: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(terms)).sum()


def _intervention(
    model: ConceptModel, logits: Tensor, labels: Mapping[str, Tensor], generator: torch.Generator
) -> tuple[Tensor, dict[str, Tensor]]:
    """The logits with one concept at one value, both drawn at random, and the labels with it."""
    names = list(model.concepts)
    concept = names[int(torch.randint(len(names), (), generator=generator))]
    value = int(torch.randint(len(model.concepts[concept]), (), generator=generator))
    wanted = {**labels, concept: torch.full((len(logits),), value, device=logits.device)}
    return model.exchanged(logits, concept, value), wanted


def decoded(pipe: Any, latents: Tensor) -> Tensor:
    """Images in 0 to 1, which the gradient goes through."""
    config = pipe.vae.config
    shifted = latents / (getattr(config, "scaling_factor", None) or 1.0) + (
        getattr(config, "shift_factor", None) or 0.0
    )
    return (pipe.vae.decode(shifted.to(pipe.vae.dtype), return_dict=False)[0].float() / 2 + 0.5).clamp(0, 1)
