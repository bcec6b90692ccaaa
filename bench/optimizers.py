"""Adam beside Muon on the embedded SAEs: `python -m bench.optimizers`, minutes on one core.

Both take as many steps on the same batches, from the same start values. Muon (Jordan et al., 2024; `torch.optim.Muon`) is for
matrices: the encoder and the decoder are its own, biases stay with Adam. Its steps are scaled to the size of Adam's
("match_rms_adamw"), so that the same learning rates mean the same.

The rows are those that `python tools/train_saes.py` kept. Writes bench/results/optimizers.json;
`python tools/write_tables.py` makes the table of docs/training.md from it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from bench.run import RESULTS
from sparsefeat.assets import weights_fingerprint
from sparsefeat.assets.embedded import PIPELINE
from sparsefeat.evaluation.results import measured_on_embedded
from sparsefeat.evaluation.sae_metrics import measure_sae
from sparsefeat.sae import SAE, SAEConfig
from sparsefeat.training import Objective, SAETrainer, TrainConfig
from sparsefeat.whole import write_json

ROWS = Path("build/training/saes-8-8") / weights_fingerprint(PIPELINE) / "rows"
HOOKPOINTS = (
    "unet.mid_block.attentions.0",
    "unet.up_blocks.1.attentions.0.transformer_blocks.0.attn2",
)
STEPS, BATCH = 300, 2048
RATES = {"adam": (2e-3, 4e-3, 8e-3), "muon": (2e-3, 4e-3, 8e-3)}


class AdamAndMuon(torch.optim.Optimizer):
    """Muon for matrices, Adam for the rest, as one."""

    def __init__(self, adam: torch.optim.Optimizer, muon: torch.optim.Optimizer) -> None:
        self.each = (adam, muon)
        self.param_groups = [group for one in self.each for group in one.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for one in self.each:
            one.zero_grad(set_to_none)

    def step(self, closure: Any = None) -> None:
        for one in self.each:
            one.step()


@dataclass(frozen=True)
class WithMuon(TrainConfig):
    def make_optimizer(self, trained: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        trained = list(trained)
        matrices = [parameter for parameter in trained if parameter.ndim == 2]
        adam = super().make_optimizer(parameter for parameter in trained if parameter.ndim != 2)
        return AdamAndMuon(adam, torch.optim.Muon(matrices, lr=0.0, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"))


def trained(hookpoint: str, optimizer: str, lr: float, folder: Path) -> dict[str, Any]:
    rows, held = (torch.load(folder / f"{hookpoint}-{part}.pt", weights_only=True) for part in ("seen", "unseen"))
    width = rows.shape[1]
    sae = SAE(SAEConfig(width, 8 * width, k=width // 8, hookpoint=hookpoint))
    settings: dict[str, Any] = {"batch_size": BATCH, "warmup_steps": 30, "objective": Objective(dead_after=200_000)}
    config = (WithMuon if optimizer == "muon" else TrainConfig)(STEPS, lr=lr, **settings)
    began = time.process_time()
    found = measure_sae(SAETrainer(sae, rows, config).fit(progress=False), held)
    seconds = time.process_time() - began
    return {"hookpoint": hookpoint, "optimizer": optimizer, "lr": lr, "fvu": found.fvu, "dead": found.dead, "seconds": seconds}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, default=ROWS)
    parser.add_argument("--out", type=Path, default=RESULTS / "optimizers.json")
    arguments = parser.parse_args()
    if not arguments.rows.is_dir():
        parser.error(f"--rows {arguments.rows} is no folder; make it with `python tools/train_saes.py`")
    runs = []
    for hookpoint in HOOKPOINTS:
        for optimizer, rates in RATES.items():
            for lr in rates:
                runs.append(trained(hookpoint, optimizer, lr, arguments.rows))
                print(runs[-1], flush=True)
    about = {**measured_on_embedded(), "steps": STEPS, "batch_size": BATCH}
    write_json(arguments.out, {**about, "runs": runs})


if __name__ == "__main__":
    main()
