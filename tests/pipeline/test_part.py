from __future__ import annotations

import pytest
import torch

from sparsefeat.pipeline.part import Part

WHOLE = torch.arange(2 * 5 * 3.0).view(2, 5, 3)


@pytest.mark.parametrize("start", [0, 2, (0, 3), (1, 1)])
def test_what_a_part_takes_is_what_it_puts_back(start):
    part = Part(start=start, length=2)
    rows = part.of(WHOLE)
    starts = (start, start) if isinstance(start, int) else start
    assert torch.equal(rows, torch.stack([entry[s : s + 2] for entry, s in zip(WHOLE, starts, strict=True)]))
    assert torch.equal(part.into(WHOLE, rows), WHOLE)
    put = part.into(WHOLE, -rows - 1)
    for before, after, s in zip(WHOLE, put, starts, strict=True):
        assert torch.equal(after[s : s + 2], -before[s : s + 2] - 1)
        assert torch.equal(after[:s], before[:s])
        assert torch.equal(after[s + 2 :], before[s + 2 :])
    assert torch.equal(WHOLE, torch.arange(2 * 5 * 3.0).view(2, 5, 3))  # nothing was written to it


def test_a_whole_tensor_is_passed_on_as_it_is():
    assert Part().of(WHOLE) is WHOLE
    assert Part(start=0, length=5).of(WHOLE) is WHOLE
    feature_map = torch.zeros(1, 3, 4, 4)
    assert Part().of(feature_map) is feature_map
    assert Part().into(WHOLE, WHOLE) is WHOLE
