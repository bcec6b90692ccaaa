"""Columns that lie further apart than 32 bits reach, as those of a transposed view of a large tensor do: every Triton kernel
that reads rows of a tensor reads them there too. Only the pages that hold the few values are ever touched."""

import mmap
import sys

import pytest
import sparsefeat_kernels as kernels
import torch
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(not TRITON_AVAILABLE, reason="Triton is not installed"),
    pytest.mark.skipif(
        torch.cuda.is_available() or sys.platform != "linux", reason="needs memory that is addressed but not there"
    ),
]
ROWS, D, N, K = 3, 70, 128, 3  # two steps of the products' 64 columns
# The last column is more than 2^31 elements away, and so is the next step of a product.
APART = 2**26 + 8


def far(tensor: Tensor) -> Tensor:
    """The same values, columns APART elements apart."""
    rows, columns = tensor.shape
    nbytes = tensor.itemsize * ((columns - 1) * APART + rows)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | 0x4000)  # MAP_NORESERVE
    return torch.frombuffer(memory, dtype=tensor.dtype).as_strided((rows, columns), (1, APART)).copy_(tensor)


@pytest.fixture(scope="module")
def inputs() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    sizes = {"x": (ROWS, D), "W": (N, D), "b": (N,), "c": (D,)}
    made = {name: torch.randn(size, generator=g).half() for name, size in sizes.items()}
    made["values"] = torch.rand(ROWS, K, generator=g) + 0.5
    made["indices"] = torch.stack([torch.randperm(N, generator=g)[:K] for _ in range(ROWS)]).int()
    return made


def both(run, near: tuple[Tensor, ...]) -> None:
    with kernels.force_triton():
        for one, other in zip(run(*map(far, near)), run(*near), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_encoders(inputs: dict[str, Tensor]):
    b, c = inputs["b"], inputs["c"]
    for k in (K, N // 2):
        both(lambda x, W, k=k: kernels.topk_encode(x, W, b, c, k), (inputs["x"], inputs["W"]))
    threshold = torch.tensor(5.0)
    both(lambda x, W: kernels.threshold_encode(x, W, b, c, threshold, 40), (inputs["x"], inputs["W"]))


def test_weight_gradient(inputs: dict[str, Tensor]):
    code = inputs["values"], inputs["indices"]
    both(lambda x: kernels.weight_gradient(*code, x, inputs["c"], N), (inputs["x"],))


def test_edits(inputs: dict[str, Tensor]):
    latents = inputs["indices"][0].long()
    rule = [torch.full((K,), value) for value in (0.5, 0.1, -9.0, 9.0, -torch.inf)]
    code = inputs["values"], inputs["indices"], latents
    both(lambda x, W: [kernels.sparse_edit(x, *code, W, *rule, torch.ones(ROWS))], (inputs["x"], inputs["W"][latents]))


def test_decoder_and_the_gradient_of_its_values(inputs: dict[str, Tensor]):
    code = inputs["values"], inputs["indices"]
    both(lambda W: [kernels.sparse_decode(*code, W, inputs["c"])], (inputs["W"],))
    gradient = torch.ops.sparsefeat.sparse_decode_grad_values
    both(lambda x, W: [gradient(x, *code, W)], (inputs["x"], inputs["W"]))


def test_attention(inputs: dict[str, Tensor]):
    """Heads whose width is the outermost dimension in memory."""
    g = torch.Generator().manual_seed(1)
    query, key = torch.randn(5, 70, generator=g).half(), torch.randn(7, 70, generator=g).half()

    def maps(query: Tensor, key: Tensor) -> list[Tensor]:
        found = torch.zeros(1, 5, 7)
        kernels.attention_map_(found, query[None, None], key[None, None])
        return [found]

    both(maps, (query, key))


def test_more_entries_a_row_than_a_grid_has_places_in_its_other_dimensions(monkeypatch: pytest.MonkeyPatch):
    """65,535 blocks of 8 entries."""
    grids = []

    class Kernel:
        def __getitem__(self, grid):
            grids.append(grid)
            return lambda *args, **kwargs: None

    module = sys.modules["sparsefeat_kernels.decode.sparse_decode"]
    monkeypatch.setattr(module, "_sparse_decode_grad_values_kernel", Kernel())
    k = 8 * 65535 + 1
    code = torch.ones(2, k), torch.zeros(2, k, dtype=torch.int32)
    module._grad_values_triton(torch.zeros(2, 3), *code, torch.zeros(4, 3))
    assert grids == [(2 * 65536,)]
