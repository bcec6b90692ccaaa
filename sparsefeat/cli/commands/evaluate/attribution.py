"""`sparsefeat evaluate attribution`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsefeat.cli.opening import quiet_libraries
from sparsefeat.cli.options import Seed


def attribution(
    prompts: Annotated[list[str] | None, typer.Argument(help="Default: three of the embedded pipeline's.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a picture.")] = 4,
    seed: Seed = 0,
) -> None:
    """How the gradients rank latents of the embedded SAE, against leaving each out (two minutes)."""
    quiet_libraries()
    from sparsefeat.assets import block_sae_folder, load_pipeline
    from sparsefeat.evaluation.attribution import rank_correlations
    from sparsefeat.sae import load_sae

    chosen = prompts or ["a noto emoji of a fox", "a twemoji emoji of a rocket", "a mono emoji of an owl"]
    pipe, sae = load_pipeline(), load_sae(block_sae_folder())
    typer.echo(
        f"{'prompt':<32} {'latents':>7} {'gradient':>9} {'integrated':>11}   Spearman's rank correlation with ablation"
    )
    for row in rank_correlations(pipe, sae, chosen, seed=seed, num_inference_steps=steps, guidance_scale=3.0):
        typer.echo(f"{row.prompt:<32} {row.n_latents:>7} {row.gradient:>9.2f} {row.integrated:>11.2f}")
