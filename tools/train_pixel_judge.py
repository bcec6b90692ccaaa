"""Train the pixel judge on real scenes and drawings, and measure it on scenes of pairs it never saw together.

    python tools/train_pixel_judge.py            # some fifteen minutes on two cores; resumable

Half of the images went through the embedded autoencoder, as all generated ones do; none is a generated image.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from torch import Tensor
from train_autoencoder import OUT as VAE
from train_autoencoder import ROOT
from train_judge import autoencoded
from training_run import TrainingRun, half

from sparsefeat.assets import emojicanvas, emojiscenes
from sparsefeat.assets.emojiscenes import HELD_OUT, Placed, Scene
from sparsefeat.evaluation.pixel_judge import FOLDER, PixelJudge, label_pixels, labels_of, mean_iou

BATCH = 48
N_SCENES = 12_000
PEAK_LR = 4e-3


def drawn(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """uint8 images [n, 3, 64, 64] and labels [n, 64, 64] of scenes."""
    made = [emojiscenes.draw(scene) for scene in scenes]
    images = torch.from_numpy(np.stack([one.image for one in made])).permute(0, 3, 1, 2).contiguous()
    labels = [labels_of(one.masks, scene.objects) for one, scene in zip(made, scenes, strict=True)]
    return images, torch.stack(labels).byte()


def singles(n: int, seed: int) -> list[Scene]:
    """Drawings alone, at sizes from a third of the canvas to all of it."""
    rng = np.random.default_rng(seed)
    scenes = []
    for _ in range(n):
        size = int(rng.integers(24, emojiscenes.SIZE + 1))
        corner = (rng.random(2) * (emojiscenes.SIZE - size + 1)).astype(int).tolist()
        style, name = int(rng.integers(len(emojicanvas.STYLES))), int(rng.integers(len(emojicanvas.OBJECTS)))
        scenes.append(Scene(style, (Placed(name, size, *corner),)))
    return scenes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--vae", type=Path, default=VAE)
    arguments = parser.parse_args()
    vae = AutoencoderTiny.from_pretrained(arguments.vae).float().eval().to(memory_format=torch.channels_last)
    torch.manual_seed(0)
    images, labels = drawn(emojiscenes.scenes(N_SCENES, seed=2) + singles(N_SCENES // 3, seed=3))
    coded = autoencoded(images, vae, 0.05)
    judge = PixelJudge().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=PEAK_LR, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, arguments.steps, pct_start=0.1)
    run = TrainingRun(
        ROOT / "build" / "training" / "pixel-judge.pt",
        arguments.steps,
        {"judge": judge, "optimizer": optimizer, "schedule": schedule},
    )
    for _, bar in run.steps():
        picked = torch.randint(len(images), (BATCH,))
        batch = torch.where(torch.rand(BATCH, 1, 1, 1) < 0.5, images[picked], coded[picked]).float() / 127.5 - 1
        jitter = 1 + 0.1 * (torch.rand(BATCH, 3, 1, 1) - 0.5)
        batch = 1 - (1 - batch) * jitter + 0.02 * torch.randn_like(batch)
        with torch.autocast("cpu", torch.bfloat16):
            logits = judge(batch.contiguous(memory_format=torch.channels_last))
        loss = F.cross_entropy(logits.float(), labels[picked].long())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    judge.eval()
    report: dict = {"steps": arguments.steps, "n_images": 500}
    torch.manual_seed(1_000_003)
    for name, scenes in (
        ("held_out_pairs", emojiscenes.scenes(500, seed=11, split=HELD_OUT)),
        ("unseen_scenes", emojiscenes.scenes(500, seed=12)),
        ("unseen_drawings_alone", singles(500, seed=13)),
    ):
        images, labels = drawn(scenes)
        for kind, shown in (("real", images), ("autoencoded", autoencoded(images, vae))):
            predicted = label_pixels(judge, shown.permute(0, 2, 3, 1).numpy())
            report[f"{name}_{kind}"] = {
                "miou": mean_iou(predicted, labels.long()),
                "pixel_accuracy": (predicted == labels).float().mean().item(),
            }
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in half(judge.state_dict()).items()}, FOLDER / "pixel_judge.safetensors")
    (FOLDER / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
