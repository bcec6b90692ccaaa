"""How well heat maps segment: pixel accuracy, mIoU, mAP and the pointing game, as the published protocols define them.

With m a map scaled from its minimum to its maximum, p = [m > threshold] its foreground, g the true mask, and sums over all
counted pixels of all images together:

    accuracy = sum [p = g] / sum 1
    mIoU = (sum [p and g] / sum [p or g]  +  sum [not p and not g] / sum [not p or not g]) / 2
    AP of an image = sum over distinct values v of m, descending, of (recall(v) - recall(before v)) precision(v)
    mAP = mean of the images' AP;   pointing = share of images whose highest pixel lies in g

Sources: ImageNet-Segmentation as Chefer et al., CVPR 2021, evaluate it (threshold: the map's mean; AP over the scores of
both classes), which ConceptAttention (ICML 2025) takes over; DAAM (ACL 2023), section 4, for COCO-Gen (threshold 0.4);
Zhang et al., ECCV 2016, for the pointing game.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from sparsefeat.evaluation.intervals import interval, resampled, share_draws

Threshold: TypeAlias = "float | Literal['mean']"

# Pixels within which the pointing game forgives a miss, in images of the photographs' size (Zhang et al., section 4.1).
POINTING_TOLERANCE = 15


@dataclass(frozen=True)
class SegmentationScores:
    """Shares of 1. `map` is the mean average precision, `n` the number of maps; `threshold` the foreground's."""

    accuracy: float
    miou: float
    map: float
    pointing: float
    threshold: Threshold
    n: int


