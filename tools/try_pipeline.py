"""Look at a trained pipeline: a sheet of what it draws, and what a judge says of it.

    python tools/try_pipeline.py build/training/unet --sheet sheet.png

Draws every object in every style, and scenes of two objects, with the embedded pipelines' guidance and steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusion3Pipeline, StableDiffusionPipeline
from PIL import Image

from sparsefeat.assets import GUIDANCE, N_STEPS, emojicanvas, emojiscenes, load_pipeline
from sparsefeat.assets.emojiscenes import Scene
from sparsefeat.evaluation.frechet import frechet_distance
from sparsefeat.evaluation.generation import TEST, accuracy, generate, whole_grid
from sparsefeat.evaluation.judge import FOLDER, judge_images, load_judge
from sparsefeat.evaluation.pixel_judge import label_pixels, load_pixel_judge, objects_drawn
from sparsefeat.measure.machine import draw_precision


def as_uint8(images: torch.Tensor) -> np.ndarray:
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def draw_scenes(
    pipe: StableDiffusionPipeline | StableDiffusion3Pipeline, captions: list[str], batch: int = 20
) -> np.ndarray:
    """uint8 [n, 64, 64, 3], scene i from noise of seed i."""
    parts = []
    for start in range(0, len(captions), batch):
        some = captions[start : start + batch]
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(some))]
        with torch.no_grad(), draw_precision():
            drawn = pipe(
                some, num_inference_steps=N_STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="pt"
            ).images
        parts.append(as_uint8(drawn.float()))
    return np.concatenate(parts)


def both_found(labels: torch.Tensor, scenes: list[Scene]) -> float:
    """The share of scenes whose objects all cover a hundredth of the image in `labels` [n, 64, 64]."""
    drawn = objects_drawn(labels)
    return float(np.mean([row[list(scene.objects)].all().item() for row, scene in zip(drawn, scenes, strict=True)]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sheet", type=Path, help="where to write the picture")
    parser.add_argument("--judge", type=Path, default=FOLDER)
    parser.add_argument("--every", type=int, default=1, help="draw every n-th cell of the grid")
    parser.add_argument("--seeds", type=int, default=1, help="draw each cell so many times")
    parser.add_argument("--scenes", type=int, default=100, help="scenes of two objects, and as many of held-out pairs")
    arguments = parser.parse_args()
    pipe = load_pipeline(arguments.folder)
    tasks = [t for repeat in range(arguments.seeds) for t in whole_grid(TEST, repeat)[:: arguments.every]]
    images = generate(pipe, tasks, n_steps=N_STEPS, guidance=GUIDANCE)
    judge = load_judge(arguments.judge)
    verdicts = judge_images(judge, images)
    print(accuracy(verdicts, tasks))
    canvas = emojicanvas.load()
    real = judge_images(judge, np.stack([canvas.on_white()[t.style, t.object] for t in tasks]))
    print(f"Frechet distance to the same drawings: {frechet_distance(verdicts.features, real.features):.2f}")
    rows = [as_uint8(images[: len(tasks) // arguments.seeds])]
    pixel_judge = load_pixel_judge()
    for split in (emojiscenes.TRAIN, emojiscenes.HELD_OUT) if arguments.scenes else ():
        scenes = emojiscenes.scenes(arguments.scenes, seed=7, n_objects=(2,), split=split)
        drawn = draw_scenes(pipe, [scene.caption for scene in scenes])
        rows.append(drawn[:20])
        pixels = np.stack([emojiscenes.draw(scene).image for scene in scenes])
        found, of_real = (both_found(label_pixels(pixel_judge, some), scenes) for some in (drawn, pixels))
        print(f"two objects, {split} pairs: both found in {found:.0%} of {len(scenes)} (of real scenes: {of_real:.0%})")
    if arguments.sheet is not None:
        flat = np.concatenate(rows)
        across = 20
        flat = np.concatenate([flat, np.full((-len(flat) % across, *flat.shape[1:]), 255, np.uint8)])
        sheet = flat.reshape(-1, across, *flat.shape[1:]).swapaxes(1, 2)
        Image.fromarray(sheet.reshape(sheet.shape[0] * sheet.shape[1], -1, 3)).save(arguments.sheet)


if __name__ == "__main__":
    main()
