"""What a pipeline looks like to those who want to know whether anything was left in it."""

from __future__ import annotations

from typing import Any

from torch import nn


def everything(pipe: Any) -> dict:
    """All of a pipeline that attaching might touch: types, attributes, hooks, processors, by identity."""
    state = {"class": type(pipe), "attributes": {k: id(v) for k, v in vars(pipe).items() if not k.startswith("_")}}
    state["scheduler"] = dict.fromkeys(vars(pipe.scheduler))
    for name, component in pipe.components.items():
        if isinstance(component, nn.Module):
            for path, module in component.named_modules():
                attributes = {k: id(v) for k, v in vars(module).items() if not k.startswith("_")}
                hooks = [
                    [id(hook) for hook in vars(module)[kind].values()]
                    for kind in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_state_dict_hooks")
                ]
                flags = [list(v) for k, v in vars(module).items() if k.startswith("_forward") and k.count("_") > 3]
                state[name, path] = (type(module), attributes, sorted(vars(module)), hooks, flags)
    return state


def hooks_of(model):
    """The hooks of torch on a model's modules."""
    return [
        hook
        for module in model.modules()
        for hook in (*module._forward_hooks.values(), *module._forward_pre_hooks.values())
    ]
