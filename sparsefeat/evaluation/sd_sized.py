"""Overhead on a UNet of Stable Diffusion 1.5's size: the cost a user of a real model would see.

Weights are random: time does not depend on them, except through which latents fire, and random directions fire as
often as any.
"""

from __future__ import annotations

import statistics
from datetime import date
from typing import Any

import torch

from sparsefeat.evaluation.overhead import measure_overhead
from sparsefeat.features import Record
from sparsefeat.measure.machine import device_name
from sparsefeat.measure.timing import versions
from sparsefeat.pipeline import Instrument
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.steering import Steer

HOOKPOINT = "unet.up_blocks.1.attentions.1"


def sd_sized_pipeline(device: str = "cpu") -> Any:
    """A `StableDiffusionPipeline` whose UNet has Stable Diffusion 1.5's configuration (860 M random weights)."""
    from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, attention_head_dim=8)
    vae = AutoencoderTiny(
        encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4),
        num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1),
    )
    pipe = StableDiffusionPipeline(
        vae=vae,
        text_encoder=None,
        tokenizer=None,
        unet=unet.to(device).eval(),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def instruments(sae: SAE) -> dict[str, Instrument]:
    """What is measured, by how it is written: features are recorded, one latent is scaled in both halves, a direction
    is added."""
    return {
        "Record(sae)": Record(sae),
        "Steer(sae, scale=…)": Steer(sae, scale={7: 0.0}, condition="both"),
        "Steer(sae, add=…)": Steer(sae, add={7: 8.0}, condition="both"),
    }


@torch.no_grad()
def measure_sd_sized(n_latents: int = 20_480, k: int = 32, n_steps: int = 8) -> dict[str, Any]:
    """Each of `instruments` on a SAeUron-sized SAE, 64x64 latents, guidance on, batch of 2."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    pipe = sd_sized_pipeline(device)
    width = 1280
    torch.manual_seed(1)
    sae = SAE(SAEConfig(width, n_latents, k=k, hookpoint=HOOKPOINT)).to(device).eval()
    embeds = torch.randn(1, 77, 768, device=device)

    def run() -> None:
        pipe(
            prompt_embeds=embeds,
            negative_prompt_embeds=torch.zeros_like(embeds),
            num_inference_steps=n_steps,
            guidance_scale=7.5,
            latents=torch.randn(1, 4, 64, 64, generator=torch.Generator().manual_seed(0)),
            output_type="latent",
        )

    rows = []
    for name, instrument in instruments(sae).items():
        measured = measure_overhead(pipe, HOOKPOINT, instrument, run)
        rows.append(
            {
                "instrument": name,
                "share_of_step": measured.share_of_step,
                "step_ms": 1000 * statistics.median(measured.step_s),
                "hook_ms": 1000 * statistics.median(measured.hook_s),
                "n_measured": len(measured.step_s),
            }
        )
    return {
        "rows": rows,
        "hookpoint": HOOKPOINT,
        "n_latents": n_latents,
        "k": k,
        "device": device_name(),
        "date": date.today().isoformat(),
        "versions": versions(),
    }
