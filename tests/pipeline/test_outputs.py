from __future__ import annotations

from collections import namedtuple

import pytest
import torch
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from torch import nn
from transformers.modeling_outputs import BaseModelOutput

from sparsefeat.pipeline.instrument import like_tensor, rows_of
from sparsefeat.pipeline.outputs import put, put_argument, take, take_argument

Pair = namedtuple("Pair", "image text")
OLD, NEW, OTHER = torch.zeros(1), torch.ones(1), torch.full((1,), 2.0)


@pytest.mark.parametrize(
    ("output", "index"),
    [
        (OLD, 0),
        ((OLD,), 0),
        ((OTHER, OLD), 1),
        ([OLD, OTHER], 0),
        ((None, OLD), 1),
        (Pair(OTHER, OLD), 1),
        (Transformer2DModelOutput(sample=OLD), 0),
        (BaseModelOutput(last_hidden_state=OLD, hidden_states=(OTHER,)), 0),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_output_keeps_its_type_and_its_other_elements(output, index):
    assert take(output, index) is OLD
    changed = put(output, index, NEW)
    assert type(changed) is type(output)
    assert take(changed, index) is NEW
    assert take(output, index) is OLD, "the module's own object was written to"
    if isinstance(output, (tuple, list)):
        assert len(changed) == len(output)
        assert all(a is b for i, (a, b) in enumerate(zip(changed, output, strict=True)) if i != index)
    if isinstance(output, Transformer2DModelOutput):
        assert changed.sample is NEW
    if isinstance(output, BaseModelOutput):
        assert changed.last_hidden_state is NEW
        assert changed.hidden_states[0] is OTHER


@pytest.mark.parametrize("output", [None, (), (None,), "text", ((OLD,),)])
def test_an_output_without_the_tensor_is_refused(output):
    with pytest.raises(TypeError, match="hookpoints"):
        take(output, 0)


class Block(nn.Module):
    def forward(self, hidden_states, temb=None, encoder_hidden_states=None):
        return hidden_states


@pytest.mark.parametrize(
    ("name", "args", "kwargs"),
    [
        (None, (OLD, OTHER), {}),
        (None, (), {"temb": OTHER, "hidden_states": OLD}),
        ("encoder_hidden_states", (OTHER, None, OLD), {}),
        ("encoder_hidden_states", (OTHER,), {"encoder_hidden_states": OLD}),
    ],
)
def test_an_argument_is_replaced_the_way_it_was_passed(name, args, kwargs):
    block = Block()
    assert take_argument(block, name, args, kwargs) is OLD
    new_args, new_kwargs = put_argument(block, name, args, kwargs, NEW)
    assert take_argument(block, name, new_args, new_kwargs) is NEW
    assert len(new_args) == len(args)
    assert new_kwargs.keys() == kwargs.keys()
    assert take_argument(block, name, args, kwargs) is OLD


def test_an_argument_that_is_no_tensor_is_refused():
    with pytest.raises(TypeError, match="'encoder_hidden_states' of Block is NoneType"):
        take_argument(Block(), "encoder_hidden_states", (OLD,), {})


@pytest.mark.parametrize("shape", [(2, 5, 3, 4), (2, 7, 5), (3, 5), (2, 5, 3, 4, 2)])
def test_rows_are_batch_by_positions_and_go_back_where_they_were(shape):
    tensor = torch.randn(shape)
    rows = rows_of(tensor)
    channels = shape[1] if len(shape) > 3 else shape[-1]
    assert rows.shape == (tensor.numel() // channels, channels)
    assert torch.equal(like_tensor(rows, tensor), tensor)
    if len(shape) == 4:  # row (b, y, x) is the pixel's channels, positions in row-major order
        assert torch.equal(rows[1 * 12 + 2 * 4 + 3], tensor[1, :, 2, 3])
