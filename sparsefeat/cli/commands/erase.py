"""`sparsefeat erase`."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from sparsefeat.assets.embedded import ERASE_GAMMA, ERASE_LATENTS
from sparsefeat.cli.drawing import draw_before_and_after
from sparsefeat.cli.failures import keeping
from sparsefeat.cli.opening import JOINT_CHOICE, PipelineChoice, SAEChoice, check_hookpoint, is_embedded
from sparsefeat.cli.options import At, Device, Guidance, Out, Pipeline, Saes, Seed, Steps, Subfolders, finite, path
from sparsefeat.whole import whole_folder

METHODS = ("exchange", "saeuron", "cad", "uce", "sld")
BY_SAE = ("exchange", "saeuron")


def erase(
    prompt: str,
    concept: Annotated[str | None, typer.Option(help="What to erase, such as “fox”.")] = None,
    concepts: Annotated[
        Path | None, typer.Option(parser=path, metavar="FILE", help="JSON file: concept -> prompts, to fit on.")
    ] = None,
    fitted: Annotated[
        Path | None,
        typer.Option(parser=path, metavar="FOLDER", help="A folder that an earlier --save wrote: no fitting."),
    ] = None,
    save_to: Annotated[
        Path | None,
        typer.Option("--save", parser=path, metavar="FOLDER", help="Keep the fitted erasure in this new folder."),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            help="exchange, by a text encoder's SAE: another concept takes its place; saeuron, by any SAE; or without one: cad, "
            "uce (weights), sld (guidance). Default: exchange with the embedded pipeline as it is, uce with joint, else saeuron."
        ),
    ] = None,
    into: Annotated[
        str | None,
        typer.Option(
            help="Of exchange and uce: what takes its place. Default: what is most like it (exchange), nothing (uce)."
        ),
    ] = None,
    latents: Annotated[
        int | None, typer.Option(min=1, help=f"Latents a step, at each SAE. Default: {ERASE_LATENTS}.")
    ] = None,
    gamma: Annotated[
        float | None,
        typer.Option(
            callback=finite, help=f"Of saeuron: their activations are multiplied by this. Default: {ERASE_GAMMA:g}."
        ),
    ] = None,
    pipeline: Pipeline = None,
    sae: Saes = None,
    subfolder: Subfolders = None,
    at: At = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("erased"),
) -> None:
    """Draw PROMPT without and with a concept erased."""
    if (concept is None) == (fitted is None):
        raise ValueError("name what to erase with --concept, or an erasure fitted before with --fitted; one of the two")
    if method is None:
        own = (pipeline, concepts, fitted, gamma, sae, subfolder, at)
        method = "exchange" if into is not None or all(one is None for one in own) else "saeuron"
        if pipeline == JOINT_CHOICE and all(one is None for one in (*own[1:], latents)):
            if into is None:
                raise ValueError(
                    "--pipeline joint needs --into, what takes the concept's place, such as owl: with latents of its SAEs taken "
                    "out the picture breaks; or choose with --method"
                )
            method = "uce"
    if method not in METHODS:
        raise ValueError(f"--method {method!r} is not known; choose one of {', '.join(METHODS)}")
    choice = PipelineChoice(pipeline, device, steps)
    check_hookpoint(at)
    folders: list[Path] = []
    of_saes = {"--latents": latents, "--sae": sae, "--subfolder": subfolder, "--at": at}
    of_latents = {**of_saes, "--gamma": gamma, "--into": into}
    owners = {**dict.fromkeys(of_saes, BY_SAE), "--gamma": ("saeuron",), "--into": ("exchange", "uce")}
    ignored = [option for option, by in owners.items() if of_latents[option] is not None and method not in by]
    if ignored and fitted is None:
        by = " and ".join(owners[ignored[0]])
        raise ValueError(f"{ignored[0]} is of --method {by}, not of {method}; leave one of them out")
    if fitted is not None and method not in BY_SAE:
        raise ValueError(
            f"--fitted is an erasure that was fitted before, whatever its method; leave --method {method} out"
        )
    if fitted is not None:
        of_fitting = {"--concepts": concepts, "--save": save_to, **of_latents}
        ignored = [option for option, given in of_fitting.items() if given is not None]
        if ignored:
            raise ValueError(
                f"{ignored[0]} changes nothing of an erasure that was fitted before; leave it or --fitted out"
            )
        folders = fitted_folders(fitted)
    else:
        assert concept is not None
        needs_others = method in BY_SAE or is_embedded(pipeline) or concepts is not None
        given = concept_prompts(concept, concepts, pipeline) if needs_others else {concept: [concept]}
        if into is not None and (into == concept or into not in given):
            what = "--concept itself" if into == concept else "none of the concepts"
            others = ", ".join(other for other in given if other != concept)
            raise ValueError(f"--into {into!r} is {what}; choose one of {others}")
        saes = SAEChoice(sae, subfolder, pipeline, "text") if method in BY_SAE else None
        if save_to is not None:
            check_apart(save_to, out)

    def kept_of_it() -> str:
        saved = save_to is not None and save_to.is_dir() and any(save_to.iterdir())
        return f"the fitted erasure is kept in {save_to}" if saved else "nothing was written"

    with keeping(kept_of_it), whole_folder(out, "--out") as folder:
        if fitted is not None:
            from sparsefeat.steering import load_instrument

            instruments: list[Any] = [load_instrument(one) for one in folders]
            pipe = choice.open()
        else:
            assert concept is not None
            n_latents = ERASE_LATENTS if latents is None else latents
            with nullcontext() if save_to is None else whole_folder(save_to, "--save") as kept:
                from sparsefeat.erasure import Erase, Exchange
                from sparsefeat.erasure.by_word import erase_by_word

                pipe = choice.open()
                call = choice.call_options(guidance, seed)
                del call["generator"]  # every image of the fit has its own
                if saes is None:
                    instruments = [erase_by_word(pipe, concept, method, given, into=into, **call)]
                elif method == "exchange":
                    instruments = [
                        Exchange.fit(pipe, one, concept, given, into=into, n_latents=n_latents, at=at)
                        for one in saes.open(device)
                    ]
                else:
                    how: dict[str, Any] = {"gamma": ERASE_GAMMA if gamma is None else gamma, "magnitude": "scale"}
                    instruments = [
                        Erase.fit(pipe, one, concept, given, n_latents=n_latents, batch_size=25, at=at, **how, **call)
                        for one in saes.open(device)
                    ]
                if kept is not None:
                    for i, instrument in enumerate(instruments):
                        instrument.save(kept if len(instruments) == 1 else kept / str(i))
        draw_before_and_after(pipe, prompt, lambda: choice.call_options(guidance, seed), instruments, folder)
    for written in (out / "before.png", out / "after.png", *([] if save_to is None else [save_to])):
        typer.echo(str(written))


def fitted_folders(fitted: Path) -> list[Path]:
    """The folders of the instruments that `--save` wrote: one, or one for each SAE."""
    folders = (
        [fitted] if (fitted / "instrument.json").is_file() else sorted(fitted.glob("[0-9]*"), key=lambda f: f.name)
    )
    if not folders or not all((folder / "instrument.json").is_file() for folder in folders):
        raise ValueError(f"--fitted {fitted} holds no fitted erasure; give the folder that --save wrote")
    return folders


def check_apart(save_to: Path, out: Path) -> None:
    one, other = save_to.resolve(), out.resolve()
    if one == other or one in other.parents or other in one.parents:
        raise ValueError(f"--save {save_to} and --out {out} are one within the other; choose folders side by side")


def concept_prompts(concept: str, concepts: Path | None, pipeline: str | None) -> dict[str, list[str]]:
    """Prompts by concept: from the file, or for the embedded pipeline its objects or its styles."""
    if concepts is not None:
        return read_concepts(concept, concepts)
    if not is_embedded(pipeline):
        raise ValueError("--concepts is needed for this pipeline: a JSON file that maps each concept to its prompts")
    from sparsefeat.assets.emojicanvas import prompts_by_concept

    return prompts_by_concept(concept, "--concept")


def each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    names = [name for name, _ in pairs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} stands there twice")
    return dict(pairs)


def read_concepts(concept: str, file: Path) -> dict[str, list[str]]:
    try:
        given = json.loads(file.read_text(encoding="utf-8-sig"), object_pairs_hook=each_once)
    except OSError as error:
        raise ValueError(f"--concepts {file} cannot be read ({error.strerror}); give a JSON file") from None
    except ValueError as error:
        raise ValueError(
            f"--concepts {file} cannot be used ({error}); map each concept to its prompts, in JSON"
        ) from None
    fits = isinstance(given, dict) and all(
        isinstance(prompts, list) and prompts and all(isinstance(p, str) and p.strip() for p in prompts)
        for prompts in given.values()
    )
    if not fits:
        raise ValueError(
            f"--concepts {file} must map each concept to a list of at least one prompt, none of them blank"
        )
    if concept not in given or len(given) < 2:
        raise ValueError(
            f"--concepts {file} must name {concept!r} and at least one other concept to compare it with; it has "
            f"{', '.join(map(repr, given)) or 'none'}"
        )
    return given
