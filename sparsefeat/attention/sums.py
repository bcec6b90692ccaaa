"""Maps while they are added up: one buffer for each resolution, or for what is to be kept apart."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from sparsefeat_kernels import attention_map_, attention_rows, attention_tap_, resize_add_
from torch import Tensor

from sparsefeat.attention.reading import Direction, Kind
from sparsefeat.pipeline import AttentionCall

Grid = tuple[int, ...]
"""(h, w), or (frames, h, w) of a video."""


@dataclass(frozen=True)
class Part:
    """What is added up together: a resolution, and the layer and the step where these are kept apart."""

    grid: Grid
    layer: str | None = None
    step: int | None = None


@dataclass
class MapSum:
    """`total` [images, heads, positions, tokens], of which heads is 1 where they are summed; for each image how many maps
    went in, by their weights; and the weight that each of the heads kept apart is to have.
    """

    total: Tensor
    count: list[float]
    head_weight: Tensor

    def add(self, other: MapSum) -> None:
        self.total += other.total
        self.count = [ours + theirs for ours, theirs in zip(self.count, other.count, strict=True)]


def add_up(sums: Mapping[Part, MapSum], into: dict[Part, MapSum]) -> None:
    for part, held in sums.items():
        if part in into:
            into[part].add(held)
        else:
            into[part] = held


def combined(
    sums: Mapping[Part, MapSum],
    image: int,
    grid: Grid,
    exact: bool,
    chosen: Callable[[Part], bool],
    head: int | None = None,
) -> tuple[Tensor, float]:
    """The maps of one image [tokens, *grid], each sum resized once, over the number of maps in it; and that number.

    `exact`: what is resized is clamped at zero before it is added, so sums over steps are taken first.
    """
    whole: dict[Part, MapSum] = {}
    for part, held in sums.items():
        if chosen(part):
            key = Part(part.grid, part.layer if exact else None)
            own = MapSum(held.total[image : image + 1], held.count[image : image + 1], held.head_weight)
            if not exact:
                weights = own.head_weight if head is None else _one_hot(own.head_weight, head)
                summed = torch.einsum("ihnt,h->int", own.total, weights.to(own.total.dtype))[:, None]
                own = MapSum(summed, [own.count[0] * float(weights.sum())], own.head_weight.new_ones(1))
            elif head is not None:
                own.head_weight = _one_hot(own.head_weight, head)
            if key in whole:
                whole[key] = MapSum(whole[key].total + own.total, [whole[key].count[0] + own.count[0]], own.head_weight)
            else:
                whole[key] = own
    if not whole:
        raise ValueError("nothing of this call was kept under that layer, step or head.")
    first = next(iter(whole.values())).total
    maps, count = first.new_zeros(first.shape[-1], *grid), 0.0
    for part, held in whole.items():
        heads = held.total[0].mT.unflatten(-1, part.grid)  # [heads, tokens, *grid]
        resize_add_(maps.flatten(0, -3), heads.flatten(1, -3), held.head_weight.to(maps.device), clamp=exact)
        count += held.count[0] * float(held.head_weight.sum())
    return (maps / count if count else maps).clamp(min=0), count


def _one_hot(weights: Tensor, head: int) -> Tensor:
    if not 0 <= head < len(weights):
        raise ValueError(f"head={head} is out of range; {len(weights)} heads were kept, counted from 0.")
    return torch.nn.functional.one_hot(torch.tensor(head), len(weights)).to(weights)


@dataclass(frozen=True)
class Attended:
    """The queries and keys of an attention that become maps: `rows` of the queries, `columns` of the keys."""

    call: AttentionCall
    kind: Kind
    direction: Direction

    @property
    def image(self) -> tuple[int, int]:
        return self.call.streams["image"] if self.call.streams else (0, self.call.query.shape[2])

    @property
    def text(self) -> tuple[int, int]:
        return self.call.streams["text"] if self.call.streams else (0, self.call.key.shape[2])

    @property
    def tokens(self) -> int:
        start, stop = self.text
        return stop - start

    def add_to(
        self, maps: Tensor, group: Tensor, weight: Tensor | None, tokens: Tensor | None, heads_apart: bool
    ) -> None:
        """Add the maps to [groups, image positions, tokens]; `tokens` are positions among the text's."""
        call = self.call
        query, key, mask, lse = call.query.detach(), call.key.detach(), of_four(call.mask), call.lse
        if self.kind == "query_query":
            query = self._unturned()
            key, mask = query, None
        if self.kind in ("cross", "joint") and lse is None:
            lse = attention_rows(query, key, call.scale, mask)[0]
        if self.kind in ("text_renormalised", "query_query"):
            lse = None
        if heads_apart:
            query, key, mask, lse = _heads_apart(query, key, mask, lse)
        image, text = slice(*self.image), slice(*self.text)
        rows, columns = (image, text) if self.direction == "image_to_text" else (text, image)
        query, key = query[:, :, rows], key[:, :, columns]
        mask = None if mask is None else cut(cut(mask, 2, rows), 3, columns)
        lse = None if lse is None else lse[:, :, rows]
        if self.direction == "text_to_image":
            maps = maps.transpose(1, 2)
            if tokens is not None:
                query, mask = query.index_select(2, tokens), _picked(mask, 2, tokens)
                lse = None if lse is None else lse.index_select(2, tokens)
        elif lse is not None and tokens is not None:
            key, mask = key.index_select(2, tokens), _picked(mask, 3, tokens)
        if lse is not None:
            attention_tap_(maps, query, key, lse, call.scale, mask, weight, group)
        else:
            tokens = tokens if self.direction == "image_to_text" else None
            attention_map_(maps, query, key, call.scale, mask, weight, group, tokens)

    def _unturned(self) -> Tensor:
        """The queries before the rotary embedding, those of both streams in the order of the sequence."""
        held = self.call.unturned
        if not held:
            return self.call.query.detach()  # of a model that has none, and no norm
        streams = sorted(held, key=lambda stream: self.call.streams[stream]) if "all" not in held else ["all"]
        query = torch.cat([held[stream] for stream in streams], 2) if len(streams) > 1 else held[streams[0]]
        if query.shape != self.call.query.shape:
            raise ValueError(
                f"{self.call.path} has queries of shape {list(self.call.query.shape)}, and before the rotary embedding "
                f"{list(query.shape)} were seen: take another kind= than 'query_query'"
            )
        return query.detach()


def of_four(mask: Tensor | None) -> Tensor | None:
    """An attn_mask as `F.scaled_dot_product_attention` takes it, broadcast from the right, with all four dimensions."""
    return mask if mask is None or mask.dim() >= 4 else mask[(None,) * (4 - mask.dim())]


def cut(mask: Tensor, dim: int, part: slice) -> Tensor:
    return mask if mask.shape[dim] == 1 else mask.narrow(dim, part.start, part.stop - part.start)


def _picked(mask: Tensor | None, dim: int, tokens: Tensor) -> Tensor | None:
    return mask if mask is None or mask.shape[dim] == 1 else mask.index_select(dim, tokens)


def _heads_apart(
    query: Tensor, key: Tensor, mask: Tensor | None, lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Every head as a batch entry of its own."""
    batch, heads = query.shape[:2]
    key = key.repeat_interleave(heads // key.shape[1], dim=1)
    if mask is not None:
        mask = mask.expand(batch, heads, -1, -1).flatten(0, 1)[:, None]
    lse = None if lse is None else lse.flatten(0, 1)[:, None]
    return query.flatten(0, 1)[:, None], key.flatten(0, 1)[:, None], mask, lse


def positions(grid: Grid) -> int:
    return math.prod(grid)
