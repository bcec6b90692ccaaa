"""The same figures through pytest-benchmark: `pytest bench --benchmark-only`. `python -m bench.run` has them all."""

from __future__ import annotations

import pytest
import torch

from bench.measure import OURS, Ceilings, available, build, into_extra_info, measure, measure_ceilings
from sparsefeat.measure.figures import HERE

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = "bfloat16" if DEVICE == "cuda" else "float32"


@pytest.fixture(scope="module")
def ceilings() -> Ceilings:
    return measure_ceilings(DEVICE)


@pytest.mark.parametrize("op", available())
def test_op(benchmark, ceilings, op):
    figure = build(op, HERE[op], "float32" if op == "matching_pursuit" else DTYPE, DEVICE)
    records = measure(figure, ceilings, seconds=2.0, peaks=False)
    into_extra_info(benchmark, records)
    ours = next(provider for provider in figure.providers if provider.name == OURS)
    assert next(r for r in records if r["provider"] == OURS)["checked"], records[0]["fault"]
    with torch.set_grad_enabled(figure.gradients):
        state = ours.prepare(figure.inputs(0))

        def call() -> None:
            ours.run(state)
            if DEVICE == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(call, rounds=3, warmup_rounds=1)
