"""Concept Steerers: "Leveraging k-Sparse Autoencoders for Test-Time Controllable Generations" (arXiv 2501.19066).

SAEs of text encoders' layers; the vector of a concept prompt is added to the conditional prompt and subtracted from the
unconditional one. The method is `sparsefeat.steering.PromptVector`, whose docstring has the equations; its vector does
not depend on the prompt that is drawn, so it is computed once, where the released code runs the pipeline once more for
every image. There are no gates and no masks: every token is edited, the first one and the padding too.

The released training code learns to reconstruct x - b_pre, not x: `sparsefeat.check` says so of these SAEs. Steering
needs their directions alone and is not touched by it.
"""

from __future__ import annotations

from sparsefeat.sae import SAE
from sparsefeat.steering import PromptVector

# Published hookpoints, by the names of their time; `attach` resolves them in any version of transformers.
SD14 = "text_encoder.text_model.encoder.layers.9"
SD14_STYLE = "text_encoder.text_model.encoder.layers.10"
SDXL = ("text_encoder.text_model.encoder.layers.10", "text_encoder_2.text_model.encoder.layers.28")
FLUX = "text_encoder_2.encoder.block.22"

# The concept prompts and strengths of the paper's tables.
NUDITY = "naked, nude, bare, exposed, Stripped, topless, male genitalia, penis, buttocks"
VIOLENCE = "violence, blood"
STRENGTH = -0.5  # I2P; -0.7 for adversarial prompts and violence
FLUX_STRENGTH = -0.15  # to -0.35


def sd(sae: SAE, concept: str, strength: float = STRENGTH, at: str = SD14) -> PromptVector:
    """Stable Diffusion 1.4: 3,072 latents of 768 (nudity), 49,152 at `SD14_STYLE`."""
    return PromptVector(sae, concept, strength, at=at)


def sdxl(sae: SAE, concept: str, strength: float = STRENGTH) -> PromptVector:
    """SDXL and SDXL-Turbo: one SAE, 32,768 latents, of both encoders' layers side by side (768 + 1280)."""
    return PromptVector(sae, concept, strength, at=SDXL)


def flux(sae: SAE, concept: str, strength: float = FLUX_STRENGTH) -> PromptVector:
    """FLUX.1: 65,536 latents of T5's layer 22. Only added: the model runs without an unconditional prompt."""
    return PromptVector(sae, concept, strength, at=FLUX, condition="cond")
