"""Linear-AcT: every neuron's activations moved, as a distribution, to those that another set of prompts gives.

Rodriguez et al., "Controlling Language and Diffusion Models by Transporting Activations" (arXiv 2410.23054). Of n source and
n target prompts, x_i and y_i are one neuron's means over the positions of the module's conditional rows at the first step,
both sorted (which is optimal transport in one dimension). With w and b of each neuron

    linear      T(x) = w x + b,  w = sum (x_i - mean x)(y_i - mean y) / sum (x_i - mean x)^2,  b = mean y - w mean x
    gaussian    w = std y / std x, the same b
    mean        w = 1: a shift
    edit        x' = x + strength (T(x) - x)   where low < x < high, the source's support; else x

Neurons whose standard deviation is below 1e-4 in either set are left alone. Of a sequence [batch, tokens, d] every token
is gated and moved by itself. Of a feature map [batch, d, h, w] the gate looks at the mean over positions m, and "linear"
shifts the whole map by strength (T(m) - m), while the others move every position.

Estimated in sequence: a module's source activations are those that the maps of the modules before it leave.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from sparsefeat.arguments import finite, number, whole
from sparsefeat.pipeline import Activations, Context, Delta, Hookpoint
from sparsefeat.pipeline.call_arguments import GIVEN_TO_SEVERAL, check_call
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.steering.first_visits import check_places, check_prompts, first_means
from sparsefeat.steering.saved import SavableInstrument, register
from sparsefeat.steering.where import check_condition, condition_signs

Method = Literal["linear", "gaussian", "mean"]
METHODS = ("linear", "gaussian", "mean")

LEAST_STD = 1e-4
"""Neurons below it are left alone (the published code's `std_eps`)."""


@dataclass(frozen=True)
class NeuronMaps:
    """Of one hookpoint's neurons `[d_model]`, float32: T(x) = weight x + bias, applied where low < x < high (infinite: no
    bound)."""

    weight: Tensor
    bias: Tensor
    low: Tensor
    high: Tensor

    def __post_init__(self) -> None:
        shapes = [list(getattr(self, name).shape) for name in _FIELDS]
        if any(len(shape) != 1 or shape != shapes[0] for shape in shapes):
            raise ValueError(f"weight, bias, low and high have shapes {shapes}; give four of [d_model].")
        for name in _FIELDS:
            finite(name, getattr(self, name), unbounded=name in ("low", "high"))

    @classmethod
    def fit(cls, source: Tensor, target: Tensor, method: Method = "linear", support: Any = "range") -> NeuronMaps:
        """From `[n, d_model]` of the source and of the target, as many rows of each; see `LinearAcT.fit`."""
        if source.ndim != 2 or source.shape != target.shape or len(source) < 2:
            raise ValueError(
                f"source and target have shapes {list(source.shape)} and {list(target.shape)}; give two of [n, d_model], n >= 2."
            )
        x = finite("source", source).double().sort(0).values
        y = finite("target", target).double().sort(0).values
        centred_x, centred_y = x - x.mean(0), y - y.mean(0)
        still = (x.std(0) < LEAST_STD) | (y.std(0) < LEAST_STD)
        if method == "linear":
            weight = (centred_x * centred_y).sum(0) / centred_x.square().sum(0)
        else:
            weight = y.std(0) / x.std(0) if method == "gaussian" else torch.ones_like(x[0])
        weight = torch.where(still, 1, weight)
        bias = torch.where(still, 0, y.mean(0) - weight * x.mean(0))
        low, high = _support(support)
        unbounded = torch.full_like(bias, torch.inf)
        bounds = (-unbounded, unbounded) if low is None else (x.quantile(low, 0), x.quantile(high, 0))
        return cls(*(part.float() for part in (weight, bias, *bounds)))

    def to(self, device: torch.device) -> NeuronMaps:
        return NeuronMaps(*(getattr(self, name).to(device) for name in _FIELDS))


_FIELDS = ("weight", "bias", "low", "high")


@register("sparsefeat.steering:LinearAcT")
class LinearAcT(SavableInstrument):
    """Instrument: the transport above. Made by `LinearAcT.fit`, or from maps.

    Args:
        maps: hookpoint -> its neurons' maps.
        method: "linear", "gaussian" or "mean": how maps were fitted, which on feature maps says what is moved.
        strength: 0 (nothing) to 1 (the whole way).
        steps, condition: as in `Steer`; by default all steps and all rows, as published.

    Raises:
        ValueError: an argument that cannot be, by its name.
    """

    def __init__(
        self,
        maps: Mapping[str, NeuronMaps] | Mapping[Hookpoint, NeuronMaps] | Mapping[str | Hookpoint, NeuronMaps],
        *,
        method: Method = "linear",
        strength: float = 1.0,
        steps: Steps = None,
        condition: str = "both",
    ):
        if not isinstance(maps, Mapping) or not all(isinstance(one, NeuronMaps) for one in maps.values()):
            raise ValueError("maps must be hookpoint -> NeuronMaps; LinearAcT.fit makes them.")
        if method not in METHODS:
            raise ValueError(f"method={method!r} is not known; use one of {', '.join(METHODS)}.")
        self.maps: dict[Hookpoint, NeuronMaps] = dict(zip(check_places(list(maps)), maps.values(), strict=True))
        self.method: Method = method
        self.strength: float = number("strength", strength, 0, 1)
        self.window: StepWindow = StepWindow.parse(steps)
        self.condition: str = check_condition(condition)

    @classmethod
    def fit(
        cls,
        pipe: Any,
        at: str | Hookpoint | Sequence[str | Hookpoint],
        source: Sequence[str],
        target: Sequence[str],
        *,
        method: Method = "linear",
        support: Literal["range", "all"] | tuple[float, float] = "range",
        sequential: bool = True,
        strength: float = 1.0,
        steps: Steps = None,
        condition: str = "both",
        seed: int = 0,
        batch: int = 4,
        **call: Any,
    ) -> LinearAcT:
        """Run the prompts up to the hookpoints of the first step, and fit.

        Args:
            at: one hookpoint or several, in any order: they are estimated in the order in which they run.
            source, target: as many prompts of each, without and with what is wanted. The published runs take 512 and
                2048; a prompt may be repeated.
            support: "range" moves neurons between the least and the largest value of the source, "all" everywhere,
                a tuple between those two quantiles (0 to 1).
            sequential: a hookpoint's source is recorded with the maps of those before it at work: a run of the source for
                each hookpoint. False: from one run.
            strength, steps, condition: of the instrument; the estimate is always of strength 1 in all rows.
            seed, batch: prompt i of either set has the noise of seed + i; so many are run at once.
            call: further arguments of the pipeline's call.

        Raises:
            TypeError: an argument that the pipeline's call does not take.
            ValueError: an argument that cannot be, by its name; not as many prompts of either set.
        """
        check_call(pipe, call, cls.fit, *GIVEN_TO_SEVERAL)
        places = check_places(at)
        source, target = check_prompts("source", source), check_prompts("target", target)
        if len(source) != len(target):
            raise ValueError(
                f"source has {len(source)} prompts and target {len(target)}; give as many of each, which are paired sorted."
            )
        if method not in METHODS:
            raise ValueError(f"method={method!r} is not known; use one of {', '.join(METHODS)}.")
        _support(support)
        number("strength", strength, 0, 1)
        settings: dict[str, Any] = {"call": call, "seed": whole("seed", seed, 0), "batch": whole("batch", batch)}
        wanted = first_means(pipe, places, target, **settings)
        given = {} if sequential else first_means(pipe, places, source, **settings)
        maps: dict[str | Hookpoint, NeuronMaps] = {}
        for place in wanted:
            if sequential:
                before = [cls(maps, method=method)] if maps else []
                given = first_means(pipe, [place], source, beside=before, **settings)
            maps[place] = NeuronMaps.fit(given[place], wanted[place], method, support)
        return cls(maps, method=method, strength=strength, steps=steps, condition=condition)

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return tuple(self.maps)

    def expected_width(self, hookpoint: Hookpoint) -> int | None:
        return len(self.maps[hookpoint].weight)

    def active(self, context: Context) -> bool:
        return self.window.contains(context)

    @torch.no_grad()
    def at_hookpoint(self, activations: Activations, context: Context) -> Delta:
        assert context.hookpoint is not None
        maps = self.maps[context.hookpoint]
        if maps.weight.device != activations.tensor.device:
            maps = self.maps[context.hookpoint] = maps.to(activations.tensor.device)
        x = activations.rows.view(context.batch, context.positions, -1)
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        gated = x.mean(1, keepdim=True) if activations.tensor.ndim > 3 else x
        moved = gated if self.method == "linear" else x
        change = (maps.weight - 1) * moved + maps.bias
        change = torch.where((maps.low < gated) & (gated < maps.high), change, 0)
        signs = condition_signs(self.condition, context).to(x)
        change = self.strength * signs[:, None, None] * change
        return Delta(change.expand_as(x).flatten(0, 1))

    def to_saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        config = {
            "at": [[str(place), place.stream] for place in self.maps],
            "method": self.method,
            "strength": self.strength,
        }
        return config, {
            f"{i}.{name}": getattr(maps, name) for i, maps in enumerate(self.maps.values()) for name in _FIELDS
        }

    @classmethod
    def from_saved(cls, sae: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> LinearAcT:
        maps: dict[str | Hookpoint, NeuronMaps] = {
            Hookpoint.parse(*place): NeuronMaps(*(tensors[f"{i}.{name}"] for name in _FIELDS))
            for i, place in enumerate(config.pop("at"))
        }
        return cls(maps, **config)


def _support(support: Any) -> tuple[float, float] | tuple[None, None]:
    """The quantiles of the source between which neurons are moved; None for no bound."""
    if support in ("range", "all"):
        return (0.0, 1.0) if support == "range" else (None, None)
    if not isinstance(support, tuple) or len(support) != 2:
        raise ValueError(f"support={support!r} must be 'range', 'all' or two quantiles, as in (0.05, 0.95).")
    low, high = number("support[0]", support[0], 0, 1), number("support[1]", support[1], 0, 1)
    if low >= high:
        raise ValueError(f"support={support!r} must be two quantiles, the lower one first.")
    return low, high
