"""sdxl-unbox and RIEBench, "One-Step is Enough: Sparse Autoencoders for Text-to-Image Diffusion Models" (arXiv
2410.22366), written out; the released hooks, where the paper is silent.

The SAE sees what a transformer block adds, diff = output - input, at every position (h, w):

    code            z = relu(topk(E (diff - b_pre) + b_lat))
    add on an area  out[h, w] += M[h, w] d_f                          "turbo": every row
                    uncond -= M d_f, cond += M d_f                    "both":  SDXL base with guidance
                    cond += M d_f                                     "cond"
    icon            out = input + value d_f                           "turbo"
                    cond = input + value d_f, uncond = input          "base"
    reconstruction  out = input + z D + b_pre
    ablation        out = input
    top features    sum over steps of the mean over positions of z
    transport       score = m1 / sum(m1) - m2 / sum(m2), S its highest, T its lowest latents over all blocks together;
                    out[mask1] += m sum_S z1 d, out[mask2] -= m sum_T z2 d

Rows are [uncond, cond] where there is guidance; "turbo" has none.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from tests.presets.plain.dense import DenseSAE, decode, topk_then_relu
from tests.presets.plain.sites import at_steps, maps_of, rows_of


@contextmanager
def add_on_area(
    pipe: Any,
    path: str,
    sae: DenseSAE,
    latent: int,
    M: torch.Tensor,
    cfg: Literal["turbo", "both", "cond"] = "turbo",
    steps: Collection[int] | None = None,
) -> Iterator:
    """`M` is [h, w] on the block's grid. `steps` are those it is added at; None is every step (in the released
    `TimedHook` None means never)."""
    signs = {"turbo": (1.0, 1.0), "both": (-1.0, 1.0), "cond": (0.0, 1.0)}[cfg]

    def rule(_came_in: torch.Tensor, output: torch.Tensor, step: int) -> torch.Tensor | None:
        if steps is not None and step not in steps:
            return None
        added = torch.einsum("hw,d->dhw", M.double(), sae.D[latent].double())
        return output.double() + _signs(signs, output) * added

    with at_steps(pipe, path, rule):
        yield


def painted(mask: torch.Tensor, grid: tuple[int, int], mean: float, strength: float) -> torch.Tensor:
    """The demo's M [h, w]: a painted mask of pixels averaged over the block's cells, times the mean of the latent's
    non-zero activations, times the slider (-40 to 40, 10 as it stands)."""
    height, width = mask.shape
    cells = mask.double().reshape(grid[0], height // grid[0], grid[1], width // grid[1])
    return cells.mean(dim=(1, 3)) * mean * strength


@contextmanager
def icon(
    pipe: Any, path: str, sae: DenseSAE, latent: int, value: float, cfg: Literal["turbo", "base"] = "turbo"
) -> Iterator:
    """The block writes `value` times one latent's direction and nothing else."""
    signs = {"turbo": (1.0, 1.0), "base": (0.0, 1.0)}[cfg]

    def rule(came_in: torch.Tensor, output: torch.Tensor, _step: int) -> torch.Tensor:
        return came_in.double() + _signs(signs, output) * value * sae.D[latent].double()[:, None, None]

    with at_steps(pipe, path, rule):
        yield


@contextmanager
def reconstruct(pipe: Any, path: str, sae: DenseSAE) -> Iterator:
    """The block writes the SAE's reconstruction of what it would have written, in every row."""

    def rule(came_in: torch.Tensor, output: torch.Tensor, _step: int) -> torch.Tensor:
        return came_in.double() + maps_of(decode(sae, _codes(sae, came_in, output)))

    with at_steps(pipe, path, rule):
        yield


@contextmanager
def ablate(pipe: Any, path: str) -> Iterator:
    """The block writes nothing."""
    with at_steps(pipe, path, lambda came_in, _output, _step: came_in):
        yield


@contextmanager
def codes(pipe: Any, path: str, sae: DenseSAE, cfg: Literal["turbo", "base"] = "turbo") -> Iterator[list[torch.Tensor]]:
    """Yields a list that holds, after a call, the codes [images, h, w, n] of the conditional rows at every step."""
    found: list[torch.Tensor] = []

    def rule(came_in: torch.Tensor, output: torch.Tensor, step: int) -> None:
        assert step == len(found)
        z = _codes(sae, came_in, output)
        found.append(z if cfg == "turbo" else z.chunk(2)[1])

    with at_steps(pipe, path, rule):
        yield found


def top_features(
    pipe: Any, path: str, sae: DenseSAE, generate: Callable[[], Any], cfg: Literal["turbo", "base"] = "turbo"
) -> torch.Tensor:
    """[images, n] in float64: the sum over the steps of `generate()` of the code's mean over positions."""
    with codes(pipe, path, sae, cfg) as found:
        generate()
    return torch.stack([z.mean(dim=(1, 2)) for z in found]).sum(dim=0)


@dataclass(frozen=True)
class Transport:
    score: torch.Tensor
    """[blocks times n]."""
    added: torch.Tensor
    """S: indices into `score`, the highest first."""
    removed: torch.Tensor
    """T: indices into `score`, the lowest first."""
    deltas: Mapping[str, torch.Tensor]
    """Of each block [steps, h, w, d] in float64: what was added to its output."""
    latents: torch.Tensor
    """Of the edited run, as `generate` returned them."""


