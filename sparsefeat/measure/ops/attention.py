"""Attention that also gives maps: attention_map (cross-attention) and attention_tap (joint), beside SDPA and eager."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import sparsefeat_kernels as kernels
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from sparsefeat.measure.answers import checked_rows, output_fault, torch_dtype
from sparsefeat.measure.ops.op import Op, Shape
from sparsefeat.measure.timing import DENSE, OURS, Provider


@dataclass(frozen=True)
class AttentionCase:
    """q, k, v [batch, heads, positions, width]. Cross-attention: maps over all keys, of all positions. Joint attention:
    the keys are `text` text tokens and then the image's; maps of the first `selected` of them, of the image's rows."""

    q: Tensor
    k: Tensor
    v: Tensor
    text: int
    selected: int
    joint: bool
    dtype: str

    @property
    def image_rows(self) -> slice:
        return slice(self.text if self.joint else 0, None)

    def empty_maps(self) -> Tensor:
        positions = self.q[:, :, self.image_rows].shape[2]
        return torch.zeros(len(self.q), positions, self.selected, device=self.q.device)


def attention_case(
    batch: int, heads: int, n: int, t: int, d: int, selected: int, joint: bool, dtype: str, device: str, seed: int
) -> AttentionCase:
    g = torch.Generator(device).manual_seed(seed)

    def normal(length: int) -> Tensor:
        return torch.randn(batch, heads, length, d, generator=g, device=device).to(torch_dtype(dtype))

    q = normal(n + t if joint else n)
    k, v = (normal(n + t if joint else t) for _ in range(2))
    return AttentionCase(q, k, v, t, selected, joint, dtype)


def attention_fault(case: AttentionCase, answer: tuple[Tensor, Tensor]) -> str:
    out, maps = answer
    rows = checked_rows(maps.shape[1]).to(case.q.device)
    q = case.q[:, :, case.image_rows][:, :, rows].double()
    p = (q @ case.k.double().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return output_fault(out[:, :, case.image_rows][:, :, rows], p @ case.v.double(), case.dtype) or output_fault(
        maps[:, rows], p[..., : case.selected].sum(1), case.dtype
    )


def _eager_attention(state: tuple[AttentionCase, Tensor]) -> tuple[Tensor, Tensor]:
    case, maps = state
    p = (case.q @ case.k.transpose(-1, -2) * case.q.shape[-1] ** -0.5).softmax(-1)
    maps += p[:, :, case.image_rows, : case.selected].sum(1, dtype=torch.float32)
    return p @ case.v, maps


def _our_cross_attention(state: tuple[AttentionCase, Tensor]) -> tuple[Tensor, Tensor]:
    case, maps = state
    return kernels.attention_with_map_(maps, case.q, case.k, case.v), maps


def _attention_and_lse(case: AttentionCase) -> tuple[Tensor, Tensor]:
    """The kernel of PyTorch's own that F.scaled_dot_product_attention takes, with its log-sum-exp."""
    heads = case.q, case.k, case.v
    if not case.q.is_cuda:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(*heads)[:2]
    if torch._fused_sdp_choice(*heads) == SDPBackend.CUDNN_ATTENTION.value:
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(*heads, None, True)[:2]
        return out, lse[..., 0] if lse.dim() == 4 else lse
    return torch.ops.aten._scaled_dot_product_flash_attention(*heads)[:2]


def _our_joint_attention(state: tuple[AttentionCase, Tensor]) -> tuple[Tensor, Tensor]:
    case, maps = state
    out, lse = _attention_and_lse(case)
    rows = case.image_rows
    kernels.attention_tap_(maps, case.q[:, :, rows], case.k[:, :, : case.selected], lse[:, :, rows].float())
    return out, maps


