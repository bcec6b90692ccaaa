"""NaN and infinity are refused where they enter, with the argument's name, before anything is drawn.

Every public function and class that takes a number, a tensor or an SAE stands in `CALLS` with arguments that pass, or in
`NOT_ASKED` with the reason. Each number of these arguments is then replaced by NaN and the infinities, each tensor gets an
entry of NaN, and each SAE a weight of NaN.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import re
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import sparsefeat as sf
from sparsefeat import presets
from sparsefeat.arguments import finite, finite_in, image_map, mask_map, number, whole
from sparsefeat.attention import HeatMap
from sparsefeat.attribution import WeightMask, chosen_weights
from sparsefeat.erasure import Selection, select
from sparsefeat.erasure.esd import LowRank
from sparsefeat.erasure.uce import TextMap
from sparsefeat.features import area_under_curve, normalized_mean_difference, search
from sparsefeat.report import overlay, save_animation
from sparsefeat.steering import (
    CodeRule,
    ConceptModel,
    Decomposition,
    FeatureTransport,
    NeuronMaps,
    Overwrite,
    PromptVector,
    PushConcepts,
    SetConcepts,
)
from sparsefeat.steering.scores import SafeGuidance
from sparsefeat.training import Objective, TensorRows, build_itda, geometric_median, initialise, training_loss
from tests.tiny import tiny_sd

AT = "unet.up_blocks.1.attentions.1"
D, N = 32, 96
# The infinities that mean "no bound".
NO_BOUND = {("Steer", "clamp[7][0]", -math.inf), ("Steer", "clamp[7][1]", math.inf)}
NO_BOUND |= {("NeuronMaps", name, inf) for name in ("low", "high") for inf in (math.inf, -math.inf)}
NO_BOUND |= {("CodeRule", name, inf) for name in ("low", "high", "gate") for inf in (math.inf, -math.inf)}


# Weights that are about to be overwritten, and a training step's batch: the trainer looks at what comes of it.
NOT_LOOKED_AT = {("SAETrainer", "sae"), ("initialise", "sae"), ("training_loss", "sae"), ("training_loss", "x")}


def make_sae(**options: Any) -> sf.SAE:
    torch.manual_seed(1)
    config = sf.SAEConfig(**{"d_model": D, "n_latents": N, "k": 6, "hookpoint": AT, **options})
    return sf.SAE(config).requires_grad_(False).eval()


def statistics() -> sf.Statistics:
    counted = sf.Statistics(["fox", "owl"], N)
    code = make_sae().encode(torch.randn(40, D, generator=torch.Generator().manual_seed(2)))
    for timestep in (801.0, 401.0):
        counted.add(code, torch.arange(40) % 2, timestep)
    return counted


def concept_model() -> ConceptModel:
    return ConceptModel.new(sf.Hookpoint("unet.mid_block"), {"colour": ("red", "blue")}, D, (2, 2), True)


class Untouched:
    """A pipeline whose parts must not be looked at: what is wrong with the arguments is said before."""

    components: ClassVar = {}

    def __getattr__(self, name: str) -> Any:
        raise AssertionError(f"the pipeline was asked for {name}")

    def __call__(self, prompt: str, height: int = 64, width: int = 64, num_inference_steps: int = 50,
                 guidance_scale: float = 7.5, generator: Any = None, output_type: str = "pil") -> None:  # fmt: skip
        raise AssertionError("the pipeline was called")


def ones(*shape: int) -> torch.Tensor:
    return torch.ones(*shape)


def mean_nonzero_sae() -> sf.SAE:
    return make_sae(statistics=("mean_nonzero",))


def on_the_pipeline(**call: Any) -> None:
    """An ordinary call under an attached instrument."""
    pipe = tiny_sd()
    with sf.attach(pipe, sf.Record(make_sae())):
        pipe("a fox", num_inference_steps=1, output_type="latent", **call)


def examples() -> sf.Examples:
    """Of one image."""
    pipe, sae, seen = tiny_sd(), make_sae(), sf.Examples(N, top=1)
    with sf.attach(pipe, sf.CollectExamples(sae, seen)):
        pipe("a fox", num_inference_steps=1, output_type="latent")
    return seen


CONCEPTS = {"fox": ["a fox"], "owl": ["an owl"]}
SOME_ROWS = torch.randn(24, D, generator=torch.Generator().manual_seed(4))

# Name: what is called, and arguments that pass.
CALLS: dict[str, tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = {
    "Steer": (
        sf.Steer,
        lambda: {
            "sae": make_sae(),
            "add": {3: 1.0},
            "add_map": {4: ones(4, 4)},
            "scale": {5: 0.5},
            "set": {6: 2.0},
            "clamp": {7: (0.0, 3.0)},
            "steps": (0.0, 0.5),
            "mask": ones(8, 8),
        },
    ),
    "Overwrite": (Overwrite, lambda: {"sae": make_sae(), "amounts": {3: 1.0}}),
    "PromptVector": (PromptVector, lambda: {"sae": make_sae(), "concept": "a fox", "strength": -0.5}),
    "CodeRule": (
        CodeRule,
        lambda: (
            {"latents": torch.tensor([1, 4])} | {name: ones(2) for name in ("gain", "offset", "low", "high", "gate")}
        ),
    ),
    "CodeRule.build": (CodeRule.build, lambda: {"rules": {3: {"gain": 1.0, "offset": 0.5}}}),
    "NeuronMaps": (NeuronMaps, lambda: {name: ones(D) for name in ("weight", "bias", "low", "high")}),
    "NeuronMaps.fit": (NeuronMaps.fit, lambda: {"source": SOME_ROWS.clone(), "target": SOME_ROWS.flip(0)}),
    "LinearAcT": (
        sf.LinearAcT,
        lambda: {"maps": {AT: NeuronMaps.fit(SOME_ROWS, SOME_ROWS)}, "strength": 0.5, "steps": (0.0, 0.5)},
    ),
    "LinearAcT.fit": (
        sf.LinearAcT.fit,
        lambda: {
            "pipe": Untouched(),
            "at": AT,
            "source": ["a fox", "a cat"],
            "target": ["a red fox", "a red cat"],
            "support": (0.1, 0.9),
            "strength": 0.5,
        },
    ),
    "AddVector": (
        sf.AddVector,
        lambda: {"at": AT, "vector": ones(D), "strength": 1.0, "steps": (0.0, 0.5), "mask": ones(8, 8)},
    ),
    "PrincipalDirections.steer": (
        lambda amounts: sf.PrincipalDirections(
            sf.Hookpoint(AT), ones(1, D), ones(1, 2, D), ones(1, 2), ones(1, 2)
        ).steer(amounts),
        lambda: {"amounts": {0: 2.0}},
    ),
    "discover_direction": (
        sf.discover_direction,
        lambda: {"pipe": Untouched(), "at": AT, "with_it": ["a red fox"], "without": "a fox", "lr": 0.1},
    ),
    "factorise": (sf.factorise, lambda: {"rows": SOME_ROWS.clone(), "n_latents": 3}),
    "sobol_importance": (
        sf.sobol_importance,
        lambda: {"sae": sf.factorise(SOME_ROWS, 3), "rows": SOME_ROWS[None].clone(), "score": lambda x: x.sum((1, 2))},
    ),
    "TokenDirection": (
        sf.TokenDirection,
        lambda: {"words": ["fox"], "direction": ones(D), "strength": 1.0, "growth": 0.1, "steps": (0.0, 0.5)},
    ),
    "TokenDirection.fit": (
        sf.TokenDirection.fit,
        lambda: {
            "pipe": Untouched(),
            "sae": make_sae(),
            "pairs": [("a fox", "a red fox")],
            "words": ["fox"],
            "percentile": 99.0,
        },
    ),
    "Blindspots": (sf.Blindspots, lambda: {"real": ones(3, N), "generated": ones(3, N)}),
    "Blindspots.suppressed": (sf.Blindspots(ones(3, N), ones(3, N)).suppressed, lambda: {"below": 0.1}),
    "Blindspots.exaggerated": (sf.Blindspots(ones(3, N), ones(3, N)).exaggerated, lambda: {"above": 0.9}),
    "Blindspots.of": (
        sf.Blindspots.of,
        lambda: {
            "pipe": Untouched(),
            "sae": make_sae(),
            "images": [Image.new("RGB", (8, 8))],
            "prompts": ["a fox"],
            "noise": 0.5,
        },
    ),
    "name_by_encoder": (
        sf.name_by_encoder,
        lambda: {"vectors": torch.eye(3), "words": ["fox", "owl"], "encode_text": lambda words: ones(len(words), 3)},
    ),
    "example_vectors": (
        sf.example_vectors,
        lambda: {
            "examples": (seen := examples()),
            "images": [Image.new("RGB", (8, 8))],
            "latents": [next(i for i in range(N) if seen.of(i))],
            "encode_images": lambda images: ones(len(images), 3),
            "crop": 0.5,
        },
    ),
    "Decomposition": (
        Decomposition,
        lambda: {"words": ("a", "b"), "weights": ones(2), "embeddings": torch.eye(2), "norm": 1.0},
    ),
    "Decomposition.scaled": (
        Decomposition(("a", "b"), ones(2), torch.eye(2), 1.0).scaled,
        lambda: {"factors": {"a": 0.5}},
    ),
    "decompose": (
        sf.decompose,
        lambda: {"pipe": Untouched(), "concept": "fox", "sparsity": 0.001, "lr": 1e-3},
    ),
    "Compose": (sf.Compose, lambda: {"weights": {"snow": 1.0, "a tree": -0.5}}),
    "Slider": (sf.Slider, lambda: {"positive": "old", "negative": "young", "scale": 2.0}),
    "ScaleConcept": (sf.ScaleConcept, lambda: {"concept": "fox", "omega": 5.0, "gamma": 3.0}),
    "ConceptAlgebra": (
        sf.ConceptAlgebra,
        lambda: {"target": "a woman", "span": ["a man", "a woman"], "keep": 0.9, "gamma": 1.0},
    ),
    "Langevin": (sf.Langevin, lambda: {"steps": 2, "size": 0.1}),
    "Hamiltonian": (sf.Hamiltonian, lambda: {"steps": 2, "size": 0.1, "damping": 0.5}),
    "Inversion": (sf.Inversion, lambda: {"latents": ones(2, 1, 4, 8, 8)}),
    "ScoreEdit": (
        sf.ScoreEdit,
        lambda: {"rule": sf.Slider("old", "young"), "steps": (0.0, 0.5), "mask": ones(8, 8)},
    ),
    "FeatureTransport.fit": (
        FeatureTransport.fit,
        lambda: {
            "pipe": Untouched(),
            "saes": [make_sae()],
            "source": "a fox",
            "target": "an owl",
            "source_mask": ones(8, 8),
            "target_mask": ones(8, 8),
            "k_transfer": 8,
            "strength": 1.0,
        },
    ),
    "Erase": (
        sf.Erase,
        lambda: {
            "sae": make_sae(),
            "selections": {401.0: Selection(torch.tensor([1, 4]), ones(2), ones(2))},
            "steps": (0.0, 0.5),
        },
    ),
    "Erase.from_statistics": (
        sf.Erase.from_statistics,
        lambda: {"sae": make_sae(), "statistics": statistics(), "concept": "fox", "percentile": 90.0, "gamma": -1.0},
    ),
    "Erase.fit": (
        sf.Erase.fit,
        lambda: {
            "pipe": Untouched(),
            "sae": make_sae(),
            "target": "fox",
            "prompts": CONCEPTS,
            "percentile": 99.0,
            "gamma": -1.0,
            "steps": (0.0, 0.5),
        },
    ),
    "select": (
        select,
        lambda: {"statistics": statistics(), "concept": "fox", "timestep": 401.0, "percentile": 90.0, "gamma": -1.0},
    ),
    "InterpretThenDeactivate": (
        sf.InterpretThenDeactivate,
        lambda: {"sae": make_sae(), "latents": [1, 4], "strength": -8.0, "tau": 0.1},
    ),
    "InterpretThenDeactivate.fit": (
        sf.InterpretThenDeactivate.fit,
        lambda: {
            "pipe": Untouched(),
            "sae": make_sae(),
            "erase": ["a fox"],
            "top_m": 8,
            "strength": -8.0,
            "gate_strength": -6.0,
        },
    ),
    "Statistics": (sf.Statistics, lambda: {"concepts": ["fox"], "n_latents": N, "timesteps": [401.0]}),
    "Statistics.nearest": (lambda timestep: statistics().nearest(timestep), lambda: {"timestep": 500.0}),
    "search": (search, lambda: {"statistics": statistics(), "concept": "fox", "timestep": 401.0}),
    "name_of": (
        importlib.import_module("sparsefeat.features").name_of,
        lambda: {
            "peaks": torch.arange(8.0),
            "concepts": [["fox"], ["owl"]] * 4,
            "words": ["fox", "owl"],
            "choosing": torch.arange(8) < 4,
            "shuffles": 20,
        },
    ),
    "Record": (sf.Record, lambda: {"sae": make_sae()}),
    "Splice": (sf.Splice, lambda: {"sae": make_sae()}),
    "CollectStatistics": (
        sf.CollectStatistics,
        lambda: {"sae": make_sae(), "statistics": statistics(), "concepts": {"a fox": "fox"}},
    ),
    "CollectExamples": (sf.CollectExamples, lambda: {"sae": make_sae(), "examples": sf.Examples(N)}),
    "collect_statistics": (
        importlib.import_module("sparsefeat.features").collect_statistics,
        lambda: {"pipe": Untouched(), "sae": make_sae(), "prompts": CONCEPTS},
    ),
    "check": (sf.check, lambda: {"sae": make_sae(), "pipe": Untouched(), "prompts": ["a fox"]}),
    "area_under_curve": (area_under_curve, lambda: {"positive": ones(3), "negative": ones(4)}),
    "normalized_mean_difference": (
        normalized_mean_difference,
        lambda: {"target": ones(N), "others": ones(N), "eps": 1e-8},
    ),
    "AttendAndExcite": (sf.AttendAndExcite, lambda: {"words": ["fox"], "thresholds": {0: 0.05}, "scale": 20.0}),
    "AStar": (sf.AStar, lambda: {"words": ["fox", "owl"], "scale": 20.0}),
    "CorrectionBySimilarities": (
        sf.CorrectionBySimilarities,
        lambda: {"words": ["fox"], "strength": 0.25, "quantile": 0.9},
    ),
    "save_animation": (
        save_animation,
        lambda: {"frames": [Image.new("RGB", (2, 2))], "path": str(Path(tempfile.mkdtemp()) / "a.gif"), "seconds": 0.2},
    ),
    "HeatMap.mask": (HeatMap(torch.eye(4), "fox").mask, lambda: {"threshold": 0.4}),
    "HeatMap.overlay": (
        HeatMap(torch.eye(4), "fox").overlay,
        lambda: {"image": Image.new("RGB", (8, 8)), "strength": 0.5},
    ),
    "HeatMaps": (
        sf.HeatMaps,
        lambda: {"steps": (0.0, 0.5), "layer_weights": {"up": [1.0, 2.0]}, "step_weights": [1.0, 0.5]},
    ),
    "read_image": (
        sf.read_image,
        lambda: {"pipe": Untouched(), "maps": sf.HeatMaps(), "image": Image.new("RGB", (8, 8)), "noise": 0.5},
    ),
    "HeatMaps.mask": (sf.HeatMaps().mask, lambda: {"word": "fox", "threshold": 0.4}),
    "overlay": (overlay, lambda: {"image": Image.new("RGB", (8, 8)), "map": torch.eye(4)}),
    "SAEConfig": (
        sf.SAEConfig,
        lambda: {"d_model": D, "n_latents": N, "k": 4, "normalizer": "pca", "clip": 3.0, "eps": 0.1},
    ),
    "TrainConfig": (
        sf.TrainConfig,
        lambda: {"steps": 3, "lr": 1e-3, "grad_clip": 1.0},
    ),
    "SAETrainer": (
        sf.SAETrainer,
        lambda: {"sae": make_sae().train(), "rows": SOME_ROWS.clone(), "config": sf.TrainConfig(steps=2, batch_size=8)},
    ),
    "TensorRows": (
        TensorRows,
        lambda: {"rows": SOME_ROWS.clone(), "target": SOME_ROWS.clone(), "timestep": SOME_ROWS[:, 0].clone()},
    ),
    "build_itda": (
        build_itda,
        lambda: {"batches": [SOME_ROWS.clone()], "n_latents": 8, "k": 2, "threshold": 0.01},
    ),
    "Objective": (
        Objective,
        lambda: {
            "auxk": 0.1,
            "multi_topk": 0.1,
            "sparsity": 0.1,
            "l0_target": 4.0,
            "pre_act": 0.1,
            "bandwidth": 0.1,
            "first_threshold": 0.1,
            "delta": 1.0,
            "threshold_decay": 0.9,
            "fired_above": 0.1,
        },
    ),
    "training_loss": (
        training_loss,
        lambda: {"sae": make_sae(), "x": SOME_ROWS},
    ),
    "geometric_median": (geometric_median, lambda: {"rows": SOME_ROWS.clone(), "tolerance": 1e-3}),
    "initialise": (initialise, lambda: {"sae": make_sae().train(), "sample": SOME_ROWS.clone()}),
    "a call of the pipeline": (
        on_the_pipeline,
        lambda: {"guidance_scale": 3.0, "latents": ones(1, 4, 16, 16), "cross_attention_kwargs": {"scale": 1.0}},
    ),
    "concept_steerers.sd": (
        presets.concept_steerers.sd,
        lambda: {"sae": make_sae(), "concept": "fox", "strength": 0.5},
    ),
    "concept_steerers.sdxl": (
        presets.concept_steerers.sdxl,
        lambda: {"sae": make_sae(), "concept": "fox", "strength": 0.5},
    ),
    "concept_steerers.flux": (
        presets.concept_steerers.flux,
        lambda: {"sae": make_sae(), "concept": "fox", "strength": 0.5},
    ),
    "flux_sae.steer": (presets.flux_sae.steer, lambda: {"sae": make_sae(), "latent": 3, "strength": 1.0}),
    "sdxl_unbox.paint": (
        presets.sdxl_unbox.paint,
        lambda: {"sae": mean_nonzero_sae(), "latent": 3, "mask": ones(8, 8), "strength": 1.0, "steps": (0.0, 0.5)},
    ),
    "sdxl_unbox.add": (
        presets.sdxl_unbox.add,
        lambda: {"sae": make_sae(), "latent": 3, "value": 1.0, "steps": (0.0, 0.5)},
    ),
    "sdxl_unbox.icon": (presets.sdxl_unbox.icon, lambda: {"sae": make_sae(), "latent": 3, "value": 1.0}),
    "sdxl_unbox.ablate": (presets.sdxl_unbox.ablate, lambda: {"sae": make_sae()}),
    "sdxl_unbox.reconstruct": (presets.sdxl_unbox.reconstruct, lambda: {"sae": make_sae()}),
    "sdxl_unbox.transport": (
        presets.sdxl_unbox.transport,
        lambda: {
            "pipe": Untouched(),
            "saes": [make_sae()],
            "source": "a fox",
            "target": "an owl",
            "source_mask": ones(8, 8),
            "target_mask": ones(8, 8),
            "k_transfer": 8,
            "strength": 1.0,
        },
    ),
    "itd.erase": (
        presets.itd.erase,
        lambda: {
            "pipe": Untouched(),
            "sae": make_sae(),
            "kind": "nudity",
            "erase": ["a fox"],
            "top_m": 8,
            "strength": -8.0,
        },
    ),
    "saeuron.erase_style": (
        presets.saeuron.erase_style,
        lambda: {"pipe": Untouched(), "sae": make_sae(), "style": "fox", "prompts": CONCEPTS, "gamma": -1.0},
    ),
    "WeightMask": (WeightMask, lambda: {"masks": {"unet.conv_in": ones(2, 3) > 0}, "steps": (0.0, 0.5)}),
    "chosen_weights": (chosen_weights, lambda: {"scores": SOME_ROWS.clone(), "ratio": 0.1}),
    "attribute_weights": (
        sf.attribute_weights,
        lambda: {"pipe": Untouched(), "prompts": "a fox", "objective": "amplify", "latents": ones(1, 4, 8, 8)},
    ),
    "attribute_latents": (
        sf.attribute_latents,
        lambda: {"pipe": Untouched(), "sae": make_sae(), "prompts": "a fox", "steps": (0.0, 0.5)},
    ),
    "circuit": (
        sf.circuit,
        lambda: {
            "pipe": Untouched(),
            "upstream": make_sae(),
            "downstream": make_sae(),
            "prompts": "a fox",
            "steps": (0.0, 0.5),
        },
    ),
    "learn_concepts": (
        sf.learn_concepts,
        lambda: {
            "pipe": Untouched(),
            "at": "unet.mid_block",
            "prompts": {"a red fox": {"colour": "red"}, "a blue fox": {"colour": "blue"}},
            "confidence": 0.9,
            "lr": 0.1,
            "steps": (0.0, 0.5),
        },
    ),
    "SetConcepts": (
        SetConcepts,
        lambda: {"model": concept_model(), "wanted": {"colour": "red"}, "strength": 0.5, "steps": (0.0, 0.5)},
    ),
    "PushConcepts": (
        PushConcepts,
        lambda: {"model": concept_model(), "wanted": {"colour": "red"}, "epsilon": 0.5, "steps": (0.0, 0.5)},
    ),
    "safe_latent_diffusion": (
        sf.safe_latent_diffusion,
        lambda: {"concept": "fox", "scale": 2.0, "threshold": 0.1, "momentum": 0.1, "beta": 0.1, "steps": (0.0, 0.5)},
    ),
    "SafeGuidance": (
        SafeGuidance,
        lambda: {"concept": "fox", "scale": 2.0, "threshold": 0.1, "momentum": 0.1, "beta": 0.1},
    ),
    "clamp_latents": (
        sf.clamp_latents,
        lambda: {"sae": make_sae(), "statistics": statistics(), "concept": "fox", "factor": 0.5, "steps": (0.0, 0.5)},
    ),
    "ReplaceWhere": (
        sf.ReplaceWhere,
        lambda: {"sae": make_sae(), "latents": {3: 0.5}, "steps": (0.0, 0.5)},
    ),
    "PosteriorAttenuation": (
        sf.PosteriorAttenuation,
        lambda: {"sae": make_sae(), "latents": [3], "posterior": ones(1, 66), "steps": (0.0, 0.5)},
    ),
    "PosteriorAttenuation.fit": (
        sf.PosteriorAttenuation.fit,
        lambda: {
            "pipe": Untouched(),
            "sae": make_sae(),
            "concept": "fox",
            "prompts": CONCEPTS,
            "prior": 0.5,
            "steps": (0.0, 0.5),
        },
    ),
    "ConceptLancet": (
        sf.ConceptLancet,
        lambda: {
            "directions": {"fox": ones(4), "owl": torch.eye(4)[0]},
            "remove": "fox",
            "at": AT,
            "strength": 0.5,
            "center": ones(4),
            "steps": (0.0, 0.5),
        },
    ),
    "Exchange": (sf.Exchange, lambda: {"sae": make_sae(), "latents": [1, 2], "change": ones(2, D), "at": AT}),
    "Exchange.fit": (
        sf.Exchange.fit,
        lambda: {"pipe": Untouched(), "sae": make_sae(), "target": "fox", "prompts": CONCEPTS, "at": AT},
    ),
    "Guard": (sf.Guard, lambda: {"sae": make_sae(), "discriminant": ones(N), "limit": 1.0, "at": AT}),
    "guard_concept": (
        sf.guard_concept,
        lambda: {"pipe": Untouched(), "saes": [make_sae()], "target": "fox", "prompts": CONCEPTS, "margin": 2.0},
    ),
    "ESD": (sf.ESD, lambda: {"changes": {"unet.x": LowRank(ones(3, 1), ones(1, 4))}, "steps": (0.0, 0.5)}),
    "ESD.fit": (
        sf.ESD.fit,
        lambda: {"pipe": Untouched(), "concept": "fox", "eta": 1.0, "lr": 1e-3, "steps": (0.0, 0.5)},
    ),
    "cones": (
        sf.cones,
        lambda: {
            "pipe": Untouched(),
            "concept": "fox",
            "prior_weight": 1.0,
            "latents": ones(1, 4, 8, 8),
            "threshold": 0.1,
            "rho": 1e-3,
            "steps": (0.0, 0.5),
        },
    ),
    "df_rise": (
        sf.df_rise,
        lambda: {"pipe": Untouched(), "prompt": "a fox", "share": 0.5, "steps": (0.0, 0.5)},
    ),
    "UCE.fit": (
        sf.UCE.fit,
        lambda: {
            "pipe": Untouched(),
            "erase": "fox",
            "erase_scale": 1.0,
            "preserve_scale": 1.0,
            "regularisation": 0.5,
            "steps": (0.0, 0.5),
        },
    ),
    "UCE": (sf.UCE, lambda: {"maps": [TextMap(("unet.x",), ones(4, 1), ones(1, 4))], "steps": (0.0, 0.5)}),
    "cad_erase": (
        sf.cad_erase,
        lambda: {"pipe": Untouched(), "prompts": "a fox", "ratio": 0.1, "steps": (0.0, 0.5)},
    ),
    "cad_amplify": (
        sf.cad_amplify,
        lambda: {"pipe": Untouched(), "prompts": "a fox", "ratio": 0.1, "steps": (0.0, 0.5)},
    ),
}

# What takes numbers and is not tried above, and why.
ANSWERS = "is what the library answers with"
IN_THE_CALL = "is the model's own numbers in the middle of a call, where looking would wait for the device"
NOT_ASKED = {
    "Activations": IN_THE_CALL,
    "AttentionCall": IN_THE_CALL,
    "Batch": "is what a RowSource gives: what TensorRows is made of is looked at",
    "Call": "its arguments are looked at by Call.of: `a call of the pipeline`",
    "Check": ANSWERS,
    "Circuit": ANSWERS,
    "CollectedRows": ANSWERS,
    "Context": IN_THE_CALL,
    "Delta": IN_THE_CALL,
    "Edge": ANSWERS,
    "EncoderName": ANSWERS,
    "Example": ANSWERS,
    "FeatureTransport": "made by FeatureTransport.fit",
    "Found": ANSWERS,
    "HeatMap": ANSWERS,
    "HeatMapRecording": ANSWERS,
    "LatentScores": ANSWERS,
    "Loss": ANSWERS,
    "Naming": ANSWERS,
    "PrincipalDirections": "made by PrincipalDirections.fit of what the pipeline gives; what it steers with is looked at",
    "Replace": IN_THE_CALL,
    "SAEQuality": ANSWERS,
    "Selection": "looked at by Erase, which it is given to",
    "SelfAttentionRecording": ANSWERS,
    "SparseCode": "the kernels say what becomes of NaN: a row with NaN is NaN",
    "TopLatent": ANSWERS,
    "WeightScores": ANSWERS,
    "WordLatent": ANSWERS,
    "code_edit": IN_THE_CALL,
    "export_neuronpedia": "writes the SAE's names and hookpoint, no weight; its own test has statistics with infinity",
    "load_instrument": "the SAE must be the one it was made with, by its fingerprint; the instrument looks at it",
    "mean_overlap": "measures maps that the library answers with; NaN in, NaN out",
    "overlap": "measures maps that the library answers with; NaN in, NaN out",
    "push_to_hub": "its metrics are written into a text",
    "save": "writing what was loaded or trained; load_sae refuses NaN",
    "random_latents": "takes an Erase, which was looked at",
    "sdxl_unbox.mean_activation": "what `icon` and `paint` make of it is looked at",
    "saeuron.object_settings": "each of its erasures is made by Erase.from_statistics",
}
HOMES = (
    "sae",
    "features",
    "attention",
    "pipeline",
    "steering",
    "attribution",
    "erasure",
    "training",
    "store",
    "report",
    "presets",
)
TAKES_NUMBERS = re.compile(r"\bfloat\b|Tensor|\bMask\b|\bSAE\b")


def public_callables() -> Iterator[tuple[str, Any]]:
    for name in sf.__all__:
        yield name, getattr(sf, name)
    for home in HOMES:
        module = importlib.import_module(f"sparsefeat.{home}")
        for name in module.__all__:
            entry = getattr(module, name)
            if inspect.ismodule(entry):
                own = [(n, o) for n, o in vars(entry).items() if getattr(o, "__module__", "") == entry.__name__]
                yield from ((f"{name}.{n}", o) for n, o in own if not n.startswith("_"))
            else:
                yield name, entry


def test_everything_public_that_takes_a_number_is_tried_or_says_why_not() -> None:
    asked = set()
    for name, entry in public_callables():
        if not callable(entry) or not getattr(entry, "__module__", "").startswith("sparsefeat"):
            continue
        if inspect.isclass(entry) and issubclass(entry, (BaseException, torch.nn.Module)):
            continue  # an SAE is made of random weights; what is put into it is looked at by whatever takes it
        try:
            parameters = inspect.signature(entry).parameters.values()
        except ValueError:
            continue
        if any(TAKES_NUMBERS.search(str(p.annotation)) for p in parameters):
            asked.add(name)
    assert asked - set(CALLS) - set(NOT_ASKED) == set()


# Every place of a call's arguments that can hold NaN ---------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of the floats, float tensors and SAEs in nested arguments."""
    if isinstance(value, (float, sf.SAE)) or (isinstance(value, torch.Tensor) and value.is_floating_point()):
        yield path
    elif isinstance(value, dict):
        for key, entry in value.items():
            if isinstance(key, float):
                yield (*path, ("key", key))
            yield from places(entry, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, entry in enumerate(value):
            yield from places(entry, (*path, index))
    elif isinstance(value, Selection):
        yield from ((*path, ("field", name)) for name in ("factor", "threshold"))


def with_bad(value: Any, path: tuple[Any, ...], bad: float) -> Any:
    """`value` with `bad` at the end of the path."""
    if not path:
        if isinstance(value, float):
            return bad
        spoilt = copy.deepcopy(value)
        weight = spoilt.W_dec.data if isinstance(spoilt, sf.SAE) else spoilt
        weight.view(-1)[weight.numel() // 2] = bad
        return spoilt
    step, rest = path[0], path[1:]
    if isinstance(step, tuple) and step[0] == "key":
        return {(bad if key == step[1] else key): entry for key, entry in value.items()}
    if isinstance(step, tuple):
        changed = {name: getattr(value, name) for name in ("latents", "factor", "threshold")}
        return Selection(**{**changed, step[1]: with_bad(changed[step[1]], rest, bad)})
    if isinstance(value, dict):
        return {**value, step: with_bad(value[step], rest, bad)}
    return type(value)(with_bad(entry, rest, bad) if i == step else entry for i, entry in enumerate(value))


CASES = [
    (name, path) for name, (_, make) in CALLS.items() for path in places(make()) if (name, path[0]) not in NOT_LOOKED_AT
]


def spelled(path: tuple[Any, ...]) -> str:
    return str(path[0]) + "".join(f"[{step}]" for step in path[1:])


@pytest.mark.parametrize("name", [name for name, (_, make) in CALLS.items() if "pipe" not in make()])
def test_the_arguments_pass_as_they_are(name: str) -> None:
    call, make = CALLS[name]
    call(**make())


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "path"), CASES, ids=[f"{name}-{spelled(path)}" for name, path in CASES])
def test_nan_and_infinity_are_refused_with_the_arguments_name(name: str, path: tuple[Any, ...], bad: float) -> None:
    if (name, spelled(path), bad) in NO_BOUND:
        pytest.skip("an infinite bound is no bound")
    call, make = CALLS[name]
    with pytest.raises(ValueError, match=r"nan|NaN|inf") as refused:
        call(**with_bad(make(), path, bad))
    said = {step.removesuffix("s") for step in path if isinstance(step, str)} | {"timestep"} & {
        "timestep" if isinstance(path[-1], tuple) else ""
    }
    assert any(word in str(refused.value) for word in said), refused.value


