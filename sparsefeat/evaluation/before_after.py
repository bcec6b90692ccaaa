"""What an edit did, in the judge's eyes: before and after, so that nothing is counted as removed that was not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

from torch import Tensor


@dataclass(frozen=True)
class BeforeAfter:
    """Numbers of images.

    Of the targets, which should lose the concept: in how many the judge saw it before and after, and in how many of the
    former no longer. Of the others, which should stay as they are: how many it judged right before and after, and how
    many of the former still.
    """

    n_targets: int
    seen_before: int
    seen_after: int
    removed: int
    n_others: int
    right_before: int
    right_after: int
    kept: int

    def __add__(self, other: BeforeAfter) -> BeforeAfter:
        """The counts of both, for images of several concepts."""
        return BeforeAfter(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def before_after(before: Tensor, after: Tensor, wanted: Tensor, is_target: Sequence[bool]) -> BeforeAfter:
    """Count the judge's verdicts `before` and `after` [n] that agree with the prompts' `wanted` [n], all on the axis of the
    concept (objects when an object was erased)."""
    was, still, target = before == wanted, after == wanted, before.new_tensor(is_target).bool()
    return BeforeAfter(
        n_targets=int(target.sum()),
        seen_before=int((was & target).sum()),
        seen_after=int((still & target).sum()),
        removed=int((was & ~still & target).sum()),
        n_others=int((~target).sum()),
        right_before=int((was & ~target).sum()),
        right_after=int((still & ~target).sum()),
        kept=int((was & still & ~target).sum()),
    )
