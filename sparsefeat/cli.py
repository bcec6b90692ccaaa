"""The command line: `sparsefeat --help`.

Every command takes any diffusers folder or hub id; the embedded pipeline and its SAEs are the default. Errors are one
sentence on stderr and exit code 1; a wrong option is 2; an interrupt is 130.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

if TYPE_CHECKING:
    from sparsefeat.sae import SAE

app = typer.Typer(
    help="Sparse features of diffusion models: extract, steer, erase and explain.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
sae_app = typer.Typer(help="Look at sparse autoencoders and convert them.", no_args_is_help=True)
app.add_typer(sae_app, name="sae")

F = TypeVar("F", bound=Callable[..., Any])

Pipeline = Annotated[str | None, typer.Option(help="A diffusers folder or hub id. Default: the embedded pipeline.")]
Saes = Annotated[list[str] | None, typer.Option("--sae", help="An SAE folder or hub id; may be given more than once.")]
Subfolders = Annotated[
    list[str] | None,
    typer.Option("--subfolder", help="The folder (or file) within it; give it once for each --sae, in their order."),
]
Subfolder = Annotated[str | None, typer.Option(help="The folder (or file) of the SAE within that.")]
Hookpoint = Annotated[
    str | None, typer.Option(help="Where the activations come from, in the place of what the file says.")
]
BaseModel = Annotated[str | None, typer.Option(help="Whose activations they are, in the place of what the file says.")]
K = Annotated[int | None, typer.Option(min=1, help="Active latents a row, where the file does not say.")]
At = Annotated[
    str | None, typer.Option(help="The hookpoint, `path[:output|input|diff][:text]`. Default: the SAE's own.")
]
Steps = Annotated[
    int | None, typer.Option(min=1, help="Denoising steps. Default: 20 for the embedded pipeline, else 50.")
]
Guidance = Annotated[float | None, typer.Option(help="Guidance scale. Default: the pipeline's own.")]
Seed = Annotated[int, typer.Option(help="Seed of the noise.")]
Device = Annotated[str, typer.Option(help="Where to run, such as cpu or cuda.")]
Out = Annotated[Path, typer.Option(help="Folder for the images; it must not exist yet.")]


def plain_errors(command: F) -> F:
    """Errors a user can mend become one sentence and exit code 1; bugs keep their traceback."""

    @wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except KeyboardInterrupt:
            typer.echo("interrupted; what was finished is kept", err=True)
            raise typer.Exit(130) from None
        except (ValueError, OSError, MemoryError) as error:
            typer.echo(f"error: {error}", err=True)
            raise typer.Exit(1) from None

    return wrapped  # type: ignore[return-value]


def quiet_libraries() -> None:
    """Loading notices of diffusers and transformers are for developers of those."""
    import logging

    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.set_verbosity_error()
    transformers_logging.set_verbosity_error()
    for module in (diffusers_logging, transformers_logging):
        if hasattr(module, "disable_progress_bar"):
            module.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)


def open_pipeline(name: str | None, device: str) -> Any:
    quiet_libraries()
    from sparsefeat.assets import load_pipeline

    if name is None:
        return load_pipeline().to(device)
    import torch
    from diffusers import DiffusionPipeline

    dtype = torch.float32 if device == "cpu" else torch.float16
    try:
        pipe = DiffusionPipeline.from_pretrained(name).to(device, dtype)
    except OSError as error:
        reason = str(error).partition("\n")[0].partition(" Please check out the root cause in the stacktrace")[0]
        raise OSError(
            f"--pipeline {name!r} cannot be opened ({reason.rstrip('.')}); pass a diffusers folder, one with a "
            "model_index.json, or a hub id that can be fetched"
        ) from error
    if not sys.stderr.isatty():
        pipe.set_progress_bar_config(disable=True)
    return pipe


def open_saes(
    names: list[str] | None,
    subfolders: list[str] | None,
    pipeline: str | None,
    device: str,
    default: str = "all",
    k: int | None = None,
) -> list[SAE]:
    """The named SAEs; without names the embedded ones: "all", that of the last "attention", or of the "text" encoder."""
    from sparsefeat.assets import cross_attention_sae_folders, sae_folders, text_encoder_sae_folder
    from sparsefeat.sae import load_sae

    if subfolders and not names:
        raise ValueError(f"--subfolder {subfolders[0]!r} is given without an SAE; name the folder or hub id it lies in")
    if subfolders and names and len(subfolders) != len(names):
        raise ValueError(f"--subfolder is given {len(subfolders)} times for {len(names)} --sae; give it once for each")
    if names:
        inside: list[str | None] = [*subfolders] if subfolders else [None] * len(names)
        places = zip(names, inside, strict=True)
        return [load_sae(name, device=device, subfolder=folder, k=k) for name, folder in places]
    if pipeline is not None:
        raise ValueError("--pipeline is not the embedded one, so its SAE must be named: add --sae FOLDER")
    last, text = cross_attention_sae_folders()[-1], text_encoder_sae_folder()
    folders = {"all": sae_folders(), "attention": [last], "text": [text]}[default]
    return [load_sae(folder, device=device) for folder in folders]


def call_options(pipeline: str | None, steps: int | None, guidance: float | None, seed: int) -> dict[str, Any]:
    import torch

    from sparsefeat.assets import GUIDANCE, N_STEPS

    options: dict[str, Any] = {"generator": torch.Generator("cpu").manual_seed(seed)}
    options["num_inference_steps"] = steps or (N_STEPS if pipeline is None else 50)
    if guidance is not None or pipeline is None:
        options["guidance_scale"] = GUIDANCE if guidance is None else guidance
    return options


def new_folder(path: Path) -> Path:
    """Make `path`, refusing one that exists: nothing of the user's is written over."""
    if path.exists():
        raise ValueError(f"--out {path} exists already; choose another folder")
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise OSError(f"--out {path} cannot be made ({error.strerror}); choose another folder") from None
    return path


@contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """`new_folder`, taken back if nothing came to be in it."""
    folder = new_folder(path)
    try:
        yield folder
    finally:
        if not any(folder.iterdir()):
            folder.rmdir()


def save(image: Any, path: Path) -> None:
    from sparsefeat.report import enlarge

    enlarge(image).save(path)
    typer.echo(str(path))


def parse_pairs(given: list[str], option: str) -> dict[int, float]:
    """`12=8.0` -> {12: 8.0}"""
    pairs = {}
    for item in given:
        latent, _, amount = item.partition("=")
        try:
            pairs[int(latent)] = float(amount)
        except ValueError:
            raise ValueError(f"{option} {item!r} must be LATENT=NUMBER, as in {option} 12=8.0") from None
    return pairs


@app.command()
@plain_errors
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the page.")] = Path("demo"),
    force: Annotated[bool, typer.Option("--force", help="Replace an earlier page in that folder.")] = False,
) -> None:
    """Run the main job on the embedded pipeline and write a page that shows it (a few minutes on two cores)."""
    quiet_libraries()
    from sparsefeat.demo import run_demo

    typer.echo(f"the page: {run_demo(out, force=force).resolve()}")


@app.command()
@plain_errors
def features(
    prompt: str,
    pipeline: Pipeline = None,
    sae: Saes = None,
    subfolder: Subfolders = None,
    at: At = None,
    top: Annotated[int, typer.Option(min=1, help="How many features.")] = 10,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("features"),
) -> None:
    """Draw PROMPT and print the features that were most active, with a map of each over the image."""
    from sparsefeat.features import Record
    from sparsefeat.pipeline import attach
    from sparsefeat.report import overlay

    records = [Record(s, at) for s in open_saes(sae, subfolder, pipeline, device, "attention")]
    pipe = open_pipeline(pipeline, device)
    with output_folder(out) as folder:
        with attach(pipe, *records) as run:
            image = pipe(prompt, **call_options(pipeline, steps, guidance, seed)).images[0]
        save(image, folder / "image.png")
        for record in records:
            recording = run[record]
            typer.echo(f"{record.at}: latent, score (mean activation, summed over steps), largest, share of positions")
            for rank, found in enumerate(recording.top(top)):
                typer.echo(f"{found.latent:8d} {found.score:10.4f} {found.maximum:10.4f} {found.frequency:8.2%}")
                if recording.grid is not None:
                    name = f"{str(record.at).replace(':', '-')}-{rank:02d}-latent-{found.latent}.png"
                    overlay(image, recording.map(found.latent)).save(folder / name)


