"""ItD: "Interpret then Deactivate" (arXiv 2503.09446), concept erasure in Stable Diffusion 1.4's text encoder.

One SAE of layer 8, 768 wide, 524,288 latents, k = 64. The method is `sparsefeat.erasure.InterpretThenDeactivate`, whose
docstring has the equations.

Where the released code deviates from the paper or from itself: its selection and its gate depend on how long the longest
prompt of a batch is, here padding is left out of both; for artistic styles its threshold is computed with strength -6 and
used with -8 (`gate_strength=-6`); for celebrities the threshold is of the worst token and the gate of the mean
(`gate_reduce="max_token"` is the worst token in both); for nudity it compares with no threshold at all and fails, here no
threshold edits every prompt, as the paper means. It holds a dense code of the batch (8 GB for 50 prompts), here none.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sparsefeat.erasure import InterpretThenDeactivate
from sparsefeat.features.attached import check_sae
from sparsefeat.sae import SAE

BASE_MODEL = "CompVis/stable-diffusion-v1-4"
HOOKPOINT = "text_encoder.text_model.encoder.layers.8"
STRENGTH = -8.0
TOP_M = {"celebrity": 128, "nudity": 128, "style": 256}
NUDITY = ("nudity", "naked", "erotic", "sexual")


def erase(
    pipe: Any, sae: SAE, kind: str, erase: Sequence[str], remain: Sequence[str] = (), **options: Any
) -> InterpretThenDeactivate:
    """Select and gate with the paper's constants for a `kind` of concept: "celebrity", "style" or "nudity".

    erase, remain: prompts; for nudity the paper has `NUDITY` against 50 captions of COCO, and no gate.
    options: of `InterpretThenDeactivate.fit`, in the place of the paper's.

    Raises:
        TypeError: `sae` is no SAE.
        ValueError: another `kind`; as `InterpretThenDeactivate.fit`.
    """
    check_sae(sae)
    if kind not in TOP_M:
        raise ValueError(f"kind={kind!r} is not known; use one of {', '.join(TOP_M)}.")
    settings = {
        "top_m": TOP_M[kind],
        "strength": STRENGTH,
        "gate": kind != "nudity",
        "at": sae.config.hookpoint or HOOKPOINT,
    }
    return InterpretThenDeactivate.fit(pipe, sae, erase, remain, **{**settings, **options})
