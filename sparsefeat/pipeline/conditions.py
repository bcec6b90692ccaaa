"""Which condition and which image each batch entry belongs to.

Pipelines with classifier-free guidance run the denoiser on a batch of several chunks, one a condition, each chunk
holding every image once, or once for each condition. In a batch nearly all put "uncond" first, and the others are
listed here by the name of their class; of two passes the conditional one comes first.
"""

from __future__ import annotations

import re
from typing import Any

from sparsefeat.pipeline.context import Call

Entries = tuple[tuple[str, ...], tuple[int, ...]]
"""(condition of each batch entry, index of the image each becomes)."""

_USUAL = {1: ("cond",), 2: ("uncond", "cond")}

# Read in diffusers 0.42.1. The key is a pattern that is looked for in the names of the pipeline's class and of its bases.
_LAYOUTS: dict[str, dict[int, tuple[str, ...]]] = {
    "InstructPix2Pix": {3: ("cond", "image", "uncond")},
    "PAG": {2: ("cond", "perturbed"), 3: ("uncond", "cond", "perturbed")},
    "^(Lumina(Text2Img)?Pipeline|ZImage|DiTPipeline|StableCascade|Wuerstchen)": {2: ("cond", "uncond")},
}

# The runs of one step where a pipeline runs its denoiser on one condition after the other: FLUX and Qwen-Image with
# `true_cfg_scale`, Wan, Lumina 2, HunyuanVideo and the like. No pipeline of diffusers 0.42.1 has the
# unconditional one first.
_PASSES = ("cond", "uncond")


def denoiser_entries(pipe: Any, call: Call, batch: int, earlier: tuple[int, ...] = ()) -> Entries:
    """The entries of one run of a denoiser on `batch` of them.

    `earlier` are the batch sizes of the runs before it since the scheduler's last step. They tell the two passes of
    guidance apart, which no argument of the model does.
    """
    n_images = call.n_images
    if n_images is None:  # neither prompts nor embeddings: the guidance tells how many chunks there are
        n_images = batch // 2 if call.guidance and batch % 2 == 0 else batch
    chunks = batch // n_images if n_images and batch % n_images == 0 else 0
    layout = _layout(pipe, call, chunks)
    if chunks == 1 and earlier:
        beside = max(earlier) > n_images  # runs of several chunks
        if beside and not call.own_loop:  # the skip-layer guidance of SD3
            layout = ("perturbed",)
        elif call.guidance and not beside:
            layout = (_PASSES[len(earlier) % len(_PASSES)],)
    if layout is None:
        raise ValueError(
            f"{type(pipe).__name__} ran its denoiser on {batch} batch entries for {n_images} images "
            f"(guidance {'on' if call.guidance else 'off'}), a layout that sparsefeat does not know: which entries "
            "are conditional cannot be told; add it to sparsefeat/pipeline/conditions.py"
        )
    return tuple(c for c in layout for _ in range(n_images)), tuple(range(n_images)) * chunks


def _layout(pipe: Any, call: Call, chunks: int) -> tuple[str, ...] | None:
    for name, layouts in _LAYOUTS.items():
        if chunks in layouts and any(re.search(name, cls.__name__) for cls in type(pipe).__mro__):
            if name == "PAG" and chunks == 2 and not pipe.do_perturbed_attention_guidance:
                break  # perturbed guidance is off: the two chunks are the usual ones
            return layouts[chunks]
    return _USUAL.get(chunks)


def text_entries(call: Call, batch: int, seen: int) -> Entries:
    """The entries of one run of a text encoder that has encoded `seen` texts in this call before.

    Pipelines encode the prompts first, in one run or one by one, and the negative prompts after. With the prompt given
    as embeddings there are only negative prompts to encode.
    """
    given_as_text = call.prompts is not None and call.arguments.get("prompt_embeds") is None
    n_prompts = call.n_prompts or batch
    n_cond = n_prompts if given_as_text or call.own_loop else 0
    conditions = tuple("cond" if row < n_cond else "uncond" for row in range(seen, seen + batch))
    prompts = (row % n_prompts for row in range(seen, seen + batch))
    return conditions, tuple(prompt * call.images_per_prompt for prompt in prompts)


def outside_entries(batch: int) -> Entries:
    """The entries of a model that knows no condition, such as a VAE."""
    return ("cond",) * batch, tuple(range(batch))


def spread(entries: Entries, batch: int, attention: int = 0) -> Entries:
    """The same for a module inside that works on a multiple of the model's batch (frames folded into it), or on a part:
    perturbed-attention guidance attends for its perturbed entries apart, in the module's second `attention`; Kandinsky 5
    runs a text once for several videos, as the first of them.
    """
    conditions, images = entries
    if batch == len(conditions):
        return entries
    perturbed = [condition == "perturbed" for condition in conditions]
    if batch in (perturbed.count(False), perturbed.count(True)):
        wanted = perturbed.count(False) != batch or (attention > 0 and perturbed.count(True) == batch)
        rows = [row for row, is_perturbed in enumerate(perturbed) if is_perturbed is wanted]
        return tuple(conditions[row] for row in rows), tuple(images[row] for row in rows)
    times = batch // len(conditions) if conditions and batch % len(conditions) == 0 else 0
    if not times and batch and len(conditions) % batch == 0 and len(set(conditions)) == 1:
        each = len(conditions) // batch
        return conditions[::each], images[::each]
    if not times:
        raise ValueError(f"a block ran on {batch} batch entries inside a model that runs on {len(conditions)}")
    return tuple(c for c in conditions for _ in range(times)), tuple(i for i in images for _ in range(times))
