"""`sparsefeat steer`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsefeat.cli.drawing import draw_before_and_after
from sparsefeat.cli.opening import PipelineChoice, SAEChoice, check_hookpoint
from sparsefeat.cli.options import (
    LARGEST,
    At,
    Condition,
    Device,
    Guidance,
    Out,
    Pipeline,
    Saes,
    Seed,
    Steps,
    Subfolders,
)
from sparsefeat.whole import whole_folder


def steer(
    prompt: str,
    add: Annotated[
        list[str] | None, typer.Option(help="LATENT=AMOUNT: add that much of the latent everywhere.")
    ] = None,
    scale: Annotated[list[str] | None, typer.Option(help="LATENT=FACTOR: multiply its activation.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="LATENT=VALUE: give it that activation.")] = None,
    pipeline: Pipeline = None,
    sae: Saes = None,
    subfolder: Subfolders = None,
    at: At = None,
    window: Annotated[str, typer.Option(help="Part of the schedule, START:STOP as fractions.")] = "0:1",
    condition: Annotated[Condition, typer.Option(help="Which rows are edited.")] = Condition.cond,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("steered"),
) -> None:
    """Draw PROMPT without and with latents edited."""
    given = {"--add": add or [], "--scale": scale or [], "--set": set_ or []}
    edits: dict[str, Any] = {option.removeprefix("--"): parse_pairs(pairs, option) for option, pairs in given.items()}
    both = edits["scale"].keys() & edits["set"].keys()
    if both:
        raise ValueError(f"latent {min(both)} is in --scale and in --set; give it one of them")
    if not any(edits.values()):
        raise ValueError("this steers nothing; give at least one latent, as in --add 12=8.0")
    fractions = parse_window(window)
    check_hookpoint(at)
    choice = PipelineChoice(pipeline, device, steps)
    if not any(fractions[0] <= step / choice.n_steps < fractions[1] for step in range(choice.n_steps)):
        raise ValueError(
            f"--window {window!r} holds none of the {choice.n_steps} steps; widen it, or give more --steps"
        )
    saes = SAEChoice(sae, subfolder, pipeline, "attention")
    if sae is not None and len(sae) > 1:
        raise ValueError("--sae was given more than once; steer edits the latents of one SAE")
    with whole_folder(out, "--out") as folder:
        from sparsefeat.steering import Steer

        edit = Steer(saes.open(device)[0], **edits, steps=fractions, condition=condition.value, at=at)
        draw_before_and_after(choice.open(), prompt, lambda: choice.call_options(guidance, seed), [edit], folder)
    typer.echo(f"{out / 'before.png'}\n{out / 'after.png'}")


def parse_pairs(given: list[str], option: str) -> dict[int, float]:
    """`12=8.0` -> {12: 8.0}"""
    pairs: dict[int, float] = {}
    for item in given:
        latent, _, amount = item.partition("=")
        try:
            key, number = int(latent), float(amount)
        except ValueError:
            raise ValueError(f"{option} {item!r} must be LATENT=NUMBER, as in {option} 12=8.0") from None
        if key < 0:
            raise ValueError(f"{option} {item!r} must name a latent, counted from 0")
        if not abs(number) <= LARGEST:
            raise ValueError(f"{option} {item!r} must give a finite number, as in {option} 12=8.0")
        if key in pairs:
            raise ValueError(f"{option} names latent {key} twice; give it once")
        pairs[key] = number
    return pairs


def parse_window(window: str) -> tuple[float, float]:
    """`0:0.5` -> (0.0, 0.5)"""
    start, _, stop = window.partition(":")
    try:
        fractions = (float(start), float(stop))
    except ValueError:
        raise ValueError(f"--window {window!r} must be START:STOP, as in --window 0:0.5") from None
    if not 0 <= fractions[0] < fractions[1] <= 1:
        raise ValueError(f"--window {window!r} must have 0 <= START < STOP <= 1, fractions of the schedule")
    return fractions
