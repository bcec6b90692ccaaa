"""Training SAEs: collecting activations, objectives, the trainer."""

from __future__ import annotations

from sparsefeat.training.activations.collect import CollectActivations, CollectedRows
from sparsefeat.training.activations.drawing import Drawing, collect_activations
from sparsefeat.training.activations.live import PipelineRows
from sparsefeat.training.activations.rows import RowSource, StoreRows, TensorRows
from sparsefeat.training.factorise import factorise, sobol_importance
from sparsefeat.training.learning.initialise import geometric_median, initialise
from sparsefeat.training.learning.itda import build_itda
from sparsefeat.training.learning.learner import Learner
from sparsefeat.training.objective.losses import Batch, Loss, training_loss
from sparsefeat.training.objective.objectives import Objective
from sparsefeat.training.ranks import Ranks
from sparsefeat.training.run.config import TrainConfig
from sparsefeat.training.run.published import PUBLISHED, Recipe, recipe
from sparsefeat.training.run.trainer import SAETrainer, fit_together

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
