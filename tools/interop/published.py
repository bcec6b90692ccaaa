"""Published SAEs of language models as SAELens opens them: the package's loader of a layout, on files of the same layout.

The package downloads what it reads; here its downloads are answered from a folder. Sizes that it takes from the names of
repositories are given as overrides: the fixtures' are small.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sae_lens import SAE
from sae_lens.loading import pretrained_sae_loaders as loaders
from sae_lens.saes.sae import handle_config_defaulting
from safetensors import safe_open
from torch import Tensor

from tools.interop import fixture

PACKAGE = "sae-lens"
SHAPE = {"d_in": 12, "d_sae": 20}


def made(seed: int, shapes: dict[str, tuple[int, ...]], scale: float = 0.5) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: scale * torch.randn(shape, generator=generator) for name, shape in shapes.items()}


def opened(
    root: Path, loader: Callable[..., Any], repository: str, folder: str, scale: float | None = None, **overrides: Any
) -> Any:
    """The package's SAE of `folder` of a repository that lies in `root / repository`; scale: folded as it does."""

    def fetched(repo_id: str, filename: str, subfolder: str | None = None, **_: Any) -> str:
        path = root / repo_id / (subfolder or "") / filename
        if not path.exists():
            raise loaders.EntryNotFoundError(f"no {filename}")
        return str(path)

    def shapes(repo_id: str, filename: str) -> dict[str, list[int]]:
        with safe_open(root / repo_id / filename, framework="pt") as file:
            return {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118

    with (
        mock.patch.object(loaders, "hf_hub_download", fetched),
        mock.patch.object(loaders, "get_safetensors_tensor_shapes", shapes),
    ):
        config, state, _ = loader(repository, folder, "cpu", False, {"dtype": "float32", **overrides})
    config = handle_config_defaulting(config)
    kind = SAE.get_sae_config_class_for_architecture(config["architecture"]).from_dict(config)
    sae = SAE.get_sae_class_for_architecture(kind.architecture())(kind)
    sae.process_state_dict_for_loading(state)
    sae.load_state_dict(state)
    sae.turn_off_forward_pass_hook_z_reshaping()  # rows come flat, not a head at a time
    if scale is not None:
        sae.fold_activation_norm_scaling_factor(scale)
    return sae


def write(case: Path, sae: Any, file: str, script: str, seed: int, **more: object) -> None:
    """What the package computes, beside the files. file: what `load_sae` is given, below the case's folder."""
    x = fixture.rows(SHAPE["d_in"], 100 + seed)
    with torch.no_grad():
        fixture.write_expected(case, x, sae.encode(x), sae(x), script, PACKAGE, file=file, **more)


def put(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values))
