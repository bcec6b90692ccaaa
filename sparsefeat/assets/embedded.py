"""The embedded pipelines: trained text-to-image models with their sparse autoencoders, offline and small.

The default is a real `StableDiffusionPipeline`, its sibling with joint attention a `StableDiffusion3Pipeline`; both were
trained on EmojiCanvas and EmojiScenes (`tools/train_pipeline.py`). Everything that works on one of them works on Stable
Diffusion by changing the folder's name.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from sparsefeat.whole import as_path

if TYPE_CHECKING:  # from their own files: mypy takes what diffusers itself exports for a stand-in that cannot be called
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import StableDiffusion3Pipeline

FOLDER = Path(__file__).parent

PIPELINE = FOLDER / "pipeline"
SAES = FOLDER / "saes"
JOINT = FOLDER / "joint"
JOINT_SAES = FOLDER / "joint_saes"

# What the embedded SAEs say they are of.
EMBEDDED_NAME = "EmojiCanvas pipeline embedded in sparsefeat"
JOINT_NAME = "EmojiCanvas joint pipeline embedded in sparsefeat"

# One guidance scale and one number of steps for everything that is shown or measured on the embedded pipeline.
N_STEPS = 20
GUIDANCE = 3.0

# What the shell and the explorer erase with by SAeUron, unless told otherwise: latents a step, and their factor.
ERASE_LATENTS = 32
ERASE_GAMMA = -0.5


def weights_fingerprint(*folders: Path) -> str:
    """12 hexadecimal digits of the weights and settings in folders: any change of a file's content or name changes them."""
    digest = hashlib.sha256()
    for folder in folders:
        for file in sorted(
            file
            for file in folder.rglob("*")
            if file.suffix in (".safetensors", ".bin", ".json", ".txt", ".model") and file.name != "report.json"
        ):
            digest.update(f"{file.relative_to(folder.parent).as_posix()}\0".encode())
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def embedded_fingerprint(joint: bool = False) -> str:
    """`weights_fingerprint` of everything that is measured here: the pipeline's files, the SAEs' and the judges'; with
    `joint` those of the joint pipeline too.

    Figures that were measured under another fingerprint are of other weights.
    """
    both = (JOINT, JOINT_SAES) if joint else ()
    return weights_fingerprint(PIPELINE, SAES, FOLDER / "judge", FOLDER / "pixel_judge", *both)


def sae_folders(of: Path = SAES) -> list[Path]:
    """The folders of the embedded SAEs, each for `sf.load_sae`; with JOINT_SAES those of the joint pipeline."""
    return sorted(folder.parent for folder in of.glob("*/config.json"))


def block_sae_folder() -> Path:
    """The SAE of a whole block, `up_blocks.0.attentions.0`: for looking at features and steering."""
    return SAES / "up_blocks.0.attentions.0"


def cross_attention_sae_folders() -> list[Path]:
    """The SAEs of the cross-attention of the layers at full resolution, where the text comes into the image."""
    return [folder for folder in sae_folders() if folder.name.endswith(".attn2")]


def text_encoder_sae_folder() -> Path:
    """The SAE of the text encoder's first layer: for erasing what the prompt asks for."""
    return SAES / "text_encoder.encoder.layers.0"


@contextlib.contextmanager
def _quiet_loading() -> Iterator[None]:
    """Without the notices and bars of diffusers and transformers, which are of no use to who opens the embedded pipeline."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    libraries = (of_diffusers, of_transformers)
    before = [(library.get_verbosity(), library.is_progress_bar_enabled()) for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, (level, bars) in zip(libraries, before, strict=True):
            library.set_verbosity(level)
            if bars:
                library.enable_progress_bar()


@overload
def load_pipeline(folder: Path | str, **options: Any) -> StableDiffusionPipeline | StableDiffusion3Pipeline: ...
@overload
def load_pipeline(**options: Any) -> StableDiffusionPipeline: ...
def load_pipeline(folder: Path | str = PIPELINE, **options: Any) -> StableDiffusionPipeline | StableDiffusion3Pipeline:
    """`DiffusionPipeline.from_pretrained(folder)` in fp32, quiet: the embedded one, JOINT, or one that the tools trained.

    A joint pipeline (`StableDiffusion3Pipeline`) without a third text encoder is opened without one.

    Raises:
        FileNotFoundError: no pipeline is there. TypeError: `folder` is no path. ValueError: it is empty, or damaged.
    """
    import torch
    from diffusers import DiffusionPipeline

    index = as_path(folder) / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"no pipeline in {folder}; give a diffusers folder, or train one: `python tools/train_pipeline.py`"
        )
    try:
        kind = json.loads(index.read_text())["_class_name"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{index} is damaged ({error}); copy the pipeline again") from error
    if kind == "StableDiffusion3Pipeline":
        # diffusers requires both of these of SD3's pipeline, and writes neither where it is absent.
        options = {
            name: None for name in ("text_encoder_3", "tokenizer_3") if not (index.parent / name).is_dir()
        } | options
    with _quiet_loading():
        pipe = DiffusionPipeline.from_pretrained(str(folder), **options)
    for part in pipe.components.values():  # transformers keeps the file's fp16, diffusers does not
        if isinstance(part, torch.nn.Module) and part.dtype != torch.float32:
            part.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe
