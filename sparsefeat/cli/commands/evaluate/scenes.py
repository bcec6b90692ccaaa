"""`sparsefeat evaluate scenes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsefeat.cli.opening import PipelineChoice, quiet_libraries
from sparsefeat.cli.options import Results, results_file


def scenes(
    out: Results = Path("bench/results/scenes.json"),
    pipeline: Annotated[
        str | None, typer.Option(help="A diffusers folder trained on EmojiScenes. Default: the embedded pipeline.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many pictures of each kind are scored.")] = 100,
) -> None:
    """Heat maps, refined ones and SAE latents as segmenters, against masks that are known (minutes)."""
    results_file(out)
    PipelineChoice(pipeline)
    quiet_libraries()
    from sparsefeat.assets import embedded, load_pipeline
    from sparsefeat.evaluation.pixel_judge import load_pixel_judge
    from sparsefeat.evaluation.results import measured_here, measured_on_embedded
    from sparsefeat.evaluation.run_scenes import evaluate_scenes
    from sparsefeat.sae import load_sae
    from sparsefeat.whole import write_json

    pipe = load_pipeline() if pipeline is None else load_pipeline(pipeline)
    saes = (
        [load_sae(folder) for folder in (embedded.block_sae_folder(), *embedded.cross_attention_sae_folders())]
        if pipeline is None
        else []
    )
    name = "embedded" if pipeline is None else Path(pipeline).name
    judge = load_pixel_judge()
    about = measured_on_embedded() if pipeline is None else measured_here()
    write_json(out, {**about, **evaluate_scenes(pipe, name, judge, saes, images, typer.echo)})
    typer.echo(f"wrote {out}")
