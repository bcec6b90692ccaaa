"""`sparsefeat evaluate overhead`."""

from __future__ import annotations

from pathlib import Path

import typer

from sparsefeat.cli.opening import quiet_libraries
from sparsefeat.cli.options import Results, results_file


def overhead(out: Results = Path("bench/results/overhead.json")) -> None:
    """What attaching costs on a UNet of Stable Diffusion 1.5's size (minutes, 6 GB of memory; on a quiet machine)."""
    results_file(out)
    quiet_libraries()
    from sparsefeat.evaluation.sd_sized import measure_sd_sized
    from sparsefeat.whole import write_json

    write_json(out, measure_sd_sized())
    typer.echo(f"wrote {out}")
