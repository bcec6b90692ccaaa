"""Edits of a pipeline's activations: by the latents of an SAE, by transport, along directions, by arithmetic of scores."""

from sparsefeat.steering.bottleneck import ConceptModel, PushConcepts, SetConcepts
from sparsefeat.steering.bottleneck_training import learn_concepts
from sparsefeat.steering.code_rule import CodeRule, code_edit
from sparsefeat.steering.conceptor import ConceptTokens, Decomposition, decompose
from sparsefeat.steering.discover import discover_direction
from sparsefeat.steering.linear_act import LinearAcT, NeuronMaps
from sparsefeat.steering.overwrite import Overwrite
from sparsefeat.steering.principal import PrincipalDirections
from sparsefeat.steering.prompt_vector import PromptVector
from sparsefeat.steering.saved import load_instrument
from sparsefeat.steering.scores import (
    Compose,
    ConceptAlgebra,
    Hamiltonian,
    Inversion,
    Langevin,
    ScaleConcept,
    ScoreEdit,
    Slider,
    Views,
)
from sparsefeat.steering.steer import Steer
from sparsefeat.steering.together import Together
from sparsefeat.steering.token_direction import TokenDirection
from sparsefeat.steering.transport import FeatureTransport
from sparsefeat.steering.vectors import AddVector

__all__ = [
    "AddVector",
    "CodeRule",
    "Compose",
    "ConceptAlgebra",
    "ConceptModel",
    "ConceptTokens",
    "Decomposition",
    "FeatureTransport",
    "Hamiltonian",
    "Inversion",
    "Langevin",
    "LinearAcT",
    "NeuronMaps",
    "Overwrite",
    "PrincipalDirections",
    "PromptVector",
    "PushConcepts",
    "ScaleConcept",
    "ScoreEdit",
    "SetConcepts",
    "Slider",
    "Steer",
    "Together",
    "TokenDirection",
    "Views",
    "code_edit",
    "decompose",
    "discover_direction",
    "learn_concepts",
    "load_instrument",
]
