"""Feature transport: what makes one image different, moved into another (RIEBench, arXiv 2410.22366).

Two prompts are run from the same noise, a source with the wanted content and a target to edit, and their codes kept at
every hookpoint and step. With m1, m2 [latents of all hookpoints] the mean codes over each one's mask:

    score   s = m1 / sum(m1) - m2 / sum(m2);   S = its k_transfer highest latents, T = its k_transfer lowest
    edit    at step t:  + strength * sum over i in S of z1(t, i) d_i   inside the source's mask
                        - strength * sum over i in T of z2(t, i) d_i   inside the target's mask

added to the blocks' outputs while the target is drawn again. z1 and z2 are the positions' own codes, or one statistic of
them over the mask.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from sparsefeat_kernels import SparseCode, sparse_decode
from torch import Tensor
from torch.nn import functional as F

from sparsefeat.arguments import mask_map, number, whole
from sparsefeat.features.attached import beside, hookpoint_of
from sparsefeat.pipeline import Activations, Context, Delta, FrozenInstrument, Hookpoint, Instrument, attach
from sparsefeat.pipeline.call_arguments import check_call
from sparsefeat.sae import SAE

Statistic = Literal["mean", "q95", "max"]
STATISTICS = ("mean", "q95", "max")


@dataclass(frozen=True)
class Part:
    """One hookpoint's share of a transport, for every step: what is added and subtracted at each position.

    added, subtracted: codes with the selected latents alone. adaptive: factor of the target's codes as they are when
    the edit is made, in the place of `subtracted`; None for those of the fitted run.
    """

    added: tuple[SparseCode, ...]
    subtracted: tuple[SparseCode, ...]
    grid: tuple[int, ...]
    target_mask: Tensor
    target_latents: Tensor
    adaptive: float | None


class FeatureTransport(FrozenInstrument):
    """Instrument: the edit above. Made by `FeatureTransport.fit`; then run the target's prompt from the same seed.

    >>> edit = FeatureTransport.fit(pipe, saes, "a fox in a forest", "a cat in a forest", fox_mask, cat_mask,
    ...                             num_inference_steps=4, guidance_scale=0.0)
    >>> with sf.attach(pipe, edit):
    ...     pipe("a cat in a forest", generator=torch.Generator().manual_seed(0), num_inference_steps=4, guidance_scale=0.0)
    """

    def __init__(self, saes: Sequence[SAE], parts: Sequence[Part], selected: Sequence[tuple[Tensor, Tensor]]):
        self.saes: tuple[SAE, ...] = tuple(saes)
        self.parts: tuple[Part, ...] = tuple(parts)
        self.at: tuple[Hookpoint, ...] = tuple(hookpoint_of(sae, None) for sae in saes)
        self.selected: tuple[tuple[Tensor, Tensor], ...] = tuple(selected)
        """Of each SAE: the latents that are added (S), and those that are taken away (T)."""

    @classmethod
    def fit(
        cls,
        pipe: Any,
        saes: Sequence[SAE],
        source: str,
        target: str,
        source_mask: Any,
        target_mask: Any,
        *,
        k_transfer: int = 160,
        strength: float = 1.0,
        select_at: Literal["first", "mean"] = "first",
        spatial: bool = True,
        statistic: Statistic = "mean",
        add_at: Literal["source", "target"] = "source",
        adaptive: bool = False,
        seed: int = 0,
        **call: Any,
    ) -> FeatureTransport:
        """Run both prompts once and select.

        Args:
            saes: one a hookpoint (the SAEs' own; four with sdxl-unbox); the score runs over all their latents together.
            source_mask, target_mask: [H, W] over the image; a cell of the grid counts where any of its pixels is above 0.
            k_transfer: latents added, and latents taken away; 80 to 640 in the paper.
            strength: factor of both; 1 or 2 in the paper.
            select_at: codes of the first step, or their mean over steps.
            spatial: positions keep their own codes, if the masks have equally many cells; else, and with masks of
                different size, every cell gets one `statistic` over the mask: "mean", "q95" (95 % quantile) or "max".
            add_at: where the source's latents are added: in the source's mask, or in the target's (by the statistic).
            adaptive: the target's codes are taken from the run that is edited, not from the fitted one, times the
                ratio of the summed norms of this hookpoint's decoder rows in S and in T.
            seed, call: of both runs; give the edited run the same.
        """
        _check(saes, k_transfer, strength, select_at, statistic, add_at)
        source_mask, target_mask = mask_map("source_mask", source_mask), mask_map("target_mask", target_mask)
        check_call(pipe, call, cls.fit)
        runs = [_codes(pipe, saes, prompt, seed, call) for prompt in (source, target)]
        masks = [
            [_cells(name, given, grid) for grid in runs[0].grids]
            for name, given in (("source_mask", source_mask), ("target_mask", target_mask))
        ]
        steps = 1 if select_at == "first" else len(runs[0].codes[0])
        means = [
            torch.cat(
                [
                    torch.stack([_masked_mean(code, mask) for code in codes[:steps]]).mean(0)
                    for codes, mask in zip(run.codes, of_run, strict=True)
                ]
            )
            for run, of_run in zip(runs, masks, strict=True)
        ]
        scores = means[0] / means[0].sum() - means[1] / means[1].sum()
        order = scores.argsort(descending=True, stable=True)
        widths = [sae.n_latents for sae in saes]
        chosen = [torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, some, True).split(widths)
                  for some in (order[:k_transfer], order[-k_transfer:])]  # fmt: skip
        parts, selected = [], []
        for index in range(len(saes)):
            latents = [some[index].nonzero()[:, 0] for some in chosen]
            mask1, mask2 = masks[0][index], masks[1][index]
            how = None if spatial and int(mask1.sum()) == int(mask2.sum()) else statistic
            norms = [float(saes[index].W_dec.detach()[of].norm(dim=1).sum()) for of in latents]
            onto, how_added = (mask1, how) if add_at == "source" else (mask2, statistic)
            parts.append(
                Part(
                    added=tuple(_moved(c, latents[0], mask1, onto, how_added, strength) for c in runs[0].codes[index]),
                    subtracted=tuple(_moved(c, latents[1], mask2, mask2, how, strength) for c in runs[1].codes[index]),
                    grid=runs[1].grids[index],
                    target_mask=mask2,
                    target_latents=latents[1],
                    adaptive=strength * norms[0] / max(norms[1], 1e-30) if adaptive else None,
                )
            )
            selected.append((latents[0], latents[1]))
        return cls(saes, parts, selected)

    def conditions(self) -> tuple[str, ...]:
        return ("cond",)

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return self.at

    def expected_width(self, hookpoint: Hookpoint) -> int | None:
        return self.saes[self.at.index(hookpoint)].d_model

    @torch.no_grad()
    def at_hookpoint(self, activations: Activations, context: Context) -> Delta | None:
        assert context.hookpoint is not None
        index = self.at.index(context.hookpoint)
        part, sae = self.parts[index], beside(self.saes[index], activations, context)
        if context.grid != part.grid:
            raise ValueError(
                f"{context.hookpoint} has the grid {context.grid}, but the transport was fitted on {part.grid}: run the "
                "target with the height and width of the fit."
            )
        step = context.step or 0
        if step >= len(part.added):
            raise ValueError(
                f"step {step} of {context.n_steps} has no fitted code; run as many steps as in the fit, {len(part.added)}."
            )
        device = activations.tensor.device
        change = _decoded(sae, part.added[step], device)
        rows = activations.rows.view(context.batch, context.positions, -1)
        if part.adaptive is None:
            change = change - _decoded(sae, part.subtracted[step], device)
        conditional = [row for row, (condition, _) in enumerate(context.entries) if condition == "cond"]
        out = rows.new_zeros(rows.shape, dtype=torch.promote_types(rows.dtype, torch.float32))
        for row in conditional:
            out[row] = change
            if part.adaptive is not None:
                code = sae.encode(rows[row])
                kept = _moved(code, part.target_latents, part.target_mask, part.target_mask, None, part.adaptive)
                out[row] -= _decoded(sae, kept, device)
        return Delta(out.flatten(0, 1))


@dataclass
class _Run:
    codes: list[list[SparseCode]]  # of each SAE, of each step
    grids: list[tuple[int, ...]]


class _Codes(Instrument):
    """Keeps the conditional code of the first image at every step."""

    def __init__(self, sae: SAE):
        self.sae, self.at = sae, hookpoint_of(sae, None)
        self.codes: list[SparseCode] = []
        self.grid: tuple[int, ...] = ()

    def conditions(self) -> tuple[str, ...]:
        return ("cond",)

    def hookpoints(self) -> tuple[Hookpoint, ...]:
        return (self.at,)

    @torch.no_grad()
    def at_hookpoint(self, activations: Activations, context: Context) -> None:
        beside(self.sae, activations, context)
        if context.grid is None:
            raise ValueError(f"{self.at} has no image grid, so nothing can be transported there by masks.")
        if "cond" not in context.condition:
            return
        row = next(row for row, (condition, _) in enumerate(context.entries) if condition == "cond")
        self.codes.append(self.sae.encode(activations.rows.view(context.batch, context.positions, -1)[row]))
        self.grid = context.grid


def _codes(pipe: Any, saes: Sequence[SAE], prompt: str, seed: int, call: dict[str, Any]) -> _Run:
    kept = [_Codes(sae) for sae in saes]
    with attach(pipe, *kept):
        pipe(prompt, generator=torch.Generator().manual_seed(seed), **call)
    return _Run([keeper.codes for keeper in kept], [keeper.grid for keeper in kept])


def _cells(name: str, mask: Tensor, grid: tuple[int, ...]) -> Tensor:
    """bool [positions]: the cells with any pixel above 0."""
    if mask.ndim != 2:
        raise ValueError(f"{name} has shape {list(mask.shape)}; give one map [height, width].")
    is_on = (mask > 0).float()[None, None]
    if mask.shape[0] >= grid[-2] and mask.shape[1] >= grid[-1]:
        cells = F.adaptive_max_pool2d(is_on, grid[-2:])
    else:
        cells = F.interpolate(is_on, size=grid[-2:], mode="nearest")
    cells = cells.flatten() > 0
    if not cells.any():
        raise ValueError(f"{name} is 0 everywhere; mark where the {name.partition('_')[0]} is.")
    return cells.repeat(math.prod(grid[:-2]))


def _masked_mean(code: SparseCode, mask: Tensor) -> Tensor:
    """[n_latents]: the code's mean over the masked rows."""
    inside = mask.to(code.values.device).nonzero()[:, 0]
    total = torch.zeros(code.n_latents, dtype=torch.float64, device=code.values.device)
    total.index_add_(0, code.indices[inside].flatten().long(), code.values[inside].flatten().double())
    return (total / len(inside)).cpu()


def _moved(
    code: SparseCode, latents: Tensor, inside: Tensor, onto: Tensor, statistic: Statistic | None, factor: float
) -> SparseCode:
    """The chosen latents of a code, times the factor: at the rows of `inside` as they are, or a statistic of those at
    the rows of `onto`; 0 elsewhere."""
    device = code.values.device
    inside, onto, latents = inside.to(device), onto.to(device), latents.to(device)
    if statistic is None:
        is_chosen = torch.isin(code.indices, latents.to(code.indices)) & inside[:, None]
        return dataclasses.replace(code, values=torch.where(is_chosen, factor * code.values, 0))
    rows = code.select(latents)[inside]  # [cells, chosen]
    if statistic == "mean":
        one = rows.mean(0)
    else:
        one = rows.amax(0) if statistic == "max" else rows.float().quantile(0.95, dim=0)
    values = torch.where(onto[:, None], factor * one.to(rows.dtype), 0)
    return SparseCode(values, latents.to(torch.int32).expand(code.rows, -1).contiguous(), code.n_latents)


def _decoded(sae: SAE, code: SparseCode, device: torch.device) -> Tensor:
    if code.values.shape[1] == 0:
        return torch.zeros(code.rows, sae.d_model, dtype=torch.float32, device=device)
    nothing = torch.zeros_like(sae.b_out)
    return sparse_decode(code.values.to(device), code.indices.to(device), sae.W_dec, nothing).float()


def _check(saes: Any, k_transfer: int, strength: float, select_at: str, statistic: str, add_at: str) -> None:
    if isinstance(saes, SAE) or not saes:
        raise ValueError("saes must be a list with one SAE a hookpoint; give at least one.")
    for i, sae in enumerate(saes):
        hookpoint_of(sae, None, f"saes[{i}]")
        if sae.config.normalizer not in ("none", "b_pre"):
            raise ValueError(f"an SAE with normalizer {sae.config.normalizer!r} cannot be transported by its codes.")
    total = sum(sae.n_latents for sae in saes)
    whole("k_transfer", k_transfer, 1, total // 2)  # no latent is added and taken away
    number("strength", strength)
    choices = {
        "select_at": (select_at, ("first", "mean")),
        "statistic": (statistic, STATISTICS),
        "add_at": (add_at, ("source", "target")),
    }
    for name, (value, known) in choices.items():
        if value not in known:
            raise ValueError(f"{name}={value!r} is not known; use one of {', '.join(known)}.")
