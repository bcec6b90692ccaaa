"""Arithmetic on what the denoiser predicts for several prompts: one instrument, a rule for each published method."""

from sparsefeat.steering.scores.corrections import Hamiltonian, Langevin
from sparsefeat.steering.scores.inversion import Inversion
from sparsefeat.steering.scores.rules import Compose, ConceptAlgebra, Rule, ScaleConcept, Slider, Views
from sparsefeat.steering.scores.safe import SafeGuidance
from sparsefeat.steering.scores.score_edit import ScoreEdit

__all__ = [
    "Compose",
    "ConceptAlgebra",
    "Hamiltonian",
    "Inversion",
    "Langevin",
    "Rule",
    "SafeGuidance",
    "ScaleConcept",
    "ScoreEdit",
    "Slider",
    "Views",
]
