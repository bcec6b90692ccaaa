"""saprmarks/dictionary_learning (distribution dictionary-learning): AutoEncoderTopK and the loss of its TopKTrainer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import importable
from sparsefeat.measure.sae_case import AUXK, SAECase
from sparsefeat.measure.timing import Provider

NAME = "dictionary-learning"
PACKAGE = "dictionary-learning"


def why_absent() -> str:
    """Importing it imports nnsight, which replaces two functions of PyTorch; with those torch.compile fails."""
    from torch._subclasses.fake_tensor import FakeTensor

    theirs, autocast = FakeTensor.__new__, torch.autocast.__init__
    reason = importable("dictionary_learning")
    FakeTensor.__new__, torch.autocast.__init__ = theirs, autocast  # type: ignore[method-assign]
    return reason


def autoencoder(case: SAECase) -> Any:
    """Its decoder is stored [d_model, n_latents]."""
    from dictionary_learning.trainers.top_k import AutoEncoderTopK

    with torch.device("meta"):
        made = AutoEncoderTopK(case.x.shape[1], len(case.W_enc), case.k)
    made.k = torch.tensor(case.k, dtype=torch.int)
    made.threshold = torch.tensor(-1.0, device=case.x.device)
    made.encoder.weight, made.encoder.bias = (nn.Parameter(t.detach()) for t in (case.W_enc, case.b_enc))
    made.decoder.weight, made.b_dec = (nn.Parameter(t.detach()) for t in (case.W_dec.T.contiguous(), case.b))
    return made


def trainer(case: SAECase) -> tuple[SAECase, Any]:
    """Its AuxK is divided by the variance of the residual and not by that of the input, and is not scaled down for few
    dead latents: its coefficient is chosen so that the loss is ours up to one factor."""
    from dictionary_learning.trainers.top_k import TopKTrainer

    made = autoencoder(case)
    d_model = case.x.shape[1]
    training = TopKTrainer(
        steps=1, activation_dim=d_model, dict_size=len(case.W_enc), k=case.k, layer=0, lm_name="none",
        warmup_steps=0, device=case.x.device.type, dict_class=lambda *_: made,
    )  # fmt: skip
    with torch.no_grad():
        missed = case.x - made(case.x)
        spread = (missed - missed.mean(0)).square().sum(1).mean()
    training.auxk_alpha = AUXK * float(spread) * min(len(case.dead) / (d_model // 2), 1.0)
    training.num_tokens_since_fired[case.dead] = training.dead_feature_threshold
    return case, training


def step(state: Any) -> Any:
    case, training = state
    loss = training.loss(case.x, step=0)
    made = training.ae
    return loss, torch.autograd.grad(loss, (made.encoder.weight, made.encoder.bias, made.decoder.weight, made.b_dec))


def canonical(state: Any, answer: Any) -> dict[str, Tensor]:
    x = state[0].x.double()
    factor = len(x) / (x - x.mean(0)).square().sum()
    loss, (W_enc, b_enc, W_dec, _) = answer
    found = {"loss": loss, "W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec.T}
    return {name: tensor.detach().double() * factor for name, tensor in found.items()}


def with_autoencoder(case: SAECase) -> tuple[SAECase, Any]:
    return case, autoencoder(case)


def providers(op: str, dtype: str, device: str) -> list[Provider]:
    return {
        "topk_encode": [Provider(NAME, lambda s: s[1].encode(s[0].x), with_autoencoder)],
        "sparse_decode": [
            Provider(
                NAME, lambda s: s[1].decode(s[2]), lambda c: (*with_autoencoder(c), c.dense_code.to(c.W_dec.dtype))
            )
        ],
        "forward": [Provider(NAME, lambda s: s[1](s[0].x), with_autoencoder)],
        "training_step": [Provider(NAME, step, trainer, canonical)],
    }.get(op, [])
