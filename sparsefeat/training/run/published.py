"""How published SAEs were trained, by name: what they select by, what they minimise, their constants.

Widths are multiples of `d_model` as published, unless you say `n_latents`; constants that were given for rows of another
norm are put into rows of unit spread (a norm of about sqrt(d_model), which Anthropic and SAELens scale to; GDM and
dictionary_learning scale to a norm of 1). What a system takes from the size of its data (steps, learning rate decay) is
as published and wants changing for yours.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from sparsefeat.sae import SAEConfig
from sparsefeat.training.objective.objectives import Objective
from sparsefeat.training.run.config import TrainConfig


@dataclass(frozen=True)
class Recipe:
    """An SAE to be and how it is trained. Where `sae.activation` is a pursuit, `build_itda` makes it and `train` has but
    the batch size to say."""

    sae: SAEConfig
    train: TrainConfig


@dataclass(frozen=True)
class _Published:
    """source: where the constants are from. sae, objective, train: functions of d_model, n_latents, k and steps, or what
    does not depend on them. n, k: the published width, as a multiple of d_model, and sparsity."""

    source: str
    n: int
    k: int
    sae: dict[str, Any]
    objective: Callable[[int, int, int, int], Objective]
    train: dict[str, Any]
    steps: int = 100_000
    warmup: int = 0
    decay: float = 1.0  # share of the steps over which the learning rate falls


GROUPS = (
    1 / 32,
    3 / 32,
    7 / 32,
    15 / 32,
    1.0,
)  # of Matryoshka SAEs, summed: a 32nd, a 16th, an 8th, a quarter, the rest


def _prefixes(n: int) -> tuple[int, ...]:
    return tuple(sorted({max(1, round(share * n)) for share in GROUPS}))


def _batch_topk(d: int, n: int, k: int, steps: int, **pieces: Any) -> Objective:
    # dictionary_learning's constants; of a run too short for them a share, or the threshold is of what fired long ago.
    start, remembered = min(1000, steps // 10), min(1000, max(1, steps // 20))
    return Objective("mse", aux="crosscoder", threshold_decay=1 - 1 / remembered, threshold_after=start, **pieces)


THRESHOLD = {"activation": "batch_topk", "inference": "threshold"}
UNBOX: dict[str, Any] = {"batch_size": 4096, "grad_clip": None}
ADAM_GDM: dict[str, Any] = {"betas": (0.0, 0.999), "batch_size": 4096}

PUBLISHED: dict[str, _Published] = {
    "topk": _Published(
        "Gao et al., arXiv 2406.04093, as EleutherAI/sparsify trains it", 32, 32, {}, lambda d, n, k, s: Objective(), {}
    ),
    "multi-topk": _Published(
        "the same paper's appendix, as sparsify has it",
        32,
        32,
        {},
        lambda d, n, k, s: Objective(multi_topk=1 / 8, fired_above=None),
        {},
    ),
    "hierarchical-topk": _Published(
        "arXiv 2505.24473, at a handful of its sparsities",
        32,
        32,
        {},
        lambda d, n, k, s: Objective(levels=tuple(sorted({max(1, k // 8), max(1, k // 4), max(1, k // 2), k}))),
        {},
    ),
    "batch-topk": _Published(
        "arXiv 2412.06410, as dictionary_learning trains it", 16, 32, THRESHOLD, _batch_topk, {}, warmup=1000, decay=0.2
    ),
    "matryoshka": _Published(
        "arXiv 2503.17547, as dictionary_learning trains it",
        16,
        32,
        THRESHOLD,
        lambda d, n, k, s: _batch_topk(d, n, k, s, prefixes=_prefixes(n)),
        {},
        warmup=1000,
        decay=0.2,
    ),
    "crosscoder": _Published(
        "BatchTopK crosscoders, arXiv 2504.02922, for one model",
        32,
        100,
        THRESHOLD,
        lambda d, n, k, s: dataclasses.replace(_batch_topk(d, n, k, s), reconstruction="l2", decoder="free"),
        {"lr": 1e-4, "batch_size": 2048},
        warmup=1000,
    ),
    "sdxl-unbox": _Published(
        "arXiv 2410.22366",
        4,
        10,
        {},
        lambda d, n, k, s: Objective("mse", aux="unbox", k_aux=256, fired_above=1e-3),
        {"lr": 1e-4, **UNBOX},
        steps=93_750,
        decay=0,
    ),
    "saeuron": _Published(
        "arXiv 2501.18052",
        16,
        32,
        {"activation": "batch_topk"},
        lambda d, n, k, s: Objective(aux="saeuron", fired_above=None),
        {"lr": 4e-4, "batch_size": 4096},
    ),
    "concept-steerers": _Published(
        "arXiv 2501.19066",
        4,
        32,
        {},
        lambda d, n, k, s: Objective("mse", aux="unbox", k_aux=32, fired_above=1e-3),
        {"lr": 4e-4, **UNBOX},
        decay=0,
    ),
    "itd": _Published(
        "arXiv 2503.09446; 524,288 latents for 768",
        683,
        64,
        {},
        lambda d, n, k, s: Objective("mse", aux="unbox", k_aux=256, fired_above=1e-3),
        {"lr": 1e-4, **UNBOX},
        steps=6000,
        warmup=1000,
        decay=0,
    ),
    "flux-sae": _Published(
        "arXiv 2505.24360, neverix/fae; 65,536 latents for 3072",
        21,
        64,
        {"activation": "raw_topk", "normalizer": "pca", "clip": 10.0},
        lambda d, n, k, s: Objective("mse", aux="fae", k_aux=64, fired_above=1.0, dead_after=max(1, 1024 * n // k)),
        {"lr": 2e-4, "betas": (0.0, 0.99), "grad_clip": 10.0, "batch_size": 1024, "ema": 0.995},
        steps=30_000,
        warmup=50,
        decay=0,
    ),
    "tide": _Published(
        "arXiv 2503.07050, as far as it says; k is for 18,432 latents",
        16,
        922,
        {"normalizer": "timestep", "time_width": 256},
        lambda d, n, k, s: Objective("mse"),
        {},
    ),
    "temporal-topk": _Published(
        "the timestep's affine of DifFRACT (arXiv 2606.15796) under TopK",
        16,
        32,
        {"normalizer": "timestep", "time_width": 256},
        lambda d, n, k, s: Objective(),
        {},
    ),
    "transcoder": _Published(
        "arXiv 2406.11944 under TopK, as sparsify trains it",
        32,
        32,
        {"transcoder": True},
        lambda d, n, k, s: Objective(),
        {},
    ),
    "skip-transcoder": _Published(
        "arXiv 2501.18823", 32, 32, {"transcoder": True, "skip": True}, lambda d, n, k, s: Objective(), {}
    ),
    "relu-l1": _Published(
        "Anthropic, April 2024; its weight of 5 to start from",
        32,
        32,
        {"activation": "relu"},
        lambda d, n, k, s: Objective(
            "mse", sparsity=5 / d, l0_target=k, sparsity_warmup=max(1, s // 20), decoder="free"
        ),
        {"lr": 5e-5, "batch_size": 4096},
        decay=0.2,
    ),
    "dn-cbm": _Published(
        "arXiv 2407.14499, without resampling",
        8,
        32,
        {"activation": "relu"},
        lambda d, n, k, s: Objective("mse", sparsity=3e-5),
        {"lr": 5e-4, "batch_size": 4096, "grad_clip": None},
        decay=0,
    ),
    "jumprelu": _Published(
        "arXiv 2407.14435, trained to a number of active latents as dictionary_learning does",
        16,
        32,
        {"activation": "jumprelu"},
        lambda d, n, k, s: Objective(
            "mse",
            sparsity=1.0,
            penalty="l0",
            l0_target=k,
            sparsity_warmup=min(10_000, max(1, s // 10)),
            bandwidth=0.001 * math.sqrt(d),
            first_threshold=0.001 * math.sqrt(d),
        ),
        {"lr": 7e-5, **ADAM_GDM},
        warmup=1000,
        decay=0.2,
    ),
    "jumprelu-tanh": _Published(
        "Anthropic, January 2025; its weight of 20 to start from",
        32,
        32,
        {"activation": "jumprelu"},
        lambda d, n, k, s: Objective(
            "mse",
            sparsity=20 / d,
            penalty="tanh",
            l0_target=k,
            sparsity_warmup=s,
            bandwidth=2.0,
            first_threshold=0.1,
            pre_act=3e-6 / d,
            decoder="free",
        ),
        {"lr": 2e-4, "batch_size": 4096},
        decay=0.2,
    ),
    "gated": _Published(
        "arXiv 2404.16014; the weight is found by the number of active latents",
        16,
        32,
        {"activation": "jumprelu"},
        lambda d, n, k, s: Objective("mse", sparsity=1e-2, l0_target=k, sparsity_warmup=max(1, s // 20), gated=True),
        {"lr": 3e-4, **ADAM_GDM},
        warmup=1000,
        decay=0.2,
    ),
    "archetypal": _Published(
        "arXiv 2502.12892",
        16,
        32,
        {},
        lambda d, n, k, s: Objective("mse", decoder="archetypal", delta=0.0),
        {"lr": 5e-4, "batch_size": 4096},
    ),
    "ra-sae": _Published(
        "arXiv 2502.12892, relaxed by 1 as overcomplete has it",
        16,
        32,
        {},
        lambda d, n, k, s: Objective("mse", decoder="archetypal", delta=1.0),
        {"lr": 5e-4, "batch_size": 4096},
    ),
    "itda": _Published(
        "arXiv 2505.24360; a dictionary of data points, no gradients",
        5,
        40,
        {"activation": "matching_pursuit", "normalizer": "unit_norm"},
        lambda d, n, k, s: Objective(),
        {},
    ),
}


def batch_size_of(name: str) -> int:
    """Of a recipe that is not told another."""
    return int(PUBLISHED[name].train.get("batch_size", TrainConfig.batch_size))


def recipe(
    name: str,
    d_model: int,
    *,
    n_latents: int | None = None,
    k: int | None = None,
    steps: int | None = None,
    sae: dict[str, Any] | None = None,
    objective: dict[str, Any] | None = None,
    **train: Any,
) -> Recipe:
    """A published SAE for activations of `d_model`; `sparsefeat.training.PUBLISHED` has the names.

    n_latents, k, steps: in the place of the published ones; where an activation has no k it is the number of active latents
    to be reached. sae, objective, train: further fields of `SAEConfig`, `Objective` and `TrainConfig` in the place of the
    recipe's.

    >>> made = recipe("matryoshka", 128, n_latents=1024, k=16, steps=900, lr=2e-3, sae={"hookpoint": "unet.mid_block"})
    >>> SAETrainer(SAE(made.sae), rows, made.train).fit()
    """
    if name not in PUBLISHED:
        raise ValueError(f"recipe {name!r:.100} is not known: choose one of {', '.join(PUBLISHED)}")
    of = PUBLISHED[name]
    n, k, steps = n_latents or of.n * d_model, k or of.k, steps or of.steps
    config: dict[str, Any] = {**of.sae, **(sae or {})}
    if config.get("activation", "topk") not in ("relu", "jumprelu"):
        config["k"] = k
    made = of.objective(d_model, n, k, steps)
    given: dict[str, Any] = {"warmup_steps": min(of.warmup, steps // 10), **of.train, **train}
    given.setdefault("decay_steps", round(of.decay * (steps - given["warmup_steps"])))
    made = dataclasses.replace(made, **(objective or {}))
    return Recipe(SAEConfig(d_model, n, **config), TrainConfig(steps=steps, objective=made, **given))
