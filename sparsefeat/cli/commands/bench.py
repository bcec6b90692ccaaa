"""`sparsefeat bench`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsefeat.cli.options import finite


def bench(
    only: Annotated[str | None, typer.Option(help="One op, such as topk_encode.")] = None,
    seconds: Annotated[
        float, typer.Option(min=0, callback=finite, help="Time for the rounds of one op; three are run at least.")
    ] = 1.0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
) -> None:
    """Measure each op against dense PyTorch on this machine, beside the results that the package carries."""
    if device not in (None, "cpu", "cuda"):
        raise ValueError(f"--device {device!r} cannot be measured; choose cpu, or cuda on a machine with a GPU")
    from sparsefeat.measure.speed_table import COMMITTED, OPS, describe, load_results

    if only is not None and only not in OPS:
        raise ValueError(f"--only {only!r} is no op; choose one of {', '.join(OPS)}")
    import torch

    from sparsefeat.measure.figures import measure_here
    from sparsefeat.measure.machine import device_name
    from sparsefeat.measure.timing import measure_ceilings

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda cannot be measured: torch finds no GPU on this machine; choose cpu")
    committed = list(load_results(COMMITTED).values())
    ceilings = measure_ceilings(device)
    typer.echo(f"{device_name()}: {', '.join(f'{name} {value}' for name, value in ceilings.as_json().items())}")
    for records in measure_here(ceilings, device, seconds, only):
        for line in describe(records, committed):
            typer.echo(line)
