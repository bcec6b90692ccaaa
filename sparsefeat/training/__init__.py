"""Training SAEs: collecting activations, objectives, the trainer."""

from __future__ import annotations

from sparsefeat.training.collect import CollectActivations, CollectedRows
from sparsefeat.training.initialise import geometric_median, initialise
from sparsefeat.training.objectives import Loss, training_loss
from sparsefeat.training.rows import RowSource, StoreRows, TensorRows
from sparsefeat.training.trainer import SAETrainer, TrainConfig

__all__ = [
    "CollectActivations",
    "CollectedRows",
    "Loss",
    "RowSource",
    "SAETrainer",
    "StoreRows",
    "TensorRows",
    "TrainConfig",
    "geometric_median",
    "initialise",
    "training_loss",
]
