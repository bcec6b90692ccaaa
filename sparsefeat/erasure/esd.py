"""ESD: the denoiser trained to say of a concept what it says without it, and less (Gandikota et al., ICCV 2023, arXiv 2303.07345).

With eps the model as it is and eps' the one that is trained, at latents z_t on the way of the trained model's own pictures of c:

    L = mean (eps'(z_t, c) - [eps(z_t) - eta (eps(z_t, c) - eps(z_t))])^2

Trained are low-rank changes W + up down of the attention's weights, which are put on and come off as other changed weights do. A
reference for comparison, as small as can be: the paper trains the weights themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import finite, number, taking_gradients, whole
from sparsefeat.attribution.gradients import EachStep, denoiser_name, predicted, weight_paths
from sparsefeat.pipeline import Context, attach, resolve
from sparsefeat.pipeline.call_arguments import check_call
from sparsefeat.pipeline.hookpoints import components
from sparsefeat.pipeline.step_window import Steps, StepWindow
from sparsefeat.pipeline.weights import plain_weight
from sparsefeat.steering.saved import SavableInstrument, register


@dataclass(frozen=True)
class LowRank:
    """W becomes W + up down; `up` [out, rank], `down` [rank, in], of a Conv2d's weight flattened to [out, in]."""

    up: Tensor
    down: Tensor

    def __post_init__(self) -> None:
        if self.up.ndim != 2 or self.down.ndim != 2 or self.up.shape[1] != self.down.shape[0]:
            raise ValueError(
                f"up {list(self.up.shape)} and down {list(self.down.shape)} must be [out, rank] and [rank, in]."
            )

    def __call__(self, weight: Tensor) -> Tensor:
        wide = torch.promote_types(weight.dtype, torch.float32)
        change = self.up.to(weight.device, wide) @ self.down.to(weight.device, wide)
        return (weight.to(wide) + change.reshape(weight.shape)).to(weight.dtype)


