"""`sparsefeat evaluate scenes`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from sparsefeat.cli.failures import keeping
from sparsefeat.cli.opening import PipelineChoice, quiet_libraries
from sparsefeat.cli.options import Results, Work, results_file, work_folder


def scenes(
    out: Results = Path("bench/results/scenes.json"),
    work: Work = Path("build/scenes"),
    pipeline: Annotated[
        str | None, typer.Option(help="A diffusers folder trained on EmojiScenes. Default: both embedded pipelines.")
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="How many pictures of each kind are scored.")] = 100,
) -> None:
    """Heat maps, refined ones and SAE latents as segmenters, against masks that are known (resumable; half an hour)."""
    results_file(out)
    work_folder(work)
    PipelineChoice(pipeline)
    quiet_libraries()
    from sparsefeat.assets import JOINT, embedded, load_pipeline, weights_fingerprint
    from sparsefeat.evaluation.parts import Parts, folder_for
    from sparsefeat.evaluation.peer_maps import PEERS
    from sparsefeat.evaluation.pixel_judge import load_pixel_judge, pixel_judge_report
    from sparsefeat.evaluation.results import measured_here, measured_on_embedded
    from sparsefeat.evaluation.run_scenes import evaluate_scenes
    from sparsefeat.measure.machine import versions_of
    from sparsefeat.sae import load_sae
    from sparsefeat.whole import write_json

    unet_saes = (embedded.block_sae_folder(), *embedded.cross_attention_sae_folders())
    asked = (
        [("unet", embedded.PIPELINE, unet_saes), ("joint", JOINT, embedded.sae_folders(embedded.JOINT_SAES))]
        if pipeline is None
        else [(Path(pipeline).name, Path(pipeline), ())]
    )
    here = measured_here() if pipeline else measured_on_embedded(joint=True)
    of_weights = here.get("fingerprint") or weights_fingerprint(Path(str(pipeline)), embedded.FOLDER / "pixel_judge")
    depends = {"versions": versions_of((*here["versions"], *PEERS)), "device": here["device"], "weights": of_weights}
    parts = Parts(folder_for(work, {**depends, "images": images}))
    judge = load_pixel_judge()
    with keeping(lambda: f"finished rows are in {work}, and the same command goes on from them"):
        rows = [
            row
            for name, folder, saes in asked
            for row in evaluate_scenes(
                load_pipeline(folder), name, judge, [load_sae(sae) for sae in saes], images, parts, typer.echo
            )
        ]
    results = {
        "n_pictures": images,
        "pixel_judge_miou": pixel_judge_report()["held_out_pairs_real"]["miou"],
        "rows": rows,
    }
    write_json(out, {**here, **results})
    typer.echo(f"wrote {out}")
