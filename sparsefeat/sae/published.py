"""Published SAEs by name: `load_sae("sdxl-unbox/up.0.1")`. Where the files lie, and what is not in them.

Repositories, files and numbers are as their authors or SAELens' directory name them; nothing here was downloaded when
the table was written. A name is `FAMILY/WHICH`; a local path of that name wins.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class PublishedSAE:
    """One published SAE.

    repository, subfolder: on the hub; the latter a folder or a file. hookpoint, base_model: where it belongs. licence:
    of the weights, "not stated" where no licence was seen. l0: active latents a row, as published (k where it selects k).
    neuronpedia: model and source of its feature labels, as `Names.of_neuronpedia` takes them.
    """

    name: str
    repository: str
    subfolder: str | None
    hookpoint: str
    base_model: str
    licence: str = "not stated"
    l0: float | None = None
    neuronpedia: str | None = None


# Average L0 of the 16k-wide SAEs that Gemma Scope's authors recommend, one a layer: part of their folders' names.
_GEMMA_L0 = (
    105,
    102,
    141,
    59,
    124,
    68,
    70,
    69,
    71,
    73,
    77,
    80,
    82,
    84,
    84,
    78,
    78,
    77,
    74,
    73,
    71,
    70,
    72,
    75,
    73,
    116,
)
_UNBOX = {"down.2.1": "down_blocks.2.attentions.1", "mid.0": "mid_block.attentions.0"}
_UNBOX |= {"up.0.0": "up_blocks.0.attentions.0", "up.0.1": "up_blocks.0.attentions.1"}
_LLAMA, _INSTRUCT = "meta-llama/Llama-3.1-8B", "meta-llama/Llama-3.1-8B-Instruct"


def _table() -> Iterator[PublishedSAE]:
    for name, block in _UNBOX.items():
        folder = f"unet.{block}_k10_hidden5120_auxk256_bs4096_lr0.0001/final"
        place = f"unet.{block}:diff"
        yield PublishedSAE(f"sdxl-unbox/{name}", "surokpro2/sdxl-saes", folder, place, "stabilityai/sdxl-turbo", l0=10)
    for name, number in (("object", 1), ("style", 2)):
        place = f"unet.up_blocks.1.attentions.{number}"
        model = "stable-diffusion-v1-5/stable-diffusion-v1-5"
        yield PublishedSAE(f"saeuron/{name}", "bcywinski/SAeUron", place, place, model, l0=32)
    yield PublishedSAE(
        "saedit/t5-xxl",
        "Ronenk94/T5_matryoshka_sae",
        "matryoshka_sae_top_300",
        "text_encoder_2.encoder.final_layer_norm",
        "black-forest-labs/FLUX.1-dev",
        l0=300,
    )
    for stream, mlp in (("img", "ff"), ("txt", "ff_context")):
        for kind, folder, blocks in (
            ("transcoder", "temporal-aware-transcoders", (*range(16), 18)),
            ("sae", "temporal-aware-saes", (6, 12, 18)),
        ):
            for block in blocks:
                place = f"transformer.transformer_blocks.{block}.{mlp}{':input' if kind == 'transcoder' else ''}"
                file, model = f"{folder}/{kind}_{stream}_{block}.pt", "black-forest-labs/FLUX.1-schnell"
                name = f"difffract/{kind}_{stream}_{block}"
                yield PublishedSAE(name, "Artalmaz31/DifFRACT", file, place, model, "Apache-2.0")
    for layer, l0 in enumerate(_GEMMA_L0):
        yield PublishedSAE(
            f"gemma-scope-2b/{layer}",
            "google/gemma-scope-2b-pt-res",
            f"layer_{layer}/width_16k/average_l0_{l0}",
            f"model.layers.{layer}",
            "google/gemma-2-2b",
            "CC-BY-4.0",
            l0,
            f"gemma-2-2b/{layer}-gemmascope-res-16k",
        )
    for layer in range(32):
        folder, source = f"Llama3_1-8B-Base-L{layer}R-8x", f"llama3.1-8b/{layer}-llamascope-res-32k"
        repository, place = "fnlp/Llama3_1-8B-Base-LXR-8x", f"model.layers.{layer}"
        yield PublishedSAE(f"llama-scope/{layer}", repository, folder, place, _LLAMA, l0=50, neuronpedia=source)
    file, source = "Llama-3.1-8B-Instruct-SAE-l19.pth", "llama3.1-8b-it/19-resid-post-gf"
    repository = "Goodfire/Llama-3.1-8B-Instruct-SAE-l19"
    yield PublishedSAE("goodfire/19", repository, file, "model.layers.19", _INSTRUCT, l0=91, neuronpedia=source)
    for layer in range(3, 28, 4):
        folder, source = f"resid_post_layer_{layer}/trainer_1", f"llama3.1-8b-it/{layer}-resid-post-aa"
        repository, place = "andyrdt/saes-llama-3.1-8b-instruct", f"model.layers.{layer}"
        yield PublishedSAE(f"andyrdt-llama/{layer}", repository, folder, place, _INSTRUCT, neuronpedia=source)
    for size in (4, 8):
        for layer in range(36):
            repository, file = f"mwhanna/qwen3-{size}b-transcoders", f"layer_{layer}.safetensors"
            place, model = f"model.layers.{layer}.mlp:input", f"Qwen/Qwen3-{size}B"
            source = f"qwen3-{size}b/{layer}-transcoder-hp"
            yield PublishedSAE(f"mwhanna-{size}b/{layer}", repository, file, place, model, neuronpedia=source)
    for layer in range(36):
        repository, file = "Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50", f"layer{layer}.sae.pt"
        model = "Qwen/Qwen3-8B-Base"
        yield PublishedSAE(f"qwen-scope-8b/{layer}", repository, file, f"model.layers.{layer}", model, l0=50)


PUBLISHED_SAES: dict[str, PublishedSAE] = {sae.name: sae for sae in _table()}
FAMILIES = frozenset(name.partition("/")[0] for name in PUBLISHED_SAES)


def published(name: str) -> PublishedSAE | None:
    """The entry of this name; None if no family of the table is called so. A wrong one of a family is refused."""
    if name in PUBLISHED_SAES or name.partition("/")[0] not in FAMILIES:
        return PUBLISHED_SAES.get(name)
    family = [known for known in PUBLISHED_SAES if known.startswith(name.partition("/")[0] + "/")]
    near = difflib.get_close_matches(name, family, n=3, cutoff=0) or family[:3]
    raise ValueError(f"{name!r} is not in the table of published SAEs: did you mean {', '.join(near)}?")
