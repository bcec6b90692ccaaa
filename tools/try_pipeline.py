"""Look at a trained pipeline: a sheet of what it draws, and what a judge says of it.

    python tools/try_pipeline.py build/training/unet --sheet sheet.png

Draws every object in every style once and some scenes, with the embedded pipelines' guidance and steps.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from sparsefeat.assets import GUIDANCE, N_STEPS, emojicanvas, emojiscenes, load_pipeline
from sparsefeat.evaluation.frechet import frechet_distance
from sparsefeat.evaluation.generation import TEST, accuracy, generate, whole_grid
from sparsefeat.evaluation.judge import FOLDER, judge_images, load_judge
from sparsefeat.measure.machine import draw_precision


def as_uint8(images: torch.Tensor) -> np.ndarray:
    return (images.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1).numpy()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sheet", type=Path, help="where to write the picture")
    parser.add_argument("--judge", type=Path, default=FOLDER)
    parser.add_argument("--every", type=int, default=1, help="draw every n-th cell of the grid")
    parser.add_argument("--scenes", type=int, default=20)
    arguments = parser.parse_args()
    pipe = load_pipeline(arguments.folder)
    tasks = whole_grid(TEST)[:: arguments.every]
    images = generate(pipe, tasks, n_steps=N_STEPS, guidance=GUIDANCE)
    judge = load_judge(arguments.judge)
    verdicts = judge_images(judge, images)
    print(accuracy(verdicts, tasks))
    canvas = emojicanvas.load()
    real = judge_images(judge, np.stack([canvas.on_white()[t.style, t.object] for t in tasks]))
    print(f"Frechet distance to the same drawings: {frechet_distance(verdicts.features, real.features):.2f}")
    rows = [as_uint8(images)]
    half = arguments.scenes // 2
    scenes = emojiscenes.scenes(half, seed=7) + emojiscenes.scenes(half, seed=7, split=emojiscenes.HELD_OUT)
    if scenes:
        generators = [torch.Generator().manual_seed(i) for i in range(len(scenes))]
        captions = [scene.caption for scene in scenes]
        with torch.no_grad(), draw_precision():
            drawn = pipe(
                captions, num_inference_steps=N_STEPS, guidance_scale=GUIDANCE, generator=generators, output_type="pt"
            ).images
        rows.append(as_uint8(drawn.float()))
        print(*captions, sep="\n")
    if arguments.sheet is not None:
        flat = np.concatenate(rows)
        across = 20
        flat = np.concatenate([flat, np.full((-len(flat) % across, *flat.shape[1:]), 255, np.uint8)])
        sheet = flat.reshape(-1, across, *flat.shape[1:]).swapaxes(1, 2)
        Image.fromarray(sheet.reshape(sheet.shape[0] * sheet.shape[1], -1, 3)).save(arguments.sheet)


if __name__ == "__main__":
    main()
