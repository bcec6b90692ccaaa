"""The card that goes with an SAE to a hub: what it is, where it belongs, how to open it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from sparsefeat.sae.module import SAE


def model_card(sae: SAE, repo_id: str, subfolder: str | None, metrics: Mapping[str, float]) -> str:
    """Markdown with a YAML head, as the hub reads it. Metrics are printed as given."""
    config = sae.config
    head = ["library_name: sparsefeat", "tags:", "- sparse-autoencoder", "- sae", "- diffusers"]
    head += ["- interpretability", "- mechanistic-interpretability"]
    if config.base_model and config.base_model.count("/") == 1:  # the hub takes nothing but its own ids here
        head.append(f"base_model: {config.base_model}")
    rows = {
        "base model": config.base_model or "not recorded",
        "hookpoint": f"`{config.hookpoint}`" if config.hookpoint else "not recorded",
        "width of an activation (d_model)": config.d_model,
        "latents": config.n_latents,
        "activation": config.activation + ("" if config.k is None else f", k = {config.k}"),
        "normalizer": config.normalizer,
        "dtype": str(sae.dtype).removeprefix("torch."),
        **metrics,
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    where = f', subfolder="{subfolder}"' if subfolder else ""
    at = "" if config.hookpoint else ', at="PATH_OF_THE_BLOCK"'
    return f"""---
{chr(10).join(head)}
---

# Sparse autoencoder{f" of {config.base_model}" if config.base_model else ""}

| | |
|---|---|
{table}

```python
import sparsefeat as sf

sae = sf.load_sae("{repo_id}"{where})
rec = sf.Record(sae{at})
with sf.attach(pipe, rec) as run:
    pipe("a fox")
run[rec].top(10)
```
"""
