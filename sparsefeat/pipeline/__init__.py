"""Where and when: hookpoints, the context of a call, and `attach`, which lets instruments read and edit a pipeline."""

from __future__ import annotations

from sparsefeat.pipeline.attachment import Recordings
from sparsefeat.pipeline.context import Call, Context, UnknownConditionError
from sparsefeat.pipeline.hookpoints import Hookpoint, HookpointInfo, UnknownHookpointError, hookpoints, resolve
from sparsefeat.pipeline.instrument import (
    Activations,
    AttentionCall,
    Delta,
    Enough,
    FrozenInstrument,
    Instrument,
    Replace,
)
from sparsefeat.pipeline.outcome import HookpointNotReachedError
from sparsefeat.pipeline.session import Session, attach, detach

__all__ = [
    "Activations",
    "AttentionCall",
    "Call",
    "Context",
    "Delta",
    "Enough",
    "FrozenInstrument",
    "Hookpoint",
    "HookpointInfo",
    "HookpointNotReachedError",
    "Instrument",
    "Recordings",
    "Replace",
    "Session",
    "UnknownConditionError",
    "UnknownHookpointError",
    "attach",
    "detach",
    "hookpoints",
    "resolve",
]
