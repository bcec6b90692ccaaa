"""`sparsefeat circuit`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from sparsefeat.cli.opening import PipelineChoice, SAEChoice
from sparsefeat.cli.options import Device, Guidance, Out, Pipeline, Saes, Seed, Steps, Subfolders
from sparsefeat.whole import whole_folder

EMBEDDED = ("unet.mid_block.attentions.0", "unet.up_blocks.0.attentions.0")


def circuit(
    prompt: str,
    pipeline: Pipeline = None,
    sae: Saes = None,
    subfolder: Subfolders = None,
    latents: Annotated[int, typer.Option(min=1, help="How many latents of each SAE are looked at.")] = 8,
    edges: Annotated[int, typer.Option(min=1, help="How many edges are kept.")] = 16,
    window: Annotated[list[int] | None, typer.Option("--step", min=0, help="A step to look at; default all.")] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("circuit"),
) -> None:
    """Which latents of one SAE make which of a later one active under PROMPT: circuit.json and circuit.svg. The first --sae
    is of the earlier block, the second of the later.
    """
    choice = PipelineChoice(pipeline, device, steps)
    saes = SAEChoice(sae, subfolder, pipeline)
    if sae is not None and len(sae) != 2:
        raise ValueError(
            f"--sae must be given twice, and is given {len(sae)} x; name the SAEs of the earlier block and of the later"
        )
    late = [step for step in window or [] if step >= choice.n_steps]
    if late:
        raise ValueError(f"--step {late[0]} is none of the {choice.n_steps} steps, which count from 0")
    with whole_folder(out, "--out") as folder:
        import sparsefeat.attribution

        opened: Any = saes.open(device)
        if sae is None:
            by_place = {one.config.hookpoint.partition(":")[0]: one for one in opened}
            opened = [by_place[place] for place in EMBEDDED]
        earlier, later = opened
        pipe = choice.open()
        found = sparsefeat.attribution.circuit(
            pipe,
            earlier,
            later,
            prompt,
            n_latents=latents,
            n_edges=edges,
            steps=window,
            seed=seed,
            **choice.call_settings(guidance),
        )
        for name in ("circuit.json", "circuit.svg"):
            found.save(folder / name)
    typer.echo(str(found))
    typer.echo(f"rank correlation of gradient and ablation {found.rank_correlation:.2f}")
    typer.echo(f"{out / 'circuit.json'}\n{out / 'circuit.svg'}")
