"""Before and after: nothing is removed that was not there, and nothing is lost that was never right."""

from __future__ import annotations

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
