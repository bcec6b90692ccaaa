"""What the denoiser loses when a block's activations are replaced: its own training loss, by time.

The pipeline draws its prompts once. Then it is called again, and in every step its denoiser is given, in the place of what
the loop would give it, the finished latents with fresh noise of that step's strength: the loss is the mean squared
distance of its output from what it was trained to say of that noise. Everything else of the call is the pipeline's own.

    recovered = (L_ablated - L_spliced) / (L_ablated - L_untouched)

is 1 where the reconstruction serves as well as the activations and 0 where it serves no better than the mean row (or
zeros), for every bin of the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparsefeat.pipeline.noising import LATENTS, noised


@dataclass(frozen=True)
class DenoisingLoss:
    """loss `[steps]`, fp64, each the mean over images and dimensions."""

    timesteps: tuple[float, ...]
    loss: Tensor


def recovered(untouched: DenoisingLoss, spliced: DenoisingLoss, ablated: DenoisingLoss, bins: int = 4) -> list[float]:
    """By bin of equally many steps, from noise to image; NaN where ablation loses nothing."""
    found = []
    for part in torch.arange(len(untouched.loss)).chunk(bins):
        lost = (ablated.loss - untouched.loss)[part].sum()
        found.append(float((ablated.loss - spliced.loss)[part].sum() / lost) if lost > 0 else float("nan"))
    return found


@torch.no_grad()
def denoising_loss(
    pipe: Any,
    prompts: Sequence[str],
    latents: Tensor,
    *,
    seed: int = 0,
    during: Callable[[], AbstractContextManager] = nullcontext,
    **call: Any,
) -> DenoisingLoss:
    """The loss at every step of the pipeline's schedule, with the noise that `seed` gives: the same for every `during`, such
    as `lambda: attach(pipe, Splice(sae))`.

    latents: of `finished_latents` (`pipeline/noising.py`). call: further arguments of the pipeline's call. Classifier-free guidance is switched off:
    the conditional prediction is what is measured.

    Raises:
        ValueError: the scheduler says neither how noise is added nor what is predicted, or the denoiser runs on several
            conditions all the same.
    """
    denoiser, scheduler = _denoiser(pipe), pipe.scheduler
    if hasattr(type(pipe), "do_classifier_free_guidance"):  # a distilled guidance is an input of the model, and stays
        call["guidance_scale"] = 1.0
    losses: list[Tensor] = []
    times: list[float] = []
    generator = torch.Generator().manual_seed(seed)
    with during(), _given_noised(denoiser, scheduler, latents, generator, losses, times):
        pipe(
            list(prompts),
            generator=torch.Generator().manual_seed(seed),
            output_type="latent",
            **call,
        )
    return DenoisingLoss(tuple(times), torch.stack(losses))


def _denoiser(pipe: Any) -> nn.Module:
    for name in ("transformer", "unet"):
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            return module
    raise ValueError("the pipeline has neither a unet nor a transformer: its denoising loss cannot be measured")


@contextmanager
def _given_noised(
    denoiser: nn.Module,
    scheduler: Any,
    latents: Tensor,
    generator: torch.Generator,
    losses: list[Tensor],
    times: list[float],
) -> Iterator[None]:
    """Within, every call of the denoiser is given noised latents, and its loss is noted."""
    aims: list[Tensor] = []

    def give(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
        name = next((n for n in LATENTS if n in kwargs), LATENTS[0])
        given = args[0] if args else kwargs[name]
        if given.shape != latents.shape:
            raise ValueError(
                f"the denoiser takes {list(given.shape)} and the pipeline's latents are {list(latents.shape)}: pass "
                "guidance_scale=1 if it runs on several conditions, else its loss cannot be measured"
            )
        step = len(losses)
        timestep = scheduler.timesteps[step : step + 1]
        noise = torch.randn(latents.shape, generator=generator, dtype=torch.float32).to(latents)
        seen, aim = noised(scheduler, latents, noise, timestep)
        seen = seen.to(given)
        aims.append(aim)
        times.append(float(timestep))
        if args:
            return (seen, *args[1:]), kwargs
        return args, {**kwargs, name: seen}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        said = output if isinstance(output, Tensor) else output[0]
        aim = aims.pop()
        said = (
            said[:, : aim.shape[1]] if said.ndim == 4 else said
        )  # beside it, a variance that some were trained to say
        losses.append((said.double() - aim.double()).square().mean().cpu())

    hooks = [
        denoiser.register_forward_pre_hook(give, with_kwargs=True, prepend=True),
        denoiser.register_forward_hook(note, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
