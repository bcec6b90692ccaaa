"""diffusers' caches, each set so that it passes over as much as it can, and what of a model then computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from torch import nn

STEPS = 4
"""Fewer, and some pass nothing over."""

CACHES = {
    "first-block cache": "FirstBlockCacheConfig",
    "MagCache": "MagCacheConfig",
    "TaylorSeer": "TaylorSeerCacheConfig",
    "Pyramid Attention Broadcast": "PyramidAttentionBroadcastConfig",
    "FasterCache": "FasterCacheConfig",
    "SeaCache": "SeaCacheConfig",
    "text KV cache": "TextKVCacheConfig",
}


class NoSuchCache(Exception):
    """This diffusers does not have it."""


def config(name: str, **options: Any) -> Any:
    try:
        import diffusers.hooks as hooks
    except ImportError as error:
        raise NoSuchCache(f"this diffusers has no {name}") from error
    cls = getattr(diffusers, name, None) or getattr(hooks, name, None)
    if cls is None:
        raise NoSuchCache(f"this diffusers has no {name}")
    always = (-1, 10**9)
    given: dict[str, Callable[[], dict[str, Any]]] = {
        "FirstBlockCacheConfig": lambda: {"threshold": 1e9},
        "MagCacheConfig": lambda: {
            "threshold": 1e9,
            "max_skip_steps": 2,
            "retention_ratio": 0.25,
            "num_inference_steps": STEPS,
            "mag_ratios": torch.ones(STEPS),
        },
        "TaylorSeerCacheConfig": lambda: {"cache_interval": 2, "disable_cache_before_step": 1, "max_order": 1},
        "PyramidAttentionBroadcastConfig": lambda: {
            "spatial_attention_block_skip_range": 2,
            "spatial_attention_timestep_skip_range": always,
            "cross_attention_block_skip_range": 2,
            "cross_attention_timestep_skip_range": always,
            "current_timestep_callback": lambda: 500,
        },
        "FasterCacheConfig": lambda: {
            "spatial_attention_block_skip_range": 2,
            "spatial_attention_timestep_skip_range": always,
            "unconditional_batch_skip_range": 2,
            "unconditional_batch_timestep_skip_range": always,
            "attention_weight_callback": lambda _: 0.3,
            "current_timestep_callback": lambda: 500,
        },
        "SeaCacheConfig": lambda: {
            "threshold": 1e9,
            "residual_order": 0,
            "retention_steps": 1,
            "cache_end_steps": 0,
        },
        "TextKVCacheConfig": dict,
    }
    return cls(**{**given[name](), **options})


@dataclass
class Computed:
    """What of a model computed, run by run."""

    runs: dict[str, list[tuple[int, int]]]
    """For each module, the runs of the model in which it did, and on how many batch entries."""
    layers: list[tuple[int, int]] = field(default_factory=list)
    """For each run, how many layers did, and on how many entries in all."""

    def passed_something_over(self, runs_a_step: int) -> bool:
        first = self.layers[:runs_a_step]
        return any(layers != first[run % runs_a_step] for run, layers in enumerate(self.layers))


@contextmanager
def computing(root: nn.Module, paths: Iterable[str]) -> Iterator[Computed]:
    """What computes in a root's runs, as its innermost layers say: no cache answers for these."""
    computed = Computed({path: [] for path in paths})
    handles = [root.register_forward_pre_hook(lambda *_: computed.layers.append((0, 0)))]
    for path, layer in root.named_modules():
        if list(layer.children()):
            continue
        around = [outer for outer in computed.runs if path == outer or path.startswith(f"{outer}.")]

        def note(layer: nn.Module, args: tuple, around: list[str] = around) -> None:
            run, entries = len(computed.layers) - 1, args[0].shape[0] if args else 0
            layers, total = computed.layers[run]
            computed.layers[run] = layers + 1, total + entries
            for outer in around:
                if not computed.runs[outer] or computed.runs[outer][-1][0] != run:
                    computed.runs[outer].append((run, entries))

        handles.append(layer.register_forward_pre_hook(note))
    try:
        yield computed
    finally:
        for handle in handles:
            handle.remove()
