"""What a call of topk_encode takes the host before a GPU has anything to do: `python -m bench.host`. No GPU is needed: launches
are left out, so Triton's own share of each is not in it. Of 256 rows, d 1280, 20,480 latents, k 32, half precision.

Processor time, so that other programs beside it do not count as much.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import triton
from sparsefeat_kernels import dispatch, force_triton
from sparsefeat_kernels.encode.gpu import tiles, topk

CALLS, REPEATS = 300, 15


def microseconds(call: Callable[[], object]) -> float:
    """Of one call, the least of some repeats."""
    call()
    found = []
    for _ in range(REPEATS):
        begin = time.thread_time()
        for _ in range(CALLS):
            call()
        found.append(time.thread_time() - begin)
    return min(found) / CALLS * 1e6


def main() -> None:
    triton.runtime.jit.JITFunction.run = lambda *_, **__: None
    dispatch.INTERPRETED = True  # a CPU's tensors take the launchers too
    tiles.has_copy_engine = lambda: True
    x, W = torch.zeros(256, 1280, dtype=torch.bfloat16), torch.zeros(20480, 1280, dtype=torch.bfloat16)
    b_enc, b_pre, bias = x.new_zeros(20480), x.new_zeros(1280), torch.zeros(20480)
    args = x, W, b_enc, b_pre, 32, "relu", bias
    with force_triton():
        found = {
            "the launcher alone": lambda: topk.topk_encode_triton(*args),
            "the op": lambda: dispatch.ops.topk_encode(*args),
            "the op through torch's dispatcher": lambda: dispatch.registered.topk_encode(*args),
            "one allocation": lambda: x.new_empty(256, 32),
        }
        for name, call in found.items():
            print(f"{name}: {microseconds(call):.1f} us", flush=True)


if __name__ == "__main__":
    main()
