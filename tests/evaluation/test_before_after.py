"""Before and after: nothing is removed that was not there, and nothing is lost that was never right."""

from __future__ import annotations

import pytest
import torch

from sparsefeat.evaluation.before_after import BeforeAfter, before_after


def test_only_what_was_seen_before_counts_as_removed_and_only_what_was_right_as_kept() -> None:
    wanted = torch.tensor([7, 7, 7, 7, 1, 2, 3])
    before = torch.tensor([7, 7, 4, 4, 1, 9, 3])  # two targets were never seen, one other was never right
    after = torch.tensor([4, 7, 7, 4, 1, 9, 8])
    counts = before_after(before, after, wanted, [True] * 4 + [False] * 3)
    assert counts == BeforeAfter(
        n_targets=4, seen_before=2, seen_after=2, removed=1, n_others=3, right_before=2, right_after=1, kept=1
    )


def test_counts_of_several_concepts_add_up() -> None:
    one, two = BeforeAfter(1, 2, 3, 4, 5, 6, 7, 8), BeforeAfter(10, 20, 30, 40, 50, 60, 70, 80)
    assert one + two == BeforeAfter(11, 22, 33, 44, 55, 66, 77, 88)


def test_where_nothing_changed_nothing_is_removed_and_nothing_is_lost() -> None:
    said, wanted = torch.tensor([3, 1, 4, 1, 5]), torch.tensor([3, 3, 4, 4, 5])
    counts = before_after(said, said, wanted, [True, True, False, False, False])
    assert (counts.removed, counts.seen_before, counts.seen_after) == (0, 1, 1)
    assert (counts.kept, counts.right_before, counts.right_after) == (2, 2, 2)


def test_lists_are_counted_as_tensors_are_and_the_counts_are_said_in_words() -> None:
    counts = before_after([7, 7, 1, 2], torch.tensor([3, 7, 1, 5]), [7, 7, 1, 2], [True, True, False, False])
    assert counts == BeforeAfter(2, 2, 1, 1, 2, 2, 1, 1)
    assert str(counts).startswith("removed 1 of 2 (of 2 images of the concept, seen in 1 after); kept 1 of 2")


@pytest.mark.parametrize(
    ("wanted", "is_target", "message"),
    [
        (["fox", "owl"], [True, False], r"wanted=\['fox', 'owl'\] must be a list, not empty, each a whole number"),
        ([7], [True, False], "before, after, wanted and is_target must be equally long"),
        ([7, 1], [True], "equally long"),
        ([7, 1], "fo", "equally long"),
    ],
)
def test_what_would_be_counted_wrongly_is_refused(wanted: list, is_target: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        before_after([7, 1], [7, 1], wanted, is_target)