def test_weights_that_become_nan_after_the_instrument_was_made_are_refused_in_the_call() -> None:
    pipe, sae = tiny_sd(), make_sae()
    steer = sf.Steer(sae, scale={3: 0.5})
    with sf.attach(pipe, steer):
        pipe("a fox", num_inference_steps=1, output_type="latent")
        with torch.no_grad():
            sae.b_enc[5] = math.nan
        with pytest.raises(ValueError, match=r"sae\.b_enc holds NaN or infinity, 1 of 96 entries, the first at \[5\]"):
            pipe("a fox", num_inference_steps=1, output_type="latent")


def test_a_threshold_may_be_infinite_and_not_nan() -> None:
    sae = make_sae(activation="jumprelu", k=None)
    assert sae.threshold is not None
    sae.threshold[3] = math.inf  # a latent that is never active
    sf.Record(sae)
    sae.threshold[5] = math.nan
    with pytest.raises(ValueError, match=r"sae\.threshold holds NaN, 1 of 96 entries, the first at \[5\]"):
        sf.Record(sae)


def test_weights_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparsefeat.features import attached

    looked: list[str] = []
    monkeypatch.setattr(attached, "finite", lambda name, given, **how: looked.append(name))
    sae = make_sae()
    for _ in range(3):
        sf.Record(sae)
    assert looked == ["sae.W_enc", "sae.b_enc", "sae.W_dec", "sae.b_pre", "sae.b_out"]
    with torch.no_grad():
        sae.W_dec *= 2
    sf.Record(sae)
    assert len(looked) == 10


