"""What an SAE is trained for, said in pieces that compose: reconstruction, sparsity, dead latents, dictionary.

    L = error(x, x_hat) + auxk * L_aux + multi_topk * error(x, x_hat_4k) + sparsity * penalty + pre_act * L_pre

All of it in rows whose spread is one (`sparsefeat.training.learning.learner`), so that constants hold at every hookpoint.

`reconstruction`, with the batch's sums over rows and dimensions:

| | error(x, x_hat) | published with |
|---|---|---|
| fvu | sum (x - x_hat)^2 / sum (x - mean(x))^2 | sparsify, SAeUron |
| mse | mean (x - x_hat)^2 | sdxl-unbox (its frozen scale is one here), fae, GDM, and d_model times less than Anthropic's |
| l2 | mean over rows of |x - x_hat| / sqrt(d_model) | BatchTopK crosscoders |

`prefixes` (Matryoshka, arXiv 2503.17547): the error is the mean over dictionaries of the first m latents, m in prefixes.
`levels` (hierarchical TopK, arXiv 2505.24473): the mean over codes of the j largest activations, j in levels.

`aux` (AuxK, arXiv 2406.04093): the `k_aux` dead latents of largest pre-activation give a guess g, without bias. With
e = x - x_hat, V = sum (x - mean(x))^2, and what is in brackets held constant,

| | L_aux | |
|---|---|---|
| residual | min(n_dead / k_aux, 1) sum (g - [e])^2 / V | Gao et al., with sparsify's normalisation |
| unbox | sum (g + b - [e + b])^2 / [sum (e - mean(e))^2] | OpenAI's code, sdxl-unbox, Concept Steerers; also without dead latents, where g = 0 |
| saeuron | min(n_dead / k_aux, 1) sum (g + b + e)^2 / V | EleutherAI's first code, SAeUron: the negative residual, not held constant |
| crosscoder | sum (g - [e])^2 / [sum (e - mean(e))^2] | dictionary_learning, BatchTopK crosscoders |
| fae | mean (g + b - [x_hat])^2 | fae: the reconstruction, not what it misses |

`penalty` of activations f of which rows are means and latents sums:

| | | published with |
|---|---|---|
| l1 | sum f | ReLU SAEs; with decoder "free" f times the decoder row's norm, Anthropic's of April 2024 |
| l0 | sum H(f) | JumpReLU (arXiv 2407.14435), by a straight-through estimate |
| tanh | sum tanh(4 f) | Anthropic's JumpReLU of January 2025 |

JumpReLU's threshold has pseudo-derivatives where a pre-activation is within half a `bandwidth` of it: -threshold /
bandwidth of f, -1 / bandwidth of H. `pre_act`, of L_pre = sum relu(threshold - pre), moves latents that do not fire.
`gated` (arXiv 2404.16014): gate and magnitude share directions; the penalty is of the gate's positive part, which
reconstructs too, through the decoder held constant. The trained SAE is a JumpReLU SAE (`SAEConfig`).

`l0_target`: under the penalty l0 it is (mean H / l0_target - 1)^2, as the JumpReLU paper has it; under the others the
weight grows by up to LOG_WEIGHT_STEP (of its logarithm) a step while more latents are active, and shrinks while fewer
are: how one weight serves all hookpoints.

`decoder`: "unit" rows (the gradient along a row is removed, the row renormalised after every step); "free" rows, with
selection, penalties and dead latents judged by activation times norm (the saved SAE has unit rows all the same);
"archetypal" rows: exp(m) (W C + R) with W's rows convex weights over `archetypes` centres C of the data (k-means) and
R's rows no longer than `delta` (RA-SAE, arXiv 2502.12892; delta 0 is archetypal), around an output bias that stays.
"""

from __future__ import annotations

from dataclasses import dataclass

from sparsefeat.arguments import number, whole
from sparsefeat.sae.config import FACTORS, PURSUITS, SAEConfig

RECONSTRUCTIONS = ("fvu", "mse", "l2")
AUXILIARIES = ("residual", "unbox", "saeuron", "crosscoder", "fae")
PENALTIES = ("l1", "l0", "tanh")
DECODERS = ("unit", "free", "archetypal")
SORTED = ("topk", "signed_topk", "raw_topk")  # whose code of more latents begins with the code of fewer
SELECTING = (*SORTED, "batch_topk")
AUXK = 1 / 32
TANH_SCALE = 4.0
LOG_WEIGHT_STEP = 0.03


