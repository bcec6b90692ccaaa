"""What the ops take on a GPU, beside cuBLAS, torch.topk and whatever other library is installed.

`times(op)` has a step a shape: every program checked against fp64, then timed in turns by CUDA events, then the kernels
also as replays of a CUDA graph, which leave out what the host does. (Plain torch waits for the device here and there, and a
capture that fails leaves torch's random numbers, allocator and stream in the midst of it.)
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import sparsefeat_kernels as kernels
import torch
from sparsefeat_kernels.encode.gpu.threshold import threshold_encode_triton
from sparsefeat_kernels.encode.gpu.tiles import LARGE_TILE, default_tile
from sparsefeat_kernels.encode.gpu.topk import topk_encode_triton
from sparsefeat_kernels.tuning.graphs import captured
from torch import Tensor

from bench.gpu.checks import SLOW, SMALLEST, TINY, TINY_ATTENTION
from bench.gpu.children import Step
from bench.gpu.faults import by_triton, device, encoded_in_groups, encoded_with_bias, with_bias
from bench.measure import OURS, Ceilings, Figure, build, measure, measure_ceilings
from bench.peers import compiled
from bench.shapes import CONCEPTS, CROSS, ENLARGED, JOINT, SELECTED, WHOLE, sae_shape
from sparsefeat.measure.sae_case import SAECase
from sparsefeat.measure.timing import DENSE, Provider

SHAPES = ("SAeUron", "768 wide", "FLUX")
ATTENTION_SHAPES = ("SD 1.5, 64 x 64", "SDXL, 32 x 32", "SD 1.5, 16 x 16")
ROWS = 4096
ROUNDS_S = 0.25
REPLAYS = 20
KERNELS, PLAIN = f"{OURS}, Triton", f"{OURS}, plain torch"
LARGE = f"{KERNELS}, {LARGE_TILE['BLOCK_LATENTS']} wide"


def by(figure: Figure, name: str, triton: bool) -> Provider:
    """Our provider, by Triton's kernels or by plain torch."""
    ours = next(p for p in figure.providers if p.name == OURS)
    return replace(ours, name=name, run=lambda state: by_triton(lambda: ours.run(state), triton))


def encode_providers(figure: Figure) -> list[Provider]:
    return [
        by(figure, KERNELS, triton=True),
        Provider(f"{KERNELS}, bias kept", encoded_with_bias, with_bias),
        Provider(LARGE, of_large_tile),
        by(figure, PLAIN, triton=False),
    ]


def large_tile(case: SAECase) -> Mapping[str, int]:
    """That only GPUs with the most shared memory have room for, whatever a tuning table says."""
    return LARGE_TILE if case.x.dtype != torch.float32 else default_tile(case.x, case.W_enc)


def of_large_tile(case: SAECase) -> tuple[Tensor, Tensor]:
    return topk_encode_triton(case.x, case.W_enc, case.b_enc, case.b, case.k, "relu", blocks=large_tile(case))