def transport(
    pipe: Any,
    saes: Mapping[str, DenseSAE],
    generate: Callable[[str], torch.Tensor],
    source: str,
    target: str,
    source_mask: torch.Tensor,
    target_mask: torch.Tensor,
    *,
    k_transfer: int,
    multiplier: float = 1.0,
    mode: Literal["sae", "sae_adaptive"] = "sae",
    maintain_spatial: bool = True,
    statistic: Literal["mean", "q95", "max"] = "mean",
    subtract_target_add_source: bool = True,
    aggregate_timesteps: Literal["first", "mean"] = "first",
    adaptive_norms: Literal["block", "all"] = "block",
) -> Transport:
    """Carry what distinguishes `source` (inside its mask) into the image of `target`.

    `saes` are the SAEs by their blocks' paths, in the order in which latents are counted; `generate(prompt)` runs the
    pipeline for one image from one seed without guidance. Masks are [h, w] bool on the blocks' grid.

    `maintain_spatial` counts only if the masks have the same number of cells; otherwise every cell gets the
    `statistic` of its mask's codes at that step. `subtract_target_add_source=False` writes the source's statistic into
    the target's mask; what is taken away there stays the same.
    "sae_adaptive" takes the target's codes from the edited run itself, times the decoder norms of S over those of T:
    of the block's own latents, or with `adaptive_norms="all"` of all blocks'.
    """
    paths = list(saes)
    z1, z2 = _runs(pipe, saes, generate, source), _runs(pipe, saes, generate, target)
    m1 = torch.cat([_pooled(z1[path], source_mask, aggregate_timesteps) for path in paths])
    m2 = torch.cat([_pooled(z2[path], target_mask, aggregate_timesteps) for path in paths])
    score = m1 / m1.sum() - m2 / m2.sum()
    highest_first = torch.sort(score, descending=True, stable=True).indices
    lowest_first = torch.sort(score, stable=True).indices
    added, removed = highest_first[:k_transfer], lowest_first[:k_transfer]

    spatial = maintain_spatial and int(source_mask.sum()) == int(target_mask.sum())
    S, T = _per_block(added, saes), _per_block(removed, saes)
    deltas = {path: torch.zeros(*z1[path].shape[:3], saes[path].D.shape[1], dtype=torch.float64) for path in paths}
    for path, sae in saes.items():
        D = sae.D.double()
        for step in range(len(z1[path])):
            inside = z1[path][step][source_mask][:, S[path]]
            if subtract_target_add_source:
                values = inside if spatial else _statistic(inside, statistic)
                deltas[path][step][source_mask] += multiplier * (values @ D[S[path]])
            else:
                deltas[path][step][target_mask] += multiplier * (_statistic(inside, statistic) @ D[S[path]])
            if mode == "sae":
                inside = z2[path][step][target_mask][:, T[path]]
                values = inside if spatial else _statistic(inside, statistic)
                deltas[path][step][target_mask] -= multiplier * (values @ D[T[path]])

    def edit(path: str) -> Callable:
        sae = saes[path]
        D = sae.D.double()

        def rule(came_in: torch.Tensor, output: torch.Tensor, step: int) -> torch.Tensor:
            if mode == "sae_adaptive" and len(T[path]):
                inside = _codes(sae, came_in, output)[0][target_mask][:, T[path]]
                deltas[path][step][target_mask] -= multiplier * ratio(path) * (inside @ D[T[path]])
            return output.double() + maps_of(deltas[path][step][None])

        return rule

    def ratio(path: str) -> torch.Tensor:
        over = [path] if adaptive_norms == "block" else paths
        norms = [sum(saes[p].D.double()[chosen[p]].norm(dim=1).sum() for p in over) for chosen in (S, T)]
        return norms[0] / norms[1]

    with ExitStack() as stack:
        for path in paths:
            stack.enter_context(at_steps(pipe, path, edit(path)))
        latents = generate(target)
    return Transport(score, added, removed, deltas, latents)


def _runs(
    pipe: Any, saes: Mapping[str, DenseSAE], generate: Callable[[str], Any], prompt: str
) -> dict[str, torch.Tensor]:
    """[steps, h, w, n] of each block in a run of one prompt."""
    with ExitStack() as stack:
        found = {path: stack.enter_context(codes(pipe, path, sae)) for path, sae in saes.items()}
        generate(prompt)
    return {path: torch.cat(z) for path, z in found.items()}


def _pooled(z: torch.Tensor, mask: torch.Tensor, aggregate: str) -> torch.Tensor:
    """[n]: the mean over the cells of the mask, at the first step or over all of them."""
    return z[0, mask].mean(dim=0) if aggregate == "first" else z[:, mask].mean(dim=(0, 1))


def _statistic(inside: torch.Tensor, statistic: str) -> torch.Tensor:
    """[cells, latents] to [latents]."""
    if statistic == "mean":
        return inside.mean(dim=0)
    return inside.quantile(0.95, dim=0) if statistic == "q95" else inside.amax(dim=0)


def _per_block(chosen: torch.Tensor, saes: Mapping[str, DenseSAE]) -> dict[str, torch.Tensor]:
    first, split = 0, {}
    for path, sae in saes.items():
        split[path] = chosen[(chosen >= first) & (chosen < first + sae.n)] - first
        first += sae.n
    return split


def _codes(sae: DenseSAE, came_in: torch.Tensor, output: torch.Tensor) -> torch.Tensor:
    return topk_then_relu(sae, rows_of(output) - rows_of(came_in))


def _signs(signs: tuple[float, float], output: torch.Tensor) -> torch.Tensor:
    """One factor a row: the first for the uncond half, the second for the cond half. "turbo", where both are 1, may
    have an odd number of rows."""
    rows = len(output)
    return torch.tensor([signs[row >= rows // 2] for row in range(rows)], dtype=torch.float64)[:, None, None, None]
