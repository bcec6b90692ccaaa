"""`sparsefeat evaluate`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from sparsefeat.cli.failures import keeping
from sparsefeat.cli.opening import SAEChoice, quiet_libraries
from sparsefeat.cli.options import path
from sparsefeat.whole import check_writable


class Benchmark(str, Enum):
    emoji = "emoji"
    overhead = "overhead"
    scenes = "scenes"


def evaluate(
    benchmark: Annotated[
        Benchmark, typer.Argument(help="Which benchmark: emoji, scenes, or overhead (6 GB of memory).")
    ],
    out: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FILE", help="Where the results go. Default: bench/results/BENCHMARK.json."),
    ] = None,
    work: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            metavar="FOLDER",
            help="emoji keeps finished parts here and goes on from them. Default: build/evaluation.",
        ),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(help="scenes: a diffusers folder trained on EmojiScenes. Default: the embedded pipeline."),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="scenes: how many pictures of each kind are scored.")] = 100,
) -> None:
    """emoji: drawing, SAEs and erasure on the embedded pipeline (resumable; about half an hour). overhead: what attaching
    costs on a UNet of Stable Diffusion 1.5's size (minutes; on a quiet machine). scenes: heat maps, refined ones and SAE
    latents as segmenters, against masks that are known (minutes)."""
    out = out or Path("bench/results") / f"{benchmark.value}.json"
    if benchmark is not Benchmark.emoji and work is not None:
        raise ValueError(f"--work is of the emoji benchmark; {benchmark.value} has no parts to keep, leave it out")
    if benchmark is not Benchmark.scenes and pipeline is not None:
        raise ValueError(f"--pipeline is of the scenes benchmark; {benchmark.value} runs on its own, leave it out")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file")
    check_writable(out, "--out")
    work = work or Path("build/evaluation")
    if work.exists() and not work.is_dir():
        raise ValueError(f"--work {work} is a file; name a folder")
    quiet_libraries()
    from sparsefeat.assets import embedded, load_pipeline
    from sparsefeat.evaluation.emoji import write_json
    from sparsefeat.evaluation.judge import load_judge
    from sparsefeat.evaluation.pixel_judge import load_pixel_judge
    from sparsefeat.evaluation.run_emoji import evaluate_emoji
    from sparsefeat.evaluation.run_scenes import evaluate_scenes
    from sparsefeat.evaluation.sd_sized import measure_sd_sized
    from sparsefeat.sae import load_sae

    if benchmark is Benchmark.overhead:
        write_json(out, measure_sd_sized())
    elif benchmark is Benchmark.scenes:
        pipe = load_pipeline() if pipeline is None else load_pipeline(pipeline)
        saes = (
            [load_sae(folder) for folder in (embedded.block_sae_folder(), *embedded.cross_attention_sae_folders())]
            if pipeline is None
            else []
        )
        name = "embedded" if pipeline is None else Path(pipeline).name
        judge = load_pixel_judge()
        write_json(out, evaluate_scenes(pipe, name, judge, saes, images, pipeline is not None, typer.echo))
    else:
        with keeping(lambda: f"finished parts are in {work}, and the same command goes on from them"):
            evaluate_emoji(load_pipeline(), SAEChoice(None, None).open(), load_judge(), out, work)
    typer.echo(f"wrote {out}")
