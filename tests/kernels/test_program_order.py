"""The programs of a launch run side by side on a GPU, in an order of the GPU's own; Triton's interpreter runs them one
after another. Here it takes them in other orders: whatever one program leaves for another of the same launch shows."""

import contextlib
import random
from collections.abc import Callable, Iterator

import pytest
import torch
from sparsefeat_kernels import force_triton
from sparsefeat_kernels.dispatch import TRITON_AVAILABLE, jit, tl
from sparsefeat_kernels.encode.gpu.topk import topk_encode_triton
from sparsefeat_kernels.feature_stats import _feature_stats_triton
from torch import Tensor

pytestmark = [
    pytest.mark.skipif(not TRITON_AVAILABLE, reason="Triton is not installed"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has its own order"),
]
SEEDS = (None, 0)  # None: backwards


@contextlib.contextmanager
def programs_in_another_order(seed: int | None) -> Iterator[list[int]]:
    """Inside, every launch of the interpreter runs its programs in an order drawn from `seed`. Yields the sizes of the
    launches."""
    from triton.runtime.interpreter import interpreter_builder as builder

    set_dim, set_idx = builder.set_grid_dim, builder.set_grid_idx
    draw, sizes, order = random.Random(seed), [], []

    def set_grid_dim(nx: int, ny: int, nz: int) -> None:
        set_dim(nx, ny, nz)
        sizes.append(nx * ny * nz)
        order[:] = range(nx * ny * nz - 1, -1, -1)
        if seed is not None:
            draw.shuffle(order)

    def set_grid_idx(x: int, y: int, z: int) -> None:
        _, ny, nz = builder.grid_dim
        number = order[(x * ny + y) * nz + z]
        set_idx(number // (ny * nz), number // nz % ny, number % nz)

    builder.set_grid_dim, builder.set_grid_idx = set_grid_dim, set_grid_idx
    try:
        yield sizes
    finally:
        del builder.set_grid_dim, builder.set_grid_idx


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def encoder() -> tuple[Tensor, ...]:
    return normal(9, 24, seed=1), normal(140, 24, seed=2), normal(140, seed=3), normal(24, seed=4)


def code(rows: int = 20, k: int = 6, n: int = 40) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(5)
    indices = torch.stack([torch.randperm(n, generator=g)[:k] for _ in range(rows)]).int()
    indices[:, 0] = 3  # a latent of every row
    return normal(rows, k, seed=6), indices


def attention(t: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    return normal(4, 2, 20, 8, seed=7), normal(4, 1, t, 8, seed=8), normal(4, 1, t, 12, seed=9)


GROUP = torch.tensor([1, -1, 1, 0])  # two batch rows in one map, one in none


def unproved() -> list[Tensor]:
    """Latents alike by the three, in one group: every row goes on the list, in the order in which their programs count."""
    x, W, b_enc, b_pre = encoder()
    W = W[:62].clone()
    W[8:16] = W[16:24] = W[:8]
    tile = {"BLOCK_ROWS": 16, "BLOCK_LATENTS": 64, "BLOCK_D": 16, "num_warps": 4, "num_stages": 2}
    return list(topk_encode_triton(x, W, b_enc[:62], b_pre, 4, "relu", blocks=tile))


def gradients() -> list[Tensor]:
    values, indices = code()
    inputs = [t.clone().requires_grad_() for t in (values, normal(40, 24), normal(24, seed=1))]
    torch.ops.sparsefeat.sparse_decode(inputs[0], indices, *inputs[1:]).square().sum().backward()
    return [t.grad for t in inputs]


def heavy_latent() -> list[Tensor]:
    """A latent of more entries than a program takes."""
    values, indices = code(1100, 2, 9)
    return list(torch.ops.sparsefeat.weight_gradient(values, indices, normal(1100, 5), normal(5), 9))


def edit() -> list[Tensor]:
    rule = normal(3, seed=1), normal(3, seed=2), -torch.ones(3), torch.ones(3), torch.zeros(3)
    latents, weight = torch.tensor([3, 7, 3]), normal(20, seed=3)
    return [torch.ops.sparsefeat.sparse_edit(normal(20, 600), *code(), latents, normal(3, 600), *rule, weight)]


def statistics() -> list[Tensor]:
    """Runs that end in their block, in the next, and that fill whole blocks."""
    tables = normal(2, 40), torch.ones(2, 40, dtype=torch.int32), normal(2, 40, seed=1)
    _feature_stats_triton(*tables, *code(), torch.arange(20) % 3 - 1, block=16)
    return list(tables)


def maps(t: int, output: bool) -> list[Tensor]:
    query, key, value = attention(t)
    into, options = normal(2, 20, t), (0.3, None, normal(2, seed=2), GROUP, None)
    if output:
        return [into, torch.ops.sparsefeat.attention_with_map_(into, query, key, value, *options)]
    torch.ops.sparsefeat.attention_map_(into, query, key, *options)
    return [into]


def tap_and_columns() -> list[Tensor]:
    query, key, _ = attention()
    rows = torch.ops.sparsefeat.attention_rows(query, key, 0.3, None, torch.arange(40) < 9)
    into, sums = normal(2, 20, 40), normal(2, 40)
    torch.ops.sparsefeat.attention_tap_(into, query, key, rows[0], 0.3, None, None, GROUP)
    torch.ops.sparsefeat.attention_column_sums_(sums, query, key, rows[0], 0.3, None, None, GROUP)
    return [*rows, into, sums]


def concepts() -> list[Tensor]:
    query, key, value = (normal(4, 2, rows, 8, seed=rows) for rows in (3, 40, 20))
    out = torch.ops.sparsefeat.concept_attention(query, query, query, key, key, 0.3)
    into = normal(2, 20, 3)
    torch.ops.sparsefeat.concept_map_(into, value, out, normal(2, seed=2), GROUP, True)
    return [out, into]


def resized() -> list[Tensor]:
    sums = normal(2, 40, 21, seed=1)
    torch.ops.sparsefeat.resize_add_(sums, normal(3, 2, 5, 7), normal(3, seed=2), True)
    return [sums]


def map_gradient() -> list[Tensor]:
    query, key, _ = attention(40)
    options = (0.3, None, normal(query.shape[1], seed=2), torch.tensor([3, 0, 3]))
    return list(torch.ops.sparsefeat.attention_map_gradient(normal(4, 20, 3, seed=4), query, key, *options))


CASES: dict[str, Callable[[], list[Tensor]]] = {
    "topk_encode": lambda: list(topk_encode_triton(*encoder(), 3, "signed")),
    "topk_encode, stored": lambda: list(torch.ops.sparsefeat.topk_encode(*encoder(), 50, "signed")),
    "topk_encode, every row without a proof": unproved,
    "threshold_encode": lambda: list(torch.ops.sparsefeat.threshold_encode(*encoder(), torch.tensor(5.0), 7)),
    "threshold_encode_csr": lambda: list(torch.ops.sparsefeat.threshold_encode_csr(*encoder(), torch.tensor(5.0))),
    "sparse_decode": gradients,
    "weight_gradient": heavy_latent,
    "sparse_edit": edit,
    "feature_stats": statistics,
    "attention_map": lambda: maps(40, output=False),
    "attention_with_map": lambda: maps(40, output=True),
    "attention_map, many keys": lambda: maps(260, output=False),
    "attention_map_gradient": map_gradient,
    "attention_tap, rows and column sums": tap_and_columns,
    "concept_attention and its map": concepts,
    "resize_add": resized,
}


@pytest.mark.parametrize("name", CASES)
def test_the_same_bits_in_whatever_order_the_programs_run(name: str):
    with force_triton():
        usual = CASES[name]()
        for seed in SEEDS:
            with programs_in_another_order(seed) as sizes:
                found = CASES[name]()
            assert max(sizes) > 1, "a launch of one program has one order"
            assert all(a.isfinite().all() for a in usual)
            assert all(torch.equal(a, b) for a, b in zip(usual, found, strict=True))


@jit
def _last_program_wins_kernel(out_ptr):
    tl.store(out_ptr, tl.program_id(0) + 10 * tl.program_id(1) + 100 * tl.program_id(2))


def test_a_race_shows():
    found = []
    for seed in (None, *range(8)):
        out = torch.zeros(1, dtype=torch.int32)
        with programs_in_another_order(seed) as sizes:
            _last_program_wins_kernel[(2, 3, 4)](out)
        assert sizes == [24]
        found.append(int(out))
    assert found[0] == 0
    assert len(set(found)) > 4
    _last_program_wins_kernel[(2, 3, 4)](out)
    assert int(out) == 321
