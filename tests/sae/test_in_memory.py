"""`SAE.of`: SAEs of other programs that are in memory. The programs' stand-ins here have their names and their saving."""

from __future__ import annotations

import json
import types
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import sparsefeat as sf
from tests.sae.dense import random_sae

D, N, K = 12, 24, 4


def in_program(name: str, kind: type) -> type:
    kind.__module__ = f"{name}.dictionary"
    return kind


class AutoEncoderTopK(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.decoder = nn.Linear(D, N), nn.Linear(N, D, bias=False)
        self.b_dec = nn.Parameter(torch.randn(D))
        self.register_buffer("k", torch.tensor(K, dtype=torch.int32))
        self.register_buffer("threshold", torch.tensor(-1.0))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        active = self.encoder(x - self.b_dec).relu()
        top = active.topk(K)
        return torch.zeros_like(active).scatter(1, top.indices, top.values)


class Wrong(AutoEncoderTopK):
    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return super().encode(2 * x)


class SparseCoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.num_latents = nn.Linear(D, N), N
        self.W_dec, self.b_dec = nn.Parameter(torch.randn(N, D)), nn.Parameter(torch.randn(D))

    def encode(self, x: torch.Tensor) -> Any:
        top = self.encoder(x - self.b_dec).relu().topk(K)
        return types.SimpleNamespace(top_acts=top.values, top_indices=top.indices)

    def save_to_disk(self, folder: Any) -> None:
        save_file({name: t.detach().contiguous() for name, t in self.state_dict().items()}, folder / "sae.safetensors")
        (folder / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": N, "k": K}))


class StandardSAE(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.W_enc, self.W_dec = nn.Parameter(torch.randn(D, N)), nn.Parameter(torch.randn(N, D))
        self.b_enc, self.b_dec = nn.Parameter(torch.randn(N)), nn.Parameter(torch.randn(D))

    def encode(self, x: torch.Tensor) -> torch.Tensor:
        return ((x - self.b_dec) @ self.W_enc + self.b_enc).relu()

    def save_model(self, folder: Any) -> None:
        save_file({name: t.detach() for name, t in self.state_dict().items()}, folder / "sae_weights.safetensors")
        described = {"architecture": "standard", "d_in": D, "d_sae": N, "metadata": {"hook_name": "layers.3"}}
        (folder / "cfg.json").write_text(json.dumps(described))


@pytest.mark.parametrize(
    ("name", "kind"),
    [("dictionary_learning", AutoEncoderTopK), ("sparsify", SparseCoder), ("sae_lens", StandardSAE)],
)
def test_a_module_in_memory_becomes_an_sae_with_its_codes(name, kind):
    torch.manual_seed(0)
    module = in_program(name, kind)()
    module.train()
    sae = sf.SAE.of(module, base_model="tiny/model")
    assert module.training
    assert sae.config.base_model == "tiny/model"
    x = torch.randn(9, D)
    code = module.encode(x)
    dense = torch.zeros(9, N).scatter(1, code.top_indices, code.top_acts) if name == "sparsify" else code
    assert torch.allclose(sae.encode(x).dense(), dense, atol=1e-5)
    assert sf.SAE.of(module.double()).dtype == torch.float64


def test_a_module_whose_codes_are_others_is_refused():
    kind = in_program("dictionary_learning", type("AutoEncoderTopK", (Wrong,), {}))
    with pytest.raises(ValueError, match=r"the module's codes differ by .* from those of its saved weights"):
        sf.SAE.of(kind())


def test_anything_else_is_refused_and_an_sae_is_itself():
    with pytest.raises(TypeError, match="is no SAE of sae_lens, sparsify, dictionary_learning"):
        sf.SAE.of(nn.Linear(2, 2))
    kind = in_program("dictionary_learning", type("IdentityDict", (nn.Linear,), {}))
    with pytest.raises(TypeError, match="IdentityDict cannot be read"):
        sf.SAE.of(kind(2, 2))
    sae = random_sae("topk")
    assert sf.SAE.of(sae) is sae