@app.command()
@plain_errors
def steer(
    prompt: str,
    add: Annotated[
        list[str] | None, typer.Option(help="LATENT=AMOUNT: add that much of the latent everywhere.")
    ] = None,
    scale: Annotated[list[str] | None, typer.Option(help="LATENT=FACTOR: multiply its activation.")] = None,
    set_: Annotated[list[str] | None, typer.Option("--set", help="LATENT=VALUE: give it that activation.")] = None,
    pipeline: Pipeline = None,
    sae: Saes = None,
    subfolder: Subfolders = None,
    at: At = None,
    window: Annotated[str, typer.Option(help="Part of the schedule, START:STOP as fractions.")] = "0:1",
    condition: Annotated[str, typer.Option(help="cond, uncond, both, or cond+uncond-.")] = "cond",
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("steered"),
) -> None:
    """Draw PROMPT without and with latents edited."""
    from sparsefeat.pipeline import attach
    from sparsefeat.steering import Steer

    saes = open_saes(sae, subfolder, pipeline, device, "attention")
    if len(saes) > 1:
        raise ValueError("--sae was given more than once; steer edits the latents of one SAE")
    start, _, stop = window.partition(":")
    try:
        fractions = (float(start), float(stop))
    except ValueError:
        raise ValueError(f"--window {window!r} must be START:STOP, as in --window 0:0.5") from None
    edit = Steer(
        saes[0],
        add=parse_pairs(add or [], "--add"),
        scale=parse_pairs(scale or [], "--scale"),
        set=parse_pairs(set_ or [], "--set"),
        steps=fractions,
        condition=condition,
        at=at,
    )
    pipe = open_pipeline(pipeline, device)
    with output_folder(out) as folder:
        save(pipe(prompt, **call_options(pipeline, steps, guidance, seed)).images[0], folder / "before.png")
        with attach(pipe, edit):
            save(pipe(prompt, **call_options(pipeline, steps, guidance, seed)).images[0], folder / "after.png")


def concept_prompts(concept: str, concepts: Path | None, pipeline: str | None) -> dict[str, list[str]]:
    """Prompts by concept: from the file, or for the embedded pipeline its objects or its styles."""
    from sparsefeat.assets import emojicanvas as canvas

    if concepts is not None:
        try:
            given = json.loads(concepts.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"--concepts {concepts} is not JSON ({error}); map each concept to its prompts") from None
        if not isinstance(given, dict) or not all(isinstance(p, list) and p for p in given.values()):
            raise ValueError(f"--concepts {concepts} must map each concept to a list of at least one prompt")
        return given
    if pipeline is not None:
        raise ValueError("--concepts is needed for this pipeline: a JSON file that maps each concept to its prompts")
    name = concept.replace(" ", "-")
    if name in canvas.STYLES:
        return {s: [canvas.prompt(o, s) for o in canvas.OBJECTS[::2]] for s in canvas.STYLES}
    if name in canvas.OBJECTS:
        return {canvas.words(o): [canvas.prompt(o, s) for s in canvas.STYLES] for o in canvas.OBJECTS}
    raise ValueError(
        f"concept {concept!r} is none of the embedded pipeline's objects and styles; choose one of "
        f"{', '.join((*canvas.STYLES, *map(canvas.words, canvas.OBJECTS)))}"
    )


