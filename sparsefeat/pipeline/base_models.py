"""Whether an SAE's base model and a pipeline surely differ: another architecture, or another width of text.

A base model is known here by its name, a hub id or a path that holds it; what is not known, and what has the same shape
(a fine-tune, a mirror), is not judged: whether an SAE fits it is a measurement (`sf.check`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class BaseModel:
    """What a base model's pipelines are made of."""

    title: str
    name: str
    """A pattern of its names."""
    denoiser: str
    """The class of its denoiser in diffusers."""
    settings: Mapping[str, int] = field(default_factory=dict)
    """Numbers of the denoiser's config by which it differs from others of the class: all are widths of text."""
    encoders: Mapping[str, int] = field(default_factory=dict)
    """The widths of its text encoders, by component."""


_TEXT = ("hidden_size", "d_model", "embed_dim", "n_embd")
_SD = r"(stable[-_]?diffusion|(?<![a-z])sd)[-_ ]?v?"

# Sources: the configs of the named repositories.
BASE_MODELS: tuple[BaseModel, ...] = (
    BaseModel(
        "SD 1.x",
        _SD + r"1([-_. ]?[0-5])?(?!\d)",
        "UNet2DConditionModel",
        {"cross_attention_dim": 768},
        {"text_encoder": 768},
    ),
    BaseModel(
        "SD 2.x",
        _SD + r"2([-_. ]?[01])?(?!\d)",
        "UNet2DConditionModel",
        {"cross_attention_dim": 1024},
        {"text_encoder": 1024},
    ),
    BaseModel(
        "SDXL",
        r"(stable[-_]?diffusion[-_ ]?|(?<![a-z])sd[-_ ]?)xl(?!.*refiner)|sdxl(?!.*refiner)",
        "UNet2DConditionModel",
        {"cross_attention_dim": 2048},
        {"text_encoder": 768, "text_encoder_2": 1280},
    ),
    BaseModel(
        "the SDXL refiner",
        r"xl.*refiner",
        "UNet2DConditionModel",
        {"cross_attention_dim": 1280},
        {"text_encoder_2": 1280},
    ),
    BaseModel(
        "SD 3",
        _SD + r"3([-_. ]?5)?(?!\d)",
        "SD3Transformer2DModel",
        {"joint_attention_dim": 4096},
        {"text_encoder": 768, "text_encoder_2": 1280, "text_encoder_3": 4096},
    ),
    BaseModel(
        "FLUX.1",
        r"flux[-_. ]?1(?!\d)",
        "FluxTransformer2DModel",
        {"joint_attention_dim": 4096},
        {"text_encoder": 768, "text_encoder_2": 4096},
    ),
    BaseModel("FLUX.2", r"flux[-_. ]?2(?!\d)", "Flux2Transformer2DModel"),
    BaseModel("PixArt", r"pixart", "PixArtTransformer2DModel", {"caption_channels": 4096}, {"text_encoder": 4096}),
    BaseModel("Sana", r"(?<![a-z])sana(?![a-z])(?!.*video)", "SanaTransformer2DModel", {"caption_channels": 2304}),
    BaseModel("Qwen-Image", r"qwen[-_ ]?image", "QwenImageTransformer2DModel", {"joint_attention_dim": 3584}),
    BaseModel("AuraFlow", r"aura[-_ ]?flow", "AuraFlowTransformer2DModel"),
    BaseModel("HunyuanDiT", r"hunyuan[-_ ]?dit", "HunyuanDiT2DModel"),
    BaseModel("HunyuanVideo", r"hunyuan[-_ ]?video(?!.*1[-_. ]5)", "HunyuanVideoTransformer3DModel"),
    BaseModel("CogVideoX", r"cogvideo[-_ ]?x", "CogVideoXTransformer3DModel", {"text_embed_dim": 4096}),
    BaseModel("Wan", r"(?<![a-z])wan[-_ ]?2", "WanTransformer3DModel", {"text_dim": 4096}),
    BaseModel("Z-Image", r"z[-_ ]image", "ZImageTransformer2DModel"),
)


def difference(pipe: Any, base_model: str | None, path: str) -> str | None:
    """The sentence that says how the pipeline surely differs from the model that an SAE was trained on, None if nothing
    says so. Of a hookpoint in a text encoder (`path`) only that encoder is compared: several models have the same.
    """
    known = [base for base in BASE_MODELS if re.search(base.name, base_model or "", flags=re.IGNORECASE)]
    if len(known) != 1:
        return None
    (base,) = known
    component = path.partition(".")[0]
    if component.startswith("text_encoder"):
        given = _number(getattr(pipe, component, None), *_TEXT)
        wanted = base.encoders.get(component)
        if None in (given, wanted) or given == wanted:
            return None
        return _said(base_model, base, f"its {component} is {wanted} wide, this pipeline's {given}")
    denoiser = getattr(pipe, "unet", None) or getattr(pipe, "transformer", None)
    classes = [cls for cls in type(denoiser).__mro__ if cls.__module__.startswith("diffusers.")]
    if not classes:
        return None
    if classes[0].__name__ != base.denoiser:
        return _said(base_model, base, f"it has a {base.denoiser}, this pipeline a {classes[0].__name__}")
    for name, wanted in base.settings.items():
        given = _number(denoiser, name)
        if given is not None and given != wanted:
            return _said(base_model, base, f"its {name} is {wanted}, this pipeline's {given}")
    return None


def _said(base_model: str | None, base: BaseModel, how: str) -> str:
    return f"the SAE was trained on {base_model} ({base.title}), which is another model than this pipeline's: {how}"


def _number(module: Any, *names: str) -> int | None:
    config = getattr(module, "config", None)
    config = getattr(config, "text_config", None) or config
    found = (getattr(config, name, None) for name in names)
    return next((value for value in found if isinstance(value, int)), None)
