"""Share an SAE on a hub."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from sparsefeat.sae.model_card import model_card
from sparsefeat.sae.names import NAMES

if TYPE_CHECKING:
    from sparsefeat.sae.module import SAE


def push_to_hub(
    sae: SAE,
    repo_id: str,
    *,
    private: bool | None = None,
    subfolder: str | None = None,
    metrics: Mapping[str, float] | None = None,
) -> str:
    """Upload the SAE to a hub repository, created if need be; returns the address of the commit.

    A model card goes with it (README.md, beside the SAE): hookpoint, base model, width, k, how to open it, and `metrics`,
    such as {"fvu": 0.21, "l0": 32.0}. Of names of latents the repository has this SAE's: those of an earlier one go.
    """
    from huggingface_hub import HfApi

    hub = HfApi()
    hub.create_repo(repo_id, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        written = sae.save(Path(folder) / "sae")
        (written / "README.md").write_text(model_card(sae, repo_id, subfolder, metrics or {}), encoding="utf-8")
        commit = hub.upload_folder(
            repo_id=repo_id, folder_path=written, path_in_repo=subfolder, delete_patterns=[NAMES]
        )
        return commit.commit_url
