"""Sparse features of diffusion models: extract, steer, erase and explain.

    import sparsefeat as sf

    sae = sf.load_sae("path/or/hub-id")
    rec, steer, maps = sf.Record(sae), sf.Steer(sae, scale={12: 0.0}), sf.HeatMaps()
    with sf.attach(pipe, rec, steer, maps) as run:
        image = pipe("a noto emoji of a fox").images[0]
    run[rec].top(10)

Names are imported when they are first used: `import sparsefeat` itself loads neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

if TYPE_CHECKING:  # the same names for type checkers and editors; a test holds the two lists together
    from sparsefeat_kernels import SparseCode as SparseCode

    from sparsefeat import presets as presets
    from sparsefeat.attention import AStar as AStar
    from sparsefeat.attention import AttendAndExcite as AttendAndExcite
    from sparsefeat.attention import CorrectionBySimilarities as CorrectionBySimilarities
    from sparsefeat.attention import CrossTokenNMS as CrossTokenNMS
    from sparsefeat.attention import HeatMaps as HeatMaps
    from sparsefeat.attention import SelfAttention as SelfAttention
    from sparsefeat.attention import read_image as read_image
    from sparsefeat.attribution import Circuit as Circuit
    from sparsefeat.attribution import WeightMask as WeightMask
    from sparsefeat.attribution import attribute_latents as attribute_latents
    from sparsefeat.attribution import attribute_weights as attribute_weights
    from sparsefeat.attribution import cad_amplify as cad_amplify
    from sparsefeat.attribution import cad_erase as cad_erase
    from sparsefeat.attribution import circuit as circuit
    from sparsefeat.attribution import cones as cones
    from sparsefeat.attribution import df_cam as df_cam
    from sparsefeat.attribution import df_rise as df_rise
    from sparsefeat.erasure import ESD as ESD
    from sparsefeat.erasure import UCE as UCE
    from sparsefeat.erasure import ConceptLancet as ConceptLancet
    from sparsefeat.erasure import Erase as Erase
    from sparsefeat.erasure import Exchange as Exchange
    from sparsefeat.erasure import Guard as Guard
    from sparsefeat.erasure import InterpretThenDeactivate as InterpretThenDeactivate
    from sparsefeat.erasure import PosteriorAttenuation as PosteriorAttenuation
    from sparsefeat.erasure import ReplaceWhere as ReplaceWhere
    from sparsefeat.erasure import clamp_latents as clamp_latents
    from sparsefeat.erasure import guard_concept as guard_concept
    from sparsefeat.erasure import negative_prompt as negative_prompt
    from sparsefeat.erasure import safe_latent_diffusion as safe_latent_diffusion
    from sparsefeat.evaluation.check import check as check
    from sparsefeat.evaluation.splice import Splice as Splice
    from sparsefeat.features import Blindspots as Blindspots
    from sparsefeat.features import CollectExamples as CollectExamples
    from sparsefeat.features import CollectStatistics as CollectStatistics
    from sparsefeat.features import Examples as Examples
    from sparsefeat.features import Record as Record
    from sparsefeat.features import Statistics as Statistics
    from sparsefeat.features import WordCorrelations as WordCorrelations
    from sparsefeat.features import example_vectors as example_vectors
    from sparsefeat.features import export_neuronpedia as export_neuronpedia
    from sparsefeat.features import name_by_encoder as name_by_encoder
    from sparsefeat.pipeline import Context as Context
    from sparsefeat.pipeline import Delta as Delta
    from sparsefeat.pipeline import Hookpoint as Hookpoint
    from sparsefeat.pipeline import Instrument as Instrument
    from sparsefeat.pipeline import Replace as Replace
    from sparsefeat.pipeline import attach as attach
    from sparsefeat.pipeline import detach as detach
    from sparsefeat.pipeline import hookpoints as hookpoints
    from sparsefeat.sae import SAE as SAE
    from sparsefeat.sae import Names as Names
    from sparsefeat.sae import SAEConfig as SAEConfig
    from sparsefeat.sae import load_sae as load_sae
    from sparsefeat.steering import AddVector as AddVector
    from sparsefeat.steering import Compose as Compose
    from sparsefeat.steering import ConceptAlgebra as ConceptAlgebra
    from sparsefeat.steering import ConceptTokens as ConceptTokens
    from sparsefeat.steering import Hamiltonian as Hamiltonian
    from sparsefeat.steering import Inversion as Inversion
    from sparsefeat.steering import Langevin as Langevin
    from sparsefeat.steering import LinearAcT as LinearAcT
    from sparsefeat.steering import PrincipalDirections as PrincipalDirections
    from sparsefeat.steering import PromptVector as PromptVector
    from sparsefeat.steering import ScaleConcept as ScaleConcept
    from sparsefeat.steering import ScoreEdit as ScoreEdit
    from sparsefeat.steering import Slider as Slider
    from sparsefeat.steering import Steer as Steer
    from sparsefeat.steering import Together as Together
    from sparsefeat.steering import TokenDirection as TokenDirection
    from sparsefeat.steering import Views as Views
    from sparsefeat.steering import decompose as decompose
    from sparsefeat.steering import discover_direction as discover_direction
    from sparsefeat.steering import learn_concepts as learn_concepts
    from sparsefeat.steering import load_instrument as load_instrument
    from sparsefeat.training import CollectActivations as CollectActivations
    from sparsefeat.training import SAETrainer as SAETrainer
    from sparsefeat.training import TrainConfig as TrainConfig
    from sparsefeat.training import factorise as factorise
    from sparsefeat.training import sobol_importance as sobol_importance

_HOME = {
    "AStar": "sparsefeat.attention",
    "AddVector": "sparsefeat.steering",
    "AttendAndExcite": "sparsefeat.attention",
    "Blindspots": "sparsefeat.features",
    "Circuit": "sparsefeat.attribution",
    "CollectActivations": "sparsefeat.training",
    "CollectExamples": "sparsefeat.features",
    "CollectStatistics": "sparsefeat.features",
    "Compose": "sparsefeat.steering",
    "ConceptAlgebra": "sparsefeat.steering",
    "ConceptLancet": "sparsefeat.erasure",
    "ConceptTokens": "sparsefeat.steering",
    "Context": "sparsefeat.pipeline",
    "CorrectionBySimilarities": "sparsefeat.attention",
    "CrossTokenNMS": "sparsefeat.attention",
    "Delta": "sparsefeat.pipeline",
    "ESD": "sparsefeat.erasure",
    "Erase": "sparsefeat.erasure",
    "Examples": "sparsefeat.features",
    "Exchange": "sparsefeat.erasure",
    "Guard": "sparsefeat.erasure",
    "Hamiltonian": "sparsefeat.steering",
    "HeatMaps": "sparsefeat.attention",
    "Hookpoint": "sparsefeat.pipeline",
    "Instrument": "sparsefeat.pipeline",
    "InterpretThenDeactivate": "sparsefeat.erasure",
    "Inversion": "sparsefeat.steering",
    "Langevin": "sparsefeat.steering",
    "LinearAcT": "sparsefeat.steering",
    "Names": "sparsefeat.sae",
    "PosteriorAttenuation": "sparsefeat.erasure",
    "PrincipalDirections": "sparsefeat.steering",
    "PromptVector": "sparsefeat.steering",
    "Record": "sparsefeat.features",
    "Replace": "sparsefeat.pipeline",
    "ReplaceWhere": "sparsefeat.erasure",
    "SAE": "sparsefeat.sae",
    "SAEConfig": "sparsefeat.sae",
    "SAETrainer": "sparsefeat.training",
    "ScaleConcept": "sparsefeat.steering",
    "ScoreEdit": "sparsefeat.steering",
    "SelfAttention": "sparsefeat.attention",
    "Slider": "sparsefeat.steering",
    "SparseCode": "sparsefeat_kernels",
    "Splice": "sparsefeat.evaluation.splice",
    "Statistics": "sparsefeat.features",
    "Steer": "sparsefeat.steering",
    "Together": "sparsefeat.steering",
    "TokenDirection": "sparsefeat.steering",
    "TrainConfig": "sparsefeat.training",
    "UCE": "sparsefeat.erasure",
    "Views": "sparsefeat.steering",
    "WeightMask": "sparsefeat.attribution",
    "WordCorrelations": "sparsefeat.features",
    "attach": "sparsefeat.pipeline",
    "attribute_latents": "sparsefeat.attribution",
    "attribute_weights": "sparsefeat.attribution",
    "cad_amplify": "sparsefeat.attribution",
    "cad_erase": "sparsefeat.attribution",
    "check": "sparsefeat.evaluation.check",
    "clamp_latents": "sparsefeat.erasure",
    "guard_concept": "sparsefeat.erasure",
    "circuit": "sparsefeat.attribution",
    "cones": "sparsefeat.attribution",
    "decompose": "sparsefeat.steering",
    "detach": "sparsefeat.pipeline",
    "df_cam": "sparsefeat.attribution",
    "df_rise": "sparsefeat.attribution",
    "discover_direction": "sparsefeat.steering",
    "example_vectors": "sparsefeat.features",
    "export_neuronpedia": "sparsefeat.features",
    "factorise": "sparsefeat.training",
    "hookpoints": "sparsefeat.pipeline",
    "learn_concepts": "sparsefeat.steering",
    "load_instrument": "sparsefeat.steering",
    "load_sae": "sparsefeat.sae",
    "name_by_encoder": "sparsefeat.features",
    "negative_prompt": "sparsefeat.erasure",
    "presets": "sparsefeat.presets",
    "read_image": "sparsefeat.attention",
    "safe_latent_diffusion": "sparsefeat.erasure",
    "sobol_importance": "sparsefeat.training",
}

__all__ = ["__version__", *_HOME]

if not TYPE_CHECKING:  # else every name, misspelt ones too, would be there for them, as Any

    def __getattr__(name: str) -> Any:
        if name not in _HOME:
            raise AttributeError(f"module 'sparsefeat' has no attribute {name!r}; it offers {', '.join(sorted(_HOME))}")
        module = importlib.import_module(_HOME[name])
        value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
        globals()[name] = value
        return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
