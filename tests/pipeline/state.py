"""What a pipeline looks like to those who want to know whether anything was left in it."""

from __future__ import annotations

from typing import Any

from torch import nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
# Which of them are called in another way.
FLAGS = ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs")


def everything(pipe: Any) -> dict:
    """All of a pipeline that attaching might touch: types, attributes, hooks, processors, by identity."""
    state = {"class": type(pipe), "attributes": {k: id(v) for k, v in vars(pipe).items() if not k.startswith("_")}}
    state["scheduler"] = dict.fromkeys(vars(pipe.scheduler))
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            for path, module in component.named_modules():
                own = vars(module)
                attributes = {k: None if k.startswith("_") else id(v) for k, v in own.items()}
                hooks = [[id(hook) for hook in own[kind].values()] for kind in HOOKS]
                state[name, path] = (type(module), attributes, hooks, [list(own[kind]) for kind in FLAGS])
    return state


def hooks_of(model):
    """The hooks of torch on a model's modules."""
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