class Segmentation:
    """Maps against masks, counted over a set.

        counted = Segmentation()
        for heat, mask in pairs:
            counted.add(heat.scaled(mask.shape), mask)
        counted.scores()

    Args:
        thresholds: of the map from 0 (its minimum) to 1 (its maximum), or "mean" for each map's own mean. Several are
            counted at once; `best()` says which has the highest mIoU.
        both_classes: the average precision is that of all pixels' scores for both classes, m for the foreground and
            1 - m for the background, as the ImageNet-Segmentation protocol has it; otherwise of the foreground's.
        tolerance: pixels by which the highest pixel may miss the mask in the pointing game.
    """

    def __init__(
        self, thresholds: Sequence[Threshold] = ("mean",), both_classes: bool = False, tolerance: float = 0.0
    ) -> None:
        for threshold in thresholds:
            if threshold != "mean" and not (isinstance(threshold, (int, float)) and 0 <= threshold < 1):
                raise ValueError(f'thresholds={list(thresholds)} must be numbers from 0 to below 1, or "mean"')
        if not thresholds:
            raise ValueError('thresholds is empty; give at least one, as in ("mean",)')
        self.thresholds: tuple[Threshold, ...] = tuple(thresholds)
        self.both_classes: bool = both_classes
        self.tolerance: float = tolerance
        # Of each map [thresholds, 4]: both foreground, foreground of either, both background, background of either.
        self._counts: list[Tensor] = []
        self._pixels = 0
        self._precision: list[float] = []
        self._hits: list[float] = []

    def add(self, values: Tensor, mask: Tensor, ignored: Tensor | None = None) -> None:
        """Count one map [h, w] against its mask bool [h, w]; pixels of `ignored` bool [h, w] are left out.

        Raises ValueError for other shapes, for values that are not finite, and where the mask is nowhere in what counts.
        """
        if values.ndim != 2 or values.shape != mask.shape or (ignored is not None and ignored.shape != mask.shape):
            raise ValueError(
                f"values {list(values.shape)} and mask {list(mask.shape)} must be one [h, w]; resize the map first"
            )
        if mask.dtype != torch.bool:
            raise ValueError(f"mask must be bool, got {mask.dtype}; write mask > 0.5")
        counted = torch.ones_like(mask) if ignored is None else ~ignored
        if not values.isfinite().all():
            raise ValueError("values hold NaN or infinity; give finite values")
        if not (mask & counted).any():
            raise ValueError("mask is nowhere true where pixels count; leave this image out")
        scaled = _scaled(values.double().cpu())
        mask, counted = mask.cpu(), counted.cpu()
        of_truth = mask[counted]
        of_map = []
        for threshold in self.thresholds:
            found = foreground(scaled, threshold)[counted]
            of_map.append(
                torch.stack([found & of_truth, found | of_truth, ~found & ~of_truth, ~found | ~of_truth]).sum(1)
            )
        self._counts.append(torch.stack(of_map).double())
        self._pixels += int(counted.sum())
        scores = scaled[counted]
        if self.both_classes:
            self._precision.append(average_precision(torch.cat([1 - scores, scores]), torch.cat([~of_truth, of_truth])))
        else:
            self._precision.append(average_precision(scores, of_truth))
        self._hits.append(_pointing(scaled, mask, counted, self.tolerance))

    def best(self) -> Threshold:
        """The threshold with the highest mIoU, the first of equal ones."""
        return max(self.thresholds, key=lambda threshold: self.scores(threshold).miou)

    def scores(self, threshold: Threshold | None = None) -> SegmentationScores:
        """The set's scores at one of the thresholds, by default the first."""
        threshold = self.thresholds[0] if threshold is None else threshold
        if threshold not in self.thresholds:
            raise ValueError(f"threshold={threshold!r} was not counted; these were: {list(self.thresholds)}")
        if not self._precision:
            raise ValueError("no map was counted; add one first")
        counts = torch.stack(self._counts)[:, self.thresholds.index(threshold)]
        both, _, neither, _ = counts.sum(0).tolist()
        return SegmentationScores(
            accuracy=(both + neither) / self._pixels,
            miou=_miou(counts),
            map=sum(self._precision) / len(self._precision),
            pointing=sum(self._hits) / len(self._hits),
            threshold=threshold,
            n=len(self._precision),
        )

    def intervals(self, threshold: Threshold) -> dict[str, tuple[float, float]]:
        """95 % intervals of "miou", maps drawn again with replacement, and "pointing"."""
        counts = torch.stack(self._counts)[:, self.thresholds.index(threshold)]
        return {
            "miou": interval(resampled(counts, _miou)),
            "pointing": interval(share_draws(torch.tensor(self._hits), seed=0)),
        }


def _miou(counts: Tensor) -> float:
    """Of both classes; counts [maps, 4]."""
    both, either, neither, background = counts.sum(0).tolist()
    return (both / either + (neither / background if background else 1.0)) / 2


def _scaled(values: Tensor) -> Tensor:
    """From its minimum to its maximum as [0, 1]; zeros where it is constant."""
    low, high = values.min(), values.max()
    return (values - low) / (high - low) if high > low else torch.zeros_like(values)


def foreground(scaled: Tensor, threshold: Threshold) -> Tensor:
    """Bool: where a map of [0, 1] exceeds the threshold, or its own mean."""
    return scaled > (scaled.mean() if threshold == "mean" else threshold)


def average_precision(scores: Tensor, true: Tensor) -> float:
    """The area under precision by recall, a step at every distinct score: pixels of equal scores come in together."""
    order = scores.argsort(descending=True, stable=True)
    ranked, hits = scores[order], true[order].double().cumsum(0)
    last = torch.ones(len(ranked), dtype=torch.bool)
    last[:-1] = ranked[1:] != ranked[:-1]  # the last pixel of every run of equal scores
    places = last.nonzero()[:, 0]
    found = hits[places]
    steps = found.diff(prepend=found.new_zeros(1))
    return float((steps * found / (places + 1)).sum() / hits[-1])


