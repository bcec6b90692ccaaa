"""Train the embedded pipelines' autoencoder: 64x64 images to 16x16x4 latents and back.

    python tools/train_autoencoder.py --start-from shipped   # from the shipped one, or from nothing; resumable
    python tools/train_autoencoder.py --refine               # then the decoder alone

Of each batch an eighth is from the whole grid of drawings, three eighths are the fifty objects that the pipelines
draw, and half are scenes of them. Loss: L1 plus MSE, and a penalty that keeps each latent channel near mean 0 and
variance 1, so that no scaling factor is needed. Latents are jittered in training, because the diffusion model's are
never exact. Refining freezes the encoder, and so the latents: a pipeline trained on them goes on unchanged, and its
images get sharper.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from training_run import Averaged, TrainingRun

from sparsefeat.assets import emojicanvas, emojiscenes
from sparsefeat.assets.embedded import PIPELINE

ROOT = Path(__file__).resolve().parents[1]
RUN = ROOT / "build" / "training" / "autoencoder.pt"
OUT = ROOT / "build" / "training" / "vae"
BATCH = 64
N_SCENES = 8000
PEAK_LR = 1e-3  # twice that ended in jumps of the loss


def build() -> AutoencoderTiny:
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 2, 2),
        num_decoder_blocks=(2, 2, 1),
        latent_channels=4,
        upsampling_scaling_factor=2,
        scaling_factor=1.0,
    )


def augment(images: torch.Tensor, mirrored: bool) -> torch.Tensor:
    """Random shift of up to 3 pixels, scale 0.85 to 1.1, and mirror if asked for, on white. [n, 3, 64, 64] in [-1, 1]."""
    n = images.shape[0]
    scale = 1 / (0.85 + 0.25 * torch.rand(n))
    mirror = torch.where((torch.rand(n) < 0.5) & mirrored, -1.0, 1.0)
    theta = torch.zeros(n, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = scale * mirror, scale
    theta[:, :, 2] = (torch.rand(n, 2) - 0.5) * (4 * 3 / 64)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    return F.grid_sample(images - 1, grid, align_corners=False) + 1  # outside the frame: white


def psnr(model: AutoencoderTiny, images: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB over images in [-1, 1]."""
    with torch.no_grad():
        errors = [(model.decoder(model.encoder(b)).clamp(-1, 1) - b).pow(2).mean() for b in images.split(100)]
    return (10 * torch.log10(4 / torch.stack(errors).mean())).item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--start-from", choices=["nothing", "shipped"], default="nothing")
    parser.add_argument("--refine", action="store_true", help="train the decoder further, and leave the encoder")
    arguments = parser.parse_args()

    def tensor(canvas: emojicanvas.EmojiCanvas) -> torch.Tensor:
        return torch.from_numpy(canvas.on_white()).flatten(0, 1).permute(0, 3, 1, 2).contiguous()  # uint8

    grid = tensor(emojicanvas.load(ROOT / "build" / "emojicanvas" / "grid.npz"))
    objects = tensor(emojicanvas.load())
    drawn = [emojiscenes.draw(scene).image for scene in emojiscenes.scenes(N_SCENES, seed=1)]
    scenes = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).contiguous()
    held_out = [emojiscenes.draw(scene).image for scene in emojiscenes.scenes(400, split=emojiscenes.HELD_OUT)]
    torch.manual_seed(0)
    if arguments.refine or arguments.start_from == "shipped":
        model = AutoencoderTiny.from_pretrained(OUT if arguments.refine else PIPELINE / "vae").float()
        model.encoder.requires_grad_(not arguments.refine)
    else:
        model = build()
    model.to(memory_format=torch.channels_last)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=PEAK_LR, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, arguments.steps, pct_start=0.05)
    average = Averaged(model, 0.998)
    run = TrainingRun(
        RUN.with_name("decoder.pt") if arguments.refine else RUN,
        arguments.steps,
        {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average},
    )
    for _, bar in run.steps():
        parts = ((grid, BATCH // 8), (objects, 3 * BATCH // 8), (scenes, BATCH // 2))
        picked = torch.cat([images[torch.randint(len(images), (n,))] for images, n in parts])
        images = augment(picked.float() / 127.5 - 1, mirrored=not arguments.refine).to(
            memory_format=torch.channels_last
        )
        with torch.autocast("cpu", torch.bfloat16):
            latents = model.encoder(images).float()
            mean, variance = latents.mean((0, 2, 3)), latents.var((0, 2, 3))
            noisy = latents + 0.05 * torch.randn_like(latents)
            decoded = model.decoder(noisy).float()
        error = decoded - images
        loss = error.abs().mean() + 2 * error.pow(2).mean() + 0.01 * (mean.pow(2) + (variance - 1).pow(2)).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        average.update()
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
    model.load_state_dict(average.shadow)
    model = model.eval()
    with torch.no_grad():
        latents = model.encoder(objects.float() / 127.5 - 1)
    print(f"latents: mean {latents.mean((0, 2, 3)).tolist()}, std {latents.std((0, 2, 3)).tolist()}")
    print(f"PSNR: {psnr(model, grid.float() / 127.5 - 1):.2f} dB over the grid of {len(grid)}", end=", ")
    print(f"{psnr(model, objects.float() / 127.5 - 1):.2f} dB over the {len(objects)} drawn objects", end=", ")
    unseen = torch.from_numpy(np.stack(held_out)).permute(0, 3, 1, 2)
    print(f"{psnr(model, unseen.float() / 127.5 - 1):.2f} dB over {len(unseen)} scenes of held-out pairs")
    model.save_pretrained(OUT)


if __name__ == "__main__":
    main()
