"""feature_stats_: sum, count and maximum of every latent, in GROUPS groups of rows."""

from __future__ import annotations

import sparsefeat_kernels as kernels
import torch
from torch import Tensor

from sparsefeat.measure.answers import output_fault
from sparsefeat.measure.ops.op import Op, Shape, sae_inputs
from sparsefeat.measure.sae_case import SAECase
from sparsefeat.measure.timing import DENSE, OURS, Provider

GROUPS = 8


def _tables(case: SAECase) -> tuple[SAECase, Tensor, list[Tensor]]:
    device, size = case.x.device, (GROUPS, len(case.W_enc))
    group = torch.arange(len(case.x), device=device) % GROUPS
    zeros = torch.zeros(size, device=device)
    return case, group, [zeros, torch.zeros(size, dtype=torch.int32, device=device), zeros.clone()]


def _our_statistics(state: tuple[SAECase, Tensor, list[Tensor]]) -> list[Tensor]:
    case, group, (total, count, maximum) = state
    kernels.feature_stats_(total, count, maximum, case.values, case.indices, group)
    return [total, count, maximum]


def _dense_statistics(state: tuple[SAECase, Tensor, list[Tensor]]) -> list[Tensor]:
    case, group, (total, count, maximum) = state
    z = case.dense_code
    total.index_add_(0, group, z)
    count.index_add_(0, group, (z != 0).int())
    maximum.index_reduce_(0, group, z, "amax")
    return [total, count, maximum]


def _scattered_statistics(state: tuple[SAECase, Tensor, list[Tensor]]) -> list[Tensor]:
    case, group, (total, count, maximum) = state
    keys = (group[:, None] * total.shape[1] + case.indices).view(-1)
    values = case.values.reshape(-1)
    total.view(-1).scatter_add_(0, keys, values)
    count.view(-1).scatter_add_(0, keys, (values != 0).int())
    maximum.view(-1).scatter_reduce_(0, keys, values, "amax")
    return [total, count, maximum]


def statistics_fault(case: SAECase, answer: list[Tensor]) -> str:
    wanted = [t.cpu() for t in _scattered_statistics(_tables(case))]
    total, count, maximum = (t.cpu() for t in answer)
    if not torch.equal(count, wanted[1]) or not torch.equal(maximum, wanted[2]):
        return "counts or maxima are not right"
    return output_fault(total, wanted[0], "float32")


def _statistics_providers() -> list[Provider]:
    return [
        Provider(OURS, _our_statistics, _tables, lambda state, tables: [t.clone() for t in tables]),
        Provider(DENSE, _dense_statistics, _tables, lambda state, tables: [t.clone() for t in tables],
                 note="from a dense code that is given"),
        Provider("scatter_add_ + scatter_reduce_", _scattered_statistics, _tables,
                 lambda state, tables: [t.clone() for t in tables]),
    ]  # fmt: skip


def _statistics_cost(s: Shape, size: int) -> tuple[float, float]:
    return 2.0 * s["rows"] * s["k"], 8.0 * s["rows"] * s["k"] + 24.0 * min(s["rows"] * s["k"], GROUPS * s["n_latents"])


def _padded_inputs(shape: Shape, dtype: str, device: str, seed: int) -> SAECase:
    """Every eighth row has half as many active latents: what is 0 is not counted."""
    case = sae_inputs(shape, dtype, device, seed)
    case.values[::8, case.k // 2 :] = 0
    return case


OPS = {"feature_stats": Op(_statistics_providers, statistics_fault, _statistics_cost, _padded_inputs)}
