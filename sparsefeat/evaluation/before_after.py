"""What an edit did, in the judge's eyes: before and after, so that nothing is counted as removed that was not there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple, dataclass

import torch
from torch import Tensor

from sparsefeat.arguments import wholes


def _classes(name: str, given: Tensor | Sequence[int]) -> Tensor:
    return torch.tensor(wholes(name, given))


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

    def __str__(self) -> str:
        return (
            f"removed {self.removed} of {self.seen_before} (of {self.n_targets} images of the concept, seen in {self.seen_after} "
            f"after); kept {self.kept} of {self.right_before} (of {self.n_others} others, right in {self.right_after} after)"
        )

    def __add__(self, other: BeforeAfter) -> BeforeAfter:
        """The counts of both, for images of several concepts."""
        return BeforeAfter(*(a + b for a, b in zip(astuple(self), astuple(other), strict=True)))


def before_after(
    before: Tensor | Sequence[int],
    after: Tensor | Sequence[int],
    wanted: Tensor | Sequence[int],
    is_target: Sequence[bool],
) -> BeforeAfter:
    """Count the judge's verdicts that agree with the prompts.

    Args:
        before, after: class numbers [n] of the images without and with the edit.
        wanted: class numbers [n] that the prompts ask for, all on the axis of the concept (objects when an object was
            erased).
        is_target: of each image, whether its prompt asks for the concept.
    """
    before, after, wanted = (
        _classes(name, given) for name, given in (("before", before), ("after", after), ("wanted", wanted))
    )
    lengths = {len(before), len(after), len(wanted), len(is_target)}
    if len(lengths) > 1 or isinstance(is_target, str):
        raise ValueError(
            "before, after, wanted and is_target must be equally long: an entry for each image, in one order."
        )
    was, still, target = before == wanted, after == wanted, torch.tensor([bool(one) for one in is_target])
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
