"""Fixtures of fae's FLUX SAEs: a PyTree as its trainer's CheckpointManager writes it, and the formulas' outputs.

    .venv-orbax/bin/python -m tools.interop.fae [FOLDER]

The package cannot be installed; orbax, which writes its files, can. The two files of a case are what
`python -m sparsefeat.sae.formats.convert_fae tree .` makes of a checkpoint; one checkpoint, the folder `tree`, is kept.
"""

from __future__ import annotations

import json
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import jax.numpy as jnp
import orbax.checkpoint as ocp
import torch
from torch import Tensor

from sparsefeat.sae.formats import convert_fae
from tools.interop import fixture

NAME = "fae"
# d_model, n_latents, k, clip; "clipped" has a bound that many values reach, "average_norm" is of before the PCA.
CASES = {
    "pca": (10, 24, 5, 10.0),
    "square": (12, 12, 9, None),
    "clipped": (10, 24, 5, 0.8),
    "average_norm": (10, 24, 4, 1.5),
}


def make(folder: Path) -> None:
    for seed, (case, (d, n, k, clip)) in enumerate(CASES.items()):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, by: torch.Generator = generator) -> Tensor:
            return 0.3 * torch.randn(*shape, generator=by)

        sae = {
            "b_pre": normal(d),
            "W_enc": normal(d, n),
            "b_mid": normal(n),
            "W_dec": normal(n, d),
            "b_post": normal(d),
        }
        info: dict[str, Tensor] = {"n_steps": torch.tensor(30000), "avg_norm": torch.tensor(7.5)}
        info |= {"feature_density": torch.rand(n, generator=generator), "activated_in": torch.zeros(n)}
        if case != "average_norm":
            mean, std = normal(d), 0.5 + torch.rand(d, generator=generator)
            if clip is not None:
                std[0] = 1e-5  # below the floor of 1e-3
            info["whitening_matrix"] = torch.linalg.qr(normal(d, d)).Q
            info |= {"feature_means": mean, "feature_square_means": mean.square() + std.square()}
        place = fixture.new_case(folder / case)
        with TemporaryDirectory() as temporary:
            tree = (place if case == "pca" else Path(temporary)) / "tree"
            save(tree, sae, info)
            (tree / "config.json").write_text(json.dumps(config(d, n, k, clip)))
            convert_fae.convert(tree, place)
        x = 2 * fixture.rows(d, 100 + seed)
        made = {"tree_by": f"orbax-checkpoint {version('orbax-checkpoint')}"}
        fixture.write_expected(place, x, *computed(sae, info, x, k, clip), NAME, None, **made)


def save(folder: Path, sae: dict[str, Tensor], info: dict[str, Tensor]) -> None:
    arrays = [{name: jnp.asarray(tensor.numpy()) for name, tensor in part.items()} for part in (sae, info)]
    manager = ocp.CheckpointManager(folder.resolve(), ocp.Checkpointer(ocp.PyTreeCheckpointHandler()))
    manager.save(30000, {"sae_params": arrays[0], "info": arrays[1], "ema": {"W_dec": arrays[0]["W_dec"] * 0}})
    manager.wait_until_finished()
    manager.close()
    for note in folder.rglob("commit_success.txt"):  # they name the folder they were written in
        note.unlink()


def config(d: int, n: int, k: int, clip: float | None) -> dict[str, object]:
    return {"d_model": d, "n_features": n, "k": k, "clip_data": clip, "site": ["double", 18], "seq_mode": "img"}


def computed(
    sae: dict[str, Tensor], info: dict[str, Tensor], x: Tensor, k: int, clip: float | None
) -> tuple[Tensor, Tensor]:
    """The formulas, in float64; the top k exact, where theirs is approximate on a TPU."""
    s, i = ({name: tensor.double() for name, tensor in part.items()} for part in (sae, info))
    x = x.double()
    d = x.shape[1]
    if "whitening_matrix" in i:
        mean = i["feature_means"]
        std = (i["feature_square_means"] - mean**2).clamp(min=0).sqrt().clamp(min=1e-3)
        u = (x @ i["whitening_matrix"] - mean) / std
    else:
        u = x / i["avg_norm"] * d**0.5
    if clip is not None:
        u = u.clamp(-clip, clip)
    pre = (u - s["b_post"] + s["b_pre"]) @ s["W_enc"]
    kept = pre.topk(k)
    code = torch.zeros_like(pre).scatter(1, kept.indices, kept.values)
    out = code @ s["W_dec"] + s["b_post"]
    if "whitening_matrix" in i:
        return code, (out * std + mean) @ i["whitening_matrix"].T
    return code, out / d**0.5 * i["avg_norm"]


if __name__ == "__main__":
    fixture.main(NAME, make)
