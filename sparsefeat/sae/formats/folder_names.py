"""What the name of a folder says: whether it is the path of a module, as training runs call their folders."""

from __future__ import annotations

import itertools
import re

# A number in a module's path stands after a list of modules, and nothing else.
LISTS = re.compile(r"(\w*_)?(blocks?|layers?|attentions|resnets|refiner|downsamplers|upsamplers|modules|experts|h)")
# What the first word of a path without a number is in pipelines and models.
ROOTS = re.compile(
    r"(unet|transformer|vae|text_encoder|text_model|image_encoder|controlnet|prior|model|encoder|decoder)(_\d+)?"
)
PARTS = re.compile(r"\w*(block|embed|norm|proj|conv|model|layer|encoder|decoder|attn|mlp|ff)\w*")


def hookpoint_called(name: str) -> str | None:
    """`name` if it can only be the path of a module, such as `layers.3` or `unet.mid_block`; None for `v1.2` and others."""
    words = name.split(".")
    if len(words) < 2 or not all(re.fullmatch(r"[A-Za-z_]\w*|\d+", word) for word in words) or words[0].isdecimal():
        return None
    after_lists = all(LISTS.fullmatch(before) for before, word in itertools.pairwise(words) if word.isdecimal())
    numbered = any(word.isdecimal() for word in words)
    is_path = after_lists if numbered else ROOTS.fullmatch(words[0]) and all(map(PARTS.fullmatch, words[1:]))
    return name if is_path else None
