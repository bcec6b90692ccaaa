"""Where published SAEs were trained: what `hookpoints(pipe)` says of a pipeline built on the same base model.

A fine-tuned model of the same shape counts as the same: whether an SAE fits it is a measurement (`sf.check`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Published:
    """One published SAE's place. `model` is a key of `_MODELS`; `width` is d_model there."""

    name: str
    model: str
    path: str
    width: int
    io: str = "output"
    stream: str = "image"

    def __str__(self) -> str:
        return self.name if self.io == "output" else f"{self.name} (:{self.io})"


# The model's pipelines by the beginning of their class's name, and a number of its denoiser's config that others of
# that name do not share: Stable Diffusion 2 has a cross-attention of width 1024, FLUX.2 another class.
_MODELS: Mapping[str, tuple[str, str, int]] = {
    "SD 1.x": ("StableDiffusion", "cross_attention_dim", 768),
    "SDXL": ("StableDiffusionXL", "cross_attention_dim", 2048),
    "FLUX.1": ("Flux", "joint_attention_dim", 4096),
    "PixArt": ("PixArt", "cross_attention_dim", 1152),
}

# Sources: the papers' repositories, as named; TIDE has published no code, its site is the paper's.
PUBLISHED: tuple[Published, ...] = (
    Published("SAeUron objects", "SD 1.x", "unet.up_blocks.1.attentions.1", 1280),
    Published("SAeUron styles", "SD 1.x", "unet.up_blocks.1.attentions.2", 1280),
    Published("sdxl-unbox composition", "SDXL", "unet.down_blocks.2.attentions.1", 1280, "diff"),
    Published("sdxl-unbox mid block", "SDXL", "unet.mid_block.attentions.0", 1280, "diff"),
    Published("sdxl-unbox details", "SDXL", "unet.up_blocks.0.attentions.0", 1280, "diff"),
    Published("sdxl-unbox style", "SDXL", "unet.up_blocks.0.attentions.1", 1280, "diff"),
    Published("Concept Steerers nudity", "SD 1.x", "text_encoder.encoder.layers.9", 768, stream="text"),
    Published("Concept Steerers styles", "SD 1.x", "text_encoder.encoder.layers.10", 768, stream="text"),
    Published("Concept Steerers, half of two", "SDXL", "text_encoder.encoder.layers.10", 768, stream="text"),
    Published("Concept Steerers, half of two", "SDXL", "text_encoder_2.encoder.layers.28", 1280, stream="text"),
    Published("Concept Steerers", "FLUX.1", "text_encoder_2.encoder.block.22", 4096, stream="text"),
    Published("ItD", "SD 1.x", "text_encoder.encoder.layers.8", 768, stream="text"),
    Published("FLUX SAE", "FLUX.1", "transformer.transformer_blocks.18", 3072),
    Published("TIDE", "PixArt", "transformer.transformer_blocks.26", 1152),
)


def published_at(pipe: Any, path: str, stream: str, width: int | None) -> tuple[str, ...]:
    """The names of the SAEs published for this place of this pipeline, with the io they need."""
    path = path.replace(".text_model.", ".")  # by the names of every transformers
    return tuple(
        str(sae)
        for sae in PUBLISHED
        if (sae.path, sae.stream, sae.width) == (path, stream, width) and _is_model(pipe, *_MODELS[sae.model])
    )


def _is_model(pipe: Any, prefix: str, setting: str, value: int) -> bool:
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    of_class = any(cls.__name__.startswith(prefix) for cls in type(pipe).__mro__)
    return of_class and getattr(getattr(denoiser, "config", None), setting, None) == value