@app.command()
@plain_errors
def erase(
    prompt: str,
    concept: Annotated[str | None, typer.Option(help="What to erase, such as “fox”.")] = None,
    concepts: Annotated[Path | None, typer.Option(help="JSON file: concept -> prompts, to fit on.")] = None,
    fitted: Annotated[Path | None, typer.Option(help="A folder that an earlier --save wrote: no fitting.")] = None,
    save_to: Annotated[Path | None, typer.Option("--save", help="Keep the fitted erasure in this folder.")] = None,
    latents: Annotated[int, typer.Option(min=1, help="Latents a step, at each SAE.")] = 32,
    gamma: Annotated[float, typer.Option(help="Their activations are multiplied by this.")] = -0.5,
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
    """Draw PROMPT without and with a concept erased (SAeUron's method)."""
    from sparsefeat.erasure import Erase
    from sparsefeat.pipeline import attach
    from sparsefeat.steering import load_instrument

    if (concept is None) == (fitted is None):
        raise ValueError("name what to erase with --concept, or an erasure fitted before with --fitted; one of the two")
    options = call_options(pipeline, steps, guidance, seed)
    given = None if concept is None else concept_prompts(concept, concepts, pipeline)
    saes = [] if fitted is not None else open_saes(sae, subfolder, pipeline, device, "text")
    pipe = open_pipeline(pipeline, device)
    with output_folder(out) as folder:
        if fitted is not None:
            folders = sorted(fitted.iterdir()) if (fitted / "0").is_dir() else [fitted]
            instruments = [load_instrument(folder) for folder in folders]
        else:
            assert concept is not None
            assert given is not None
            fit_options = {key: value for key, value in options.items() if key != "generator"}
            how = {
                "n_latents": latents,
                "gamma": gamma,
                "magnitude": "scale",
                "batch_size": 25,
                "at": at,
                **fit_options,
            }
            instruments = [Erase.fit(pipe, one, concept, given, **how) for one in saes]
        if save_to is not None:
            for i, one in enumerate(instruments):
                one.save(save_to if len(instruments) == 1 else save_to / str(i))
        save(pipe(prompt, **options).images[0], folder / "before.png")
        with attach(pipe, *instruments):
            again = call_options(pipeline, steps, guidance, seed)
            save(pipe(prompt, **again).images[0], folder / "after.png")


@app.command()
@plain_errors
def heatmap(
    prompt: str,
    word: Annotated[list[str] | None, typer.Option(help="A word of the prompt; default each of them.")] = None,
    pipeline: Pipeline = None,
    steps: Steps = None,
    guidance: Guidance = None,
    seed: Seed = 0,
    device: Device = "cpu",
    out: Out = Path("heatmaps"),
) -> None:
    """Draw PROMPT and, for each word, where the image attended to it."""
    from sparsefeat.attention import HeatMaps
    from sparsefeat.pipeline import attach
    from sparsefeat.report import overlay

    pipe = open_pipeline(pipeline, device)
    maps = HeatMaps()
    with output_folder(out) as folder:
        with attach(pipe, maps) as run:
            image = pipe(prompt, **call_options(pipeline, steps, guidance, seed)).images[0]
        words = word or list(dict.fromkeys(prompt.split()))
        found = {one: run[maps].word(one).values for one in words}
        save(image, folder / "image.png")
        for one, values in found.items():
            path = folder / f"{one.strip('.,').replace('/', '-')}.png"
            overlay(image, values).save(path)
            typer.echo(str(path))


@app.command()
@plain_errors
def hookpoints(
    pipeline: Pipeline = None,
    every: Annotated[bool, typer.Option("--all", help="Also attentions and feed-forwards inside the blocks.")] = False,
) -> None:
    """List the blocks of a pipeline: path, width, stream, grid at its default size, SAEs published for them."""
    pipe = open_pipeline(pipeline, "cpu")
    from sparsefeat.pipeline import hookpoints as list_hookpoints

    for info in list_hookpoints(pipe):
        if not every and ("attention" in info.kind or "feed_forward" in info.kind):
            continue
        grid = " x ".join(map(str, info.grid)) if info.grid else "-"
        published = f"  {'; '.join(info.published)}" if info.published else ""
        typer.echo(f"{info.hookpoint!s:60} {info.width or '?':>5}  {info.stream:5}  {grid:12}{published}".rstrip())


@app.command()
@plain_errors
def evaluate(
    benchmark: Annotated[str, typer.Argument(help="Which benchmark: emoji, or overhead (6 GB of memory).")],
    out: Annotated[
        Path | None, typer.Option(help="Where the results go. Default: bench/results/BENCHMARK.json.")
    ] = None,
    work: Annotated[
        Path, typer.Option(help="Finished parts are kept here; the same command goes on from them.")
    ] = Path("build/evaluation"),
) -> None:
    """emoji: drawing, SAEs and erasure on the embedded pipeline (resumable; about half an hour). overhead: what attaching
    costs on a UNet of Stable Diffusion 1.5's size (minutes; on a quiet machine)."""
    if benchmark not in ("emoji", "overhead"):
        raise ValueError(f"there is no benchmark {benchmark!r}; choose emoji or overhead")
    quiet_libraries()
    from sparsefeat.assets import load_pipeline
    from sparsefeat.evaluation.emoji import write_json
    from sparsefeat.evaluation.judge import load_judge
    from sparsefeat.evaluation.run_emoji import evaluate_emoji
    from sparsefeat.evaluation.sd_sized import measure_sd_sized

    out = out or Path("bench/results") / f"{benchmark}.json"
    if benchmark == "overhead":
        write_json(out, measure_sd_sized())
    else:
        evaluate_emoji(load_pipeline(), open_saes(None, None, None, "cpu"), load_judge(), out, work)
    typer.echo(f"wrote {out}")


@app.command()
@plain_errors
def bench(
    only: Annotated[str | None, typer.Option(help="One op, such as topk_encode.")] = None,
    seconds: Annotated[float, typer.Option(min=0, help="Time for the rounds of one op; three are run at least.")] = 1.0,
    device: Annotated[str | None, typer.Option(help="cpu or cuda. Default: cuda where there is one.")] = None,
) -> None:
    """Measure each op against dense PyTorch on this machine, beside the results that the package carries."""
    import torch

    from sparsefeat.evaluation.machine import device_name
    from sparsefeat.evaluation.measure import measure_ceilings
    from sparsefeat.evaluation.ops_bench import measure_here
    from sparsefeat.evaluation.speed_table import COMMITTED, describe, load_results

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device not in ("cpu", "cuda") or (device == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device {device!r} cannot be measured here; choose cpu, or cuda on a machine with a GPU")
    committed = list(load_results(COMMITTED).values())
    ceilings = measure_ceilings(device)
    typer.echo(f"{device_name()}: {', '.join(f'{name} {value}' for name, value in ceilings.as_json().items())}")
    for records in measure_here(ceilings, device, seconds, only):
        for line in describe(records, committed):
            typer.echo(line)


@sae_app.command("info")
@plain_errors
def sae_info(
    sae: Annotated[str | None, typer.Argument(help="An SAE folder or hub id; default: the embedded ones.")] = None,
    subfolder: Subfolder = None,
    k: K = None,
    hookpoint: Hookpoint = None,
    base_model: BaseModel = None,
) -> None:
    """Print what an SAE is: width, latents, activation, hookpoint, the model it was trained on."""
    import dataclasses

    said: dict[str, Any] = {
        name: value for name, value in (("hookpoint", hookpoint), ("base_model", base_model)) if value
    }
    for one in open_saes([sae] if sae else None, [subfolder] if subfolder else None, None, "cpu", k=k):
        config = dataclasses.replace(one.config, **said)
        n_bytes = sum(p.numel() * p.element_size() for p in one.parameters())
        typer.echo(f"hookpoint   {config.hookpoint or 'not recorded'}")
        typer.echo(f"base model  {config.base_model or 'not recorded'}")
        typer.echo(f"activation  {config.activation}" + (f", k = {config.k}" if config.k else ""))
        typer.echo(f"normalizer  {config.normalizer}")
        typer.echo(f"shape       {config.n_latents} latents x {config.d_model}, {n_bytes / 2**20:.1f} MiB in memory")
        for name, value in config.metadata.items():
            typer.echo(f"{name:11s} {value}")
        typer.echo("")


@sae_app.command("check")
@plain_errors
def sae_check(
    prompts: Annotated[list[str], typer.Argument(help="A few prompts of the kind the SAE was trained on.")],
    sae: Saes = None,
    subfolder: Subfolders = None,
    pipeline: Pipeline = None,
    at: At = None,
    k: K = None,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of each prompt.")] = 4,
    device: Device = "cpu",
) -> None:
    """Measure whether an SAE belongs where it is put: exit code 1 if it evidently does not, with what would fit better."""
    import warnings

    pipe = open_pipeline(pipeline, device)
    from sparsefeat.evaluation.check import CheckWarning, check

    fits = True
    for one in open_saes(sae, subfolder, pipeline, device, k=k):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CheckWarning)  # its sentence is printed
            result = check(one, pipe, prompts, at=at, num_inference_steps=steps)
        typer.echo(str(result))
        fits = fits and bool(result)
    if not fits:
        raise typer.Exit(1)


@sae_app.command("convert")
@plain_errors
def sae_convert(
    source: Annotated[str, typer.Argument(help="An SAE folder, file or hub id, in any format that can be read.")],
    target: Annotated[Path, typer.Argument(help="The folder to write; it must not exist yet, or be empty.")],
    format_: Annotated[str, typer.Option("--format", help="Whose format. Default: sparsefeat's own.")] = "sparsefeat",
    subfolder: Subfolder = None,
    k: K = None,
    hookpoint: Hookpoint = None,
    base_model: BaseModel = None,
) -> None:
    """Read an SAE of any format and write it in another; docs/interop.md lists them."""
    from sparsefeat.sae import load_sae
    from sparsefeat.sae.convert import convert

    sae = load_sae(source, subfolder=subfolder, k=k, hookpoint=hookpoint, base_model=base_model)
    done = convert(sae, target, format_)
    typer.echo(f"wrote {done.folder} ({format_})")
    typer.echo(f"read back: reconstructions of standard normal rows differ by at most {done.difference:.1e}")
    for name in done.lost:
        typer.echo(f"not kept by the format: {name}")


if __name__ == "__main__":
    app()
