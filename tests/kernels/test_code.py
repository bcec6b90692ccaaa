"""SparseCode: its two forms, and what can be asked of it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sparsefeat_kernels import SparseCode
from torch.utils import _pytree as pytree


def both_forms() -> list[SparseCode]:
    padded = SparseCode(
        torch.tensor([[3.0, 1.0], [2.0, 0.0], [0.0, 0.0]]), torch.tensor([[4, 0], [1, 4], [0, 0]]).int(), 5
    )
    csr = SparseCode(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([4, 0, 1]).int(), 5, torch.tensor([0, 2, 3, 3]))
    return [padded, csr]


DENSE = torch.tensor([[1.0, 0, 0, 0, 3], [0, 2, 0, 0, 0], [0, 0, 0, 0, 0]])


@pytest.mark.parametrize("code", both_forms(), ids=["padded", "csr"])
def test_both_forms_answer_alike(code: SparseCode):
    assert code.rows == 3
    assert torch.equal(code.dense(), DENSE)
    assert torch.equal(code.select(torch.tensor([4, 2, 4, 1])), DENSE[:, [4, 2, 4, 1]])
    assert code.select([]).shape == (3, 0)
    for start, stop in ((0, 3), (1, 2), (2, 9), (-1, 3), (2, 1)):
        assert torch.equal(
            code.slice_rows(start, stop).dense(), DENSE[start : max(stop, start) if start >= 0 else stop]
        )
    assert torch.equal(code.to("cpu").dense(), DENSE)


@settings(max_examples=50)
@given(st.integers(0, 2**31), st.integers(0, 6), st.integers(0, 8))
def test_padded_from_dense_goes_back(seed: int, rows: int, n: int):
    z = torch.randint(-2, 3, (rows, n), generator=torch.Generator().manual_seed(seed)).float()
    code = SparseCode.padded_from_dense(z)
    assert torch.equal(code.dense(), z)
    assert ((code.indices >= 0) & (code.indices < max(n, 1))).all()


@pytest.mark.parametrize("code", both_forms(), ids=["padded", "csr"])
def test_it_is_a_pytree_of_tensors(code: SparseCode):
    leaves, spec = pytree.tree_flatten(code)
    assert all(isinstance(leaf, torch.Tensor) for leaf in leaves if leaf is not None)
    assert torch.equal(pytree.tree_unflatten(leaves, spec).dense(), DENSE)
    doubled = pytree.tree_map_only(torch.Tensor, lambda t: t * 2 if t.is_floating_point() else t, code)
    assert torch.equal(doubled.dense(), 2 * DENSE)


@pytest.mark.parametrize("wrong", [-1, 5])
@pytest.mark.parametrize("code", both_forms(), ids=["padded", "csr"])
def test_an_index_that_is_no_latent_is_refused_not_counted_from_the_end(code: SparseCode, wrong: int):
    indices = code.indices.clone()
    indices.view(-1)[1] = wrong
    with pytest.raises(IndexError, match=rf"indices must lie in 0 \.\. 4, got values from .*{wrong}"):
        SparseCode(code.values, indices, 5, code.row_offsets).dense()


def test_mistakes_are_refused_by_name():
    values, indices = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match="values and indices"):
        SparseCode(values[:, :2], indices, 5)
    with pytest.raises(ValueError, match="row_offsets"):
        SparseCode(values[0], indices[0], 5)
    with pytest.raises(TypeError, match="values must be floating"):
        SparseCode(indices, indices, 5)
    with pytest.raises(TypeError, match="indices must be int32"):
        SparseCode(values, values, 5)
