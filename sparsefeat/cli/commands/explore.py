"""`sparsefeat explore`."""

from __future__ import annotations

import importlib.util
import socket
import threading
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from sparsefeat.assets import emojicanvas as canvas
from sparsefeat.cli.opening import PipelineChoice, SAEChoice
from sparsefeat.cli.options import Device, Guidance, Saes, Seed, Steps, Subfolders
from sparsefeat.inputs import read_prompts

if TYPE_CHECKING:
    from sparsefeat.explore import Explorer


def explore(
    pipeline: Annotated[
        str | None, typer.Argument(help="A diffusers folder or hub id. Default: the embedded pipeline.")
    ] = None,
    sae: Saes = None,
    subfolder: Subfolders = None,
    prompts: Annotated[
        str | None, typer.Option(help="A file of prompts, one a line, that images are drawn of as examples.")
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "cpu",
    port: Annotated[
        int | None, typer.Option(min=1, max=65535, help="Of 127.0.0.1. Default: the first free one from 7860.")
    ] = None,
) -> None:
    """Open a page in your browser: a prompt's features to steer and paint, words to map and erase, edits to save."""
    choice = PipelineChoice(pipeline, device, steps, option="PIPELINE")
    saes = SAEChoice(sae, subfolder, pipeline, "explore")
    if importlib.util.find_spec("gradio") is None:
        raise ValueError("the page needs Gradio, which is not installed; pip install 'sparsefeat[explore]'")
    others = () if prompts is None else read_prompts(prompts).prompts
    check_port(port)
    typer.echo(f"opening {'the embedded pipeline' if pipeline is None else pipeline}; the address follows", err=True)
    explorer = open_explorer(choice, saes, others)
    from sparsefeat.explore import Asked
    from sparsefeat.explore.page import Page

    first = canvas.prompt("fox", "noto") if choice.embedded else "a fox"
    settings = choice.call_settings(guidance)
    page = Page(explorer, Asked(first, seed, choice.n_steps, settings.get("guidance_scale")))
    try:
        address = page.serve(port)
    except OSError:
        raise OSError(
            f"--port {port or '7860 and the hundred after it'} cannot be opened: another program has it; choose another"
        ) from None
    typer.echo(f"{address}  Open this in a browser; Ctrl-C ends it.")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        explorer.stop()
        page.blocks.close(verbose=False)
        typer.echo("ended; what was saved is kept", err=True)


def open_explorer(choice: PipelineChoice, saes: SAEChoice, prompts: Sequence[str] = ()) -> Explorer:
    """The explorer of a pipeline and SAEs; the embedded pipeline's knows its words, and erases by its text encoder's SAE."""
    pipe, opened = choice.open(), saes.open(choice.device)
    from sparsefeat.explore import Explorer, Source

    own_imports, pipe_line = choice.code()
    sae_imports, sae_lines = saes.code(choice.device)
    imports = (*own_imports, *sae_imports)
    if choice.name is not None:
        return Explorer(pipe, opened, Source(imports, pipe_line, sae_lines), prompts=prompts)
    of_words = SAEChoice(None, None, None, "text")
    eraser_line = of_words.code(choice.device)[1][0]
    return Explorer(
        pipe,
        opened,
        Source(imports, pipe_line, sae_lines, eraser_line),
        prompts=prompts or canvas.training_prompts(),
        words={canvas.prompt(o, s): (canvas.words(o), s) for o in canvas.OBJECTS for s in canvas.STYLES},
        eraser=of_words.open(choice.device)[0],
        concepts=lambda word: canvas.prompts_by_concept(word, "the word"),
    )


def check_port(port: int | None) -> None:
    """Raise OSError if another program has it, before the minutes of opening."""
    if port is None:
        return
    with socket.socket() as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # one that was left a moment ago is free
        try:
            trial.bind(("127.0.0.1", port))
        except OSError as error:
            raise OSError(f"--port {port} cannot be opened ({str(error.strerror).lower()}); choose another") from None
