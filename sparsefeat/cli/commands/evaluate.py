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


def evaluate(
    benchmark: Annotated[Benchmark, typer.Argument(help="Which benchmark: emoji, or overhead (6 GB of memory).")],
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
) -> None:
    """emoji: drawing, SAEs and erasure on the embedded pipeline (resumable; about half an hour). overhead: what attaching
    costs on a UNet of Stable Diffusion 1.5's size (minutes; on a quiet machine)."""
    out = out or Path("bench/results") / f"{benchmark.value}.json"
    if benchmark is Benchmark.overhead and work is not None:
        raise ValueError("--work is of the emoji benchmark; overhead has no parts to keep, leave it out")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder; name a file")
    check_writable(out, "--out")
    work = work or Path("build/evaluation")
    quiet_libraries()
    from sparsefeat.assets import load_pipeline
    from sparsefeat.evaluation.emoji import write_json
    from sparsefeat.evaluation.judge import load_judge
    from sparsefeat.evaluation.run_emoji import evaluate_emoji
    from sparsefeat.evaluation.sd_sized import measure_sd_sized

    if benchmark is Benchmark.overhead:
        write_json(out, measure_sd_sized())
    else:
        with keeping(lambda: f"finished parts are in {work}, and the same command goes on from them"):
            evaluate_emoji(load_pipeline(), SAEChoice(None, None).open(), load_judge(), out, work)
    typer.echo(f"wrote {out}")
