"""Training SAEs: collecting activations, objectives, the trainer."""

from __future__ import annotations

from sparsefeat.training.collect import CollectActivations, CollectedRows
from sparsefeat.training.config import TrainConfig
from sparsefeat.training.drawing import Drawing, collect_activations
from sparsefeat.training.factorise import factorise, sobol_importance
from sparsefeat.training.initialise import geometric_median, initialise
from sparsefeat.training.itda import build_itda
from sparsefeat.training.learner import Learner
from sparsefeat.training.live import PipelineRows
from sparsefeat.training.losses import Batch, Loss, training_loss
from sparsefeat.training.objectives import Objective
from sparsefeat.training.published import PUBLISHED, Recipe, recipe
from sparsefeat.training.ranks import Ranks
from sparsefeat.training.rows import RowSource, StoreRows, TensorRows
from sparsefeat.training.trainer import SAETrainer, fit_together

__all__ = [
    "PUBLISHED",
    "Batch",
    "CollectActivations",
    "CollectedRows",
    "Drawing",
    "Learner",
    "Loss",
    "Objective",
    "PipelineRows",
    "Ranks",
    "Recipe",
    "RowSource",
    "SAETrainer",
    "StoreRows",
    "TensorRows",
    "TrainConfig",
    "build_itda",
    "collect_activations",
    "factorise",
    "fit_together",
    "geometric_median",
    "initialise",
    "recipe",
    "sobol_importance",
    "training_loss",
]