def _plain_attention_fault(case: AttentionCase, answer: Tensor) -> str:
    maps = case.empty_maps()
    rows = checked_rows(maps.shape[1]).to(case.q.device)
    q = case.q[:, :, case.image_rows][:, :, rows].double()
    p = (q @ case.k.double().transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return output_fault(answer[:, :, case.image_rows][:, :, rows], p @ case.v.double(), case.dtype)


WITHOUT_MAPS = Provider(
    "SDPA without maps",
    lambda case: F.scaled_dot_product_attention(case.q, case.k, case.v),
    check=_plain_attention_fault,
    bound=True,
    note="the attention alone: no map comes out",
)


def _attention_providers(ours: Callable[[Any], Any]) -> list[Provider]:
    def with_maps(case: AttentionCase) -> tuple[AttentionCase, Tensor]:
        return case, case.empty_maps()

    def copied(state: Any, answer: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return answer[0], answer[1].clone()

    return [
        Provider(OURS, ours, with_maps, copied),
        WITHOUT_MAPS,
        Provider(DENSE, _eager_attention, with_maps, copied, note="eager: all probabilities in memory"),
    ]


def _cross_cost(s: Shape, size: int) -> tuple[float, float]:
    b, h, n, t, d = (s[name] for name in ("batch", "heads", "n", "t", "d"))
    return 4.0 * b * h * n * t * d, size * b * h * d * (2.0 * n + 2 * t) + 8.0 * b * n * t


def _joint_cost(s: Shape, size: int) -> tuple[float, float]:
    b, h, n, t, d, selected = (s[name] for name in ("batch", "heads", "n", "t", "d", "selected"))
    length = n + t
    return (
        4.0 * b * h * length**2 * d + 2.0 * b * h * n * selected * d,
        size * 4.0 * b * h * length * d + 8.0 * b * n * selected,
    )


def _cross_inputs(shape: Shape, dtype: str, device: str, seed: int) -> AttentionCase:
    return attention_case(**shape, selected=shape["t"], joint=False, dtype=dtype, device=device, seed=seed)


def _joint_inputs(shape: Shape, dtype: str, device: str, seed: int) -> AttentionCase:
    return attention_case(**shape, joint=True, dtype=dtype, device=device, seed=seed)


@dataclass(frozen=True)
class ConceptCase:
    """query, key, value [batch, heads, concepts, width] of a few concepts, and the image's keys and values."""

    own: tuple[Tensor, Tensor, Tensor]
    image: tuple[Tensor, Tensor]
    dtype: str

    def joined(self) -> tuple[Tensor, Tensor, Tensor]:
        query, *rest = self.own
        key, value = (torch.cat(pair, dim=2) for pair in zip(rest, self.image, strict=True))
        return query, key, value


def _concept_inputs(shape: Shape, dtype: str, device: str, seed: int) -> ConceptCase:
    """`t` concepts beside `n` positions."""
    g = torch.Generator(device).manual_seed(seed)
    batch, heads, n, t, d = (shape[name] for name in ("batch", "heads", "n", "t", "d"))
    query, key, value, image_key, image_value = (
        torch.randn(batch, length, heads, d, generator=g, device=device).to(torch_dtype(dtype)).transpose(1, 2)
        for length in (t, t, t, n, n)
    )
    return ConceptCase((query, key, value), (image_key, image_value), dtype)


def _concept_fault(case: ConceptCase, answer: Tensor) -> str:
    query, key, value = (tensor.double() for tensor in case.joined())
    p = (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1)
    return output_fault(answer, p @ value, case.dtype)


def _eager_concepts(case: ConceptCase) -> Tensor:
    query, key, value = case.joined()
    return (query @ key.transpose(-1, -2) * query.shape[-1] ** -0.5).softmax(-1) @ value


def _concept_providers() -> list[Provider]:
    return [
        Provider(OURS, lambda case: kernels.concept_attention(*case.own, *case.image)),
        Provider("SDPA of keys put together", lambda case: F.scaled_dot_product_attention(*case.joined())),
        Provider(DENSE, _eager_concepts, note="eager: all probabilities in memory"),
    ]


def _concept_cost(s: Shape, size: int) -> tuple[float, float]:
    b, h, n, t, d = (s[name] for name in ("batch", "heads", "n", "t", "d"))
    return 4.0 * b * h * t * (t + n) * d, size * b * h * d * (2.0 * n + 4 * t)


OPS = {
    "concept_attention": Op(_concept_providers, _concept_fault, _concept_cost, _concept_inputs),
    "attention_map": Op(
        lambda: _attention_providers(_our_cross_attention), attention_fault, _cross_cost, _cross_inputs
    ),
    "attention_tap": Op(
        lambda: _attention_providers(_our_joint_attention), attention_fault, _joint_cost, _joint_inputs
    ),
}
