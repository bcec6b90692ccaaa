"""What the path of a file says of where it belongs, and the names of places in a language model.

Hookpoints are transformers' names within a causal language model, `model.layers.N`; in a pipeline they are looked for in
its text encoders, whatever these put before them.
"""

from __future__ import annotations

import re
from pathlib import Path

# TransformerLens's names of a place in block N, and where that is in transformers' models of the Llama kind.
PLACES = {
    "hook_resid_pre": "model.layers.{}:input",
    "hook_resid_post": "model.layers.{}",
    "hook_mlp_out": "model.layers.{}.mlp",
    "hook_attn_out": "model.layers.{}.self_attn",
    "attn.hook_z": "model.layers.{}.self_attn.o_proj:input",
    "mlp.hook_in": "model.layers.{}.mlp:input",
}


def said_by(place: Path) -> str:
    """The path with hub repositories as they are called, `owner/name`, and not as the hub's cache calls them."""
    return re.sub(r"models--([^/]+?)--([^/]+)", r"\1/\2", place.absolute().as_posix())


def place_called(name: object) -> str | None:
    """The hookpoint of `blocks.N.PLACE`; None for what is no module's input or output."""
    found = re.fullmatch(r"blocks\.(\d+)\.(.+)", name) if isinstance(name, str) else None
    return PLACES[found[2]].format(found[1]) if found and found[2] in PLACES else None
