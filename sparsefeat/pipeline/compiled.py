"""Hooks that `torch.compile` would ignore.

Dynamo reads a module's hooks when it compiles and does not look again (`skip_nnmodule_hook_guards`, True by default in
every torch that has it): a hook put on a module inside an already compiled region never fires, without a word. Hooks on
the wrapper that `torch.compile(module)` returns are outside the graph and always fire.

What is compiled while sessions are attached would lose hooks too: modules of one class share compiled code, and the
second is given that of the first, hooks and all. So hooks are guarded while a call of an attached pipeline runs.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch._dynamo
from torch import nn

from sparsefeat.pipeline.hookpoints import Target


def refuse_compiled(target: Target) -> None:
    """Raise if the target lies inside a compiled region, where its hooks would be ignored."""
    if not getattr(torch._dynamo.config, "skip_nnmodule_hook_guards", True):
        return  # hooks are guarded: compiled code notices a new one and is compiled again
    for path, module in _ancestors(target):
        inside = module is not target.module
        if getattr(module, "_compiled_call_impl", None) is not None:  # module.compile(): hooks are in the graph
            how = f"{path}.compile()"
        elif inside and (hasattr(module, "_orig_mod") or _is_compiled(vars(module).get("forward"))):
            how = f"torch.compile({path})"
        else:
            continue
        raise RuntimeError(
            f"{target.path} lies inside {how}, compiled before `attach`, and compiled code ignores new hooks: attach "
            "first and compile inside the session, or attach to the pipeline before it is compiled, or set "
            "torch._dynamo.config.skip_nnmodule_hook_guards = False before compiling and leave it so"
        )


def hooks_guarded() -> AbstractContextManager[None]:
    """Within this, what dynamo compiles is compiled again for a module whose hooks are others."""
    if not hasattr(torch._dynamo.config, "skip_nnmodule_hook_guards"):
        return nullcontext()
    return torch._dynamo.config.patch(skip_nnmodule_hook_guards=False)


def _ancestors(target: Target) -> list[tuple[str, nn.Module]]:
    """The modules on the way from the component down to the target, both included."""
    chain: list[tuple[str, nn.Module]] = [(target.root_name, target.root)]
    for part in target.path.split(".")[1:]:
        name, module = chain[-1]
        while not hasattr(module, part) and hasattr(module, "base_layer"):
            module = module.base_layer  # PEFT's wrapper, left out of paths
        chain.append((f"{name}.{part}", getattr(module, part)))
    return chain


def _is_compiled(forward: object) -> bool:
    return hasattr(forward, "_torchdynamo_orig_callable") and not hasattr(forward, "_torchdynamo_disable")
