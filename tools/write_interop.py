"""Write docs/interop.md from docs/interop.json, which `make interop` measures.

    python tools/write_interop.py            # after `make interop`
    python tools/write_interop.py --check    # exit code 1 if the page is not what the JSON says

A test runs the check.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from sparsefeat.sae.formats import FORMATS

DOCS = Path(__file__).resolve().parents[1] / "docs"
RESULTS, PAGE = DOCS / "interop.json", DOCS / "interop.md"

# What is in a format, for the reader of the page.
HELD = {
    "sparsify": "top-k, groupmax, transcoders, skip transcoders; `signed` of v0; SAeUron's BatchTopK and `input_unit_norm`",
    "sae_lens": "standard, topk, jumprelu, gated, abstopk, matryoshka and batchtopk, (skip) transcoders; files of before 6.0",
    "unbox": "`config.json` + `state_dict.pth`, with `mean.pt` and `std.pt` as statistics; SAEmnesia's mixture with SAeUron's files",
    "openai": "one `.pt` file: TopK with per-row standardisation, ReLU",
    "dictionary_learning": "TopK, BatchTopK, Matryoshka, JumpReLU, Gated, Standard, AutoEncoderNew; checkpoints and backups of runs",
    "overcomplete": "state dicts of SAE, TopKSAE, JumpSAE, archetypal; linear and batch-norm encoders; pass `k=`",
    "crosscoder": "BatchTopK (by threshold) and ReLU crosscoders, as one SAE over the layers side by side",
    "itda": "`atoms.pt` + `metadata.yaml`; matching pursuit",
    "matryoshka": "`config.json` + `pytorch_model.bin`; BatchTopK by threshold, with `input_unit_norm`; SAEdit's",
    "difffract": "`transcoder_{img,txt}_L.pt`, `sae_{img,txt}_L.pt` of FLUX.1-schnell's MLPs; the input depends on the timestep",
    "bionemo": "one `.pt` with `model_state_dict`, `model_config`; top-k, ReLU",
    "gemma_scope": "`params.npz`, `params.safetensors`; JumpReLU of residual, MLP, attention, embedding; (skip) transcoders",
    "llama_scope": "`hyperparams.json` + `checkpoints/final.safetensors`; JumpReLU",
    "goodfire": "one `.pth`, `MODEL-SAE-lN.pth`; ReLU",
    "qwen_scope": "`layerN.sae.pt`; top-k, k from the repository's name or `k=`",
    "mwhanna": "`layer_N.safetensors`; ReLU transcoders of Qwen 3's MLPs",
    "fae": "after `python -m sparsefeat.sae.formats.convert_fae FOLDER OUT`: PCA normaliser, clip, raw top-k",
}

PAGE_TEXT = """\
# Other programs' SAEs

