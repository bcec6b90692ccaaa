"""discover_direction: the vector in the h-space that makes an unspoken attribute of images expected.

Li et al., "Self-Discovering Interpretable Diffusion Latent Directions" (CVPR 2024). Images x_0 are drawn from prompts that
name the attribute; the model, frozen, is given a prompt that does not, and a vector c at the hookpoint:

    min over c of  E over images, timesteps, noise of || target - model(x_t, t, prompt without; h + c) ||^2

with the model's own target (noise, v, or the velocity of flow matching), by Adam from c = 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from sparsefeat.arguments import number, taking_gradients, whole
from sparsefeat.features.progress import progress_bar
from sparsefeat.pipeline import Activations, Context, Hookpoint, attach
from sparsefeat.pipeline.call_arguments import check_call
from sparsefeat.steering.first_visits import check_place, check_prompts
from sparsefeat.steering.learning import Given, denoising_loss, drawn, without_guidance
from sparsefeat.steering.vectors import AddVector


def discover_direction(
    pipe: Any,
    at: str | Hookpoint,
    with_it: Sequence[str],
    without: str,
    *,
    spatial: bool = True,
    epochs: int = 20,
    batch: int = 8,
    lr: float = 0.1,
    seed: int = 0,
    **call: Any,
) -> AddVector:
    """Draw an image of each prompt and learn the vector.

    Args:
        at: where it is added; the paper's is "unet.mid_block".
        with_it: prompts with the attribute, one image each, which may repeat (the paper: 1,000 of "a female person").
        without: the prompt without it ("a person").
        spatial: one value for every channel and position, as published; False: for every channel.
        epochs, batch, lr: the published 20, 8 and 0.1.
        seed: image i has the noise of seed + i; what is drawn while training comes from a generator of seed.
        call: further arguments of the pipeline's call; the timesteps trained on are those of its schedule.

    Returns the instrument of strength 1, which acts on conditional rows.

    Raises:
        ValueError: an argument that cannot be, by its name; a place without a grid of (height, width). TypeError: an
            argument that the pipeline's call does not take.
    """
    check_call(pipe, call, discover_direction, "output_type", "return_dict")
    taking_gradients("discover_direction")
    place = check_place(at)
    with_it = check_prompts("with_it", with_it, least=1)
    (without,) = check_prompts("without", [without], least=1)
    epochs, batch, seed = whole("epochs", epochs), whole("batch", batch), whole("seed", seed, 0)
    lr = number("lr", lr, 0, above=True)
    clean = drawn(pipe, with_it, seed, call)
    seen = Shaped(place)
    with attach(pipe, seen):
        pipe(
            without, generator=torch.Generator().manual_seed(seed), output_type="latent", **without_guidance(pipe, call)
        )
    levels = seen.levels(pipe, "discover_direction")
    shape = (seen.width, *seen.grid) if spatial else (seen.width,)
    vector = torch.zeros(shape, dtype=torch.float32, device=clean.device, requires_grad=True)
    add = AddVector(place, vector, condition="both")
    optimiser = torch.optim.Adam([vector], lr=lr)
    generator = torch.Generator().manual_seed(seed)
    root = getattr(pipe, seen.name)
    bar = progress_bar(epochs, "discovering", "epochs")
    with attach(pipe, add) as session, taking_gradients("discover_direction"), bar:
        for _ in range(epochs):
            for images in torch.randperm(len(clean), generator=generator).split(batch):
                step = int(torch.randint(len(levels), (), generator=generator))
                noise = torch.randn(clean[images].shape, generator=generator, dtype=torch.float32).to(clean)
                with session.call([without] * len(images)):
                    loss = denoising_loss(root, seen.given[step], levels[step], clean[images], noise)
                (vector.grad,) = torch.autograd.grad(loss, vector)
                optimiser.step()
            bar.update()
    return AddVector(place, vector.detach().cpu())


class Shaped(Given):
    """Keeps the shape of a hookpoint's activations besides."""

    def __init__(self, at: Hookpoint):
        super().__init__(at.path.partition(".")[0])
        self.at: Hookpoint = at
        self.width: int = 0
        self.grid: tuple[int, int] = (0, 0)

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    def at_hookpoint(self, activations: Activations, context: Context) -> None:
        if context.grid is None or len(context.grid) != 2:
            raise ValueError(
                f"{self.at} has no grid of (height, width); name a place in the image's stream of a denoiser."
            )
        self.width, self.grid = activations.width, context.grid
