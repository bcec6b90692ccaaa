"""PrincipalDirections: the directions in which a module's activations vary most, as directions to steer along.

Härkönen et al., "GANSpace" (NeurIPS 2020), on a diffusion model: activations y of the conditional rows are recorded while
prompts are drawn; with their mean mu and the eigenvectors V of their covariance, by variance sigma^2,

    coordinates x = V^T (y - mu) / sigma          edit  y' = y + sum over k of amount_k sigma_k v_k

y is a position's activations, or a whole map [d_model, height, width] at once (`whole=True`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsefeat.arguments import finite, number
from sparsefeat.arguments import whole as whole_number
from sparsefeat.features.folders import read_folder, write_folder
from sparsefeat.pipeline import Activations, Context, Hookpoint, Instrument, attach
from sparsefeat.pipeline.call_arguments import GIVEN_TO_SEVERAL, check_call, for_several
from sparsefeat.pipeline.step_window import Steps
from sparsefeat.steering.first_visits import check_place, check_prompts
from sparsefeat.steering.vectors import AddVector, bin_of
from sparsefeat.steering.where import GivenMask
from sparsefeat.whole import as_path, whole_folder


@dataclass(frozen=True)
class PrincipalDirections:
    """Of one hookpoint: `mean [bins, *shape]`, `components [bins, n, *shape]` of unit norm, by falling variance,
    `std [bins, n]` along them, and the share of all variance that each explains, `explained [bins, n]`. shape is (d_model,)
    or (d_model, height, width); bins are equal parts of the schedule. A component's sign is that which makes its largest
    entry positive.

    Raises:
        ValueError: shapes that do not fit each other, or a number that is not finite.
    """

    at: Hookpoint
    mean: Tensor
    components: Tensor
    std: Tensor
    explained: Tensor

    def __post_init__(self) -> None:
        (bins, *shape), of_each = self.mean.shape, self.std.shape
        if self.components.shape != (*of_each, *shape) or self.explained.shape != of_each or of_each[0] != bins:
            said = ", ".join(f"{name} {list(getattr(self, name).shape)}" for name in _FIELDS)
            raise ValueError(f"the directions' shapes do not fit each other: {said}.")
        for name in _FIELDS:
            finite(name, getattr(self, name))

    @classmethod
    def fit(
        cls,
        pipe: Any,
        at: str | Hookpoint,
        prompts: Sequence[str],
        *,
        n: int = 16,
        bins: int = 1,
        whole: bool = False,
        seed: int = 0,
        batch: int = 4,
        **call: Any,
    ) -> PrincipalDirections:
        """Draw the prompts and find the directions. Exact: [d_model, d_model] is held, or with `whole` all maps.

        Args:
            n: how many directions (GANSpace: 80). bins: equal parts of the schedule, each with directions of its own.
            whole: of whole maps, which needs more prompts than directions; else of positions.
            seed, batch: prompt i has the noise of seed + i; so many are drawn at once.
            call: further arguments of the pipeline's call.

        Raises:
            TypeError: an argument that the pipeline's call does not take.
            ValueError: an argument that cannot be, by its name.
        """
        check_call(pipe, call, cls.fit, "output_type", *GIVEN_TO_SEVERAL)
        place = check_place(at)
        prompts = check_prompts("prompts", prompts)
        n, bins, batch = whole_number("n", n), whole_number("bins", bins), whole_number("batch", batch)
        sums = _Sums(place, bins, whole)
        with attach(pipe, sums):
            for first in range(0, len(prompts), batch):
                some = prompts[first : first + batch]
                seeds = [
                    torch.Generator().manual_seed(whole_number("seed", seed, 0) + first + i) for i in range(len(some))
                ]
                pipe(some, generator=seeds, output_type="latent", **for_several(call, len(some)))
        parts = [sums.principal(index, n) for index in range(bins)]
        return cls(place, *(torch.stack(tensors) for tensors in zip(*parts, strict=True)))

    def steer(
        self,
        amounts: Mapping[int, float],
        *,
        steps: Steps = None,
        mask: GivenMask = None,
        condition: str = "cond",
    ) -> AddVector:
        """An instrument that moves along directions: number of the component -> amount, in standard deviations.

        Raises:
            ValueError: a component that is not there, an amount that is not finite.
        """
        n = self.std.shape[1]
        if not isinstance(amounts, Mapping) or not amounts:
            raise ValueError(f"amounts={amounts!r} must be component -> amount, as in {{0: 2.0}}.")
        weights = torch.zeros(n, dtype=torch.float32)
        for index, amount in amounts.items():
            weights[whole_number("a component", index, 0, n - 1)] = number(f"amounts[{index}]", amount)
        scaled = (weights * self.std).unflatten(1, (n, *(1 for _ in self.mean.shape[1:])))
        return AddVector(self.at, (scaled * self.components).sum(1), steps=steps, mask=mask, condition=condition)

    def save(self, folder: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write them for `PrincipalDirections.load(folder)`.

        Raises:
            FileExistsError: something is in `folder`; earlier directions are replaced with `overwrite`.
            TypeError: `folder` is no path. ValueError: it is empty. OSError: it cannot be written.
        """
        tensors = {name: getattr(self, name) for name in _FIELDS}
        with whole_folder(as_path(folder), replace="directions.json" if overwrite else None) as unfinished:
            write_folder(unfinished, "directions", {"at": [str(self.at), self.at.stream]}, tensors)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> PrincipalDirections:
        """What `save` wrote.

        Raises:
            FileNotFoundError: there are none in `folder`. TypeError: it is no path. ValueError: they are damaged.
        """
        config, tensors = read_folder(as_path(folder), "directions")
        try:
            return cls(Hookpoint.parse(*config["at"]), *(tensors[name] for name in _FIELDS))
        except (KeyError, TypeError) as error:
            raise ValueError(f"{folder} holds damaged directions ({error}); save them again.") from error


