"""Train the judge on real drawings, and measure how far it can be trusted.

    python tools/train_judge.py                  # a few minutes on two cores; resumable

Objects are learned from the fifty drawn objects and from scenes of them, styles from the whole grid. Augmentation: shift, scale, rotation,
colour jitter, blur, and copies that went through the embedded autoencoder (the pipeline's images all come out of it;
none is a generated image). Beside the shipped judge, two more are trained to be honest about it: one that never sees a fifth of
the concepts (style accuracy on those), and one a vendor that never sees it (object accuracy on that vendor's drawings,
and how often it finds both objects of that vendor's scenes). The shipped judge itself is measured on scenes of pairs
that it never saw together.
"""

from __future__ import annotations

import argparse
import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from safetensors.torch import save_file
from train_autoencoder import OUT as VAE
from train_autoencoder import ROOT
from training_run import TrainingRun, half

from sparsefeat.assets import emojicanvas, emojiscenes
from sparsefeat.assets.emojiscenes import HELD_OUT, Scene
from sparsefeat.evaluation.judge import FOLDER, Judge, objects_present

BATCH = 128
N_SCENES = 6000


@dataclass(frozen=True)
class Scenes:
    """uint8 `images` [version, n, 3, 64, 64], bool `present` [n, object], int64 `styles` [n]."""

    images: torch.Tensor
    present: torch.Tensor
    styles: torch.Tensor


def drawn_scenes(scenes: list[Scene], vae: AutoencoderTiny | None = None) -> Scenes:
    """The scenes as drawn and, with an autoencoder, also as it gives them back."""
    drawn = [emojiscenes.draw(scene).image for scene in scenes]
    images = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()
    present = torch.zeros(len(scenes), len(emojicanvas.OBJECTS), dtype=torch.bool)
    for row, scene in zip(present, scenes, strict=True):
        row[list(scene.objects)] = True
    versions = [images] if vae is None else [images, autoencoded(images, vae, 0.05)]
    return Scenes(torch.stack(versions), present, torch.tensor([scene.style for scene in scenes]))


def augment(images: torch.Tensor) -> torch.Tensor:
    """Shift up to 4 pixels, scale 0.8 to 1.1, rotation up to 10 degrees, colour jitter, blur, noise."""
    n = len(images)
    scale, angle = 1 / (0.8 + 0.3 * torch.rand(n)), (torch.rand(n) - 0.5) * (20 * math.pi / 180)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 0, 1] = scale * angle.cos(), -scale * angle.sin()
    theta[:, 1, 0], theta[:, 1, 1] = scale * angle.sin(), scale * angle.cos()
    theta[:, :, 2] = (torch.rand(n, 2) - 0.5) * (4 * 4 / 64)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images - 1, grid, align_corners=False) + 1
    jitter = 1 + 0.1 * (torch.rand(n, 3, 1, 1) - 0.5)
    moved = 1 - (1 - moved) * jitter  # white stays white
    soft = F.avg_pool2d(F.pad(moved, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    moved = torch.lerp(moved, soft, (torch.rand(n, 1, 1, 1) * 0.8))
    return (moved + 0.02 * torch.randn_like(moved)).clamp(-1, 1)


@torch.no_grad()
def autoencoded(images: torch.Tensor, vae: AutoencoderTiny, jitter: float = 0.0) -> torch.Tensor:
    """uint8 [..., 3, 64, 64] through the autoencoder and back, latents jittered."""
    flat = images.flatten(0, -4)
    parts = []
    for chunk in flat.split(200):
        with torch.autocast("cpu", torch.bfloat16):
            latents = vae.encoder((chunk.float() / 127.5 - 1).contiguous(memory_format=torch.channels_last))
            decoded = vae.decoder(latents + jitter * torch.randn_like(latents)).float()
        parts.append(((decoded.clamp(-1, 1) + 1) * 127.5).round().byte())
    return torch.cat(parts).view(images.shape)


def train(
    name: str, objects: torch.Tensor, grid: torch.Tensor, scenes: Scenes, n_steps: int, hidden_vendor: int = -1
) -> Judge:
    """`objects` [version, style, object, 3, 64, 64] and `grid` [version, style, concept, ...] uint8, where the versions
    are the drawing and its autoencoded copies. `hidden_vendor` is left out.

    The object logits are at once a softmax's, for an image of one object, and one sigmoid's each: which are present."""
    torch.manual_seed(0)
    judge = Judge(objects.shape[2], objects.shape[1]).to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=3e-3, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, n_steps, pct_start=0.1)
    run = TrainingRun(
        ROOT / "build" / "training" / f"judge-{name}.pt",
        n_steps,
        {"judge": judge, "optimizer": optimizer, "schedule": schedule},
    )
    seen = torch.tensor([s for s in range(objects.shape[1]) if s != hidden_vendor])
    seen_scenes = torch.nonzero(scenes.styles != hidden_vendor)[:, 0]
    n_drawn, n_more = BATCH * 3 // 8, BATCH * 2 // 8
    n_scenes = BATCH - n_drawn - n_more
    for _, bar in run.steps():
        s, o = seen[torch.randint(len(seen), (n_drawn,))], torch.randint(objects.shape[2], (n_drawn,))
        gs, gc = seen[torch.randint(len(seen), (n_more,))], torch.randint(grid.shape[2], (n_more,))
        v, gv = torch.randint(len(objects), (n_drawn,)), torch.randint(len(grid), (n_more,))
        c, cv = (
            seen_scenes[torch.randint(len(seen_scenes), (n_scenes,))],
            torch.randint(len(scenes.images), (n_scenes,)),
        )
        styles = torch.cat([s, scenes.styles[c], gs])
        present = torch.cat([F.one_hot(o, objects.shape[2]).bool(), scenes.present[c]]).float()
        images = torch.cat([objects[v, s, o], scenes.images[cv, c], grid[gv, gs, gc]]).float() / 127.5 - 1
        images = augment(images).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16):
            object_logits, style_logits = judge(images)
        object_logits = object_logits.float()
        loss = F.cross_entropy(object_logits[:n_drawn], o, label_smoothing=0.05)
        # Summed over objects: one or two of fifty are present, and a mean would let the absent ones drown them.
        loss = loss + F.binary_cross_entropy_with_logits(object_logits[: len(present)], present) * present.shape[1] / 2
        loss = loss + F.cross_entropy(style_logits.float(), styles, label_smoothing=0.05)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return judge.eval()


