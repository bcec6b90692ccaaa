"""Pipelines with a loop of their own: neither their class nor their arguments say how they guide."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from torch import nn

from tests.tiny import tiny_sd

BLOCK = "unet.up_blocks.1.attentions.1"
TEXT = "text_encoder.encoder.layers.0"


class Own(StableDiffusionPipeline):
    """`runs` are the runs of one step, each the conditions of its chunks; `each` how many images a text gives."""

    @torch.no_grad()
    def __call__(
        self,
        words: list[str],
        avoid: list[str] | None = None,
        runs: tuple[tuple[str, ...], ...] = (("uncond", "cond"),),
        steps: int = 2,
        each: int = 1,
        copied: bool = False,
        dtype: torch.dtype = torch.float32,
    ) -> torch.Tensor:
        cond, uncond = self.encode_prompt(words, self.device, each, avoid is not None, avoid)
        uncond = torch.zeros_like(cond) if uncond is None else uncond
        texts = {"cond": cond.to(dtype).float(), "uncond": uncond.to(dtype).float()}
        scheduler = copy.deepcopy(self.scheduler) if copied else self.scheduler
        scheduler.set_timesteps(steps)
        latents = torch.randn(len(cond), 4, 16, 16, generator=torch.Generator().manual_seed(0)).to(self.device)
        for t in scheduler.timesteps:
            predicted: dict[str, torch.Tensor] = {}
            for chunks in runs:
                text = torch.cat([texts[chunk] for chunk in chunks]) if len(chunks) > 1 else texts[chunks[0]]
                noise = self.unet(torch.cat([latents] * len(chunks)), t, encoder_hidden_states=text).sample
                predicted |= dict(zip(chunks, noise.chunk(len(chunks)), strict=True))
            noise = predicted["cond"]
            if "uncond" in predicted:
                noise = predicted["uncond"] + 3 * (noise - predicted["uncond"])
            latents = scheduler.step(noise, t, latents).prev_sample
        return latents


class Encodes(StableDiffusionPipeline):
    """Encodes its texts itself: `batches` are the runs of the text encoder, each a list of texts."""

    @torch.no_grad()
    def __call__(self, prompt: list[str], negative_prompt: list[str], batches: list[list[str]]) -> None:
        for batch in batches:
            ids = self.tokenizer(batch, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
            self.text_encoder(ids.input_ids)


class Silent(StableDiffusionPipeline):
    """A denoiser run on embeddings that come from nowhere."""

    @torch.no_grad()
    def __call__(self, prompt: str, batch: int = 2) -> None:
        self.unet(torch.zeros(batch, 4, 16, 16), 1, encoder_hidden_states=torch.ones(batch, 16, 32))


def build(kind: type, **options: Any) -> Any:
    parts = tiny_sd(**options).components
    names = inspect.signature(StableDiffusionPipeline.__init__).parameters
    pipe = kind(**{n: p for n, p in parts.items() if n in names}, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


class OneByOne(StableDiffusionPipeline):
    """Encodes every text by itself, as `encode_prompt(text, device, 1, False)`; `order` is that of the rows and of encoding."""

    @torch.no_grad()
    def __call__(self, prompt: str, order: list[str], **texts: str) -> None:
        texts = {"prompt": prompt, **texts}
        rows = [self.encode_prompt(texts.get(name, name), "cpu", 1, False)[0] for name in order]
        self.unet(torch.zeros(len(rows), 4, 16, 16), 1, encoder_hidden_states=torch.cat(rows))


class Projector(nn.Module):
    """What lies between a text encoder and a denoiser: texts go in, longer and other texts come out."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(32, 32)

    def forward(self, texts: torch.Tensor) -> torch.Tensor:
        return self.mix(torch.cat([texts, texts], dim=1))


class Between:
    """No pipeline of diffusers': `order` are the rows of a run, each "cond" or "uncond"; some are zeros to the denoiser."""

    def __init__(self) -> None:
        base = tiny_sd()
        self.unet, self.text_encoder, self.tokenizer = base.unet, base.text_encoder, base.tokenizer
        torch.manual_seed(0)
        self.projector = Projector()

    def encode_prompt(self, prompt: list[str], negative_prompt: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
        prompt_embeds, negative_prompt_embeds = (
            self.text_encoder(
                self.tokenizer(texts, padding="max_length", max_length=16, return_tensors="pt").input_ids
            )[0]
            for texts in (prompt, negative_prompt)
        )
        return prompt_embeds, negative_prompt_embeds

    @torch.no_grad()
    def __call__(self, prompt: list[str], negative_prompt: list[str], order: list[str], steps: int = 2) -> None:
        cond, uncond = self.encode_prompt(prompt, negative_prompt)
        texts = torch.cat([{"cond": cond, "uncond": uncond}[name] for name in order])
        for timestep in range(steps):  # some pipelines do it once, and some in every step
            rows = self.projector(texts)
            self.unet(torch.zeros(len(rows), 4, 16, 16), timestep, encoder_hidden_states=rows)
