"""Which weights and latents made a concept, and masks of them."""

from sparsefeat.attribution.cam import df_cam
from sparsefeat.attribution.circuit import Circuit, Edge, circuit
from sparsefeat.attribution.components import WeightScores, attribute_weights, cad_amplify, cad_erase
from sparsefeat.attribution.concept_neurons import cones
from sparsefeat.attribution.latents import LatentScores, attribute_latents
from sparsefeat.attribution.masks import WeightMask, chosen_weights
from sparsefeat.attribution.rise import df_rise

__all__ = [
    "Circuit",
    "Edge",
    "LatentScores",
    "WeightMask",
    "WeightScores",
    "attribute_latents",
    "attribute_weights",
    "cad_amplify",
    "cad_erase",
    "chosen_weights",
    "circuit",
    "cones",
    "df_cam",
    "df_rise",
]