@register("sparsefeat.erasure:ESD")
class ESD(SavableInstrument):
    """Instrument: trained low-rank changes of weights, which come back to the bit. Made by `ESD.fit`.

    Weights are the same for all rows: there is no `condition`.

    Args:
        changes: path of a module -> its change.
        concept: a name, for the record.
        steps: window of steps as in `Steer`; default all.

    Raises:
        TypeError: a change is no LowRank.
        ValueError: there is none, or its numbers are not finite.
    """

    def __init__(self, changes: Mapping[str, LowRank], concept: str = "", *, steps: Steps = None):
        if not isinstance(changes, Mapping) or not changes:
            raise ValueError("changes= must map at least one module's path to a LowRank; ESD.fit makes them.")
        for path, change in changes.items():
            if not isinstance(change, LowRank):
                raise TypeError(f"changes[{path!r}] is {type(change).__name__}, not a LowRank.")
            finite(f"changes[{path!r}].up", change.up)
            finite(f"changes[{path!r}].down", change.down)
        self.changes: dict[str, LowRank] = dict(changes)
        self.concept: str = str(concept)
        self.losses: tuple[float, ...] = ()
        """Of the training, one for each of its steps; of a loaded one none."""
        self.window: StepWindow = StepWindow.parse(steps)

    @classmethod
    def fit(
        cls,
        pipe: Any,
        concept: str,
        *,
        eta: float = 1.0,
        iterations: int = 200,
        rank: int = 4,
        lr: float = 1e-3,
        modules: str | Sequence[str] | None = None,
        steps: Steps = None,
        seed: int = 0,
        **call: Any,
    ) -> ESD:
        """Train on pictures that the pipeline draws of the concept with what it has learnt so far: every step of theirs is one
        of the training.

        Args:
            concept: prompt. eta: how far past the unconditional prediction; the paper's is 1.
            iterations: steps of the training (the paper's: 1000). lr: of Adam. rank: of the changes.
            modules: as of `attribute_weights`; default "attn2" of UNets (the paper's ESD-x), "attn" of transformers.
            steps: when the changes are on, once trained; default all.
            call: arguments of the pipeline, which needs guidance (the paper's: guidance_scale=3, 50 steps).

        Raises:
            TypeError: an argument that the pipeline's call does not take.
            ValueError: an argument that cannot be, by its name; a run without guidance.
        """
        if not isinstance(concept, str) or not concept.strip():
            raise ValueError(f"concept={concept!r} must be the prompt of a concept, as 'a fox'.")
        number("eta", eta)
        number("lr", lr, 0, above=True)
        for name, given in (("iterations", iterations), ("rank", rank)):
            whole(name, given)
        whole("seed", seed, 0)
        StepWindow.parse(steps)
        check_call(pipe, call, cls.fit, "output_type")
        if modules is None:
            root = components(pipe)[denoiser_name(pipe)]
            modules = "attn2" if any("attn2" in path for path, _ in root.named_modules()) else "attn"
        training = _Training(pipe, weight_paths(pipe, modules), eta, rank, lr, iterations, seed)
        picture = 0
        while len(training.losses) < iterations:
            before = len(training.losses)
            with attach(pipe, cls(training.changes()), training):
                generator = torch.Generator().manual_seed(seed + picture)
                pipe(concept, generator=generator, output_type="latent", **call)
            if len(training.losses) == before:
                raise ValueError(
                    "the pipeline ran without guidance, so there is no prediction without the concept to train towards; pass "
                    "guidance_scale=3 (FLUX and others that take it: true_cfg_scale=3 and negative_prompt='')."
                )
            picture += 1
        made = cls(training.changes(), concept, steps=steps)
        vars(made)["losses"] = tuple(training.losses)
        return made

    def weights(self, pipe: Any) -> dict[str, Callable[[Tensor], Tensor]]:
        changes: dict[str, Callable[[Tensor], Tensor]] = {}
        for path, change in self.changes.items():
            found = plain_weight(resolve(pipe, path)).flatten(1).shape
            if found != (len(change.up), change.down.shape[1]):
                raise ValueError(
                    f"the weight of {path} is {list(found)} in this {type(pipe).__name__} and the change "
                    f"{[len(change.up), change.down.shape[1]]}: it was trained on another model."
                )
            changes[path] = change
        return changes

    def active(self, context: Context) -> bool:
        return self.window.contains(context)

    def to_saved(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        tensors = {
            f"{path}.{side}": getattr(change, side) for path, change in self.changes.items() for side in ("up", "down")
        }
        return {"concept": self.concept, "paths": list(self.changes)}, tensors

    @classmethod
    def from_saved(cls, sae: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> ESD:
        changes = {path: LowRank(tensors[f"{path}.up"], tensors[f"{path}.down"]) for path in config["paths"]}
        return cls(changes, config["concept"])

    def __repr__(self) -> str:
        return f"ESD({self.concept}: {len(self.changes)} weights)"


class _Training(EachStep):
    """A step of Adam at every step of the pipeline. The weights as they were are kept, as the model's are changed meanwhile."""

    def __init__(self, pipe: Any, paths: Sequence[str], eta: float, rank: int, lr: float, iterations: int, seed: int):
        targets = {path: resolve(pipe, path) for path in paths}
        super().__init__(next(iter(targets.values())).root_name)
        self.root = getattr(next(iter(targets.values())).root, "_orig_mod", next(iter(targets.values())).root)
        names = {id(parameter): name for name, parameter in self.root.named_parameters()}
        weights = {path: plain_weight(target) for path, target in targets.items()}
        self.names = {path: names[id(weight)] for path, weight in weights.items()}
        self.originals = {path: weight.detach().clone() for path, weight in weights.items()}
        self.eta, self.iterations = eta, iterations
        self.losses: list[float] = []
        generator = torch.Generator().manual_seed(seed)
        self.up, self.down = {}, {}
        for path, weight in self.originals.items():
            rows, columns = weight.flatten(1).shape
            down = torch.randn(rank, columns, generator=generator, dtype=torch.float32) / columns**0.5
            self.down[path] = down.to(weight.device).requires_grad_()
            self.up[path] = torch.zeros(rows, rank, dtype=torch.float32, device=weight.device).requires_grad_()
        self.optimiser = torch.optim.Adam([*self.up.values(), *self.down.values()], lr=lr)

    def changes(self) -> dict[str, LowRank]:
        return {
            path: LowRank(self.up[path].detach().cpu().clone(), self.down[path].detach().cpu().clone())
            for path in self.up
        }

    def row(self, given: Mapping[str, Any], without: Mapping[str, Any] | None, image: int, context: Context) -> None:
        if without is None or len(self.losses) == self.iterations:
            return
        own = {self.names[path]: weight for path, weight in self.originals.items()}
        with torch.no_grad():
            concept, nothing = (predicted(self.root, arguments, own) for arguments in (given, without))
        with taking_gradients("ESD"):
            changed = {
                self.names[path]: LowRank(self.up[path], self.down[path])(w) for path, w in self.originals.items()
            }
            aim = nothing - self.eta * (concept - nothing)
            loss = (predicted(self.root, given, changed) - aim).square().mean()
        if not loss.isfinite():
            raise ValueError("the loss is not finite; lower lr=, or load the model in bfloat16 or float32.")
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()
        self.losses.append(float(loss.detach()))
