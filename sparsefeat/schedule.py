"""How many steps a scheduler can take, from its config alone: without torch, so that the shell asks before it is loaded."""

from __future__ import annotations

from typing import Any


def most_steps(scheduler: str, num_train_timesteps: Any) -> int | None:
    """None where the time of the scheduler (its class's name) is continuous, or nothing is known of it."""
    return num_train_timesteps if isinstance(num_train_timesteps, int) and "FlowMatch" not in scheduler else None


def check_steps(name: str, steps: int, most: int | None) -> None:
    """Raise ValueError, with the argument's name, for more steps than `most_steps`."""
    if most is not None and steps > most:
        raise ValueError(f"{name}={steps} is more than the {most} of this pipeline's scheduler; take fewer.")
