"""The score card: every method of one kind measured side by side on the embedded pipeline."""

from sparsefeat.evaluation.card.bench import Bench
from sparsefeat.evaluation.card.budget import FULL, QUICK, Budget
from sparsefeat.evaluation.card.edit import Edit
from sparsefeat.evaluation.card.erasers import ERASERS, Eraser, prompts_with, prompts_without
from sparsefeat.evaluation.card.result import Row, load_card
from sparsefeat.evaluation.card.run import SECTIONS, evaluate_card

__all__ = [
    "ERASERS",
    "FULL",
    "QUICK",
    "SECTIONS",
    "Bench",
    "Budget",
    "Edit",
    "Eraser",
    "Row",
    "evaluate_card",
    "load_card",
    "prompts_with",
    "prompts_without",
]
