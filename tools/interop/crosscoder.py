"""Fixtures of crosscoder_learning: no package of it can be installed, so files and outputs follow its description.

.venv-peers/bin/python -m tools.interop.crosscoder [FOLDER]
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from tools.interop import fixture

NAME = "crosscoder"
LAYERS, D_MODEL, N_LATENTS, K, THRESHOLD = 2, 6, 20, 4, 1.5
IDS = {"crosscoder": 1, "sae": 2, "mixed": 3, "none": 4}
NONE = torch.full((LAYERS, D_MODEL), torch.nan)


def weights(seed: int, n_latents: int = N_LATENTS) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {
        "encoder.weight": (LAYERS, D_MODEL, n_latents),
        "encoder.bias": (n_latents,),
        "decoder.weight": (LAYERS, n_latents, D_MODEL),
        "decoder.bias": (LAYERS, D_MODEL),
    }
    return {name: 0.5 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def spread(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(LAYERS, D_MODEL, generator=generator), 0.5 + torch.rand(LAYERS, D_MODEL, generator=generator)


def make(folder: Path) -> None:
    absent = {"activation_mean": NONE, "activation_std": NONE, "activation_global_scale": torch.ones(LAYERS)}
    for seed, normalization in enumerate(IDS):
        batch_top_k = {
            "k": torch.tensor(K, dtype=torch.int32),
            "threshold": torch.tensor(THRESHOLD),
            "code_normalization_id": torch.tensor(IDS[normalization]),
            "target_rms": torch.tensor(1.0),
        }
        case(folder / normalization, weights(seed) | batch_top_k | absent, seed, normalization)
    mean, std = spread(20)
    relative = {
        "activation_mean": mean,
        "activation_std": std,
        "activation_global_scale": 3.0 / (std.square().sum(-1) + 1e-8).sqrt(),
    }
    case(folder / "normalized", weights(10) | batch_top_k | relative, 10, "none")
    neurons = {"activation_mean": mean, "activation_std": std, "activation_global_scale": torch.ones(LAYERS)}
    case(folder / "normalized_by_neuron", weights(11) | batch_top_k | neurons, 11, "none")
    case(folder / "relu", weights(12) | {"code_normalization_id": torch.tensor(1)} | absent, 12, "crosscoder")
    square = weights(13, LAYERS * D_MODEL) | batch_top_k | {"code_normalization_id": torch.tensor(1)}
    case(folder / "square_state_dict", square, 13, "crosscoder", one_file=True)


def case(place: Path, state: dict[str, Tensor], seed: int, normalization: str, one_file: bool = False) -> None:
    place = fixture.new_case(place)
    config = {"activation_dim": D_MODEL, "dict_size": state["encoder.bias"].numel(), "num_layers": LAYERS}
    config["code_normalization"] = normalization.upper()
    more = {}
    if one_file:
        torch.save({f"_orig_mod.{name}": tensor for name, tensor in state.items()}, place / "ae_final.pt")
        more["file"] = "ae_final.pt"
    else:
        save_file({name: tensor.clone() for name, tensor in state.items()}, place / "model.safetensors")
        (place / "config.json").write_text(json.dumps(config, indent=2))
    x = fixture.rows(LAYERS * D_MODEL, 100 + seed)
    fixture.write_expected(place, x, *computed(state, x, normalization), NAME, None, **more)


def computed(state: dict[str, Tensor], x: Tensor, normalization: str) -> tuple[Tensor, Tensor]:
    """The formulas, layer by layer, in float64."""
    t = {name: tensor.double() for name, tensor in state.items()}
    stacked = x.double().view(len(x), LAYERS, D_MODEL)
    mean, std = t.get("activation_mean", NONE.double()), t.get("activation_std")
    normalized = not mean.isnan().any()
    by_neuron = normalized and bool((t["activation_global_scale"] == 1).all())
    if normalized:
        stacked = stacked - mean
        stacked = stacked / (std + 1e-8) if by_neuron else stacked * t["activation_global_scale"][:, None]
    pre = t["encoder.bias"] + sum(stacked[:, layer] @ t["encoder.weight"][layer] for layer in range(LAYERS))
    f = pre.clamp(min=0)
    if "threshold" in t:
        norms = t["decoder.weight"].square().sum(2)
        by_layer, whole = norms.sqrt().sum(0), norms.sum(0).sqrt()
        nu = {"crosscoder": by_layer, "sae": whole, "mixed": whole + 0.1 * by_layer, "none": torch.ones(len(whole))}
        f = f * (f * nu[normalization] > t["threshold"])
    out = torch.stack([f @ t["decoder.weight"][layer] + t["decoder.bias"][layer] for layer in range(LAYERS)], 1)
    if normalized:
        out = out * (std + 1e-8) if by_neuron else out / (t["activation_global_scale"][:, None] + 1e-8)
        out = out + mean
    return f, out.flatten(1)


if __name__ == "__main__":
    fixture.main(NAME, make)
