"""The ops against dense PyTorch on this machine: `make bench`.

Both sides compute the same thing, and the answer is checked before anything is timed. `extra_info` carries the ratio
to the dense way, measured in the same process on the same inputs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from sparsefeat_kernels import sparse_decode, topk_encode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# rows, d_model, n_latents, k: the published shapes of sdxl-unbox, SAeUron, Concept Steerers.
SHAPES = {
    "sdxl-unbox": (512, 1280, 5120, 10),
    "saeuron": (512, 1280, 20480, 32),
    "steerers": (512, 768, 3072, 32),
}


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    run()
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def inputs(shape: str) -> tuple[torch.Tensor, ...]:
    rows, d_model, n_latents, _ = SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, d_model, generator=generator)
    w = F.normalize(torch.randn(n_latents, d_model, generator=generator))
    b_enc, b_pre = torch.randn(n_latents, generator=generator) * 0.1, torch.randn(d_model, generator=generator) * 0.1
    return tuple(t.to(DEVICE) for t in (x, w, b_enc, b_pre))


@pytest.mark.parametrize("shape", SHAPES)
def test_topk_encode(benchmark, shape):
    x, w, b_enc, b_pre = inputs(shape)
    k = SHAPES[shape][3]

    def dense() -> tuple[torch.Tensor, torch.Tensor]:
        values, indices = F.linear(x - b_pre, w, b_enc).topk(k)
        return values.relu(), indices

    values, _ = topk_encode(x, w, b_enc, b_pre, k)
    torch.testing.assert_close(values, dense()[0], atol=1e-4, rtol=1e-4)
    product = seconds(lambda: F.linear(x - b_pre, w, b_enc))
    peer = seconds(dense)
    benchmark(topk_encode, x, w, b_enc, b_pre, k)
    ours = benchmark.stats.stats.median
    benchmark.extra_info |= {
        "shape": SHAPES[shape],
        "over_product_alone": ours / product,
        "speedup_over_dense": peer / ours,
    }


@pytest.mark.parametrize("shape", SHAPES)
def test_sparse_decode(benchmark, shape):
    x, w, b_enc, b_pre = inputs(shape)
    values, indices = topk_encode(x, w, b_enc, b_pre, SHAPES[shape][3])
    z = torch.zeros(len(x), len(w), device=DEVICE).scatter_(1, indices.long(), values)

    def dense() -> torch.Tensor:
        return z @ w + b_pre

    torch.testing.assert_close(sparse_decode(values, indices, w, b_pre), dense(), atol=1e-4, rtol=1e-4)
    peer = seconds(dense)
    benchmark(sparse_decode, values, indices, w, b_pre)
    benchmark.extra_info |= {"shape": SHAPES[shape], "speedup_over_dense": peer / benchmark.stats.stats.median}
