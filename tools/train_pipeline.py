"""Train one of the embedded text-to-image pipelines, on a CPU or a GPU, for as long as there is time.

    python tools/train_pipeline.py unet --start-from sparsefeat/assets/pipeline --minutes 120
    python tools/train_pipeline.py joint --minutes 6              # on a GPU

`--minutes` is the training time in all, over every run that went before in the same folder: a run that was stopped
goes on where it was, one that had ended goes on for longer. The learning rate falls to nothing in the last quarter of
it. Weights are averaged; each checkpoint also exports them as a pipeline in fp16, to try at any time
(`python tools/try_pipeline.py FOLDER`). The first of these commands needs the autoencoder (`tools/train_autoencoder.py`).
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from embedded_models import FAMILIES, build_tokenizer, export
from torch import nn
from train_autoencoder import OUT as VAE
from train_autoencoder import ROOT
from training_data import SINGLE, Bank
from training_run import Averaged, TrainingRun

from sparsefeat.measure.machine import has_bfloat16

WARM_UP_STEPS = 100
ANNEALED = 0.25


def learning_rate(step: int, done: float, peak: float) -> float:
    """A short warm-up, the peak, and a linear fall to nothing over the last quarter. `done` is a share of the time."""
    return peak * min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, max(0.0, 1 - done) / ANNEALED)


class Clock:
    """Seconds of training over all runs, as a part of the checkpoint."""

    def __init__(self) -> None:
        self.before, self.started = 0.0, time.monotonic()

    @property
    def seconds(self) -> float:
        return self.before + time.monotonic() - self.started

    def state_dict(self) -> dict:
        return {"seconds": self.seconds}

    def load_state_dict(self, state: dict) -> None:
        self.before, self.started = state["seconds"], time.monotonic()


class Optimizers:
    """Muon (Jordan et al. 2024, at the step sizes of AdamW: arXiv 2502.16982) for the matrices within blocks, AdamW for
    everything else: embeddings, norms, biases, convolutions, the first and last layers."""

    def __init__(self, denoiser: nn.Module) -> None:
        named = list(denoiser.named_parameters())
        inner = {name for name, p in named if p.ndim == 2 and ("blocks." in name or ".layers." in name)}
        matrices = [p for name, p in named if name in inner]
        others = [p for name, p in named if name not in inner]
        self.parts: list[torch.optim.Optimizer] = [
            torch.optim.Muon(matrices, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, betas=(0.9, 0.99), weight_decay=0.01, fused=True),
        ]

    def step(self, lr: float) -> None:
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr
            part.step()
            part.zero_grad()

    def state_dict(self) -> dict:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("family", choices=FAMILIES)
    parser.add_argument("--minutes", type=float, required=True, help="training time in all, earlier runs included")
    parser.add_argument("--start-from", type=Path, help="a pipeline folder whose weights a new run begins with")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "training", help="checkpoints, exports, data")
    parser.add_argument("--vae", type=Path, default=VAE)
    parser.add_argument("--batch", type=int, default=0, help="default 32 on a CPU, 512 on a GPU")
    parser.add_argument("--single", type=float, default=SINGLE, help="share of single drawings, the rest being scenes")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--average", type=float, default=0.999, help="decay of the averaged weights")
    parser.add_argument(
        "--compile", action="store_true", help="compile the denoiser: minutes first, faster steps after"
    )
    parser.add_argument("--checkpoint-every", type=float, default=300.0, help="seconds")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch = arguments.batch or (512 if device == "cuda" else 32)
    # On a CPU the flash kernel's backward takes a quarter of a step of these small models; plain products are faster.
    torch.backends.cuda.enable_flash_sdp(device == "cuda")
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    denoiser = FAMILIES[arguments.family](tokenizer)
    out = arguments.folder / arguments.family
    if arguments.start_from is not None:
        denoiser.load(arguments.start_from)
    denoiser.to(device, memory_format=torch.channels_last).train()
    bank = Bank.open(arguments.folder / "bank.safetensors", arguments.vae, tokenizer, device)
    optimizer = Optimizers(denoiser)
    average, clock = Averaged(denoiser, arguments.average), Clock()
    parts = {"denoiser": denoiser, "optimizer": optimizer, "average": average, "clock": clock}
    run = TrainingRun(out.with_suffix(".pt"), 10**9, parts, arguments.checkpoint_every)
    if arguments.compile:
        torch._dynamo.config.skip_nnmodule_hook_guards = False
        for name in ("unet", "transformer"):
            if hasattr(denoiser, name):
                getattr(denoiser, name).compile()

    def write_export() -> None:
        averaged = FAMILIES[arguments.family](tokenizer)
        averaged.load_state_dict({name: value.cpu() for name, value in average.shadow.items()})
        export(averaged, arguments.vae, out)
        progress = {"minutes": clock.seconds / 60, "steps": run.step, "batch": batch, "loss": smoothed}
        (arguments.folder / f"{arguments.family}.json").write_text(json.dumps(progress) + "\n")

    # float32 where the processor has no bfloat16 instructions: autocast would emulate them.
    lower = device == "cuda" or has_bfloat16()
    smoothed, warm = None, time.monotonic()
    for count, (step, bar) in enumerate(run.steps(on_checkpoint=write_export), 1):
        done = clock.seconds / (60 * arguments.minutes)
        if done >= 1:
            break
        drawn = bank.batch(batch, arguments.single)
        with torch.autocast(device, torch.bfloat16) if lower else nullcontext():
            loss = denoiser.loss(drawn)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(denoiser.parameters(), 1.0)
        optimizer.step(learning_rate(step, done, arguments.lr))
        average.update()
        if count == 20:  # the first steps compile and warm up
            warm = time.monotonic()
        if count == 60:
            rate = 40 * batch / (time.monotonic() - warm)
            left = (1 - done) * arguments.minutes
            print(
                f"{rate:.0f} samples a second: about {rate * left * 60:,.0f} in the {left:.0f} minutes left", flush=True
            )
        if count % 20 == 0:
            smoothed = loss.item() if smoothed is None else 0.9 * smoothed + 0.1 * loss.item()
            bar.set_postfix(loss=f"{smoothed:.4f}", refresh=False)
    run.checkpoint()
    write_export()
    print(f"exported {out} after {run.step} steps of {batch}, {clock.seconds / 60:.1f} minutes")


if __name__ == "__main__":
    main()
