"""`sparsefeat demo`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from sparsefeat.cli.opening import quiet_libraries
from sparsefeat.cli.options import path
from sparsefeat.whole import check_free, check_writable


def demo(
    out: Annotated[Path, typer.Option(parser=path, metavar="FOLDER", help="Folder for the page.")] = Path("demo"),
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier page in that folder.")] = False,
) -> None:
    """Run the main job on the embedded pipeline and write a page that shows it (a few minutes on two cores)."""
    if not force:
        check_free(out, "--out")
    check_writable(out, "--out")
    from sparsefeat.report import check_folder

    try:
        check_folder(out, force=force)
    except FileExistsError as error:
        raise FileExistsError(f"--out {error}") from None
    quiet_libraries()
    from sparsefeat.demo import findings, run_demo

    page = run_demo(out, force=force)
    for line in findings(json.loads((page.parent / "results.json").read_text())):
        typer.echo(line)
    typer.echo(f"the page: {page.resolve()}")
