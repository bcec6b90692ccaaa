"""Train the embedded SAEs on the embedded pipeline's own activations.

    python tools/train_saes.py                               # into the package; minutes on two cores; resumable
    python tools/train_saes.py --out build/saes              # beside it, and compared with what the package carries
    python tools/train_saes.py --pipeline sparsefeat/assets/joint

What came of it is printed beside the SAEs that the package carried, and written to --results.

Activations: conditional rows of all twenty steps while the pipeline draws four fifths of the grid, two images a cell
(the other fifth is what the evaluation measures on), of cross-attention also while it draws objects in no style and styles of
no object; of the text encoder, every token of all these prompts; of the joint pipeline also while it draws scenes of two
objects, of trained pairs alone. One TopK SAE for each hookpoint, 8 times as many latents as the block is wide and an eighth
of its width active. FVU is of the other fifth, *dead* of the whole grid drawn anew.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from train_autoencoder import ROOT
from training_run import save_atomically

from sparsefeat.assets import GUIDANCE, emojicanvas, emojiscenes, load_pipeline, weights_fingerprint
from sparsefeat.assets.embedded import EMBEDDED_NAME, JOINT, JOINT_NAME, JOINT_SAES, PIPELINE, SAES
from sparsefeat.evaluation.generation import STATISTICS, TEST, held_out, whole_grid
from sparsefeat.evaluation.results import measured_here, measured_on_embedded
from sparsefeat.evaluation.run_emoji import activation_rows
from sparsefeat.evaluation.sae_metrics import measure_sae, pca_fvu
from sparsefeat.pipeline import attach
from sparsefeat.sae import SAE, SAEConfig, load_sae
from sparsefeat.training import CollectActivations, Objective, SAETrainer, TrainConfig
from sparsefeat.whole import write_json

# Two whole blocks; the cross-attention of the layers at full resolution, through which nearly all goes that the text
# does to the image (docs/erasure.md); and the text encoder's first layer, which sees each prompt once, outside the steps: there the words of a prompt have
# mixed least.
HOOKPOINTS = (
    "unet.mid_block.attentions.0",
    "unet.up_blocks.0.attentions.0",
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2",
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2",
    "unet.up_blocks.1.attentions.1.transformer_blocks.0.attn2",
    "text_encoder.encoder.layers.0",
)

# Of the joint pipeline: the image's rows after its fourth block, up to which training told it what is drawn where, and
# after the sixth.
JOINT_HOOKPOINTS = ("transformer.transformer_blocks.3", "transformer.transformer_blocks.5")

# Rows of cross-attention are of the few prompts there are, and are learned by heart: small batches, whose noise keeps from that,
# explain rows of other prompts better than large ones, longer or shorter training, or none of the auxiliary loss. Fewer latents
# die and rows of other prompts are explained better where training begins at rows, and with PARTIAL drawn too (docs/embedded.md).
SMALL_BATCH, FEW_STEPS = 512, 600

# Longer fits the few thousand tokens better and splits the latents that many prompts share: erasing a style then took
# more of the object along (docs/erasure.md).
TEXT_STEPS = 350


@dataclass(frozen=True)
class Beside:
    """An image that is not of the grid, but of what the pipeline also saw in training."""

    prompt: str
    seed: int


# Without a style, or without an object.
PARTIAL = [
    Beside(prompt, seed=7_100_000 + i)
    for i, prompt in enumerate(
        [emojicanvas.prompt(o) for o in emojicanvas.OBJECTS] + [emojicanvas.prompt(None, s) for s in emojicanvas.STYLES]
    )
]

# Of the joint pipeline, three rows for every four of the grid: SAEs that never saw two things in one picture explain such
# pictures less well, and their latents mark less in them (docs/attention.md).
SCENES = [
    Beside(scene.caption, seed=7_200_000 + i)
    for i, scene in enumerate(emojiscenes.scenes(240, 7_200_000, emojiscenes.TRAIN, n_objects=(2,)))
]


def text_rows(pipe: Any, hookpoints: Sequence[str], prompts: Sequence[str]) -> list[Tensor]:
    """Every token's row of each prompt, once: fp32 [n, d_model]."""
    collect = CollectActivations(*hookpoints, dtype=torch.float32)
    with attach(pipe, collect), torch.no_grad():
        pipe(list(prompts), num_inference_steps=1, guidance_scale=GUIDANCE, output_type="latent")
    return [collect.collected(h).rows for h in hookpoints]


def measured(sae: SAE, held: Tensor, grid: Tensor) -> dict[str, float]:
    """What it explains of rows of prompts that no SAE saw, and the share of its latents that never fire on rows of the whole
    grid from new noise: forty prompts have not every concept, and a latent of one that they lack is not dead."""
    quality = measure_sae(sae, held)
    return {"fvu": quality.fvu, "l0": quality.l0, "dead": measure_sae(sae, grid).dead}


