"""The ops as figures: inputs, references, what counts as right, what it costs, ours and plain dense PyTorch.

`build(op, shape, dtype, device)` makes a `Figure` for `measure`. The repository's bench/ adds other libraries to the
same figures; `sparsefeat bench` measures these on the machine it runs on (`measure_here`).

Formulas of cost. FLOPs: a multiply-add is two. Bytes: inputs read once and outputs written once, but the rows of a
dictionary that a code gathers count as often as they are gathered (rows k d); where the dictionary fits a cache, a
share of the ceiling above 1 is possible, and so it is where fewer bits do the work (a bf16 product that finds the
candidates of an fp32 one).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import sparsefeat_kernels as kernels

from sparsefeat.measure import speed_table
from sparsefeat.measure.answers import itemsize
from sparsefeat.measure.ops import attention, decode, encode, feature_stats, maps, pursuit, training
from sparsefeat.measure.ops.op import Op
from sparsefeat.measure.timing import Ceilings, Figure, measure

FOUND: Mapping[str, Op] = (
    encode.OPS | decode.OPS | training.OPS | feature_stats.OPS | pursuit.OPS | attention.OPS | maps.OPS
)
OPS = {name: FOUND[name] for name in speed_table.OPS}  # in the order of the tables


def available() -> tuple[str, ...]:
    return tuple(OPS)


def build(op: str, shape: Mapping[str, int], dtype: str = "float32", device: str = "cpu") -> Figure:
    """The figure of an op: `shape` has rows, d_model, n_latents, k; of attention batch, heads, n, t, d, and for
    "attention_tap" selected; for "resize_add" maps, t, side, to."""
    if op not in available():
        raise ValueError(f"op {op!r} is not measured; choose one of {', '.join(available())}")
    what, size = OPS[op], itemsize(dtype)
    flops, moved = what.cost(shape, size)
    providers = what.providers()
    if dtype != "float32" or (device == "cpu" and not kernels.bf16_products()):  # then it is the plain path again
        providers = [p for p in providers if p.name not in (encode.PREPARED, encode.BF16_PRODUCT.name)]
    input_bytes = size * shape["n_latents"] * shape["d_model"] if "n_latents" in shape else moved
    return Figure(
        op=op, shape=shape, dtype=dtype, device=device, providers=tuple(providers),
        inputs=lambda seed: what.inputs(shape, dtype, device, seed), check=what.fault, flops=flops, bytes=moved, input_bytes=int(input_bytes), gradients=what.gradients,
        recipe=(__name__, "build", {"op": op, "shape": dict(shape), "dtype": dtype, "device": device}),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------- `sparsefeat bench`

SAEURON = {"rows": 1024, "d_model": 1280, "n_latents": 20480, "k": 32}

HERE: dict[str, Mapping[str, int]] = {
    "topk_encode": SAEURON,
    "sparse_decode": SAEURON,
    "forward": SAEURON,
    "training_step": {**SAEURON, "rows": 256},
    "sparse_edit": SAEURON,
    "feature_stats": SAEURON,
    "weight_gradient": SAEURON,
    "threshold_encode": SAEURON,
    "matching_pursuit": {"rows": 256, "d_model": 768, "n_latents": 16384, "k": 16},
    "attention_map": {"batch": 2, "heads": 8, "n": 1024, "t": 77, "d": 80},  # SD 1.5 at 32 x 32
    "attention_tap": {"batch": 1, "heads": 24, "n": 1024, "t": 333, "d": 64, "selected": 8},  # SD 3.5 at 512 x 512
    "attention_rows": {"batch": 2, "heads": 8, "n": 1024, "t": 1024, "d": 80},  # SD 1.5 at 32 x 32, its self-attention
    "attention_column_sums": {"batch": 2, "heads": 8, "n": 1024, "t": 1024, "d": 80},
    "concept_attention": {"batch": 1, "heads": 24, "n": 1024, "t": 8, "d": 128},  # FLUX.1 at 512 x 512, 8 concepts
    "concept_map": {"batch": 1, "heads": 24, "n": 1024, "t": 8, "d": 128},
    "attention_map_gradient": {"batch": 1, "heads": 8, "n": 256, "t": 77, "d": 160},  # of Attend-and-Excite in SD 1.5
    "resize_add": {"maps": 64, "t": 8, "side": 32, "to": 64},  # SD 1.5: the layers and heads of one level, 8 words
}


def measure_here(
    ceilings: Ceilings, device: str, seconds: float = 1.0, only: str | None = None
) -> Iterator[list[dict[str, Any]]]:
    """Each op against dense PyTorch on this machine: the records of one op at a time."""
    if only is not None and only not in available():
        raise ValueError(f"--only {only!r} is no op; choose one of {', '.join(available())}")
    dtype = "float32" if device == "cpu" else "bfloat16"
    for op in available():
        if only in (None, op) and not (op == "matching_pursuit" and dtype != "float32"):
            yield measure(build(op, HERE[op], dtype, device), ceilings, seconds)
