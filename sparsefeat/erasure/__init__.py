"""Erasing a concept: find its latents, and take them out while the pipeline runs."""

from sparsefeat.erasure.clamp import clamp_latents
from sparsefeat.erasure.esd import ESD
from sparsefeat.erasure.exchange import Exchange
from sparsefeat.erasure.guard import Guard, guard_concept
from sparsefeat.erasure.interpret_deactivate import InterpretThenDeactivate
from sparsefeat.erasure.lancet import ConceptLancet
from sparsefeat.erasure.negative_prompt import negative_prompt
from sparsefeat.erasure.posterior_attenuation import PosteriorAttenuation
from sparsefeat.erasure.random_latents import random_latents
from sparsefeat.erasure.replace_where import ReplaceWhere
from sparsefeat.erasure.saeuron import Erase, Selection, select
from sparsefeat.erasure.safe_latent_diffusion import safe_latent_diffusion
from sparsefeat.erasure.uce import UCE, TextEmbeddings

__all__ = [
    "ESD",
    "UCE",
    "ConceptLancet",
    "Erase",
    "Exchange",
    "Guard",
    "InterpretThenDeactivate",
    "PosteriorAttenuation",
    "ReplaceWhere",
    "Selection",
    "TextEmbeddings",
    "clamp_latents",
    "guard_concept",
    "negative_prompt",
    "random_latents",
    "safe_latent_diffusion",
    "select",
]
