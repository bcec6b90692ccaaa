"""Train the embedded SAEs on the embedded pipeline's own activations.

    python tools/train_saes.py                   # a few minutes on two cores; resumable

Activations: conditional rows of all twenty steps while the pipeline draws four fifths of the grid, two images a cell
(the other fifth is what the evaluation measures on). One TopK SAE for each hookpoint, 8 times as many latents as the
block is wide and an eighth of its width active.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from train_autoencoder import ROOT
from training_run import save_atomically

from sparsefeat.assets import load_pipeline
from sparsefeat.assets.embedded import PIPELINE, SAES
from sparsefeat.evaluation.generation import STATISTICS, TEST, held_out, whole_grid
from sparsefeat.evaluation.run_emoji import activation_rows
from sparsefeat.evaluation.sae_metrics import measure_sae, pca_fvu
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.training import SAETrainer, TrainConfig

# Two whole blocks, and the cross-attention of the layers at full resolution. Nearly all that the text does to the image
# goes through those three: editing the four cross-attentions at half resolution instead changes next to nothing
# (docs/erasure.md).
HOOKPOINTS = (
    "unet.mid_block.attentions.0",
    "unet.up_blocks.0.attentions.0",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=Path, default=PIPELINE)
    parser.add_argument("--out", type=Path, default=SAES)
    parser.add_argument("--hookpoints", nargs="+", default=list(HOOKPOINTS))
    parser.add_argument("--expansion", type=int, default=8, help="latents, as a multiple of the width")
    parser.add_argument("--active", type=int, default=8, help="k is the width divided by this")
    parser.add_argument("--steps", type=int, default=900)
    arguments = parser.parse_args()

    pipe = load_pipeline(arguments.pipeline)
    seen = [t for repeat in (0, 1) for t in whole_grid(STATISTICS, repeat) if not held_out(t)]
    unseen = [t for t in whole_grid(TEST) if held_out(t)]
    folder = ROOT / "build" / "training" / f"saes-{arguments.expansion}-{arguments.active}"
    cache = folder / "rows.pt"
    if cache.is_file():
        collected = torch.load(cache, weights_only=True)
    else:
        collected = {
            "seen": activation_rows(pipe, arguments.hookpoints, seen, rows_per_image=40),
            "unseen": activation_rows(pipe, arguments.hookpoints, unseen, rows_per_image=64),
        }
        save_atomically(cache, collected)
    for hookpoint, rows, held in zip(arguments.hookpoints, collected["seen"], collected["unseen"], strict=True):
        name, width = hookpoint.removeprefix("unet."), rows.shape[1]
        config = SAEConfig(
            d_model=width,
            n_latents=width * arguments.expansion,
            k=width // arguments.active,
            hookpoint=f"{hookpoint}:output",
            base_model="EmojiCanvas pipeline embedded in sparsefeat",
            metadata={"training_rows": len(rows), "training_steps": arguments.steps},
        )
        training = TrainConfig(
            steps=arguments.steps, batch_size=2048, lr=2e-3, warmup_steps=50, dead_after=200_000, checkpoint_every=200
        )
        sae = SAETrainer(SAE(config), rows, training, folder / name).fit()
        print(
            f"{hookpoint}: {measure_sae(sae, held)}; PCA with {config.k}: FVU {pca_fvu(held, width // arguments.active):.4f}"
        )
        sae.save(arguments.out / name, dtype=torch.float16, overwrite=True)


if __name__ == "__main__":
    main()
