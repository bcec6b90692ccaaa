"""The hooks that sessions put on modules: objects that can be found again, that know their session weakly, and that are
not copied.

A hook is on a module from the moment torch registered it, whether or not an interrupt let us keep torch's handle: so it
is taken off by looking for it, which may be done twice. A copy of the module (deepcopy, pickle) gets a `Gone` in its
place, that takes itself off when the copy first runs.
"""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn

from sparsefeat.pipeline.hookpoints import Target
from sparsefeat.pipeline.knowing.computed import inner_forward, inner_forwards, needs_inner_forward, take_out_inner

_AFTER = ("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
_BEFORE = ("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")

HookKey = tuple[int, str]
"""(id of the module, "root", "before", "after" or "between")."""


class Hook:
    """One hook: `wiring.heard(key, target, args, kwargs, output)` when the module runs, as long as there is a wiring."""

    def __init__(self, wiring: Any, kind: str, target: Target):
        self._wiring = weakref.ref(wiring)
        self.kind: str = kind
        self.target: Target = target

    @torch.compiler.disable  # instruments run between the graphs of a compiled model, not in them
    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any = None) -> Any:
        wiring = self._wiring()
        # A graph compiled for another block of the same class may call this with that block's output.
        if wiring is None or module is not self.target.module:
            return None
        return wiring.heard(self.kind, self.target, args, kwargs, output)

    def __reduce__(self) -> Any:
        return Gone, ()

    @property
    def _comes_after(self) -> bool:
        return self.kind in ("after", "between")

    def put_on(self) -> None:
        """On the module, inside the caches that may answer for it; doing it twice is harmless."""
        module = self.target.module
        if self._is_where_it_belongs():
            return
        self.take_off()
        inner = inner_forward(module)
        if inner is not None:
            hooks = inner.after if self._comes_after else inner.before
            hooks.insert(0 if self.kind == "root" else len(hooks), self)
        elif self._comes_after:
            # First of the module's hooks: transformers collects `hidden_states` with one, which has to see the edit.
            module.register_forward_hook(self, with_kwargs=True, prepend=self.kind == "after")
        else:
            module.register_forward_pre_hook(self, with_kwargs=True, prepend=self.kind == "root")

    def take_off(self) -> None:
        """From wherever it is on the module; doing it twice is harmless."""
        module = self.target.module
        _remove(module, self)
        for inner in list(inner_forwards(module)):
            for hooks in (inner.before, inner.after):
                if self in hooks:
                    hooks.remove(self)
        take_out_inner(module)

    def _is_where_it_belongs(self) -> bool:
        module = self.target.module
        if not needs_inner_forward(module):
            kinds = _AFTER if self._comes_after else _BEFORE
            return any(hook is self for hook in getattr(module, kinds[0]).values())
        return any(self in (*inner.before, *inner.after) for inner in inner_forwards(module))


class Gone:
    """What a copy of a module has in a hook's place."""

    def __call__(self, module: nn.Module, *_: Any) -> None:
        _remove(module, self)


def _remove(module: nn.Module, hook: Any) -> None:
    for hooks, *flags in (_AFTER, _BEFORE):
        for key in [key for key, found in vars(module)[hooks].items() if found is hook]:
            for flag in flags:
                vars(module).get(flag, {}).pop(key, None)
            del vars(module)[hooks][key]
