"""SAeUron: "Interpretable Concept Unlearning in Diffusion Models with Sparse Autoencoders" (arXiv 2501.18052).

Stable Diffusion 1.5, fine-tuned on UnlearnCanvas; SAEs of two transformers' outputs, 1280 wide, 20,480 latents, k = 32.
The method is `sparsefeat.Erase`, whose docstring has its equations.

Where the released code deviates from the paper: it adds the reconstruction error with the opposite sign, which reflects
every row about its reconstruction, also where nothing is erased (`error="saeuron_released"`); its step comes from
counting calls of the module, here from the scheduler; with the files' `input_unit_norm` it normalises and does not undo
it, here it is undone. Its sweep generates every image 21 times; here statistics are collected once (`collect_statistics`)
and every setting is made of them (`Erase.from_statistics`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sparsefeat.erasure import Erase
from sparsefeat.features.statistics import Statistics
from sparsefeat.sae import SAE, load_sae

BASE_MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
HOOKPOINTS = {"object": "unet.up_blocks.1.attentions.1", "style": "unet.up_blocks.1.attentions.2"}

# Of the paper's evaluation.
GENERATION: dict[str, Any] = {"num_inference_steps": 100, "guidance_scale": 9.0}

STYLE = {"percentile": 99.999, "gamma": -1.0}

# The grid that objects are chosen from, one concept at a time, by the mean of UA and IRA.
PERCENTILES = (99.99, 99.995, 99.999)
GAMMAS = (-1.0, -5.0, -10.0, -15.0, -20.0, -25.0, -30.0)


def load(source: str | Path, kind: str, **options: Any) -> SAE:
    """One of the published SAEs: `kind` is "object" or "style". source, options: of `load_sae`.

    Raises:
        ValueError: another `kind`; as `load_sae`.
    """
    if kind not in HOOKPOINTS:
        raise ValueError(f'kind={kind!r} is not known; use "object" or "style".')
    return load_sae(source, **{"hookpoint": HOOKPOINTS[kind], "base_model": BASE_MODEL, **options})


def erase_style(pipe: Any, sae: SAE, style: str, prompts: Mapping[str, Sequence[str]], **options: Any) -> Erase:
    """Erase one style, with the paper's percentile and strength. prompts: style -> prompts (20 each in the paper), all
    of them; options: of `Erase.fit`, and arguments of the pipeline, by default `GENERATION`."""
    return Erase.fit(pipe, sae, style, prompts, **{**STYLE, **GENERATION, **options})


def object_settings(
    sae: SAE, statistics: Statistics, concept: str, **options: Any
) -> Iterator[tuple[float, float, Erase]]:
    """Every (percentile, gamma) of the paper's grid for one object, as an `Erase` of statistics collected once."""
    for percentile in PERCENTILES:
        for gamma in GAMMAS:
            yield (
                percentile,
                gamma,
                Erase.from_statistics(sae, statistics, concept, percentile=percentile, gamma=gamma, **options),
            )
