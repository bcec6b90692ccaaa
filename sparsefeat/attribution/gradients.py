"""Gradients of a denoiser's weights, taken while the pipeline runs: one image's row at a time, summed in float32.

The model is run again on the arguments that the pipeline gave it, by `functional_call` on leaves that share the weights'
storage: no flag and no `.grad` of the user's parameters is touched, and only the chosen weights are in the graph.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sparsefeat.arguments import taking_gradients
from sparsefeat.attention.moved_latents import rows_of_arguments
from sparsefeat.pipeline import Call, Context, Instrument, UnknownConditionError, resolve
from sparsefeat.pipeline.context import HOW_TO_STATE, UNKNOWN
from sparsefeat.pipeline.families.registry import family_of
from sparsefeat.pipeline.hookpoints import components
from sparsefeat.pipeline.weights import plain_weight

Predict = Callable[[Mapping[str, Any]], Tensor]


def denoiser_name(pipe: Any) -> str:
    """The one component that runs in the steps.

    Raises:
        ValueError: there is none, or there are several (a refiner, Wan's two experts).
    """
    names = [name for name, root in components(pipe).items() if family_of(root).runs_in_steps]
    if len(names) != 1:
        raise ValueError(f"{type(pipe).__name__} has {' and '.join(names) or 'no model'} that denoises: one is needed.")
    return names[0]


def weight_paths(pipe: Any, modules: str | Sequence[str]) -> list[str]:
    """Paths of the Linear and Conv2d modules that are meant: those of the denoiser whose path contains the text, or those of
    the list.

    Raises:
        ValueError: there is none, or one whose weight cannot be read (LoRA, quantised).
    """
    if not isinstance(modules, (str, Sequence)) or not modules:
        raise ValueError(f"modules={modules!r:.80} must be a part of a path, as 'ff', or a list of paths.")
    if not isinstance(modules, str):
        paths = [resolve(pipe, path).path for path in modules]
    else:
        name = denoiser_name(pipe)
        root = getattr(components(pipe)[name], "_orig_mod", components(pipe)[name])
        paths = [
            f"{name}.{inner}"
            for inner, module in root.named_modules()
            if modules in inner and isinstance(module, (nn.Linear, nn.Conv2d))
        ]
    if not paths:
        raise ValueError(
            f"modules={modules!r} names no Linear or Conv2d of the denoiser; give a part of a path, as 'ff'."
        )
    for path in paths:
        plain_weight(resolve(pipe, path))
    return paths


def predicted(
    root: nn.Module, arguments: Mapping[str, Any], weights: Mapping[str, Tensor] = MappingProxyType({})
) -> Tensor:
    """What the denoiser says, in float32, with `weights` by the names of its parameters in the place of its own; those that
    are not among them take no part in a gradient.
    """
    state = {name: parameter.detach() for name, parameter in root.named_parameters()} | dict(weights)
    said = functional_call(root, state, (), dict(arguments))
    return (said if isinstance(said, Tensor) else said[0]).float()


class WeightGradients:
    """sum of d loss / d weight of the modules at `paths`, all in one component."""

    def __init__(self, pipe: Any, paths: Sequence[str]):
        targets = [resolve(pipe, path) for path in paths]
        self.root_name: str = targets[0].root_name
        if any(target.root_name != self.root_name for target in targets):
            raise ValueError(
                f"modules= lie in several components: {', '.join({t.root_name for t in targets})}; give one's."
            )
        self.root: nn.Module = getattr(targets[0].root, "_orig_mod", targets[0].root)
        own = {id(parameter): name for name, parameter in self.root.named_parameters()}
        self.names: dict[str, str] = {target.path: own[id(plain_weight(target))] for target in targets}
        self.values: dict[str, Tensor] = {target.path: plain_weight(target).detach() for target in targets}
        """The weights that the gradient is taken at; another tensor in their place leaves the model as it is."""
        self.sums: dict[str, Tensor] = {
            path: torch.zeros_like(value, dtype=torch.float32) for path, value in self.values.items()
        }

    def add(self, loss: Callable[[Predict], Tensor]) -> float:
        """Add the gradients of `loss(predict)`, where `predict(arguments)` is what the denoiser says of its arguments."""
        leaves = {path: value.detach().requires_grad_() for path, value in self.values.items()}
        named = {self.names[path]: leaf for path, leaf in leaves.items()}
        with taking_gradients("an attribution to weights"):
            value = loss(lambda arguments: predicted(self.root, arguments, named))
        gradients = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
        for path, gradient in zip(leaves, gradients, strict=True):
            if gradient is not None:  # not reached by the denoiser's prediction: 0
                self.sums[path] += gradient
        return float(value.detach())

    def checked(self) -> dict[str, Tensor]:
        """The sums.

        Raises:
            ValueError: they are not finite, as in float16.
        """
        for path, total in self.sums.items():
            if not total.isfinite().all():
                raise ValueError(
                    f"the gradient of {path} is not finite in {str(self.values[path].dtype).removeprefix('torch.')}; load "
                    "the model in bfloat16 or float32."
                )
        return self.sums


class EachStep(Instrument):
    """Instrument: hears every run of the denoiser and hands on each image's conditional row, with the unconditional one of
    the same step where there is one: of the same run, or of another.
    """

    def __init__(self, root_name: str):
        self.root_name = root_name

    def components(self, pipe: Any) -> tuple[str, ...]:
        return (self.root_name,)

    def begin_call(self, call: Call) -> None:
        self.scheduler: Any = getattr(call.pipe, "scheduler", None)
        self._waiting: dict[int, tuple[dict[str, Mapping[str, Any]], Context]] = {}

    def at_component(self, name: str, arguments: Mapping[str, Any], context: Context) -> None:
        if context.step is None:
            return
        if UNKNOWN in context.condition:
            raise UnknownConditionError(f"which rows of {name} are the prompt's cannot be told: {HOW_TO_STATE}")
        for row, (condition, image) in enumerate(zip(context.condition, context.prompt_index, strict=True)):
            pair, _ = self._waiting.setdefault(image, ({}, context))
            pair[condition] = rows_of_arguments(arguments, [row], len(context.condition))
            if "cond" in pair and "uncond" in pair:
                self.row(pair["cond"], pair["uncond"], image, self._waiting.pop(image)[1])

    def end_step(self, context: Context) -> None:
        for image, (pair, began) in self._waiting.items():
            if "cond" in pair:
                self.row(pair["cond"], None, image, began)
        self._waiting.clear()

    def row(self, given: Mapping[str, Any], without: Mapping[str, Any] | None, image: int, context: Context) -> None:
        """One image's conditional arguments, and its unconditional ones where the pipeline runs with guidance."""
        raise NotImplementedError
