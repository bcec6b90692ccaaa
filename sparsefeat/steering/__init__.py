"""Edits of a pipeline's activations by the latents of an SAE."""

from sparsefeat.steering.code_rule import CodeRule, code_edit
from sparsefeat.steering.saved import load_instrument
from sparsefeat.steering.steer import Steer

__all__ = ["CodeRule", "Steer", "code_edit", "load_instrument"]
