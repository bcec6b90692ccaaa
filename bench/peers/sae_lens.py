"""SAELens (distribution sae-lens): TopKSAE, and TopKTrainingSAE with and without sparse activations."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import importable
from sparsefeat.measure.sae_case import AUXK, SAECase
from sparsefeat.measure.timing import Provider

NAME = "sae-lens"
PACKAGE = "sae-lens"


def why_absent() -> str:
    return importable("sae_lens")


def sae(case: SAECase, training: bool = False, **options: Any) -> Any:
    """Its encoder is stored [d_model, n_latents]."""
    from sae_lens import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig

    common: dict[str, Any] = {
        "d_in": case.x.shape[1], "d_sae": len(case.W_enc), "k": case.k, "dtype": case.dtype,
        "device": case.x.device.type, "apply_b_dec_to_input": True, "rescale_acts_by_decoder_norm": False,
    }  # fmt: skip
    if training:
        made = TopKTrainingSAE(TopKTrainingSAEConfig(**common, aux_loss_coefficient=AUXK, **options))
    else:
        made = TopKSAE(TopKSAEConfig(**common))
    stored = {"W_enc": case.W_enc.T.contiguous(), "b_enc": case.b_enc, "W_dec": case.W_dec, "b_dec": case.b}
    for name, tensor in stored.items():
        setattr(made, name, nn.Parameter(tensor.detach()))
    return made


def step(state: Any) -> Any:
    from sae_lens.saes.sae import TrainStepInput

    case, made = state
    given = TrainStepInput(
        sae_in=case.x, coefficients={}, dead_neuron_mask=case.is_dead, n_training_steps=0, is_logging_step=False
    )
    loss = made.training_forward_pass(given).loss
    return loss, torch.autograd.grad(loss, (made.W_enc, made.b_enc, made.W_dec, made.b_dec))


def canonical(state: Any, answer: Any) -> dict[str, Tensor]:
    """Its loss is a mean over rows of summed squares, ours a share of the variance: a factor for the whole batch."""
    case = state[0]
    x = case.x.double()
    factor = len(x) / (x - x.mean(0)).square().sum()
    loss, (W_enc, b_enc, W_dec, _) = answer
    found = {"loss": loss, "W_enc": W_enc.T, "b_enc": b_enc, "W_dec": W_dec}
    return {name: tensor.detach().double() * factor for name, tensor in found.items()}


def with_sae(case: SAECase, **options: Any) -> tuple[SAECase, Any]:
    return case, sae(case, **options)


def providers(op: str, dtype: str, device: str) -> list[Provider]:
    training = [Provider(NAME, step, partial(with_sae, training=True), canonical)]
    if dtype == "float32":  # its documentation: sparse activations are for float32 without autocast
        sparse = partial(with_sae, training=True, use_sparse_activations=True)
        training.append(Provider(f"{NAME}, sparse activations", step, sparse, canonical))
    return {
        "topk_encode": [Provider(NAME, lambda s: s[1].encode(s[0].x), with_sae)],
        "sparse_decode": [
            Provider(NAME, lambda s: s[1].decode(s[2]), lambda c: (*with_sae(c), c.dense_code.to(c.W_dec.dtype)))
        ],
        "forward": [Provider(NAME, lambda s: s[1].decode(s[1].encode(s[0].x)), with_sae)],
        "training_step": training,
    }.get(op, [])
