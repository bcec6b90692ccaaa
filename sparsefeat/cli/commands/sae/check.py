"""`sparsefeat sae check`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from sparsefeat.cli.opening import PipelineChoice, SAEChoice, check_hookpoint
from sparsefeat.cli.options import At, Device, Json, K, Pipeline, Saes, Subfolders
from sparsefeat.cli.outputs import print_json


def check(
    prompts: Annotated[list[str], typer.Argument(help="A few prompts of the kind the SAE was trained on.")],
    sae: Saes = None,
    subfolder: Subfolders = None,
    pipeline: Pipeline = None,
    at: At = None,
    k: K = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of each prompt.")] = 4,
    device: Device = "cpu",
    as_json: Json = False,
) -> None:
    """Measure whether an SAE belongs where it is put: exit code 1 if it evidently does not, with what would fit better."""
    choice = PipelineChoice(pipeline, device, steps)
    saes = SAEChoice(sae, subfolder, pipeline)
    check_hookpoint(at)
    import warnings

    pipe = choice.open()
    from sparsefeat.evaluation.check import CheckWarning
    from sparsefeat.evaluation.check import check as check_sae

    told: list[dict[str, Any]] = []
    for one in saes.open(device, k=k):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckWarning)  # its sentence is printed
            result = check_sae(one, pipe, prompts, at=at, num_inference_steps=steps)
        quality = {
            name: getattr(result.quality, name) for name in ("rows", "fvu", "cosine", "norm_ratio", "l0", "dead")
        }
        told.append({"hookpoint": str(result.hookpoint), "fits": bool(result), "problem": result.problem, **quality})
        if not as_json:
            typer.echo(str(result))
    if as_json:
        print_json(told)
    if not all(it["fits"] for it in told):
        raise typer.Exit(1)
