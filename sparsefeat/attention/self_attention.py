"""Self-attention of the image, kept as one affinity of its positions: to refine maps, to follow a point, to find concepts.

    own = SelfAttention()
    with sf.attach(pipe, maps, own) as run:
        pipe("a fox and a rocket")
    run[own].propagate(run[maps].word("fox").values)      # refined: what each position attends to
    run[own].concepts()                                   # masks of what belongs together, without any word

With A_l the self-attention of a layer, averaged over heads, on its grid of side r, and R the side of the common grid,

    F = sum over layers and steps of (r / R) resize(A_l)  /  sum of r / R,      affinity = F / its rows' sums

where keys are resized bilinearly to a finer grid (by area to a coarser one) and queries repeated (averaged).

Source: ConceptExpress (Hao et al., ECCV 2024) for F and the clustering; AttenCraft (Shentu et al., 2024) for affinity @ map.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from sparsefeat_kernels import attention_map_
from torch import Tensor
from torch.nn import functional as F

from sparsefeat.arguments import finite, number, sides, whole
from sparsefeat.attention.clusters import merged, partition
from sparsefeat.attention.heat_map_arguments import names_of
from sparsefeat.pipeline import AttentionCall, Call, Context, FrozenInstrument
from sparsefeat.pipeline.attention_seam import bypass
from sparsefeat.pipeline.families.registry import family_of
from sparsefeat.pipeline.hookpoints import components
from sparsefeat.pipeline.step_window import Steps, StepWindow

# The common grid has at most this many positions unless one is named: 32 x 32, AttenCraft's, an affinity of 4 MiB.
MOST_POSITIONS = 1024
# Rows of a layer's attention that are made at a time.
BLOCK_BYTES = 4 << 20


class SelfAttention(FrozenInstrument):
    """Instrument: the image's attention to itself, summed over layers, heads and steps into one [positions, positions].

    Of a joint attention the rows and keys of the image alone, renormalised over them. Of Sana's linear attention, which
    has no softmax, the shares that it gives instead: features relu(q_i) . relu(k_j), over their sum over j.

    Args:
        layers: parts of the paths of attention modules; default every self-attention, or joint attention, there is.
        steps: when to read: (0.75, 1.0) is the last quarter of the schedule, [0, 1] the first two steps. Default: always.
        grid: (height, width) of the affinity; default that of the first layer that is seen, halved until it has at most
            1,024 positions.
        condition: of the rows that are read, "cond" or "uncond".

    Memory: 4 positions^2 bytes an image for all layers and steps together (4 MiB of 32 x 32), and of a layer on another
    grid, while it attends, 4 MiB more and its rows on the common grid.

    Raises:
        ValueError: an argument that cannot be, by its name.
    """

    def __init__(
        self,
        layers: str | Sequence[str] | None = None,
        grid: tuple[int, int] | None = None,
        condition: str = "cond",
        steps: Steps = None,
    ):
        if condition not in ("cond", "uncond"):
            raise ValueError(f"condition={condition!r} is not known; use 'cond' or 'uncond'.")
        self.layers: tuple[str, ...] | None = names_of("layers", layers, "layers='up_blocks.1'")
        self.grid: tuple[int, int] | None = None if grid is None else sides("grid", grid)
        self.condition = condition
        self.window: StepWindow = StepWindow.parse(steps)
        self.begin_call(Call())

    def active(self, context: Context) -> bool:
        return self.window.contains(context)

    def attentions(self, pipe: Any) -> tuple[str, ...]:
        found, video = {}, False
        for name, root in components(pipe).items():
            family, model = family_of(root), getattr(root, "_orig_mod", root)
            if not family.runs_in_steps or family.stream == "audio":
                continue
            for path, kind, module in family.blocks(model):
                if kind in ("self_attention", "joint_attention", "linear_attention"):
                    found[f"{name}.{path}"] = bypass(name, module)
                    video = video or len(family.default_grid(pipe, model, path) or ()) > 2
        if video:
            raise ValueError(f"SelfAttention keeps images, and {type(pipe).__name__} makes videos: leave it out.")
        if not found:
            raise ValueError(f"SelfAttention finds no attention of the image to itself in {type(pipe).__name__}.")
        chosen = tuple(path for path in found if self.layers is None or any(part in path for part in self.layers))
        if not chosen:
            raise ValueError(f"layers={self.layers!r} match no self-attention module; there are: {', '.join(found)}.")
        for path in chosen:
            if found[path] is not None:
                raise ValueError(f"the attention of {path} cannot be read: {found[path]}.")
        return chosen

    def begin_call(self, call: Call) -> None:
        self._call = call
        self._grid = self.grid
        self._sums: Tensor | None = None
        self._weight: list[float] = []

    def at_attention(self, call: AttentionCall, context: Context) -> None:
        rows = [row for row, condition in enumerate(context.condition) if condition == self.condition]
        if not rows or context.recomputing or call.index > 0 or context.grid is None:
            return
        if call.streams and "image" not in call.streams:
            return  # of the text alone, as in a refiner of it
        start, stop = call.streams.get("image", (0, call.query.shape[2]))
        grid = (int(context.grid[-2]), int(context.grid[-1]))
        if len(context.grid) != 2 or grid[0] * grid[1] != stop - start:
            raise ValueError(
                f"{call.path} attends from {stop - start} positions, which is not the image grid {tuple(context.grid)}: "
                "leave this module out of SelfAttention(layers=...)."
            )
        if call.key.shape[2] != call.query.shape[2]:
            return  # to something else than the image
        common = self._common(grid)
        if self._sums is None:
            n_images = max(max(context.prompt_index) + 1, self._call.n_images or 0)
            size = common[0] * common[1]
            self._sums, self._weight = call.query.new_zeros(n_images, size, size, dtype=torch.float32), [0.0] * n_images
        weight = math.sqrt(grid[0] * grid[1] / (common[0] * common[1]))
        for row in rows:
            image = context.prompt_index[row]
            query, key = (t[row : row + 1, :, start:stop].detach() for t in (call.query, call.key))
            if call.linear:
                self._sums[image] += weight * _linear(query[0].float(), key[0].float(), grid, common)
            else:
                _add(self._sums[image], query.float(), key.float(), call.scale, weight, grid, common)
            self._weight[image] += weight

    def _common(self, grid: tuple[int, int]) -> tuple[int, int]:
        if self._grid is None:
            height, width = grid
            while height * width > MOST_POSITIONS:
                height, width = (height + 1) // 2, (width + 1) // 2
            self._grid = height, width
        return self._grid

    def end_call(self, call: Call) -> SelfAttentionRecording:
        sums, self._sums = self._sums, None
        if sums is None or self._grid is None:
            return SelfAttentionRecording(torch.zeros(0, 0, 0, dtype=torch.float32), (0, 0))
        weight = torch.tensor(self._weight, dtype=torch.float32, device=sums.device).clamp(min=1e-30)
        return SelfAttentionRecording(sums / weight[:, None, None], self._grid)


def _add(
    sums: Tensor,
    query: Tensor,
    key: Tensor,
    scale: float,
    weight: float,
    grid: tuple[int, int],
    common: tuple[int, int],
) -> None:
    """Add weight times one layer's attention [1, heads, n, d], averaged over heads, to sums [N, N]."""
    heads, n = query.shape[1], query.shape[2]
    share = query.new_full((heads,), weight / heads)
    if grid == common:
        attention_map_(sums[None], query, key, scale, head_weight=share)
        return
    rows = query.new_empty(n, common[0] * common[1])
    block = max(1, BLOCK_BYTES // (4 * n))
    for first in range(0, n, block):
        some = query[:, :, first : first + block]
        part = query.new_zeros(1, some.shape[2], n)
        attention_map_(part, some, key, scale, head_weight=share)
        rows[first : first + block] = _resized(part[0].unflatten(1, grid), common, "bilinear").flatten(1)
    sums += _resized(rows.T.unflatten(1, grid), common, "nearest-exact").flatten(1).T


def _linear(query: Tensor, key: Tensor, grid: tuple[int, int], common: tuple[int, int]) -> Tensor:
    """One layer's linear attention, averaged over heads, on the common grid [N, N]: features [heads, n, d] are resized, of
    which the shares are a product.
    """
    shares = query / (len(query) * (query @ key.sum(1)[..., None])).clamp(min=1e-30)  # sum over keys and heads: 1
    few, many = (t.transpose(0, 1).flatten(1) for t in (shares, key))  # [n, heads d]
    few = _resized(few.T.unflatten(1, grid), common, "nearest-exact").flatten(1)
    return few.T @ _resized(many.T.unflatten(1, grid), common, "bilinear").flatten(1)


def _check_maps(name: str, given: Any) -> None:
    if not isinstance(given, Tensor):
        raise TypeError(f"{name} is {type(given).__name__}, not a tensor: pass torch.as_tensor({name}).")
    finite(name, given)


def _resized(maps: Tensor, grid: tuple[int, int], larger: str) -> Tensor:
    """Maps [n, h, w] on another grid: averaged to a coarser one."""
    if tuple(maps.shape[-2:]) == grid:
        return maps
    mode = "area" if maps.shape[-2] >= grid[0] and maps.shape[-1] >= grid[1] else larger
    return F.interpolate(maps[:, None], size=grid, mode=mode)[:, 0]


@dataclass(frozen=True)
class SelfAttentionRecording:
    """The affinity of one call's images. `means` [images, positions, positions], not normalised; `grid` (h, w)."""

    means: Tensor
    grid: tuple[int, int]

    def __repr__(self) -> str:
        return f"SelfAttentionRecording({len(self.means)} images, {' x '.join(map(str, self.grid))})"

    def affinity(self, image: int = 0) -> Tensor:
        """[positions, positions]: row i is what position i attends to, and sums to 1.

        Raises:
            ValueError: an image that there is not, or no attention was seen.
        """
        if not len(self.means):
            raise ValueError(
                "no attention of the image to itself was seen in this call; name steps= that it has, or leave steps out."
            )
        if not 0 <= image < len(self.means):
            raise ValueError(
                f"image={image} is out of range; the call made {len(self.means)} image(s), counted from 0."
            )
        mean = self.means[image]
        return mean / mean.sum(1, keepdim=True).clamp(min=1e-30)

    def propagate(self, maps: Tensor, image: int = 0, times: int = 1) -> Tensor:
        """Maps [h, w] or [n, h, w], brought to the grid, times the affinity: each position gets the mean of the map over
        what it attends to. Several times follow the attention further.

        A word's map is refined by it (AttenCraft); a seed, a map that is 1 at a point, spreads to what belongs to it.

        Raises:
            TypeError: `maps` is no tensor.
            ValueError: maps of another shape or not finite; an image that there is not.
        """
        whole("times", times)
        _check_maps("maps", maps)
        if maps.ndim not in (2, 3) or not maps.numel():
            raise ValueError(f"maps has shape {list(maps.shape)}; give [height, width] or [n, height, width].")
        affinity = self.affinity(image)
        several = maps if maps.ndim == 3 else maps[None]
        found = _resized(several.to(self.means), self.grid, "bilinear").flatten(1).T  # [positions, n]
        for _ in range(times):
            found = affinity @ found
        found = found.T.unflatten(1, self.grid)
        return found if maps.ndim == 3 else found[0]

    def seed(self, y: float, x: float, image: int = 0, times: int = 1) -> Tensor:
        """`propagate` of a point: y and x from 0 to 1, the top left corner to the bottom right one.

        Raises:
            ValueError: y or x is not from 0 to 1; an image that there is not.
        """
        for name, place in (("y", y), ("x", x)):
            number(name, place, 0, 1)
        self.affinity(image)  # refuses before
        point = self.means.new_zeros(self.grid)
        point[min(int(y * self.grid[0]), self.grid[0] - 1), min(int(x * self.grid[1]), self.grid[1] - 1)] = 1
        return self.propagate(point, image, times)

    def concepts(self, image: int = 0, foreground: Tensor | None = None, fewest: int = 10) -> Tensor:
        """Masks bool [concepts, h, w] of what belongs together, found without labels; the largest first.

        1. The positions are grouped by who is whose nearest neighbour (FINCH), by the divergence
           KL(row i || row j) of the affinity's rows, as often as `fewest` groups remain.
        2. Groups whose mean of `foreground` is not above the image's are left out. ConceptExpress takes the map of the
           end-of-text token of an empty prompt: `run[maps].map([1])`. Default: all are kept.
        3. The groups' mean rows are grouped again, only neighbours in the picture, and only where they are as much alike
           as the least alike positions that met in the first grouping.

        Masks do not overlap. What is left out belongs to none.

        Raises:
            TypeError: `foreground` is no tensor.
            ValueError: it is not one finite map; an argument that cannot be, by its name.
        """
        rows = self.affinity(image).double().clamp(min=1e-12)
        labels, limit = partition(rows, whole("fewest", fewest))
        groups = labels == torch.arange(int(labels.max()) + 1, device=labels.device)[:, None]  # [groups, positions]
        if foreground is not None:
            _check_maps("foreground", foreground)
            if foreground.ndim != 2:
                raise ValueError(f"foreground has shape {list(foreground.shape)}; give one map [height, width].")
            shown = _resized(foreground[None].to(rows), self.grid, "bilinear").flatten()
            inside = (groups.double() @ shown) / groups.sum(1)
            groups = groups[inside > shown.mean()]
        masks = merged(rows, groups, self.grid, limit)
        order = masks.sum(1).argsort(descending=True, stable=True)
        return masks[order].unflatten(1, self.grid)
