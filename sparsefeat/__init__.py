"""Sparse features of diffusion models: extract, steer, erase and explain.

    import sparsefeat as sf

    sae = sf.load_sae("path/or/hub-id")
    rec, steer, maps = sf.Record(sae), sf.Steer(sae, scale={12: 0.0}), sf.HeatMaps()
    with sf.attach(pipe, rec, steer, maps) as run:
        image = pipe("a noto emoji of a fox").images[0]
    run[rec].top(10)

Names are imported when they are first used: `import sparsefeat` itself loads neither torch nor diffusers.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "CollectStatistics": "sparsefeat.features",
    "Context": "sparsefeat.pipeline",
    "Delta": "sparsefeat.pipeline",
    "Erase": "sparsefeat.erasure",
    "HeatMaps": "sparsefeat.attention",
    "Hookpoint": "sparsefeat.pipeline",
    "Instrument": "sparsefeat.pipeline",
    "InterpretThenDeactivate": "sparsefeat.erasure",
    "PromptVector": "sparsefeat.steering",
    "Record": "sparsefeat.features",
    "Replace": "sparsefeat.pipeline",
    "SAE": "sparsefeat.sae",
    "SAEConfig": "sparsefeat.sae",
    "SAETrainer": "sparsefeat.training",
    "SparseCode": "sparsefeat_kernels",
    "Splice": "sparsefeat.evaluation.splice",
    "Statistics": "sparsefeat.features",
    "Steer": "sparsefeat.steering",
    "attach": "sparsefeat.pipeline",
    "check": "sparsefeat.evaluation.check",
    "hookpoints": "sparsefeat.pipeline",
    "load_instrument": "sparsefeat.steering",
    "load_sae": "sparsefeat.sae",
    "negative_prompt": "sparsefeat.erasure",
    "presets": "sparsefeat.presets",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sparsefeat' has no attribute {name!r}; it offers {', '.join(sorted(_HOME))}")
    module = importlib.import_module(_HOME[name])
    value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
