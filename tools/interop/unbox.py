"""Fixtures of the sdxl-unbox family's folders, from the format's description: none of them was ever a package.

    .venv/bin/python -m tools.interop.unbox [FOLDER]

`config.json` and `state_dict.pth`, which holds `{"state_dict": {...}}`; sdxl-unbox adds `mean.pt` and `std.pt`, the mean
and deviation of what is not zero. The decoder is `[d_model, n]` and lies in memory column by column.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from tools.interop import fixture

NAME, PACKAGE = "unbox", None
COMMON = {"auxk": 256, "dead_steps_threshold": 2441}
CASES: dict[str, dict[str, Any]] = {
    "sdxl_unbox": {"n_dirs_local": 24, "d_model": 12, "k": 10, **COMMON},
    "square": {"n_dirs_local": 14, "d_model": 14, "k": 9, **COMMON},
    "steerers": {"n_dirs_local": 20, "d_model": 12, "k": 4, "auxk_coef": 0.03125, **COMMON},
    "mixed": {"n_dirs_local": 24, "d_model": 12, "k": 6, **COMMON},
    "mixed_names": {"n_dirs_local": 24, "d_model": 12, "k": 6, **COMMON},
}


def make(folder: Path) -> None:
    for seed, (case, config) in enumerate(CASES.items()):
        random = torch.Generator().manual_seed(seed)
        n, d, k = config["n_dirs_local"], config["d_model"], config["k"]
        tensors = {
            "pre_bias": 0.5 * torch.randn(d, generator=random),
            "latent_bias": 0.5 * torch.randn(n, generator=random),
            "encoder.weight": 0.5 * torch.randn(n, d, generator=random),
            "decoder.weight": 0.5 * torch.randn(n, d, generator=random).T,
        }
        place = fixture.new_case(folder / case)
        counter = {"stats_last_nonzero": torch.randint(0, 1000, (n,), generator=random)}
        if case.startswith("mixed"):  # SAEmnesia's
            (place / "cfg.json").write_text(json.dumps(config))
            names = {"latent_bias": "encoder.bias", "decoder.weight": "W_dec", "pre_bias": "b_dec"}
            held = tensors
            if case == "mixed_names":
                held = {names.get(name, name): t.T if name == "decoder.weight" else t for name, t in tensors.items()}
            save_file({name: t.contiguous() for name, t in held.items()}, place / "sae.safetensors")
        else:
            (place / "config.json").write_text(json.dumps(config))
            torch.save({"state_dict": {**tensors, **counter}}, place / "state_dict.pth")
        if case == "sdxl_unbox":
            torch.save(18 + 12 * torch.rand(n, generator=random), place / "mean.pt")
            torch.save(5 * torch.rand(n, generator=random), place / "std.pt")

        x = fixture.rows(d, 100 + seed)
        pre = (x - tensors["pre_bias"]) @ tensors["encoder.weight"].T + tensors["latent_bias"]
        top = pre.topk(k)
        code = torch.zeros_like(pre).scatter(1, top.indices, top.values.relu())
        reconstruction = code @ tensors["decoder.weight"].T + tensors["pre_bias"]
        fixture.write_expected(place, x, code, reconstruction, NAME, PACKAGE)


if __name__ == "__main__":
    fixture.main(NAME, make)
