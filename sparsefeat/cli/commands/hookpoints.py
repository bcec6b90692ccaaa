"""`sparsefeat hookpoints`."""

from __future__ import annotations

from typing import Annotated

import typer

from sparsefeat.cli.opening import PipelineChoice
from sparsefeat.cli.options import Json, Pipeline
from sparsefeat.cli.outputs import print_json


def hookpoints(
    pipeline: Pipeline = None,
    every: Annotated[bool, typer.Option("--all", help="Also attentions and feed-forwards inside the blocks.")] = False,
    as_json: Json = False,
) -> None:
    """List the blocks of a pipeline: path, width, stream, grid at its default size, SAEs published for them."""
    pipe = PipelineChoice(pipeline).open()
    from sparsefeat.pipeline import hookpoints as list_hookpoints

    blocks = [
        info for info in list_hookpoints(pipe) if every or not ("attention" in info.kind or "feed_forward" in info.kind)
    ]
    if as_json:
        named = ("kind", "width", "stream", "grid", "published")
        print_json([{"hookpoint": str(b.hookpoint), **{name: getattr(b, name) for name in named}} for b in blocks])
        return
    for info in blocks:
        grid = " x ".join(map(str, info.grid)) if info.grid else "-"
        published = f"  {'; '.join(info.published)}" if info.published else ""
        typer.echo(f"{info.hookpoint!s:60} {info.width or '?':>5}  {info.stream:5}  {grid:12}{published}".rstrip())
