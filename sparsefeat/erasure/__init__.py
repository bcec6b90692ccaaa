"""Erasing a concept: find its latents, and take them out while the pipeline runs."""

from sparsefeat.erasure.interpret_deactivate import InterpretThenDeactivate
from sparsefeat.erasure.negative_prompt import negative_prompt
from sparsefeat.erasure.random_latents import random_latents
from sparsefeat.erasure.saeuron import Erase, Selection, select
from sparsefeat.erasure.uce import UCE

__all__ = [
    "UCE",
    "Erase",
    "InterpretThenDeactivate",
    "Selection",
    "negative_prompt",
    "random_latents",
    "select",
]
