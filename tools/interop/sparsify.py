"""Fixtures of the sparsify format, written and computed by eai-sparsify; and of its dialects that no package reads.

    .venv-peers/bin/python -m tools.interop.sparsify [FOLDER]

`signed` (EleutherAI's sae, before it was called sparsify) and SAeUron's files are not what today's package reads: those
cases are written in the same form and computed here from the formulas.

sae-lens has a loader of these folders too, which turns the decoder round and takes num_latents 0 at its word. What it
makes of the case "square", where no shape gives that away, is kept in `sae_lens.safetensors`.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from sparsify import SparseCoder, SparseCoderConfig
from torch import Tensor

from tools.interop import fixture

NAME, PACKAGE = "sparsify", "eai-sparsify"

# num_latents 0 stands for d_in * expansion_factor.
CASES: dict[str, tuple[int, dict[str, Any]]] = {
    "topk": (12, {"expansion_factor": 2, "num_latents": 0, "k": 4}),
    "square": (14, {"expansion_factor": 32, "num_latents": 14, "k": 3}),
    "groupmax": (10, {"num_latents": 24, "k": 6, "activation": "groupmax"}),
    "transcode": (12, {"num_latents": 12, "k": 3, "transcode": True}),
    "skip_transcode": (12, {"num_latents": 20, "k": 5, "transcode": True, "skip_connection": True}),
    "skip": (12, {"num_latents": 20, "k": 5, "skip_connection": True}),
    "readme": (32, {"num_latents": 64, "k": 4}),
}

# Keys of cfg.json in which these differ from the package's.
DIALECTS: dict[str, dict[str, Any]] = {
    "v0_signed": {"expansion_factor": 2, "normalize_decoder": True, "num_latents": 0, "k": 5, "signed": True},
    "saeuron": {
        "expansion_factor": 16,
        "normalize_decoder": True,
        "num_latents": 12,
        "k": 4,
        "batch_topk": True,
        "sample_topk": False,
        "input_unit_norm": False,
        "multi_topk": False,
    },
    "saeuron_unit_norm": {
        "expansion_factor": 2,
        "normalize_decoder": True,
        "num_latents": 0,
        "k": 4,
        "batch_topk": False,
        "sample_topk": False,
        "input_unit_norm": True,
        "multi_topk": False,
    },
}


def open_with_peer(folder: Path, x: Tensor) -> tuple[Tensor, Tensor]:
    """Dense code and reconstruction of `x`, by the package, of what lies in `folder`."""
    return computed(SparseCoder.load_from_disk(folder), x)


def computed(sae: SparseCoder, x: Tensor) -> tuple[Tensor, Tensor]:
    with torch.no_grad():
        top = sae.encode(x)
        code = torch.zeros(len(x), sae.num_latents).scatter(1, top.top_indices, top.top_acts)
        return code, sae(x).sae_out


def make(folder: Path) -> None:
    for seed, (case, (width, settings)) in enumerate(CASES.items()):
        sae = SparseCoder(width, SparseCoderConfig(**settings))
        fixture.fill(sae, seed)
        place = fixture.new_case(folder / case)
        sae.save_to_disk(place)
        x = fixture.rows(width, 100 + seed)
        fixture.write_expected(place, x, *computed(sae, x), NAME, PACKAGE)
    read_by_sae_lens(folder / "square")
    for seed, (case, settings) in enumerate(DIALECTS.items(), start=50):
        make_dialect(fixture.new_case(folder / case), settings, seed)


def read_by_sae_lens(place: Path) -> None:
    from sae_lens import SAE
    from sae_lens.loading.pretrained_sae_loaders import sparsify_disk_loader

    with tempfile.TemporaryDirectory() as run:  # its loader looks for the layer in the folder's name
        shutil.copytree(place, Path(run) / "layers.3")
        sae = SAE.load_from_disk(Path(run) / "layers.3", converter=sparsify_disk_loader, dtype="float32")
    x = load_file(place / "expected.safetensors")["x"]
    with torch.no_grad():
        outputs = {"code": sae.encode(x), "reconstruction": sae(x)}
    save_file(outputs, place / "sae_lens.safetensors", metadata={"version": version("sae-lens")})


def make_dialect(place: Path, settings: dict[str, Any], seed: int, width: int = 12) -> None:
    random = torch.Generator().manual_seed(seed)
    n_latents = settings["num_latents"] or width * settings["expansion_factor"]
    tensors = {
        "encoder.weight": 0.5 * torch.randn(n_latents, width, generator=random),
        "encoder.bias": 0.5 * torch.randn(n_latents, generator=random),
        "W_dec": 0.5 * torch.randn(n_latents, width, generator=random),
        "b_dec": 0.5 * torch.randn(width, generator=random),
    }
    save_file(tensors, place / "sae.safetensors")
    (place / "cfg.json").write_text(json.dumps({**settings, "d_in": width}))

    x = fixture.rows(width, 100 + seed)
    mean, spread, inside = torch.zeros(1), torch.ones(1), x
    if settings.get("input_unit_norm"):
        mean, spread = x.mean(1, keepdim=True), x.std(1, keepdim=True)
        inside = (x - mean) / (spread + 1e-5)
    pre = (inside - tensors["b_dec"]) @ tensors["encoder.weight"].T + tensors["encoder.bias"]
    if settings.get("signed"):
        chosen = pre.abs().topk(settings["k"]).indices
    else:
        pre = pre.relu()
        chosen = pre.topk(settings["k"]).indices
    code = torch.zeros_like(pre).scatter(1, chosen, pre.gather(1, chosen))
    reconstruction = (code @ tensors["W_dec"] + tensors["b_dec"]) * spread + mean
    fixture.write_expected(place, x, code, reconstruction, NAME, None)


if __name__ == "__main__":
    fixture.main(NAME, make)
