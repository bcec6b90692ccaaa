"""SAEs as modules: configuration, encoding and decoding, loading and saving."""

from __future__ import annotations

from sparsefeat.sae.config import SAEConfig
from sparsefeat.sae.hub import push_to_hub
from sparsefeat.sae.module import SAE, load_sae, save
from sparsefeat.sae.names import Names

__all__ = ["SAE", "Names", "SAEConfig", "load_sae", "push_to_hub", "save"]
