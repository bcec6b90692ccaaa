"""Ops run without torch's dispatcher where nobody would see it, and through it wherever somebody does."""

import pytest
import torch
from sparsefeat_kernels import attention_map_, sparse_decode, topk_encode
from sparsefeat_kernels.dispatch import ops, registered
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode


def inputs(seed: int = 0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(seed)
    x, W = torch.randn(5, 7, generator=generator), torch.randn(11, 7, generator=generator)
    return x, W, torch.randn(11, generator=generator), torch.randn(7, generator=generator)


class Seen(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func._schema.name)
        return func(*args, **(kwargs or {}))


class Nothing(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def test_both_ways_give_the_same_bits():
    args = (*inputs(), 3, "signed")
    assert all(map(torch.equal, ops.topk_encode(*args), registered.topk_encode(*args)))


def test_a_mode_a_profiler_and_a_transform_see_the_op():
    with Seen() as seen:
        topk_encode(*inputs(), 3)
    assert "sparsefeat::topk_encode" in seen.names
    with FlopCounterMode(display=False) as counted:
        topk_encode(*inputs(), 3)
    assert counted.get_total_flops() == 2 * 5 * 11 * 7
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        topk_encode(*inputs(), 3)
    assert "sparsefeat::topk_encode" in {event.key for event in profile.key_averages()}
    with Nothing():
        assert topk_encode(*inputs(), 3)[0].shape == (5, 3)


def test_gradients_reach_what_asks_for_them_and_nothing_else_is_recorded():
    x, W, b_enc, b_pre = inputs()
    values, _ = topk_encode(x.requires_grad_(), W, b_enc, b_pre, 3, "raw")
    values.sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    with torch.no_grad():
        assert not topk_encode(x, W, b_enc, b_pre, 3)[0].requires_grad


def test_meta_tensors_and_compiled_graphs_have_shapes_alone():
    meta = [tensor.to("meta") for tensor in inputs()]
    assert topk_encode(*meta, 3)[0].shape == (5, 3)
    graphs = []

    def backend(graph, _):
        graphs.append(str(graph.code))
        return graph.forward

    torch.compile(lambda *args: topk_encode(*args, 3), fullgraph=True, backend=backend)(*inputs())
    assert "sparsefeat.topk_encode" in graphs[0]


def test_autograd_notices_that_what_it_kept_was_written_to():
    query, key, maps = torch.randn(1, 2, 4, 3), torch.randn(1, 2, 5, 3), torch.zeros(1, 4, 5)
    before = maps._version
    attention_map_(maps, query, key)
    assert maps._version > before
    kept = torch.ones(1, 4, 5, requires_grad=True)
    product = kept * maps
    attention_map_(maps, query, key)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():
        attention_map_(torch.zeros(1, 4, 5), query, key)


def test_a_tensor_of_another_kind_goes_through_the_dispatcher():
    values, indices = topk_encode(*inputs(), 3)
    W, b = inputs()[1], inputs()[3]

    class Own(torch.Tensor):
        pass

    found = sparse_decode(values.as_subclass(Own), indices, W, b)
    torch.testing.assert_close(found.as_subclass(torch.Tensor), sparse_decode(values, indices, W, b))


def test_a_tensor_that_is_negative_by_a_bit_alone_is_read_with_its_sign(path: str):
    values, indices = topk_encode(*(t.to(path) for t in inputs()), 3)
    W, b = (t.to(values.device) for t in (inputs()[1], inputs()[3]))
    negative = torch.complex(values, values).conj().imag
    assert negative.is_neg()
    torch.testing.assert_close(sparse_decode(negative, indices, W, b), sparse_decode(-values, indices, W, b))
