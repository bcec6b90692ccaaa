"""Where the derivations read and write: modules by their path, torch forward hooks, and the step from the timestep."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

Rule = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor | None]
"""`rule(input, output, step)`: what the module's output becomes, or None to leave it. Tensors as the module has them."""


def module_at(pipe: Any, path: str) -> Any:
    """`unet.up_blocks.1.attentions.0` of a pipeline; `text_model` is left out where the text encoder has none (that of
    SD and SDXL's first from transformers 5 on)."""
    component, _, rest = path.partition(".")
    owner = getattr(pipe, component)
    return owner.get_submodule(rest if hasattr(owner, "text_model") else rest.removeprefix("text_model."))


@contextmanager
def rewritten(
    module: Any, rule: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None], index: int = 0
) -> Iterator:
    """`rule(input, output)` decides on the module's output; of a tuple on its tensor `index`.

    The hook runs before those already there: transformers 5 records `hidden_states` with a forward hook that it
    installs at the first call that asks for them and leaves, and it would record the layer's output as it was.
    """

    def hook(_module: Any, args: tuple, kwargs: dict, output: Any) -> Any:
        came_in = args[0] if args else kwargs["hidden_states"]
        parts = list(output) if isinstance(output, tuple) else [output]
        new = rule(came_in, parts[index])
        if new is None:
            return None
        assert new.shape == parts[index].shape
        parts[index] = new.to(parts[index].dtype)
        return tuple(parts) if isinstance(output, tuple) else parts[0]

    handle = module.register_forward_hook(hook, with_kwargs=True, prepend=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def at_steps(pipe: Any, path: str, rule: Rule, index: int = 0) -> Iterator:
    """`rewritten` on a block of the denoiser, with the index of the step: the place in `scheduler.timesteps` of the
    timestep that the denoiser was called with (schedulers that repeat a timestep would need another way)."""
    denoiser = getattr(pipe, path.partition(".")[0])
    step = 0

    def read_timestep(_module: Any, args: tuple, kwargs: dict) -> None:
        nonlocal step
        given = args[1] if len(args) > 1 else kwargs["timestep"]
        timestep = torch.as_tensor(given).double().flatten()[0]
        if "Flux" in type(denoiser).__name__:  # FLUX's pipeline divides by 1000, UNets are given the timestep itself
            timestep = timestep * 1000
        step = int((pipe.scheduler.timesteps.double() - timestep).abs().argmin())

    clock = denoiser.register_forward_pre_hook(read_timestep, with_kwargs=True)
    try:
        with rewritten(module_at(pipe, path), lambda came_in, output: rule(came_in, output, step), index):
            yield
    finally:
        clock.remove()


def rows_of(maps: torch.Tensor) -> torch.Tensor:
    """[images, channels, h, w] to [images, h, w, channels] in float64."""
    return maps.double().permute(0, 2, 3, 1)


def maps_of(rows: torch.Tensor) -> torch.Tensor:
    """The way back."""
    return rows.permute(0, 3, 1, 2)
