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
        str | None, typer.Option(help="A diffusers folder trained on EmojiScenes. Default: both embedded pipelines.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many pictures of each kind are scored.")] = 100,
) -> None:
    """Heat maps, refined ones and SAE latents as segmenters, against masks that are known (minutes)."""
    results_file(out)
    PipelineChoice(pipeline)
    quiet_libraries()
    from sparsefeat.assets import JOINT, embedded, load_pipeline
    from sparsefeat.evaluation.pixel_judge import load_pixel_judge, pixel_judge_report
    from sparsefeat.evaluation.results import measured_here, measured_on_embedded
    from sparsefeat.evaluation.run_scenes import evaluate_scenes
    from sparsefeat.sae import load_sae
    from sparsefeat.whole import write_json

    unet_saes = (embedded.block_sae_folder(), *embedded.cross_attention_sae_folders())
    asked = (
        [("unet", embedded.PIPELINE, unet_saes), ("joint", JOINT, embedded.sae_folders(embedded.JOINT_SAES))]
        if pipeline is None
        else [(Path(pipeline).name, Path(pipeline), ())]
    )
    judge = load_pixel_judge()
    rows = [
        row
        for name, folder, saes in asked
        for row in evaluate_scenes(
            load_pipeline(folder), name, judge, [load_sae(sae) for sae in saes], images, typer.echo
        )
    ]
    results = {
        "n_pictures": images,
        "pixel_judge_miou": pixel_judge_report()["held_out_pairs_real"]["miou"],
        "rows": rows,
    }
    write_json(out, {**(measured_here() if pipeline else measured_on_embedded(joint=True)), **results})
    typer.echo(f"wrote {out}")
