"""Every op on the same inputs again and again, and every op once: the same bits, and what a sanitizer watches."""

from __future__ import annotations

import time
from collections.abc import Callable

import sparsefeat_kernels as kernels
import torch
from torch import Tensor

from bench.gpu.faults import by_triton, encoded_in_groups, unproved
from bench.gpu.record import Record
from bench.measure import OURS, available
from bench.shapes import sae_shape
from sparsefeat.measure import figures
from sparsefeat.measure.sae_case import SAECase, sae_case

REPEATS = 20
SMALL = {"rows": 33, "d_model": 80, "n_latents": 300, "k": 5}
SMALL_ATTENTION = {"batch": 2, "heads": 3, "n": 70, "t": 19, "d": 40}
SMALL_MAPS = {
    **dict.fromkeys(
        (
            "attention_map",
            "attention_rows",
            "attention_column_sums",
            "attention_map_gradient",
            "concept_attention",
            "concept_map",
        ),
        SMALL_ATTENTION,
    ),
    "attention_tap": {**SMALL_ATTENTION, "selected": 7},
    "resize_add": {"maps": 3, "t": 5, "side": 7, "to": 20},
}


def encoded_unproved(case: SAECase) -> tuple[Tensor, Tensor]:
    return encoded_in_groups(unproved(case))


def encoded_stored(case: SAECase) -> tuple[Tensor, Tensor]:
    """Of a large part of the latents."""
    k = min(300, len(case.W_enc) // 2)
    return by_triton(lambda: kernels.topk_encode(case.x, case.W_enc, case.b_enc, case.b, k))


# What no figure runs, and the dtypes it is for.
OTHER_PATHS: dict[str, tuple[Callable[[SAECase], tuple[Tensor, Tensor]], tuple[str, ...]]] = {
    "topk_encode, rows without a proof": (encoded_unproved, ("bfloat16", "float16", "float32")),
    "topk_encode_stored": (encoded_stored, ("bfloat16", "float16", "float32")),
}


def shape_of(op: str, sae: dict[str, int]) -> dict[str, int]:
    return dict(SMALL_MAPS.get(op, sae))


def same_answers(answer: Callable[[], list[Tensor]]) -> bool:
    """Whether REPEATS calls give the same bits; as bits, NaN is equal to itself."""
    first = answer()
    again = (answer() for _ in range(REPEATS - 1))
    return all(
        torch.equal(a.view(torch.uint8) if a.dim() else a, b.view(torch.uint8) if b.dim() else b)
        for other in again
        for a, b in zip(first, other, strict=True)
    )


def same_bits(op: str, shape: dict[str, int], dtype: str, device: str) -> bool:
    """Of our provider of a figure."""
    figure = figures.build(op, shape, dtype, device)
    provider = next(p for p in figure.providers if p.name == OURS)
    inputs = figure.inputs(0)

    def answer() -> list[Tensor]:
        state = provider.prepare(inputs)
        found = provider.canonical(state, provider.run(state))
        found = list(found.values()) if isinstance(found, dict) else found
        return [found] if isinstance(found, Tensor) else [t for t in found if isinstance(t, Tensor)]

    with torch.set_grad_enabled(figure.gradients):
        return same_answers(answer)


def path_same_bits(name: str, shape: dict[str, int], device: str) -> bool:
    path, dtypes = OTHER_PATHS[name]
    case = sae_case(**shape, dtype=dtypes[0], device=device, seed=0)
    return same_answers(lambda: list(path(case)))


def repeats(record: Record, seconds: float) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    results: dict[str, bool | str] = record.done.get("repeats", {})
    deadline = time.monotonic() + seconds
    shape = sae_shape("SAeUron", 1024) if device == "cuda" else SMALL
    for name in (*available(), *(OTHER_PATHS if device == "cuda" else ())):
        if name in results or time.monotonic() > deadline:
            continue
        dtype = "float32" if device == "cpu" or name == "matching_pursuit" else "bfloat16"
        try:
            if name in OTHER_PATHS:
                results[name] = path_same_bits(name, shape, device)
            else:
                results[name] = same_bits(name, shape_of(name, shape), dtype, device)
        except Exception as error:
            results[name] = f"{type(error).__name__}: {error}"
        record.keep("repeats", results)
        print(f"{name}, {REPEATS} times: {results[name]}", flush=True)


def one_of_each(device: str) -> None:
    """Every op once on small inputs of odd sizes: what the sanitizer watches."""
    for op in available():
        figure = figures.build(op, shape_of(op, SMALL), "float32" if op == "matching_pursuit" else "float16", device)
        provider = next(p for p in figure.providers if p.name == OURS)
        with torch.set_grad_enabled(figure.gradients):
            state = provider.prepare(figure.inputs(0))
            provider.run(state)
        if device == "cuda":
            torch.cuda.synchronize()
        print(op, flush=True)
    for name, (path, dtypes) in OTHER_PATHS.items() if device == "cuda" else ():
        for dtype in dtypes:
            path(sae_case(**{**SMALL, "rows": 200, "n_latents": 320}, dtype=dtype, device=device, seed=0))
        torch.cuda.synchronize()
        print(name, flush=True)
