"""The adversary of erasers: words are learned that bring the erased concept back, with gradients through the eraser.

Four token vectors v stand in the prompt where the concept's word stood. With x_t the latents of the unedited pipeline on its way
to pictures of the concept, and step(.) one guided step of a pipeline from x_t, to x_{t-1}:

    loss = |step_edited(x_t; v) - step_unedited(x_t; concept)|^2 / |step_unedited(x_t; concept) - x_t|^2

one picture and one step at random at a time, 500 times, by Adam. It is textual inversion (arXiv 2208.01618) whose aim is what the
unedited model says (as in arXiv 2309.06135) in the place of the noise: guidance and every edit of the prediction are in the
gradient. What an instrument computes without gradient (which patch, how large a share) is a constant there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparsefeat.evaluation.card.edit import Edit, LearnedWords

N_VECTORS = 4
LR = 0.01
"""Of Adam; entries of the embedded text encoder's token vectors deviate by 0.07."""


class Trajectory(NamedTuple):
    """latents [steps + 1, images, channels, height, width] of the unedited pipeline, from noise to the picture."""

    latents: Tensor
    prompts: tuple[str, ...]


def trajectory(pipe: Any, prompts: Sequence[str], seeds: Sequence[int], call: Mapping[str, Any]) -> Trajectory:
    """What the unedited pipeline does on its way to pictures of these prompts."""
    passed: list[Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        passed.append(given["latents"].detach().clone())
        return given

    config, first = pipe.unet.config, []
    for seed in seeds:
        noise = torch.randn(
            1, config.in_channels, config.sample_size, config.sample_size, generator=torch.Generator().manual_seed(seed)
        )
        first.append(noise * pipe.scheduler.init_noise_sigma)
    start = torch.cat(first)
    pipe(list(prompts), latents=start, output_type="latent", callback_on_step_end=keep, **call)
    return Trajectory(torch.stack([start, *passed]), tuple(prompts))


def differentiable(pipe: Any) -> Any:
    """A pipeline of the same parts, whose call keeps gradients."""
    own = type(pipe)
    call = inspect.unwrap(own.__call__)
    kind = type(own.__name__, (own,), {"__call__": call, "__module__": own.__module__})
    made = kind(**pipe.components, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


@contextmanager
def only_at(denoiser: nn.Module, wanted: Callable[[], bool]) -> Iterator[None]:
    """Within, the denoiser says nothing (zeros, for no time) except while `wanted()`."""
    original = denoiser.forward

    def forward(sample: Tensor, *args: Any, **kwargs: Any) -> Any:
        if wanted():
            return original(sample, *args, **kwargs)
        return (torch.zeros_like(sample),)

    denoiser.forward = forward
    try:
        yield
    finally:
        del denoiser.forward


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Within, no weight takes part in a gradient."""
    were = [(p, p.requires_grad) for module in modules for p in module.parameters()]
    for parameter, _ in were:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter, was in were:
            parameter.requires_grad_(was)


@dataclass(eq=False)
class OneStep:
    """One guided step of a pipeline from latents of a trajectory: x_{t-1} [1, ...], with gradients."""

    pipe: Any
    aim: Trajectory
    call: Mapping[str, Any]

    def __post_init__(self) -> None:
        self._now = self._step = self._image = 0
        self._found: Tensor | None = None

    def at_work(self) -> bool:
        return self._now == self._step

    def __call__(self, prompt: str, image: int, step: int) -> Tensor:
        self._now, self._step, self._image, self._found = 0, step, image, None
        self.pipe(
            prompt,
            latents=self.aim.latents[0, image : image + 1],
            output_type="latent",
            callback_on_step_end=self._ended,
            **self.call,
        )
        assert self._found is not None
        return self._found

    def _ended(self, pipe: Any, step: int, timestep: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
        self._now = step + 1
        if step == self._step:
            self._found = given["latents"]
            pipe._interrupt = True  # diffusers' way to end a call: the steps that are left are passed over
        if step == self._step - 1:
            return {"latents": self.aim.latents[step + 1, self._image : self._image + 1]}
        return given


def invert(
    pipe: Any,
    edit: Edit,
    aim: Trajectory,
    worded: Sequence[str],
    placeholders: Sequence[str],
    start: Tensor,
    *,
    steps: int,
    call: Mapping[str, Any],
    seed: int = 0,
) -> tuple[Tensor, list[float]]:
    """The learned vectors [n, width], and the loss of every step.

    Args:
        pipe: without a session; the edit is attached to another of the same parts.
        aim: trajectories of the concept. worded: the prompt of each, with the placeholders where the concept stood.
        start: [n, width], the first vectors.
        steps: of Adam. seed: of the pictures and steps drawn.
    """
    own = differentiable(pipe)
    vectors = start.detach().clone().requires_grad_()
    words = LearnedWords(vectors, placeholders)
    optimiser = torch.optim.Adam([vectors], lr=LR)
    step_of = OneStep(
        own, aim, call if edit.negative_prompt is None else {**call, "negative_prompt": edit.negative_prompt}
    )
    generator = torch.Generator().manual_seed(seed)
    n_steps, n_images = len(aim.latents) - 1, len(worded)
    losses = []
    parts = [part for part in own.components.values() if isinstance(part, nn.Module)]
    with (
        frozen(*parts),
        only_at(own.unet, step_of.at_work),
        replace(edit, words=words).opened(own),
        torch.enable_grad(),
    ):
        for _ in range(steps):
            step = int(torch.randint(n_steps, (), generator=generator))
            image = int(torch.randint(n_images, (), generator=generator))
            said = step_of(worded[image], image, step)
            before, after = (aim.latents[at, image : image + 1] for at in (step, step + 1))
            loss = (said - after).square().sum() / (after - before).square().sum()
            (vectors.grad,) = torch.autograd.grad(loss, [vectors])
            optimiser.step()
            losses.append(float(loss.detach()))
    return vectors.detach(), losses


def free_words(pipe: Any, prompts: Sequence[str], n: int = N_VECTORS) -> tuple[str, ...]:
    """Letters that are one token each and stand in no prompt, the last of the alphabet first.

    Raises:
        ValueError: the tokenizer has fewer.
    """
    used = {token for prompt in prompts for token in pipe.tokenizer(prompt).input_ids}
    found = []
    for letter in "zyxwvutsrqponmlkjihgfedcb":
        tokens = pipe.tokenizer(letter, add_special_tokens=False).input_ids
        if len(tokens) == 1 and tokens[0] not in used:
            found.append(letter)
    if len(found) < n:
        raise ValueError(f"the tokenizer has {len(found)} letters of one token that no prompt has; {n} are needed.")
    return tuple(found[:n])


def first_vectors(pipe: Any, n: int = N_VECTORS, seed: int = 0) -> Tensor:
    """[n, width], drawn at random with the mean and the deviation of the token vectors there are."""
    table = pipe.text_encoder.get_input_embeddings().weight.detach()
    drawn = torch.randn(n, table.shape[1], generator=torch.Generator().manual_seed(seed))
    return table.mean(0) + table.std() * drawn