_FIELDS = ("mean", "components", "std", "explained")


class _Sums(Instrument):
    """Counts, sums and sums of squares of a hookpoint's conditional rows, by part of the schedule; or the maps themselves."""

    condition = "cond"

    def __init__(self, at: Hookpoint, bins: int, whole: bool):
        self.at, self.whole = at, whole
        self.maps: list[list[Tensor]] = [[] for _ in range(bins)]
        self.count = [0] * bins
        self.total: list[Tensor | None] = [None] * bins
        self.squares: list[Tensor | None] = [None] * bins
        self.shape: tuple[int, ...] = ()

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    @torch.no_grad()
    def at_hookpoint(self, activations: Activations, context: Context) -> None:
        index = bin_of(context, len(self.count))
        rows = activations.rows.view(context.batch, context.positions, -1)
        chosen = [row for row, (condition, _) in enumerate(context.entries) if condition == "cond"]
        if not chosen:
            return
        y = rows[chosen].double()
        if self.whole:
            if context.grid is None or len(context.grid) != 2:
                raise ValueError(
                    f"{self.at} has no grid of (height, width), of which whole=True takes maps; leave it out."
                )
            self.shape = (y.shape[2], *context.grid)
            self.maps[index].append(y.transpose(1, 2).flatten(1).cpu())
            return
        self.shape = (y.shape[2],)
        y = y.flatten(0, 1)
        total, squares = y.sum(0).cpu(), (y.T @ y).cpu()
        before, around = self.total[index], self.squares[index]
        self.total[index] = total if before is None else before + total
        self.squares[index] = squares if around is None else around + squares
        self.count[index] += len(y)

    def principal(self, index: int, n: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """mean, components, std and explained of one part of the schedule, in float32."""
        if self.whole:
            data = torch.cat(self.maps[index]) if self.maps[index] else torch.zeros(0, 1, dtype=torch.float32)
            count, width = data.shape
        else:
            count, width = self.count[index], self.shape[0] if self.shape else 1
        if min(count - 1, width) < n:
            raise ValueError(
                f"{count} activations of {width} entries in part {index} of the schedule have fewer than n={n} directions; "
                "give more prompts, fewer bins or a smaller n."
            )
        if self.whole:
            mean = data.mean(0)
            _, values, right = torch.linalg.svd(data - mean, full_matrices=False)
            variances, vectors = values.square() / (count - 1), right
        else:
            total, squares = self.total[index], self.squares[index]
            assert total is not None
            assert squares is not None
            mean = total / count
            found = torch.linalg.eigh((squares - count * torch.outer(mean, mean)) / (count - 1))
            variances, vectors = found.eigenvalues.flip(0).clamp_min(0), found.eigenvectors.T.flip(0)
        kept = vectors[:n]
        largest = kept.gather(1, kept.abs().argmax(1, keepdim=True))
        kept = kept * largest.sign()
        explained = variances[:n] / variances.sum().clamp_min(1e-300)
        return (
            mean.view(self.shape).float(),
            kept.view(n, *self.shape).float(),
            variances[:n].sqrt().float(),
            explained.float(),
        )
