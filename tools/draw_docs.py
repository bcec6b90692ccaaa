"""The pictures of the docs, drawn by the embedded pipeline: `python tools/draw_docs.py` writes docs/pictures/*.png.

A minute or two on a quiet machine. The diagrams beside them (*.svg) are drawn by hand.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image

import sparsefeat as sf
from sparsefeat.assets import (
    GUIDANCE,
    N_STEPS,
    block_sae_folder,
    cross_attention_sae_folders,
    load_pipeline,
    text_encoder_sae_folder,
)
from sparsefeat.assets import emojicanvas as canvas
from sparsefeat.features import collect_statistics
from sparsefeat.report import contact_sheet, overlay

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "pictures"
PROMPT = "a noto emoji of a fox"
LATENTS = 5
SOURCE, TURNED_UP = "a noto emoji of a pizza", 8
STRENGTHS = (0.0, 2.0, 3.0, 4.0, 6.0)
OTHERS = ("owl", "rocket", "pizza", "key")
CALL: dict[str, Any] = {"num_inference_steps": N_STEPS, "guidance_scale": GUIDANCE}


def draw(
    pipe: Any, prompts: list[str], *instruments: sf.Instrument, seed: int = 0, **more: Any
) -> tuple[list[Image.Image], Any]:
    """Images of the prompts, each from noise of its own, and the session if there were instruments."""
    call = {**CALL, "generator": [torch.Generator().manual_seed(seed + i) for i in range(len(prompts))], **more}
    if not instruments:
        return pipe(prompts, **call).images, None
    with sf.attach(pipe, *instruments) as run:
        return pipe(prompts, **call).images, run


def steps(pipe: Any) -> Image.Image:
    """What the image would be if it ended at a step: the noisy latents, decoded."""
    shown: dict[int, torch.Tensor] = {}

    def keep(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        shown[step + 1] = values["latents"].clone()
        return values

    draw(pipe, [PROMPT], callback_on_step_end=keep)
    wanted = [1, 4, 8, 12, N_STEPS]
    images = []
    for step in wanted:
        with torch.no_grad():
            decoded = pipe.vae.decode(shown[step] / pipe.vae.config.scaling_factor).sample
        images += pipe.image_processor.postprocess(decoded)
    return contact_sheet([images], [""], [[f"step {step} of {N_STEPS}" for step in wanted]])


def steering(pipe: Any, sae: sf.SAE) -> tuple[list[Image.Image], list[str]]:
    """The fox with more and more of those latents that the pizza has most more of than it."""
    record = sf.Record(sae)
    _, run = draw(pipe, [PROMPT, SOURCE], record)
    of_fox, of_pizza = ({latent.latent: latent.score for latent in run[record].top(10**4, image=i)} for i in (0, 1))
    surplus = {latent: score - of_fox.get(latent, 0.0) for latent, score in of_pizza.items()}
    most = sorted(surplus, key=lambda latent: -surplus[latent])[:TURNED_UP]
    images = []
    for strength in STRENGTHS:
        images += draw(pipe, [PROMPT], sf.Steer(sae, add={latent: strength * surplus[latent] for latent in most}))[0]
    return images, [f"{strength:g} × the pizza's latents" if strength else "the fox" for strength in STRENGTHS]


def main() -> None:
    pipe = load_pipeline()
    block, crossed = sf.load_sae(block_sae_folder()), [sf.load_sae(f) for f in cross_attention_sae_folders()]
    pages: dict[str, Image.Image] = {"steps": steps(pipe)}

    record, words = sf.Record(block), sf.HeatMaps()
    (plain,), run = draw(pipe, [PROMPT], record, words)
    found = [latent.latent for latent in run[record].top(LATENTS)]
    maps = [overlay(plain, run[record].map(latent)) for latent in found]
    named = ["the drawing", *(f"latent {latent}" for latent in found)]
    pages["latents"] = contact_sheet([[plain, *maps]], [""], [named])

    edited, times = steering(pipe, sf.load_sae(text_encoder_sae_folder()))
    pages["steering"] = contact_sheet([edited], [""], [times])

    texts = [PROMPT, "a twemoji emoji of an owl"]
    worded: list[list[Image.Image]] = []
    for prompt in texts:
        (image,), of = draw(pipe, [prompt], words)
        worded.append(
            [
                image,
                *(
                    overlay(image, of[words].word(word).values)
                    for word in prompt.split()
                    if word not in ("a", "an", "of")
                ),
            ]
        )
    heads = [["", *(word for word in prompt.split() if word not in ("a", "an", "of"))] for prompt in texts]
    pages["words"] = contact_sheet(worded, [f"“{prompt}”" for prompt in texts], heads)

    prompts = {name: [canvas.prompt(name, style) for style in canvas.STYLES] for name in ("fox", *OTHERS)}
    fewer = {**CALL, "num_inference_steps": 10}
    erase = [
        sf.Erase.from_statistics(
            sae, collect_statistics(pipe, sae, prompts, **fewer), "fox", n_latents=8, gamma=-1.0, magnitude="scale"
        )
        for sae in crossed
    ]
    targets, others = prompts["fox"], [canvas.prompt(name, "noto") for name in OTHERS]
    before, after = draw(pipe, [*targets, *others])[0], draw(pipe, [*targets, *others], *erase)[0]
    n = len(targets)
    pairs = [
        [image for pair in zip(before[part], after[part], strict=True) for image in pair]
        for part in (slice(n), slice(n, None))
    ]
    pages["erasing"] = contact_sheet(pairs, ["fox", "others"], [["before", "after"] * (len(row) // 2) for row in pairs])

    pages["overview"] = contact_sheet(
        [[plain, *maps[:3]], [edited[i] for i in (0, 2, 3, 4)], [before[0], after[0], before[n], after[n]], worded[0]],
        ["find", "steer", "erase “fox”", "map words"],
        [
            ["the drawing", *named[1:4]],
            [times[i] for i in (0, 2, 3, 4)],
            ["fox", "erased", "another", "stays"],
            ["the drawing", *heads[0][1:]],
        ],
    )
    for name, page in pages.items():
        page.quantize(255).save(FOLDER / f"{name}.png", optimize=True)
        print(FOLDER / f"{name}.png")


if __name__ == "__main__":
    main()