`sf.load_sae` finds out by itself whose files lie in a folder, and `sparsefeat sae convert SRC DST --format NAME` writes
the formats marked below (without `--format`, sparsefeat's own):

```bash
sparsefeat sae convert path/to/their-sae my-sae --hookpoint unet.mid_block.attentions.0
sparsefeat sae convert my-sae for-them --format sae_lens
sparsefeat sae info owner/repository --subfolder layer8
```

Foreign files are untrusted. Nothing in them is executed; what they declare is compared with the bytes that are there
before anything is allocated; a tensor or a key that the format's SAEs do not have is refused, as their own loaders do. A
pickle that needs more is refused with the command that saves its weights alone. `python -m tests.sae.fuzzing` tries
damaged files of every format for as long as you like. What most formats do not
say, the hookpoint, is passed: `sf.load_sae(source, hookpoint=…, base_model=…, k=…)`; `sf.check(sae, pipe, prompts)`
tells whether it fits.

{table}

*Verified against* is the published package that wrote the files and computed the code and the reconstruction which
sparsefeat's are compared with, in float32; “description” where nothing can be installed that reads the format, and files
and outputs follow its written description. The differences are the largest over all cases, entries of the code and of
the reconstruction, which are of order 1 to 10. In the last column that package opened what sparsefeat wrote ({written_by}).
Every SAE of every fixture was written in each format, {example}; what a format cannot express is
refused in one sentence.

| format | holds |
|---|---|
{held}

Cases that follow a description although there is a package, because no release of it writes them: {described}.

## SAEs of a pipeline's language model

Many pipelines carry a language model as text encoder, and SAEs of these are published with labels of their latents.
`sf.load_sae` reads them; the place (`model.layers.12`) is found in whichever text encoder has it:

```python
import sparsefeat as sf
from diffusers import Lumina2Pipeline

pipe = Lumina2Pipeline.from_pretrained("my-lumina-2")
sae = sf.load_sae("gemma-scope-2b-pt-res/layer_0/width_16k/average_l0_9")  # or by name: "gemma-scope-2b/12"
sae.names = sf.Names.read("labels.jsonl")
with sf.attach(pipe, rec := sf.Record(sae), sf.Steer(sae, scale={{"falling snow": 0}})) as run:
    image = pipe("a fox in the snow", num_inference_steps=2).images[0]
print(run[rec].top(3))
```

| pipeline | text encoder | SAEs, by name |
|---|---|---|
| Lumina 2, Sana | gemma-2-2b, gemma-2-2b-it | `gemma-scope-2b/0` to `/25` |
| HiDream | Llama-3.1-8B-Instruct | `goodfire/19`, `andyrdt-llama/3` to `/27`; `llama-scope/0` to `/31` are of the base model |
| FLUX.2 klein, Z-Image | Qwen3-4B, Qwen3-8B | `mwhanna-4b/0` to `/35`, `mwhanna-8b/0` to `/35` (transcoders); `qwen-scope-8b/0` to `/35` are of the base model |

* An SAE of a base model may not fit an instruct model. `sf.check(sae, pipe, prompts)` measures whether it does. It also
  tries an edit, and warns if nothing changes: some pipelines do not read the last layers.
* Names come from a file of yours (JSON, CSV), from a Neuronpedia export (`.jsonl.gz`), or, a few at a time, from its API:
  `sf.Names.of_neuronpedia("gemma-2-2b/12-gemmascope-res-16k", [3, 7], cache="labels")`. A name may be a part of a label, if
  only one label has it. `sparsefeat sae names FOLDER FILE` keeps them with an SAE of yours.
* A transcoder is recorded at the MLP's input. `sf.Steer` takes its code there and adds the change to the MLP's output; what
  the transcoder does not explain stays.
* `sparsefeat sae list` prints the table. `sparsefeat sae verify NAME "a prompt" --pipeline …` measures an SAE beside what is
  published of it. The table is tested on stand-ins; no weights were downloaded to write it.

## SAEs that are in memory

`sf.SAE.of(module)` takes an SAE of SAELens, sparsify or dictionary_learning that your script already has, and gives the
same one here. Its codes are compared on 64 rows before you get it.

Measured with Python {python} and torch {torch} by `make interop`, which makes every fixture of `tests/sae/formats/fixtures`
again with the published packages (the scripts are `tools/interop/NAME.py`), compares, and writes `docs/interop.json` and
this page. The tests read the committed fixtures and need none of the packages.
"""


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])


def row(found: dict[str, Any]) -> list[str]:
    written = found["written"]
    verified = f"{found['package']} {found['version']}" if found["package"] else "description"
    return [
        found["title"],
        f"`{found['format']}`",
        "yes",
        "yes" if written else "–",
        verified,
        str(len(found["cases"])),
        f"{found['read_difference']:.1e}",
        f"{written['largest_difference']:.1e}{'' if found['package'] else ' ¹'}" if written else "–",
    ]


def page(results: dict[str, Any]) -> str:
    formats = results["formats"]
    head = [
        "format",
        "`--format`",
        "read",
        "write",
        "verified against",
        "cases",
        "difference, read",
        "difference, written",
    ]
    described = [
        f"{', '.join(f['described_cases'])} ({f['title']})" for f in formats if f["package"] and f["described_cases"]
    ]
    most = max((f for f in formats if f["written"]), key=lambda f: f["written"]["written"])
    example = f"{most['written']['written']} of {most['written']['written'] + most['written']['refused']} in {most['title']}'s"
    return PAGE_TEXT.format(
        table=table(head, [row(f) for f in formats]),
        written_by="¹ sparsefeat itself, where there is no package",
        example=example,
        held="\n".join(f"| {f['title']} | {HELD[f['format']]} |" for f in formats),
        described="; ".join(described) or "none",
        python=results["python"],
        torch=results["torch"],
    )


def main() -> None:
    results = json.loads(RESULTS.read_text())
    measured, known = [f["format"] for f in results["formats"]], [f.name for f in FORMATS if f.name != "sparsefeat"]
    if measured != known:
        raise SystemExit(f"{RESULTS.name} has {measured}, formats are {known}: run `make interop`")
    if "--check" in sys.argv[1:]:
        if not PAGE.is_file() or PAGE.read_text() != page(results):
            raise SystemExit(f"{PAGE.name} is not what {RESULTS.name} says; run `python tools/write_interop.py`")
        return
    PAGE.write_text(page(results))
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    main()