def threshold_of_large_tile(state: tuple[SAECase, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    case, threshold = state
    weights, most = (case.W_enc, case.b_enc, case.b, threshold), min(8 * case.k, len(case.W_enc))
    return threshold_encode_triton(case.x, *weights, most, tile=large_tile(case))


def stored_providers(figure: Figure) -> list[Provider]:
    """In float32 also what runs there while its kernels are not proven."""
    kernels, plain = op_providers(figure)
    in_groups = Provider(f"{KERNELS}, three of sixteen", encoded_in_groups)
    return [kernels, *([in_groups] if figure.dtype == "float32" else []), plain]


def op_providers(figure: Figure) -> list[Provider]:
    return [by(figure, KERNELS, triton=True), by(figure, PLAIN, triton=False)]


def threshold_providers(figure: Figure) -> list[Provider]:
    kernels, plain = op_providers(figure)
    return [kernels, replace(kernels, name=LARGE, run=threshold_of_large_tile), plain]


def gradient_providers(figure: Figure) -> list[Provider]:
    """The maps are the kernel's, whoever makes their gradient."""

    def run(state: Any, triton: bool) -> tuple[Tensor, ...]:
        query, key, grad = state.given
        maps = by_triton(lambda: kernels.attention_map(query, key))
        return by_triton(lambda: torch.autograd.grad(maps, (query, key), grad), triton)

    by_kernels, plain = op_providers(figure)
    return [replace(by_kernels, run=partial(run, triton=True)), replace(plain, run=partial(run, triton=False))]


# Every op that is timed, the most wanted first.
OPS: Mapping[str, Callable[[Figure], list[Provider]]] = {
    "topk_encode": encode_providers,
    "topk_encode_stored": stored_providers,
    "attention_map": op_providers,
    "threshold_encode": threshold_providers,
    "sparse_decode": op_providers,
    "training_step": op_providers,
    "weight_gradient": op_providers,
    "sparse_edit": op_providers,
    "feature_stats": op_providers,
    "attention_tap": op_providers,
    "attention_rows": op_providers,
    "attention_column_sums": op_providers,
    "concept_attention": op_providers,
    "concept_map": op_providers,
    "attention_map_gradient": gradient_providers,
    "resize_add": op_providers,
}
# Whose only other is dense PyTorch.
BESIDE_DENSE = (
    "attention_map", "threshold_encode", "attention_rows", "attention_column_sums", "concept_attention", "concept_map",
    "attention_map_gradient", "resize_add",
)  # fmt: skip
FIGURES = {"topk_encode_stored": "topk_encode"}  # kernels of an op that are proven by a name of their own
MAPS: Mapping[str, Mapping[str, Mapping[str, int]]] = {
    "attention_map": {name: CROSS[name] for name in ATTENTION_SHAPES},
    "attention_tap": {"FLUX": {**JOINT["FLUX"], "selected": SELECTED}},
    "attention_rows": {"FLUX": WHOLE["FLUX"], "SD 1.5, 64 x 64": CROSS["SD 1.5, 64 x 64"]},
    "attention_column_sums": {"FLUX": WHOLE["FLUX"]},
    "concept_attention": {"FLUX": CONCEPTS["FLUX"]},
    "concept_map": {"FLUX": CONCEPTS["FLUX"]},
    "attention_map_gradient": {
        "SD 1.5, 16 x 16": CROSS["SD 1.5, 16 x 16"],
        "SD 1.5, 64 x 64": CROSS["SD 1.5, 64 x 64"],
    },
    "resize_add": ENLARGED,
}
TINY_MAPS = {"attention_tap": {**TINY_ATTENTION, "selected": 3}, "resize_add": {"maps": 3, "t": 2, "side": 5, "to": 9}}
AT_ONE_SHAPE = ("weight_gradient", "sparse_edit", "feature_stats")


def graph_ms(figure: Figure, provider: Provider) -> float:
    """Milliseconds of a replay of one captured call. Raises where it cannot be captured."""
    state = provider.prepare(figure.inputs(0))
    graph, times = captured(lambda: provider.run(state)), []
    for _ in range(REPLAYS):
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        graph.replay()
        last.record()
        last.synchronize()
        times.append(first.elapsed_time(last))
    return statistics.median(times)


def all_captured(figure: Figure, records: Sequence[dict[str, Any]]) -> bool:
    """Adds the kernels' `graph_ms`, up to the first of which a capture fails: that says why."""
    for record, provider in zip(records, figure.providers, strict=True):
        if record["checked"] and provider.name.startswith(KERNELS):
            try:
                record["graph_ms"] = graph_ms(figure, provider)
            except Exception as error:
                record["graph_ms"] = f"{type(error).__name__}: {error}"[:200]
                return False
    return True


def timed(op: str, shape: Mapping[str, int], dtype: str) -> dict[str, Any]:
    """Records of every program; `fault` names ours that are not right, `spoilt`: a capture failed."""
    figure = build(FIGURES.get(op, op), shape, dtype, device())
    others = [p for p in figure.providers if not p.name.startswith(OURS) and p.name not in (compiled.NAME, DENSE)]
    if op in BESIDE_DENSE:
        others = [p for p in figure.providers if not p.name.startswith(OURS)]
    figure = replace(figure, providers=(*OPS[op](figure), *others))
    cuda = device() == "cuda"
    ceilings: Ceilings = measure_ceilings("cuda") if cuda else measure_ceilings("cpu", 64, 1 << 20)
    records = measure(figure, ceilings, ROUNDS_S if cuda else 0.0, min_rounds=3 if cuda else 1, peaks=cuda)
    spoilt = cuda and not figure.gradients and not all_captured(figure, records)
    wrong = [f"{r['provider']}: {r['fault']}" for r in records if not r["checked"] and r["provider"].startswith(OURS)]
    return {"fault": "; ".join(wrong), "records": records, "spoilt": spoilt}


def wanted(op: str, rehearse: bool) -> Mapping[str, tuple[Mapping[str, int], str]]:
    """Shape and dtype of every step."""
    if rehearse:
        shape = SMALLEST if op in SLOW else TINY_MAPS.get(op, TINY_ATTENTION if op in MAPS else TINY)
        return {"tiny, float32": (shape, "float32")}
    if op in MAPS:
        dtype = "float32" if op == "resize_add" else "bfloat16"
        return {f"{name}, {dtype}": (shape, dtype) for name, shape in MAPS[op].items()}
    if op == "topk_encode_stored":
        wanted_of = {"sdxl-unbox, k 160": "bfloat16", "TIDE": "bfloat16", "SAeUron": "float32"}
        return {f"{name}, {dtype}": (sae_shape(name, ROWS), dtype) for name, dtype in wanted_of.items()}
    found: dict[str, tuple[Mapping[str, int], str]] = {
        f"{name}, bfloat16": (sae_shape(name, ROWS), "bfloat16")
        for name in (SHAPES[:1] if op in AT_ONE_SHAPE else SHAPES)
    }
    if op == "topk_encode":
        found["SAeUron, 256 rows, bfloat16"] = (sae_shape("SAeUron", 256), "bfloat16")
    return found


def times(op: str, rehearse: bool = False) -> list[Step]:
    def step(name: str, shape: Mapping[str, int], dtype: str) -> Step:
        return Step(name, lambda: timed(op, shape, dtype))

    kernels.release_gradient_memory()
    return [step(name, *what) for name, what in wanted(op, rehearse).items()]
