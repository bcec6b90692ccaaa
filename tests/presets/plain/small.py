"""Tiny pipelines' places, an SAE that loses nothing, and what an edit did to a module."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from tests.presets.plain.dense import (
    DenseSAE,
)
from tests.presets.plain.sites import module_at

SD_BLOCK = "unet.up_blocks.1.attentions.1"  # 32 channels on 8 x 8
SDXL_BLOCK = "unet.up_blocks.0.attentions.0"  # 32 channels on 4 x 4
SDXL_OTHER = "unet.mid_block.attentions.0"  # the same
FLUX_BLOCK = "transformer.transformer_blocks.1"
ROUNDING = {"rtol": 1e-6, "atol": 1e-6}  # one rounding to float32 of what float64 computed


def complete_sae(d: int) -> DenseSAE:
    """Latent i is the positive part of channel i, latent d + i the negative part: nothing is lost."""
    both = torch.cat([torch.eye(d), -torch.eye(d)])
    zero = torch.zeros(d)
    return DenseSAE(both, both, zero, torch.zeros(2 * d), zero, k=2 * d)


@contextmanager
def watched(pipe: Any, path: str, index: int = 0) -> Iterator[list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]]:
    """Entered inside an edit: of every call of the module (input, output before the edit, output after it)."""
    module, calls, before = module_at(pipe, path), [], []

    def tensor(output: Any) -> torch.Tensor:
        return (output[index] if isinstance(output, tuple) else output).clone()

    def after(_module: Any, args: tuple, kwargs: dict, output: Any) -> None:
        calls.append(((args[0] if args else kwargs["hidden_states"]).clone(), before.pop(), tensor(output)))

    first = module.register_forward_hook(lambda _m, _a, output: before.append(tensor(output)), prepend=True)
    last = module.register_forward_hook(after, with_kwargs=True)
    try:
        yield calls
    finally:
        first.remove()
        last.remove()


def run(pipe: Any, prompt: str = "a fox", steps: int = 2, **call: Any) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    options = {"num_inference_steps": steps, "generator": generator, "output_type": "latent", "guidance_scale": 5.0}
    return pipe(prompt, **{**options, **call}).images


def unguided(pipe: Any, prompt: str = "a fox", **call: Any) -> torch.Tensor:
    return run(pipe, prompt, guidance_scale=0.0, **call)
