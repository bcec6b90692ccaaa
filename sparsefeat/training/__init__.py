"""Training SAEs: collecting activations, objectives, the trainer."""

from __future__ import annotations

from sparsefeat.training.collect import CollectActivations, CollectedRows
from sparsefeat.training.initialise import geometric_median, initialise
from sparsefeat.training.itda import build_itda
from sparsefeat.training.learner import Learner
from sparsefeat.training.losses import Batch, Loss, training_loss
from sparsefeat.training.objectives import Objective
from sparsefeat.training.published import PUBLISHED, Recipe, recipe
from sparsefeat.training.rows import RowSource, StoreRows, TensorRows
from sparsefeat.training.trainer import SAETrainer, TrainConfig

__all__ = [
    "PUBLISHED",
    "Batch",
    "CollectActivations",
    "CollectedRows",
    "Learner",
    "Loss",
    "Objective",
    "Recipe",
    "RowSource",
    "SAETrainer",
    "StoreRows",
    "TensorRows",
    "TrainConfig",
    "build_itda",
    "geometric_median",
    "initialise",
    "recipe",
    "training_loss",
]
