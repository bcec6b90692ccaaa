"""`sparsefeat evaluate weights`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsefeat.cli.opening import quiet_libraries


def weights(
    name: Annotated[str, typer.Argument(metavar="OBJECT", help="An object of EmojiCanvas.")] = "fox",
    images: Annotated[int, typer.Option(min=1, help="Pictures with the object, and as many without.")] = 8,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of a picture.")] = 10,
) -> None:
    """What CAD-Erase and CAD-Amplify do to pictures of the embedded pipeline, by the judge (two minutes)."""
    quiet_libraries()
    from sparsefeat.assets import load_pipeline
    from sparsefeat.evaluation.judge import load_judge
    from sparsefeat.evaluation.weights import effects_of_weights

    typer.echo(f"{'':<12} {'prompts':<17} {name + ' seen (log p)':<22} others seen (log p)")
    pipe = load_pipeline()
    pipe.set_progress_bar_config(disable=True)
    for one in effects_of_weights(pipe, load_judge(), name, images=images, n_steps=steps):
        typer.echo(
            f"{one.name:<12} {one.prompts:<17} {f'{one.own:.0%} ({one.log_own:.2f})':<22} "
            f"{one.others:.0%} ({one.log_others:.2f})"
        )
