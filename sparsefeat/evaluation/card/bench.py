"""What methods of the card are given to work with, and where finished parts are kept.

Parts lie in a folder that is named for the package's version, what is measured (the fingerprint), the budget, and the part: a run that was stopped
goes on, and nothing that was measured on other weights is taken for this.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsefeat import __version__
from sparsefeat.assets import (
    GUIDANCE,
    block_sae_folder,
    cross_attention_sae_folders,
    embedded_fingerprint,
    emojicanvas,
    load_pipeline,
    text_encoder_sae_folder,
)
from sparsefeat.evaluation.card.budget import Budget
from sparsefeat.evaluation.card.edit import Edit
from sparsefeat.evaluation.emoji import OBJECT, Ledger, Target, real_features, tasks_for
from sparsefeat.evaluation.frechet import Reference
from sparsefeat.evaluation.generation import TEST, Task, generate, task
from sparsefeat.evaluation.judge import Judge, Verdicts, judge_images, load_judge
from sparsefeat.evaluation.parts import Parts
from sparsefeat.evaluation.run_emoji import collect_grid_statistics
from sparsefeat.features import Statistics
from sparsefeat.sae import SAE, load_sae
from sparsefeat.whole import write_json

N_NEAREST = 5
"""Concepts of FADE's adjacency set."""


class Bench(Parts):
    """The embedded pipeline, its SAEs, statistics of them, the judge, and the parts that are finished.

    Args:
        budget: how many images of what.
        work: folder of finished parts.
        said: hears of every part that is finished.
    """

    def __init__(self, budget: Budget, work: Path, said: Callable[[str], object] = lambda line: None) -> None:
        self.budget: Budget = budget
        self.fingerprint: str = embedded_fingerprint()
        named = f"{__version__}-{self.fingerprint}"
        super().__init__(Path(work) / f"{named}-{budget.name}", said)
        self._statistics = Path(work) / f"{named}-statistics"
        self.ledger: Ledger = Ledger(self.folder)
        self.n_steps: int = budget.n_steps
        self.guidance: float = GUIDANCE
        self.pipe: Any = load_pipeline()
        self.pipe.set_progress_bar_config(disable=True)
        self.judge: Judge = load_judge()
        self._once: dict[Hashable, tuple[Any, float]] = {}
        self._spared = 0.0

    @property
    def call(self) -> dict[str, Any]:
        """Arguments of the pipeline's call that are the same for everything."""
        return {"num_inference_steps": self.n_steps, "guidance_scale": self.guidance}

    # The SAEs, and what is known of their latents

    @cached_property
    def text_sae(self) -> SAE:
        return load_sae(text_encoder_sae_folder())

    @cached_property
    def block_sae(self) -> SAE:
        return load_sae(block_sae_folder())

    @cached_property
    def cross_saes(self) -> list[SAE]:
        return [load_sae(folder) for folder in cross_attention_sae_folders()]

    @cached_property
    def _collected(self) -> dict[tuple[int, str], Statistics]:
        saes = [self.text_sae, *self.cross_saes]
        return collect_grid_statistics(self.pipe, saes, self._statistics)

    def text_statistics(self, kind: str) -> Statistics:
        """Of the text encoder's SAE, by object or by style, over the whole grid of prompts."""
        return self._collected[0, kind]

    def cross_statistics(self, kind: str) -> list[Statistics]:
        """Of each cross-attention's SAE."""
        return [self._collected[i + 1, kind] for i in range(len(self.cross_saes))]

    @cached_property
    def real(self) -> Tensor:
        """The judge's features of the real drawings."""
        return real_features(self.judge)

    @cached_property
    def real_drawings(self) -> Reference:
        """What Fréchet distances are from."""
        return Reference(self.real)

    def nearest(self, target: Target) -> list[int]:
        """Indices of the concepts of the target's kind whose drawings the judge's features hold nearest to its own, by the
        cosine of their means: FADE's adjacency set, of real drawings in the place of the model's."""
        by_kind = self.real.double().reshape(len(emojicanvas.STYLES), len(emojicanvas.OBJECTS), -1)
        means = by_kind.mean(0 if target.kind == OBJECT else 1)
        alike = torch.cosine_similarity(means, means[target.index][None], dim=1)
        alike[target.index] = -torch.inf
        return alike.argsort(descending=True)[: min(N_NEAREST, len(means) - 1)].tolist()

    # Drawing

    def draw(self, tasks: Sequence[Task], edit: Edit | None = None, **how: Any) -> Tensor:
        """float32 [n, 3, 64, 64] in 0 to 1, under an edit."""
        edit = edit or Edit()
        return generate(
            self.pipe,
            tasks,
            n_steps=self.n_steps,
            guidance=self.guidance,
            negative_prompt=edit.negative_prompt,
            during=lambda _: edit.opened(self.pipe),
            **how,
        )

    def verdicts(
        self, key: str, tasks: Sequence[Task], edit: Callable[[], Edit] = Edit, **how: Any
    ) -> tuple[Verdicts, dict[str, float]]:
        """The judge's verdicts on the tasks, drawn if they are not on disk yet, and the processor seconds of an image and of
        making the edit."""
        spent = self.folder / f"{key}.json"
        known = self.ledger.get(key)
        if known is not None and len(known.objects) == len(tasks) and spent.is_file():
            return known, json.loads(spent.read_text())
        began, spared = time.process_time(), self._spared
        made = edit()
        ready = time.process_time()
        images = self.draw(tasks, made, **how)
        seconds = {
            "made": ready - began + self._spared - spared,
            "image": (time.process_time() - ready) / len(tasks),
        }
        write_json(spent, seconds)
        self.ledger.put(key, judge_images(self.judge, images))
        self.said(key)
        kept = self.ledger.get(key)  # as a run that goes on reads it, to the bit
        assert kept is not None
        return kept, seconds

    def once(self, key: Hashable, make: Callable[[], Any]) -> Any:
        """What `make()` gives, made once a run: what several settings of a method share. Each has its seconds counted."""
        if key in self._once:
            self._spared += self._once[key][1]
        else:
            began = time.process_time()
            self._once[key] = make(), time.process_time() - began
        return self._once[key][0]


def adjacent_tasks(target: Target, nearest: Sequence[int], n: int, split: int = TEST) -> list[Task]:
    """n images of each of the nearest concepts."""
    n_other = len(emojicanvas.STYLES) if target.kind == OBJECT else len(emojicanvas.OBJECTS)
    found = []
    for concept in nearest:
        for i in range(n):
            other, repeat = (7 * i + concept) % n_other, 50 + i // n_other  # noise that no other task has
            found.append(task(*((concept, other) if target.kind == OBJECT else (other, concept)), split, repeat))
    return found


def unit_tasks(bench: Bench, target: Target) -> tuple[list[Task], list[Task]]:
    """The images of the target and others, and those of its neighbours."""
    budget = bench.budget
    own = tasks_for(target, TEST, budget.n_target, budget.n_other)
    return own, adjacent_tasks(target, bench.nearest(target), budget.n_adjacent)
