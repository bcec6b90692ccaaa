"""Turn a PyTree that fae's trainer saved with orbax into files that `load_sae` reads; see `sparsefeat.sae.formats.fae`.

    pip install tensorstore
    python -m sparsefeat.sae.formats.convert_fae FOLDER OUT

FOLDER holds one checkpoint (`_METADATA`, or one folder a tensor) or numbered ones, of which the last is taken, and may
hold the training's `config.json`; without it pass `load_sae(OUT, k=...)`. Only the tensors that an SAE needs are read.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsefeat.sae.files import read_json
from sparsefeat.sae.formats.fae import CONFIG, WEIGHTS

SAE_TENSORS = ("W_enc", "W_dec", "b_pre", "b_post")
NORMALIZER = ("whitening_matrix", "feature_means", "feature_square_means", "avg_norm")
DRIVERS = ("zarr", "zarr3")
# Weights are noise: zstd, which orbax uses, takes a tenth off them. Statistics of dead latents are zeros, but small.
MOST_COMPRESSED, SMALL = 2, 2**24


def convert(folder: Path, out: Path) -> None:
    """Write `fae.safetensors` and `fae.json` into `out`, a folder that is made if need be."""
    checkpoint = _checkpoint(folder)
    found = {name: _read(checkpoint, f"sae_params.{name}") for name in SAE_TENSORS}
    missing = sorted(name for name, tensor in found.items() if tensor is None)
    if missing:
        raise ValueError(f"{checkpoint} lacks {missing} under sae_params: it was not written by fae's trainer")
    found |= {name: _read(checkpoint, f"info.{name}") for name in NORMALIZER}
    state = {name: tensor for name, tensor in found.items() if tensor is not None}
    configs = [path for path in (checkpoint / "config.json", folder / "config.json") if path.is_file()]
    described = read_json(configs[0]) if configs else {}
    out.mkdir(parents=True, exist_ok=True)
    save_file(state, out / WEIGHTS)
    (out / CONFIG).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")


def _checkpoint(folder: Path) -> Path:
    """The folder that holds the tensors: this one, or that of the last step below it."""
    if _has_tensors(folder):
        return folder
    steps = [path for path in folder.glob("*") if path.is_dir()] if folder.is_dir() else []
    steps.sort(key=lambda path: int(path.name) if path.name.isdecimal() else -1)
    for step in reversed(steps):
        for place in (step, step / "default"):
            if _has_tensors(place):
                return place
    raise FileNotFoundError(f"{folder} holds no orbax checkpoint: pass the folder that training saved into")


def _has_tensors(place: Path) -> bool:
    return (place / "manifest.ocdbt").is_file() or (place / "sae_params.W_dec").is_dir()


def _read(checkpoint: Path, name: str) -> Tensor | None:
    """One tensor, in float32; None if it is not there."""
    try:
        import tensorstore
    except ImportError:
        raise ImportError(
            "tensorstore is not installed: pip install tensorstore, which reads orbax checkpoints"
        ) from None
    base = f"file://{checkpoint.resolve()}/"
    store: Any = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
    if not (checkpoint / "manifest.ocdbt").is_file():
        store = f"{base}{name}/"
    for driver in DRIVERS:
        try:
            stored = tensorstore.open({"driver": driver, "kvstore": store}, read=True).result()
        except ValueError:  # NOT_FOUND, or the other version of zarr
            continue
        _check_declared(checkpoint, name, math.prod(stored.shape) * stored.dtype.numpy_dtype.itemsize)
        array = stored.read().result()
        return torch.from_numpy(array.astype("float32"))
    return None


def _check_declared(checkpoint: Path, name: str, declared: int) -> None:
    """Against the bytes of the whole checkpoint: chunks that are not there read as zeros, as many as are declared."""
    held = sum(path.stat().st_size for path in checkpoint.rglob("*") if path.is_file())
    if declared > SMALL and declared > MOST_COMPRESSED * held:
        raise ValueError(
            f"{name} in {checkpoint} declares {declared} bytes and the whole checkpoint has {held}: chunks are missing, copy "
            "it again"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    try:
        convert(arguments.folder, arguments.out)
    except (ValueError, OSError, ImportError) as error:
        raise SystemExit(f"error: {error}") from None
    print(f"wrote {arguments.out / WEIGHTS} and {arguments.out / CONFIG}")


if __name__ == "__main__":
    main()
