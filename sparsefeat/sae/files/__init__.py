"""Reading files that are not trusted: what they declare is compared with what lies in them before anything is allocated.

`weights` opens safetensors and what `torch.save` wrote, `read_json` and `read_yaml` configs. Nothing that a file holds is
ever executed. What a reader does not ask for is refused when it is done, unless it is known to be harmless.
"""

from __future__ import annotations

from sparsefeat.sae.files.asked import listed
from sparsefeat.sae.files.text import Described, described, read_json, read_yaml
from sparsefeat.sae.files.untrusted import must_be_file, reading, say, shown
from sparsefeat.sae.files.weights import Weights, names_in, read_weights, shape_in, weights

__all__ = [
    "Described",
    "Weights",
    "described",
    "listed",
    "must_be_file",
    "names_in",
    "read_json",
    "read_weights",
    "read_yaml",
    "reading",
    "say",
    "shape_in",
    "shown",
    "weights",
]