def _pointing(scaled: Tensor, mask: Tensor, counted: Tensor, tolerance: float) -> float:
    """The share of the map's highest pixels that lie in the mask, or within `tolerance` pixels of it."""
    among = torch.where(counted, scaled, -torch.inf)
    highest = (among == among.max()).nonzero().double()
    inside = mask.nonzero().double()
    return float((torch.cdist(highest, inside).amin(1) <= tolerance).double().mean())


def downsampled_and_back(mask: Tensor, grid: tuple[int, int]) -> Tensor:
    """A mask [h, w] in [0, 1] averaged to a map's grid and enlarged again: the best that a map of that grid can know."""
    small = F.interpolate(mask[None, None].float(), size=grid, mode="area")
    return F.interpolate(small, size=tuple(mask.shape), mode="bicubic")[0, 0]


# ----------------------------------------------------------------------------------------------------- the protocols


@dataclass(frozen=True)
class Annotated:
    """An image, words for what is in it, the mask of each word [words, h, w] bool, and pixels that do not count [h, w]."""

    name: str
    image: Image.Image
    words: tuple[str, ...]
    masks: Tensor
    ignored: Tensor
    prompt: str


@dataclass(frozen=True)
class Protocol:
    """How a published evaluation makes scores of maps; `segmentation_folders` reads its images and masks.

    size: maps and masks are brought to it, (h, w); None: the mask's own. nearest: how maps are enlarged, else bicubic.
    """

    threshold: Threshold
    both_classes: bool
    size: tuple[int, int] | None
    nearest: bool
    tolerance: float

    def evaluate(
        self, annotated: Iterable[Annotated], maps_of: Callable[[Annotated], Tensor]
    ) -> tuple[SegmentationScores, tuple[float, float]]:
        """The scores of `maps_of(image)` [words, h', w'] over a set; and the mean over maps of the foreground's IoU, with
        the half width of its 95 % interval (1.96 standard errors), which COCO-Gen reports.
        """
        counted = Segmentation((self.threshold,), self.both_classes, self.tolerance)
        ious = []
        for one in annotated:
            maps = maps_of(one)
            if maps.ndim != 3 or len(maps) != len(one.words):
                raise ValueError(
                    f"maps_of gave {list(maps.shape)} for {one.name}; give one map for each of {', '.join(one.words)}"
                )
            size = self.size or tuple(one.masks.shape[-2:])
            masks, ignored = _labels_to(one.masks, size), _labels_to(one.ignored[None], size)[0]
            for values, mask in zip(_maps_to(maps, size, self.nearest), masks, strict=True):
                counted.add(values, mask, ignored)
                found = foreground(_scaled(values.double()), self.threshold)[~ignored]
                true = mask[~ignored]
                ious.append(float((found & true).sum() / (found | true).sum()))
        scores = counted.scores()
        mean = sum(ious) / len(ious)
        spread = sum((iou - mean) ** 2 for iou in ious) / max(len(ious) - 1, 1)
        return scores, (mean, 1.96 * math.sqrt(spread / len(ious)))


IMAGENET_SEGMENTATION = Protocol("mean", True, (224, 224), True, POINTING_TOLERANCE)
PASCAL_VOC = Protocol("mean", True, None, False, POINTING_TOLERANCE)
COCO_GEN = Protocol(0.4, False, None, False, 0.0)


def _labels_to(masks: Tensor, size: tuple[int, ...]) -> Tensor:
    if tuple(masks.shape[-2:]) == tuple(size):
        return masks
    return F.interpolate(masks[None].float(), size=size, mode="nearest-exact")[0] > 0.5


def _maps_to(maps: Tensor, size: tuple[int, ...], nearest: bool) -> Tensor:
    maps = maps.detach().float().cpu()
    if tuple(maps.shape[-2:]) == tuple(size):
        return maps
    if nearest:
        return F.interpolate(maps[None], size=size, mode="nearest-exact")[0]
    return F.interpolate(maps[None], size=size, mode="bicubic")[0].clamp(min=0)