@dataclass(frozen=True)
class Objective:
    """The pieces above. auxk: None is 1/32 where the activation has a k, else 0. k_aux: None is d_model / 2.

    sparsity_warmup: steps over which the penalty's weight rises from 0.
    first_threshold: where JumpReLU's thresholds start.
    threshold_decay, threshold_after: BatchTopK's inference threshold follows the batches' smallest kept activation as an
        exponential average, from the first step after `threshold_after` on.
    dead_after: a latent is dead once it has not fired for so many rows. fired_above: it fires where its activation is
        larger than this (sdxl-unbox 1e-3, fae 1); None where it is among the k, even with 0 (SAeUron).
    """

    reconstruction: str = "fvu"
    auxk: float | None = None
    aux: str = "residual"
    k_aux: int | None = None
    multi_topk: float = 0.0
    prefixes: tuple[int, ...] = ()
    levels: tuple[int, ...] = ()
    sparsity: float = 0.0
    penalty: str = "l1"
    l0_target: float | None = None
    sparsity_warmup: int = 0
    pre_act: float = 0.0
    bandwidth: float = 0.1
    first_threshold: float = 0.1
    gated: bool = False
    decoder: str = "unit"
    archetypes: int | None = None
    delta: float = 1.0
    threshold_decay: float = 0.99
    threshold_after: int = 0
    dead_after: int = 10_000_000
    fired_above: float | None = 0.0

    def __post_init__(self) -> None:
        for name, choices in (
            ("reconstruction", RECONSTRUCTIONS),
            ("aux", AUXILIARIES),
            ("penalty", PENALTIES),
            ("decoder", DECODERS),
        ):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name} is {getattr(self, name)!r:.100}: choose one of {', '.join(choices)}")
        for name in ("auxk", "multi_topk", "sparsity", "pre_act", "delta", "fired_above"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), 0)
        for name in ("l0_target", "bandwidth", "first_threshold"):
            if getattr(self, name) is not None:
                number(name, getattr(self, name), 0, above=True)
        number("threshold_decay", self.threshold_decay, 0, 1)
        for name, least in (("sparsity_warmup", 0), ("threshold_after", 0), ("dead_after", 1)):
            whole(name, getattr(self, name), least)
        for name in ("k_aux", "archetypes"):
            if getattr(self, name) is not None:
                whole(name, getattr(self, name))
        for name in ("prefixes", "levels"):
            sizes = getattr(self, name)
            if list(sizes) != sorted(set(sizes)) or any(not isinstance(size, int) or size < 1 for size in sizes):
                raise ValueError(f"{name} is {sizes!r:.100}: pass whole numbers of at least 1 in ascending order")
            object.__setattr__(self, name, tuple(sizes))
        if self.prefixes and self.levels:
            raise ValueError("prefixes and levels are both given: nest the latents or the activations, not both")
        if self.l0_target is not None and not self.sparsity:
            raise ValueError("l0_target is given without a penalty to reach it by: pass sparsity, such as 1e-3")

    def auxk_of(self, config: SAEConfig) -> float:
        """The weight of L_aux for an SAE of this config."""
        return (AUXK if config.activation in SELECTING else 0.0) if self.auxk is None else self.auxk

    def check(self, config: SAEConfig) -> None:
        """Refuse what does not go with the SAE: nothing that is asked for is left out silently."""
        activation = config.activation
        if activation in (*PURSUITS, *FACTORS, "groupmax"):
            makers = {"groupmax": "train 'topk' instead", "nnls": "factorise makes its dictionary"}
            remedy = makers.get(activation, "build_itda makes its dictionary")
            raise ValueError(f"activation {activation!r} is not trained by gradients: {remedy}")
        selecting, jumping = activation in SELECTING, activation == "jumprelu"
        if not selecting and not self.sparsity:
            raise ValueError(
                f"activation {activation!r} has no sparsity of its own to train: pass sparsity, or train 'batch_topk' "
                "with inference 'threshold', which encodes the same way"
            )
        for name, wrong, needs in (
            ("auxk", self.auxk and not selecting, "an activation with a k"),
            ("multi_topk", self.multi_topk and not selecting, "an activation with a k"),
            ("sparsity", self.sparsity and selecting, "activation 'relu' or 'jumprelu'"),
            ("penalty", self.penalty == "l0" and not (jumping and not self.gated), "activation 'jumprelu', not gated"),
            ("pre_act", self.pre_act and not (jumping and not self.gated), "activation 'jumprelu', not gated"),
            ("gated", self.gated and not (jumping and self.penalty == "l1"), "activation 'jumprelu' and penalty 'l1'"),
            ("gated", self.gated and (self.prefixes or self.decoder != "unit"), "decoder 'unit' and no prefixes"),
            ("levels", self.levels and activation not in SORTED, "activation 'topk', whose codes are sorted"),
        ):
            if wrong:
                raise ValueError(f"{name}={getattr(self, name)!r:.100} needs {needs}, and the SAE's is {activation!r}")
        for name, largest in (("prefixes", config.n_latents), ("levels", config.k or 1)):
            sizes = getattr(self, name)
            if sizes and sizes[-1] != largest:
                what = "n_latents" if name == "prefixes" else "k"
                raise ValueError(f"{name} ends with {sizes[-1]}: the last must be {what}, {largest}")
