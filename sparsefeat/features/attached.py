"""An SAE as instruments hold it: where it belongs, and on which device it computes."""

from __future__ import annotations

import os
import weakref
from typing import Any

from torch import Tensor

from sparsefeat.arguments import finite
from sparsefeat.pipeline import Activations, Context, Hookpoint
from sparsefeat.sae import SAE

# SAEs whose weights were found to be finite, and which weights those were.
_FINITE: weakref.WeakKeyDictionary[SAE, list[tuple[int, int]]] = weakref.WeakKeyDictionary()


def check_sae(sae: Any, called: str = "sae") -> None:
    """Refuse what is no SAE, such as the name of one."""
    if not isinstance(sae, SAE):
        name = os.fspath(sae) if isinstance(sae, (str, os.PathLike)) else None
        what, opened = (type(sae).__name__, "folder or hub id") if name is None else (repr(name), name)
        raise TypeError(f"{called} is {what}, not an SAE; open it first, sparsefeat.load_sae({opened!r}).")


def hookpoint_of(sae: SAE, at: str | Hookpoint | None, called: str = "sae") -> Hookpoint:
    """`at`, or where the SAE says that it belongs. `called`: the argument's name, for errors.

    Refuses what is no SAE, such as the name of one, an SAE with NaN or infinity in its weights, and one whose codes would depend on what else is in the batch (BatchTopK in training mode).
    """
    check_sae(sae, called)
    _refuse_training(sae, called)
    check_weights(sae, called)
    where = at if at is not None else sae.config.hookpoint
    if where is None:
        raise ValueError(
            'at is missing, and the SAE does not know its hookpoint; name one, as in at="unet.mid_block.attentions.0".'
        )
    return where if isinstance(where, Hookpoint) else Hookpoint.parse(where)


def reconstructing(sae: SAE) -> SAE:
    """Refuse a transcoder, whose code is of one tensor and whose reconstruction of another: it cannot be edited in place."""
    if sae.config.transcoder:
        raise ValueError(
            "sae is a transcoder: its code is of the module's input and its decoder writes the module's output, so a "
            "code cannot be edited in place; steer with add= at the module's output, or use an SAE."
        )
    return sae


def beside(sae: SAE, activations: Activations, context: Context) -> SAE:
    """The SAE, moved to the activations' device if it was on another: with offloading that is only known in the call.

    The SAE is no part of the pipeline, whose own moves leave it where it is. One that depends on the timestep is set to
    the step's.
    """
    _refuse_training(sae)
    check_weights(sae)
    if sae.device != activations.tensor.device:
        if any(weight.is_meta for _, weight in sae.named_parameters(recurse=False)):
            raise ValueError(
                "the SAE has no weights, it is on the device 'meta'; open it with sparsefeat.load_sae(folder)."
            )
        sae.to(activations.tensor.device)
    if sae.config.normalizer == "timestep":
        if context.timestep is None:
            raise ValueError(
                f"the SAE at {context.hookpoint} depends on the timestep, and the module runs outside the denoising steps: "
                "attach it to a block of the denoiser."
            )
        sae.at_timestep(context.timestep)
    return sae


def _refuse_training(sae: SAE, called: str = "sae") -> None:
    if sae.training and sae.config.activation == "batch_topk":
        raise ValueError(
            f"{called} is in training mode, where BatchTopK shares its k among all rows of a batch; call sae.eval() first."
        )


def check_weights(sae: SAE, called: str = "sae") -> None:
    """Refuse NaN and infinity in the weights: looked at once (two passes over the memory), and again when they changed."""
    weights = dict(sae.named_parameters(recurse=False))
    weights |= {n: b for n, b in sae.named_buffers(recurse=False) if not n.startswith("statistic_")}
    seen = [_state(weight) for weight in weights.values()]
    if _FINITE.get(sae) != seen:
        for name, weight in weights.items():
            finite(
                f"{called}.{name}", weight, unbounded=name == "threshold"
            )  # infinite where a latent is never to be active
        _FINITE[sae] = seen


def _state(weight: Tensor) -> tuple[int, int]:
    return weight.data_ptr(), -1 if weight.is_inference() else weight._version