@torch.no_grad()
def accuracy(judge: Judge, images: torch.Tensor, objects: torch.Tensor | None, styles: torch.Tensor) -> dict:
    predictions = [judge(chunk) for chunk in images.split(250)]
    result = {"style_accuracy": (torch.cat([p[1] for p in predictions]).argmax(1) == styles).float().mean().item()}
    if objects is not None:
        hits = torch.cat([p[0] for p in predictions]).argmax(1) == objects
        result["object_accuracy"] = hits.float().mean().item()
    result["n_images"] = len(images)
    return result


def found(judge: Judge, scenes: Scenes) -> dict:
    """Of images of two objects: how often both are found, how often exactly these two, and the style."""
    images = scenes.images[-1]
    present = objects_present(judge, images.permute(0, 2, 3, 1).numpy())
    both = (present & scenes.present).sum(1) == scenes.present.sum(1)
    return {
        "both_found": both.float().mean().item(),
        "exactly_both_found": (present == scenes.present).all(1).float().mean().item(),
        "n_images": images.shape[0],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--control-steps", type=int, default=250, help="steps of each judge of the honesty report")
    parser.add_argument("--vae", type=Path, default=VAE)
    arguments = parser.parse_args()
    vae = AutoencoderTiny.from_pretrained(arguments.vae).float().eval().to(memory_format=torch.channels_last)

    def uint8(canvas: emojicanvas.EmojiCanvas) -> torch.Tensor:
        return torch.from_numpy(canvas.on_white()).permute(0, 1, 4, 2, 3).contiguous()

    canvas = emojicanvas.load(ROOT / "build" / "emojicanvas" / "grid.npz")
    objects, grid = uint8(emojicanvas.load()), uint8(canvas)
    n_styles, n_objects = objects.shape[:2]
    style_of = torch.arange(n_styles).repeat_interleave(n_objects)
    object_of = torch.arange(n_objects).repeat(n_styles)
    flat = objects.flatten(0, 1).float() / 127.5 - 1

    torch.manual_seed(2)
    drawn_versions = torch.stack([objects, *(autoencoded(objects, vae, jitter) for jitter in (0.0, 0.1, 0.1))])
    grid_versions = torch.stack([grid, autoencoded(grid, vae, 0.05)])
    scenes = drawn_scenes(emojiscenes.scenes(N_SCENES, seed=4), vae)
    unseen_pairs = emojiscenes.scenes(600, seed=5, split=HELD_OUT)
    judge = train("shipped", drawn_versions, grid_versions, scenes, arguments.steps)
    torch.manual_seed(1_000_003)  # augmentations it has not seen
    coded = autoencoded(objects, vae).flatten(0, 1).float() / 127.5 - 1
    fresh = torch.cat([augment(version) for version in (flat, coded, flat, coded)])
    report: dict = {
        "steps": arguments.steps,
        "real": accuracy(judge, flat, object_of, style_of),
        "autoencoded": accuracy(judge, coded, object_of, style_of),
        "held_out_augmentations": accuracy(judge, fresh, object_of.repeat(4), style_of.repeat(4)),
        "held_out_pairs": found(judge, drawn_scenes(unseen_pairs)),
        "held_out_pairs_autoencoded": found(judge, drawn_scenes(unseen_pairs, vae)),
    }
    FOLDER.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in half(judge.state_dict()).items()}, FOLDER / "judge.safetensors")
    Path(FOLDER / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1), flush=True)

    # Honesty: concepts it never saw (every fifth of the grid, and none of them among the fifty it trains on).
    drawn = [canvas.names.index(name) for name in emojicanvas.OBJECTS]
    hidden = [c for c in range(len(canvas.names)) if c % 5 == 0 and c not in drawn]
    shown = [c for c in range(len(canvas.names)) if c not in hidden]
    control = train("unseen-concepts", drawn_versions, grid_versions[:, :, shown], scenes, arguments.control_steps)
    unseen = grid[:, hidden].flatten(0, 1).float() / 127.5 - 1
    report["unseen_concepts"] = accuracy(control, unseen, None, torch.arange(n_styles).repeat_interleave(len(hidden)))
    report["unseen_concepts"]["steps"] = arguments.control_steps
    report["unseen_vendor"] = {}
    for vendor, style in enumerate(emojicanvas.STYLES):
        control = train(
            f"without-{style}", drawn_versions, grid_versions, scenes, arguments.control_steps, hidden_vendor=vendor
        )
        rows = style_of == vendor
        measured = accuracy(control, flat[rows], object_of[rows], style_of[rows])
        its = drawn_scenes([scene for scene in unseen_pairs if scene.style == vendor])
        report["unseen_vendor"][style] = {
            "object_accuracy": measured["object_accuracy"],
            "n_images": int(rows.sum()),
            "scenes": found(control, its),
        }
    Path(FOLDER / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