def shown(found: dict[str, float]) -> str:
    return f"FVU {found['fvu']:.4f}, L0 {found['l0']:.2f}, dead {found['dead']:.1%}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=Path, default=PIPELINE)
    parser.add_argument("--out", type=Path, help="default: where the package carries those of this pipeline")
    parser.add_argument("--hookpoints", nargs="+", help="default: those that the package carries")
    parser.add_argument("--expansion", type=int, default=8, help="latents, as a multiple of the width")
    parser.add_argument("--active", type=int, default=8, help="k is the width divided by this")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument(
        "--work",
        type=Path,
        help="rows and checkpoints, in a folder named for the pipeline's weights; default: build/training/saes-EXPANSION-ACTIVE",
    )
    parser.add_argument("--results", type=Path, help="default: bench/results/unet_saes.json, or joint_saes.json")
    arguments = parser.parse_args()

    arguments.pipeline = arguments.pipeline.resolve()
    pipe = load_pipeline(arguments.pipeline)
    joint = hasattr(pipe, "transformer")
    carried_in = JOINT_SAES if joint else SAES
    out = arguments.out or carried_in
    hookpoints = arguments.hookpoints or list(JOINT_HOOKPOINTS if joint else HOOKPOINTS)
    results_to = arguments.results or ROOT / "bench" / "results" / ("joint_saes.json" if joint else "unet_saes.json")
    seen = [t for repeat in (0, 1) for t in whole_grid(STATISTICS, repeat) if not held_out(t)]
    unseen = [t for t in whole_grid(TEST) if held_out(t)]
    folder = arguments.work or ROOT / "build" / "training" / f"saes-{arguments.expansion}-{arguments.active}"
    folder /= weights_fingerprint(arguments.pipeline)
    started, cpu = time.perf_counter(), time.process_time()
    results: list[dict[str, Any]] = []
    collected = {}
    crossing = [h for h in hookpoints if h.endswith("attn2")]
    for name, at, tasks, rows_per_image in (
        ("seen", hookpoints, seen, 40),
        ("partial", crossing, PARTIAL, 40),
        ("scenes", hookpoints if joint else [], SCENES, 40),
        ("unseen", hookpoints, unseen, 64),
        ("grid", hookpoints, whole_grid(TEST), 64),
    ):
        caches = {h: folder / "rows" / f"{h}-{name}.pt" for h in at}
        missing = [h for h, cache in caches.items() if not cache.is_file()]
        texts = [h for h in missing if h.startswith("text_encoder")]
        drawn = [h for h in missing if h not in texts]
        rows = dict(zip(drawn, activation_rows(pipe, drawn, tasks, rows_per_image), strict=True)) if drawn else {}
        if texts:
            prompts = list(dict.fromkeys(t.prompt for t in tasks))
            prompts += [t.prompt for t in PARTIAL] if name == "seen" else []
            rows |= zip(texts, text_rows(pipe, texts, prompts), strict=True)
        for hookpoint, found in rows.items():
            save_atomically(caches[hookpoint], found)
        collected[name] = {h: torch.load(cache, weights_only=True) for h, cache in caches.items()}
    for hookpoint in hookpoints:
        crosses, held, grid = hookpoint in crossing, collected["unseen"][hookpoint], collected["grid"][hookpoint]
        parts = [collected[part] for part in ("seen", "partial", "scenes") if hookpoint in collected[part]]
        rows = torch.cat([part[hookpoint] for part in parts])
        name, width = hookpoint.removeprefix("unet.").removeprefix("transformer."), rows.shape[1]
        of_text = hookpoint.startswith("text_encoder")
        steps = min(arguments.steps, TEXT_STEPS if of_text else FEW_STEPS if crosses else arguments.steps)
        config = SAEConfig(
            d_model=width,
            n_latents=width * arguments.expansion,
            k=width // arguments.active,
            hookpoint=f"{hookpoint}:output",
            base_model=JOINT_NAME if joint else EMBEDDED_NAME,
            metadata={"training_rows": len(rows), "training_steps": steps},
        )
        training = TrainConfig(
            steps=steps,
            batch_size=SMALL_BATCH if crosses else 2048,
            lr=2e-3 if of_text or crosses else 4e-3,
            warmup_steps=50,
            start="rows" if crosses else "random",
            objective=Objective(dead_after=10_000 if crosses else 200_000),
            checkpoint_every=200,
        )
        sae = SAETrainer(SAE(config), rows, training, folder / name).fit()
        carried = load_sae(carried_in / name) if (carried_in / name).is_dir() else None
        sae.save(out / name, dtype=torch.float16, overwrite=True)
        found, before = measured(load_sae(out / name), held, grid), carried and measured(carried, held, grid)
        components = pca_fvu(held, width // arguments.active)
        results.append(
            {
                "hookpoint": hookpoint,
                **found,
                "fvu_pca": components,
                "held_out_rows": len(held),
                "grid_rows": len(grid),
            }
        )
        print(
            f"{hookpoint}: {shown(found)}; carried: {before and shown(before)}; PCA with {config.k}: FVU {components:.4f}",
            flush=True,
        )
    seconds, of_processor = time.perf_counter() - started, time.process_time() - cpu
    print(f"{seconds:.0f} s, {of_processor:.0f} s of processor time", flush=True)
    write_json(
        results_to,
        {
            **(measured_on_embedded(joint) if arguments.pipeline in (PIPELINE, JOINT) else measured_here()),
            "seconds": seconds,
            "processor_seconds": of_processor,
            "saes": results,
        },
    )


if __name__ == "__main__":
    main()
