"""sdxl-unbox: "One-Step is Enough: Sparse Autoencoders for Text-to-Image Diffusion Models" (arXiv 2410.22366).

SDXL-Turbo (one step, or four, no guidance) and SDXL base; SAEs of what four transformers add to their input, so the
hookpoints are `diff`s: 1280 wide, 5,120 latents, k = 10 in the demo and 160 in RIEBench.

Where the released code deviates, or wastes: its hooks encode the whole block only to learn a tensor's shape and multiply
a dense code to add one column, here one outer product; its `TimedHook` is off by one step from the second call on, here
steps come from the scheduler; given no steps it never acts, here it always does.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sparsefeat.arguments import latent_number, mask_map, number
from sparsefeat.evaluation.splice import Splice
from sparsefeat.features.attached import check_sae
from sparsefeat.pipeline.step_window import Steps
from sparsefeat.sae import SAE, load_sae
from sparsefeat.steering import FeatureTransport, Overwrite, Steer

BASE_MODEL = "stabilityai/sdxl-turbo"

# What the paper found each to be for: composition, -, details, style.
HOOKPOINTS = {
    "down.2.1": "unet.down_blocks.2.attentions.1:diff",
    "mid.0": "unet.mid_block.attentions.0:diff",
    "up.0.0": "unet.up_blocks.0.attentions.0:diff",
    "up.0.1": "unet.up_blocks.0.attentions.1:diff",
}

# Both ways of guidance in the released code: the painted map is added to the conditional half and subtracted from the
# unconditional one ("both"), or added to the conditional half alone ("cond"). Without guidance they are the same.
GUIDANCE = {"both": "cond+uncond-", "cond": "cond"}


def load(source: str | Path, block: str, **options: Any) -> SAE:
    """One of the published SAEs, told which block it is of ("down.2.1", "mid.0", "up.0.0" or "up.0.1").

    source: a folder with `config.json`, `state_dict.pth` and, for `paint`, `mean.pt`, or a hub id with `subfolder`.
    options: of `load_sae`.

    Raises:
        ValueError: another `block`; as `load_sae`.
    """
    if block not in HOOKPOINTS:
        raise ValueError(f"block={block!r} is not one of {', '.join(HOOKPOINTS)}.")
    return load_sae(source, **{"hookpoint": HOOKPOINTS[block], "base_model": BASE_MODEL, **options})


def mean_activation(sae: SAE, latent: int) -> float:
    """The latent's mean activation where it is active, from the `mean.pt` that came with the SAE.

    Raises:
        TypeError: `sae` is no SAE.
        ValueError: it came without `mean.pt`, or has no such latent.
    """
    check_sae(sae)
    return float(sae.statistic("mean_nonzero")[latent_number("latent", latent, sae.n_latents)])


def paint(
    sae: SAE, latent: int, mask: Any, strength: float = 10.0, *, guidance: str = "both", steps: Steps = None
) -> Steer:
    """The app's brush: adds `mask * strength * mean activation` of the latent's direction.

    mask: [H, W] over the image, averaged over each cell of the grid. strength: -40 to 40 in the app.
    guidance: "both" or "cond", see `GUIDANCE`. steps: as in `Steer`.

    Raises:
        ValueError: another `guidance`; the SAE came without `mean.pt`; as `Steer`.
    """
    amount = number("strength", strength) * mean_activation(sae, latent)
    return Steer(sae, add_map={latent: mask_map("mask", mask) * amount}, condition=_condition(guidance), steps=steps)


def add(sae: SAE, latent: int, value: float, *, guidance: str = "both", steps: Steps = None) -> Steer:
    """`value` of the latent's direction at every position.

    Raises:
        ValueError: another `guidance`; as `Steer`.
    """
    return Steer(sae, add={latent: number("value", value)}, condition=_condition(guidance), steps=steps)


def icon(sae: SAE, latent: int, value: float | None = None) -> Overwrite:
    """A feature icon: the block writes the latent and nothing else. Draw with an empty prompt.

    value: default the latent's mean activation times k, the paper's.

    Raises:
        ValueError: `value` is not finite, or not given and the SAE came without `mean.pt`.
    """
    if value is None:
        value = mean_activation(sae, latent) * (sae.config.k or 1)
    return Overwrite(sae, {latent: number("value", value)}, condition="cond")


def ablate(sae: SAE) -> Overwrite:
    """The block adds nothing."""
    return Overwrite(sae, {})


def reconstruct(sae: SAE) -> Splice:
    """The block adds the SAE's reconstruction of what it would have added."""
    return Splice(sae)


def transport(
    pipe: Any, saes: Sequence[SAE], source: str, target: str, source_mask: Any, target_mask: Any, **options: Any
) -> FeatureTransport:
    """RIEBench's edit by SAE features; its settings are those of `FeatureTransport.fit`, with four steps, no guidance
    and seed 42 unless given. RIEBench makes its masks with Grounded-SAM2; heat maps do as well."""
    settings = {"num_inference_steps": 4, "guidance_scale": 0.0, "seed": 42, **options}
    return FeatureTransport.fit(pipe, saes, source, target, source_mask, target_mask, **settings)


def _condition(guidance: str) -> str:
    if guidance not in GUIDANCE:
        raise ValueError(f'guidance={guidance!r} is not known; use "both" or "cond".')
    return GUIDANCE[guidance]
