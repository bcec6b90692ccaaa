"""What is no pipeline, and what the call of one does not take: refused by name, before anything runs.

Many pipelines end their signature in `**kwargs`, for the sake of two arguments of old, and swallow a misspelt one: the
call then runs with the default.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
from torch import nn

from sparsefeat.arguments import finite_in, whole
from sparsefeat.schedule import check_steps, most_steps

IGNORES_ONE_SIDE = "StableDiffusionPipeline.__call__"
"""Draws in its own size where one of height and width is left out. Others have their own for the one that is."""
GIVEN_TO_SEVERAL = ("num_images_per_prompt", "num_videos_per_prompt", "latents")
"""What a function gives the call, beside the prompt and the noise, that draws several prompts at once from noise of their own."""
# What functions that draw by themselves give the call, and the argument of their own that says it.
_SAID_BY = {
    "prompt": "prompts", "prompt_embeds": "prompts", "num_images_per_prompt": "prompts", "num_videos_per_prompt": "prompts",
    "generator": "seed", "latents": "seed", "num_inference_steps": "steps",
}  # fmt: skip


def check_pipeline(pipe: Any) -> None:
    """Raise TypeError if `pipe` is no pipeline object."""
    if isinstance(pipe, nn.Module):
        raise TypeError(
            f"pipe is {type(pipe).__name__}, one of a pipeline's models; attach to the pipeline, whose calls tell the step "
            "and the prompt"
        )
    named = getattr(pipe, "components", None)  # a modular pipeline holds its parts there
    parts = [*getattr(pipe, "__dict__", {}).values(), *(named.values() if isinstance(named, Mapping) else ())]
    holds = callable(pipe) or any(isinstance(part, nn.Module) for part in parts)
    if isinstance(pipe, type) or not hasattr(pipe, "__dict__") or not holds:
        what = f"the class {pipe.__name__}" if isinstance(pipe, type) else f"{type(pipe).__name__}"
        raise TypeError(f"pipe is {what}, not a pipeline; open one, DiffusionPipeline.from_pretrained(folder)")


def check_arguments(pipe: Any, names: Iterable[str], also: Iterable[str] = ()) -> None:
    """Raise TypeError, with the nearest name, if one of `names` is no argument of `pipe(...)`.

    Args:
        also: further names that would be right, the caller's own, to choose the nearest from.
    """
    check_pipeline(pipe)
    call = type(pipe).__call__
    parameters = inspect.signature(call).parameters.values()
    named = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)][1:]
    if hasattr(type(pipe), "blocks"):  # a modular pipeline's take its arguments
        named += [name for taken in pipe.blocks.inputs for name in (taken.name, taken.kwargs_type) if name]
    takes_more = any(p.kind is p.VAR_KEYWORD for p in parameters)
    for name in names:
        if name in named or (takes_more and name in inspect.unwrap(call).__code__.co_consts):
            continue  # it is in the signature, or the function reads it by name from its **kwargs
        parts = set(
            name.split("_")
        )  # num_steps: those of num_inference_steps, though "timesteps" has more letters of it
        near = [known for known in (*named, *also) if parts < set(known.split("_"))] if len(parts) > 1 else []
        near = near or difflib.get_close_matches(name, [*named, *also], n=1, cutoff=0.6)
        if takes_more and not near and not type(pipe).__module__.startswith("diffusers."):
            continue  # somebody's own class, which may hand its **kwargs on
        remedy = f"did you mean {near[0]}?" if near else f"it takes {', '.join(named)}"
        raise TypeError(f"{name}= is no argument of this {type(pipe).__name__}'s call; {remedy}")


def check_call(pipe: Any, call: Mapping[str, Any], of: Callable[..., Any], *own: str) -> None:
    """Raise for what cannot be among `call`, the further arguments of a function `of` that calls the pipeline by itself: what
    `check_arguments` and `check_values` refuse, and what the function gives it, the prompt, the noise and `own`."""
    taken = inspect.signature(of).parameters
    check_arguments(pipe, call, also=taken)
    for name in ("prompt", "prompt_embeds", "generator", *own):
        if name in call:
            source = _SAID_BY.get(name)
            remedy = f", from {source}=; give that in its place" if source in taken else "; leave it out"
            raise TypeError(f"{name}= is made here{remedy}.")
    for name, value in call.items():
        finite_in(name, value)
    check_values(pipe, call)


def for_several(call: Mapping[str, Any], prompts: int) -> dict[str, Any]:
    """The arguments of a call of a list of prompts: Stable Diffusion takes a negative prompt in a list then."""
    negative = {name: [text] * prompts for name, text in call.items() if isinstance(text, str) and "negative" in name}
    return {**call, **negative}


def check_number_of_steps(pipe: Any, name: str, steps: int) -> None:
    """Raise ValueError, with the argument's name, for more steps than the pipeline's scheduler can take."""
    scheduler = getattr(pipe, "scheduler", None)
    trained = getattr(getattr(scheduler, "config", None), "num_train_timesteps", None)
    check_steps(name, steps, most_steps(type(scheduler).__name__, trained))


def check_values(pipe: Any, arguments: Mapping[str, Any]) -> None:
    """Raise for values of a call's arguments of which the pipeline's parts would speak in their own words, or not at all."""
    for name in ("num_images_per_prompt", "num_videos_per_prompt"):
        if arguments.get(name) is not None:
            whole(name, arguments[name])
    steps = arguments.get("num_inference_steps")
    counted = arguments.get("timesteps") is None and arguments.get("sigmas") is None
    if steps is not None and counted:
        check_number_of_steps(pipe, "num_inference_steps", whole("num_inference_steps", steps))
    parameters = inspect.signature(type(pipe).__call__).parameters
    for name in ("num_inference_steps", "guidance_scale"):
        default = parameters[name].default if name in parameters else None
        no_number = isinstance(arguments.get(name), (str, list, tuple, dict, type(None)))
        unread = name == "num_inference_steps" and arguments.get(name) is None and not counted
        if name in arguments and no_number and not unread and isinstance(default, (int, float)):
            raise ValueError(f"{name}={arguments[name]!r:.80} must be a number; leave it out for {default}.")
    sides = {side: arguments.get(side) for side in ("height", "width")}
    if inspect.unwrap(type(pipe).__call__).__qualname__ == IGNORES_ONE_SIDE and list(sides.values()).count(None) == 1:
        said, left = sorted(sides, key=lambda side: sides[side] is None)
        raise ValueError(f"{said}={sides[said]} is ignored by {type(pipe).__name__} without {left}=; give both.")
    for name, given in arguments.items():
        if name.startswith("callback_on") and name.endswith("_end") and given is not None and not callable(given):
            raise ValueError(f"{name}={given!r:.80} must be a function.")
    for one in _entries(arguments.get("generator")):
        if isinstance(one, (int, float, str)):
            raise ValueError(f"generator={one!r} must be a torch.Generator, as in torch.Generator().manual_seed(0).")
    if isinstance(arguments.get("generator"), tuple):
        raise ValueError("generator is a tuple; give the generators as a list.")
    for name in ("latents", "prompt_embeds", "negative_prompt_embeds"):
        if isinstance(arguments.get(name), np.ndarray):
            raise ValueError(f"{name} is an array of numpy; give a tensor, torch.as_tensor({name}).")
    for name in ("prompt", "negative_prompt"):
        given = arguments.get(name)
        entries = _entries(given)
        if given is not None and (not entries or any(map(_is_no_text, entries))):
            raise ValueError(f"{name}={given!r:.80} must be a text, or a list of at least one.")


def _is_no_text(given: Any) -> bool:
    is_array = hasattr(given, "__array__") and not isinstance(given, str)  # np.str_ is a text
    return is_array or given is None or isinstance(given, (int, float, bytes))


def _entries(given: Any) -> list[Any]:
    return list(given) if isinstance(given, (list, tuple)) else [given]
