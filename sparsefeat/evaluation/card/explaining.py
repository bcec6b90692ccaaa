"""Attribution × {C-Deletion, C-Insertion}: whether the latents that a method names are those that made the object.

h is the judge's probability of the prompt's object in the picture that is drawn with some latents at 0 (at every step, the SAE's error
kept), over a growing share of the latents that were active:

    C-Deletion   area under h as latents go, the most important first: low is good
    C-Insertion  area under h as they come back, the most important first: high is good
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor

from sparsefeat.attribution import attribute_latents
from sparsefeat.evaluation.card.bench import Bench
from sparsefeat.evaluation.card.edit import Edit
from sparsefeat.evaluation.card.result import Row
from sparsefeat.evaluation.generation import TEST, Task, held_out, whole_grid
from sparsefeat.evaluation.intervals import mean_interval
from sparsefeat.evaluation.judge import as_tensor
from sparsefeat.steering import Steer

METHODS = ("gradient", "integrated", "random order")
SHARES = (0.0, 0.1, 0.25, 0.5, 1.0)
STEPS = 5
"""Of the runs in which latents are scored; pictures are drawn with all of the budget's."""


def area(shares: Sequence[float], h: Tensor) -> float:
    """By the trapezoidal rule; shares from 0 to 1."""
    return float(torch.trapezoid(h.double(), torch.tensor(shares, dtype=torch.float64)))


def explained_rows(bench: Bench) -> list[Row]:
    """On the SAE of the last cross-attention, for held-out prompts."""
    sae = bench.cross_saes[-1]
    tasks = [t for t in whole_grid(TEST, repeat=40) if held_out(t)][:: 40 // bench.budget.n_explained]
    tasks = tasks[: bench.budget.n_explained]

    def probability(t: Task, gone: Sequence[int]) -> float:
        def drawn() -> float:
            edit = Edit((Steer(sae, scale=dict.fromkeys(gone, 0.0), condition="both"),)) if gone else Edit()
            with torch.no_grad():
                objects, _ = bench.judge(as_tensor(bench.draw([t], edit)))
            return float(objects.softmax(1)[0, t.object])

        return bench.once((t, frozenset(gone)), drawn)  # with none gone, and with all, the same in every order

    def order(t: Task, method: str) -> list[int]:
        how = {**bench.call, "num_inference_steps": min(STEPS, bench.n_steps)}
        scored = "gradient" if method == "random order" else method
        found = bench.once(
            (t, scored),
            lambda: attribute_latents(bench.pipe, sae, t.prompt, method=scored, seed=t.seed, **how).latents,
        )
        if method == "random order":
            found = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(t.seed))]
        return found.tolist()

    def curves(t: Task, method: str) -> dict[str, list[float]]:
        latents = order(t, method)
        cuts = [round(share * len(latents)) for share in SHARES]
        return {
            "C-Deletion": [probability(t, latents[:cut]) for cut in cuts],
            "C-Insertion": [probability(t, latents[cut:]) for cut in cuts],
        }

    rows = []
    for method in METHODS:
        found = [
            bench.kept(f"attribution/{method.replace(' ', '-')}/{t.seed}", partial(curves, t, method)) for t in tasks
        ]
        for metric in ("C-Deletion", "C-Insertion"):
            areas = torch.tensor([area(SHARES, torch.tensor(one[metric])) for one in found])
            ci = mean_interval(areas) if len(areas) > 1 else None
            of = f"objects, {sae.config.hookpoint}"
            rows.append(
                Row(
                    "attribution",
                    method,
                    of,
                    metric,
                    float(areas.mean()),
                    ci,
                    len(areas),
                    tasks[0].seed,
                )
            )
    return rows
