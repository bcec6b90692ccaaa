"""Write docs/pipelines.md from the results of the matrix test (tests/pipeline/test_matrix*.py).

    python tools/write_pipelines.py                                # the page from docs/pipelines.json
    python tools/write_pipelines.py --take newest build/matrix.json   # first put a run's results into that file
    python tools/write_pipelines.py --take newest FILE FILE           # a run whose families were shared out
    python tools/write_pipelines.py --take newest FILE --families krea2 mochi     # of some families alone
    python tools/write_pipelines.py --check                        # exit code 1 if the page is not what the file says

`make matrix` and `make floor` do the second for the two environments. A test runs the check.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "pipelines.json"
PAGE = ROOT / "docs" / "pipelines.md"
ENVIRONMENTS = {"newest": "the newest versions", "floor": "the oldest versions"}
CELLS = {"full": "the whole product", "pairwise": "a covering array of all pairs"}
PACKAGES = ("python", "torch", "triton", "diffusers", "transformers", "numpy", "accelerate", "peft")

INTRO = """# Pipelines

`sf.attach(pipe, ...)` works on these families of diffusers' pipelines. For each there is a tiny randomly initialised
pipeline of diffusers' own classes (`tests/families/`), on which every promise of `attach` is tested over guidance on
and off, one prompt, two, two with two images each, square and wide pictures, and the ways of running a model listed
below. `sf.hookpoints(pipe)` lists the hookpoints of yours.

A cell says in how many configurations the promise was kept, of how many that were tried. This page is written from the
results of the tests by `python tools/write_pipelines.py`; `make matrix` and `make floor` make them again.

What the promises are:

* *same bits*: edits that change nothing, at every block, its input and its difference, give bit-identical latents.
* *reaches*: an edit at a block changes the latents, and does so no longer after the session.
* *conditions*: each batch entry's condition and image are right; checked by comparing the text that the model is given
  for the entry with the prompts' own. *In the text encoders*: the same there.
* *grid*: the positions' grid is the known one, for square pictures and for others.
* *step*: each run of a block is in the right step, also where guidance runs the model twice.
* *leaving*, *exceptions*: afterwards the pipeline is what it was: every hook, attribute and processor object, also when
  an instrument or a module fails or is interrupted in the middle.

What is good to know:

* In joint blocks (SD3, FLUX, Qwen-Image, CogVideoX, HunyuanVideo and others) a hookpoint means the image;
  `path:text`, or `Hookpoint(path, stream="text")`, means the text.
* A tensor counts as image or as text only where its rows are known: reference images and padding are neither. A model
  that is not in this list, or a part of one that gives no rows, is refused; if you know the rows, say them:
  `Hookpoint(path, rows=(77, 4173))`, or `path:77-4173`.
* CogView 4 runs its feed-forward on the image and then on the text: each hookpoint sees its own run.
* LTX-2 makes a video and its sound: `path:audio` is the sound. Stable Audio and ACE-Step have nothing else.
* A video's grid is (frames, height, width), also where its frames are folded into the batch (AnimateDiff, Stable Video
  Diffusion, Latte): `Context.positions` counts those of all frames, and `Context.condition` has an entry for each frame, as
  the tensor has; `Context.entries` has one for each video. Kandinsky 5 with sparse attention and transformers over time order their positions otherwise: no
  grid there.
* Stable Diffusion in tiles (panoramas, a VAE's tiling) is refused: a tile has no place in the image's grid.
* Wan 2.2 has two models; `transformer.blocks.5` and `transformer_2.blocks.5` are different hookpoints, and each sees
  its own part of the schedule.
* CogVideoX, AnimateDiff and a few others make one video a prompt whatever `num_videos_per_prompt` says; so does
  `Call.images_per_prompt`.
* Conditioning frames and reference images (Kontext, FLUX.2, FLUX.3, LTX's conditions) are not part of what is made: no
  instrument sees their rows.
* A module of your own in the denoiser's place that holds it and hands everything on is seen through: hookpoints are called
  as they are without it.
* Packed weights (torchao, bitsandbytes, GGUF files, Nunchaku) are never read: activations are read and edited as in any
  other model (`tests/pipeline/test_quantised.py`, which `make matrix` runs with these packages).
* Attach first and compile then. A model that was compiled before would not run the hooks, and `attach` refuses it.
* A step belongs to the scheduler that its model is run with. Pipelines with a prior and a decoder, with copies of their
  scheduler, or with several loops in one call (`Context.loop`) are counted loop by loop.
* Where a model is given a timestep for every token, `Context.timestep` is the scheduler's.

## Which rows are conditional

It is seen, not looked up: the text that each row is given is compared with what the pipeline's `encode_prompt`
returned for the prompts and for the negative prompts, and with embeddings among the call's arguments. So it does not
matter whether a pipeline runs [uncond, cond] or [cond, uncond], one run or several, or what its arguments are called;
subclasses and loops of your own are understood in the same way. A text encoder's rows are told by the token ids in
them; where no `encode_prompt` says which text is which, the ids that the encoders were given do. Two kinds of rows have the same text and are told apart by the pipeline's class or by its guider: "perturbed"
ones, and InstructPix2Pix's "image".

Where a loop is not one of diffusers' and its embeddings come from nowhere, a row is `"unknown"`. An instrument that acts on
some rows is then refused; one with `condition="both"` goes on. Say what one step runs, and both work:

```python
sf.attach(pipe, rec, layout=("uncond", "cond"))  # one run of the denoiser on both halves
sf.attach(pipe, rec, layout=[("cond",), ("uncond",)])  # two runs, the conditional one first
```

## Caches

First-block cache, MagCache, TaylorSeer, Pyramid Attention Broadcast and the other caches of diffusers
(`pipe.transformer.enable_cache(...)`), and layers that a guider skips: where a block does not compute, nothing is
recorded and no instrument is asked, and an edit is in what the cache repeats, once. Turn a cache on or off between
calls as you like. A cache that is not diffusers' and hands a block's input on is noticed as well; one that repeats a block's
output is not.

## Modular pipelines

`sf.attach(modular_pipe, ...)` takes the pipelines of `ModularPipelineBlocks.init_pipeline()`. Guiders say themselves which
of their passes is running. Tried on {modular}, and FLUX.3, which has no other pipeline (`tests/pipeline/test_modular.py`).

## Several pipelines with the same models

One session for all of them: `sf.attach((base, refiner), rec)` puts the same instruments on each, and `run.calls` has the
calls in order. Or attach to each: a session sees the calls of its own pipeline. Both hold for a base and a refiner, for
`from_pipe` and for a components manager; attaching to each also for threads with a pipeline each, and for a pipeline that
another's callback calls, with instruments of its own. A pipeline without a session is refused while one that it shares
models with has one.
"""

EMPTY = (
    "An empty cell was not tried: pipelines around another family's model are tried plain and in bf16, compiling with three "
    "families."
)
CACHED = (
    "Each cache is set so that it passes over as much as it can; what computed is heard from the layers inside, and a block is "
    "visited then and only then, with the right step and conditions. A family that is not here takes none of them in diffusers, "
    "or none passes anything over in its tiny model."
)

SHORT = {
    "a neutral edit gives the same bits": "same bits",
    "an edit reaches the output": "reaches",
    "conditions of the rows": "conditions",
    "conditions in the text encoders": "in the text encoders",
    "grid": "grid",
    "step": "step",
    "leaving restores": "leaving",
    "an exception restores": "exceptions",
    "gradients through checkpoints": "gradients through checkpoints",
}
CACHES = (
    "first-block cache",
    "MagCache",
    "TaylorSeer",
    "Pyramid Attention Broadcast",
    "FasterCache",
    "SeaCache",
    "text KV cache",
)
MODES = (
    "plain",
    "bf16",
    "fp16",
    "LoRA",
    "fused projections",
    "gradient checkpointing",
    "layerwise casting",
    "group offload",
    "int8 (torchao)",
    "int8 (bitsandbytes)",
    "torch.compile before attach: refused",
    "torch.compile after attach",
)


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def kept(counts: list[int] | None) -> str:
    if not counts:
        return ""
    good, tried = counts
    return f"{good} of {tried}" if good < tried else str(tried)


def by_title(environment: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return sorted(environment["families"].items(), key=lambda item: item[1]["title"].lower())


def promises(environment: dict[str, Any]) -> str:
    rows = []
    for _, family in by_title(environment):
        first = [family["title"], f"`{family['pipeline']}`"]
        if not family["available"]:
            rows.append([*first, "cannot be imported there", *[""] * (len(SHORT) - 1)])
        else:
            rows.append([*first, *(kept(family["promises"].get(promise)) for promise in SHORT)])
    return table(["family", "pipeline", *SHORT.values()], rows)


def modes(environment: dict[str, Any], columns: tuple[str, ...], note: str) -> str:
    available = [family for _, family in by_title(environment) if family["available"]]
    available = [family for family in available if any(mode in family["modes"] for mode in columns)]
    tried = [mode for mode in columns if any(mode in f["modes"] or mode in f["not here"] for f in available)]
    rows, notes = [], {}
    for family in available:
        row = [family["title"]]
        for mode in tried:
            cell = kept(family["modes"].get(mode))
            reason = family["not here"].get(mode)
            if reason and not cell:
                cell = f"–<sup>{notes.setdefault(reason, len(notes) + 1)}</sup>"
            row.append(cell)
        rows.append(row)
    lines = [f"{number}. {reason}" for reason, number in notes.items()]
    return "\n\n".join([table(["family", *tried], rows), note, "\n".join(lines)]).rstrip()


def unknown(environment: dict[str, Any]) -> str:
    """What cannot be told, and for whom."""
    told: dict[str | None, list[str]] = {}
    for _, family in by_title(environment):
        told.setdefault(family.get("own loop"), []).append(family["title"])
    lines = [
        "The rows of these denoisers are not known; a hookpoint there has to state them: "
        + ", ".join(f"`{name}`" for name in environment.get("refused", []))
        + ".",
    ]
    if told.get("unknown"):
        lines.append(
            "The conditions of these are told by the pipeline's class, as their texts cannot be compared; in a subclass with "
            f"a loop of its own they are unknown: {', '.join(told['unknown'])}. Of the others they are seen there too."
        )
    return "\n\n".join(lines)


def versions(environment: dict[str, Any]) -> str:
    found = environment["versions"]
    return ", ".join(f"{package} {found[package]}" for package in PACKAGES if found.get(package))


def together(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The results of runs that shared the families out among them: each family's are those of the run that tried it."""
    first = runs[0]
    if any((run["versions"], run["cells"]) != (first["versions"], first["cells"]) for run in runs):
        raise SystemExit("the files are of runs with other versions or configurations")
    tried = {name: found for run in runs for name, found in run["families"].items() if found["promises"]}
    return {**first, "families": {**first["families"], **tried}}


def page(results: dict[str, Any]) -> str:
    parts = [INTRO.strip().replace("{modular}", ", ".join(results["newest"].get("modular", ["SDXL"])))]
    for name, title in ENVIRONMENTS.items():
        if name not in results:
            continue
        environment = results[name]
        how = CELLS[environment["cells"]]
        others = [
            family["title"]
            for _, family in by_title(environment)
            if family["available"] and family.get("cells", environment["cells"]) != environment["cells"]
        ]
        if others:  # taken by a run of some families alone
            how += f" (for {', '.join(others)}: {CELLS['pairwise']})"
        command = "make floor" if name == "floor" else "make matrix"
        parts += [
            f"## With {title}",
            f"{versions(environment)}; {how} of the configurations (`{command}`).",
            promises(environment),
            "### Ways of running the model",
            modes(environment, MODES, EMPTY),
        ]
        if any(mode in family["modes"] for family in environment["families"].values() for mode in CACHES):
            parts += ["### Caches", modes(environment, CACHES, CACHED)]
        if "refused" in environment:
            parts += ["### What is unknown", unknown(environment)]
    return "\n\n".join(parts) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--take", nargs="+", metavar=("ENVIRONMENT", "FILE"))
    parser.add_argument("--families", nargs="+", metavar="NAME", help="take these families of the run, keep the others")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    if arguments.take:
        environment, *files = arguments.take
        if environment not in ENVIRONMENTS:
            parser.error(f"--take {environment}: it is one of {', '.join(ENVIRONMENTS)}")
        if not files:
            parser.error(f"--take {environment} needs the file of a run")
        taken = together([json.loads(Path(file).read_text()) for file in files])
        if arguments.families:
            known = results[environment]
            if taken["versions"] != known["versions"]:
                parser.error(f"{files[0]} is of other versions than the {environment} results; take all families")
            some = {name: {**taken["families"][name], "cells": taken["cells"]} for name in arguments.families}
            taken = {**known, "families": {**known["families"], **some}}
        results[environment] = taken
        RESULTS.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
    written = page(results)
    if arguments.check:
        if PAGE.read_text() != written:
            print(
                "docs/pipelines.md is not what docs/pipelines.json says; run python tools/write_pipelines.py",
                file=sys.stderr,
            )
            return 1
        return 0
    PAGE.write_text(written)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