# The helper --------------------------------------------------------------------------------------------------------------


@given(st.lists(st.floats(width=32), min_size=1, max_size=40))
def test_a_tensor_passes_exactly_if_all_its_entries_are_finite(values: list[float]) -> None:
    tensor = torch.tensor(values)
    if all(math.isfinite(value) for value in values):
        assert finite("x", tensor) is tensor
    else:
        with pytest.raises(ValueError, match="x holds NaN or infinity"):
            finite("x", tensor)


def test_finite_numbers_whose_sum_overflows_pass() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        finite("x", torch.full((70_000,), torch.finfo(dtype).max, dtype=dtype))


@pytest.mark.parametrize("given", ["8", b"8", True, None, "", [], {}, "nan", 1j, torch.ones(2)])
def test_what_is_no_number_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^x=.* must be a finite number\.$"):
        number("x", given)


@pytest.mark.parametrize("given", [2.0, "2", None, True, 0, -1, 11, math.nan])
def test_what_is_no_whole_number_in_the_range_is_refused(given: Any) -> None:
    with pytest.raises(ValueError, match=r"^x=.* must be a whole number from 1 to 10\.$"):
        whole("x", given, 1, 10)
    assert whole("x", np.int64(10), 1, 10) == whole("x", torch.tensor(10)) == 10


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (Image.new("RGB", (4, 4)), "PIL image of mode 'RGB'; give one in grey"),
        ("mask.png", "'mask.png', which is no map"),
        (object(), "which is no map"),
        (np.zeros((64, 64, 3)), r"\[64, 64, 3\], an image in colours"),
        (np.full((4, 4), 255, np.uint8), "values up to 255; divide it by 255"),
        (np.zeros((4,)), r"shape \[4\]; give \[height, width\]"),
        (np.zeros((0, 4)), r"shape \[0, 4\]"),
        (torch.ones(4, 4, dtype=torch.complex64), "real numbers"),
        ([[1.0, math.nan]], r"mask holds NaN or infinity, 1 of 2 entries, the first at \[0, 1\]"),
    ],
)
def test_what_is_no_map_over_an_image_is_refused(given: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mask_map("mask", given)


def test_maps_of_every_usual_kind_mean_the_same() -> None:
    wanted = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    white = Image.fromarray((wanted.numpy() * 255).astype(np.uint8))
    frozen = wanted.numpy().copy()
    frozen.setflags(write=False)
    for one in (wanted, wanted.bool(), wanted.to(torch.uint8), wanted.tolist(), frozen, white, white.convert("1")):
        assert torch.equal(mask_map("mask", one), wanted)
    assert image_map("mask", wanted.double()).dtype == torch.float64


def test_a_map_stays_what_it_was_when_the_next_one_is_painted_into_the_same() -> None:
    for painted in (torch.ones(2, 2), torch.ones(2, 2, dtype=torch.float64), np.ones((2, 2), dtype=np.float32)):
        kept = mask_map("mask", painted)
        painted[:] = 0
        assert bool((kept == 1).all())


def test_arrays_lists_and_dicts_of_a_calls_arguments_are_looked_into() -> None:
    finite_in("image", [np.ones((2, 3)), {"a": (1.0, torch.ones(2))}, "text", None, 3, Image.new("L", (2, 2))])
    for bad, name in (
        ([np.ones(2), np.array([1.0, math.inf])], r"image\[1\] holds NaN"),
        ({"scale": math.nan}, r"image\['scale'\]=nan"),
        ([[torch.tensor([math.nan])]], r"image\[0\]\[0\] holds NaN"),
    ):
        with pytest.raises(ValueError, match=name):
            finite_in("image", bad)


def test_latents_that_are_no_whole_numbers_are_refused() -> None:
    for latents in ([1.5], torch.tensor([1.0, 2.0]), [True, False]):
        with pytest.raises(ValueError, match=r"^latents=.* must be the latents' numbers"):
            sf.InterpretThenDeactivate(make_sae(), latents)
    assert sf.InterpretThenDeactivate(make_sae(), []).latents.tolist() == []
