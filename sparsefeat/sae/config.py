"""What an SAE is, apart from its weights: shapes, activation, normaliser, and its place in a pipeline."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, fields
from typing import Any

TOPK_ACTIVATIONS = ("topk", "signed_topk", "raw_topk", "batch_topk")
THRESHOLD_ACTIVATIONS = ("relu", "jumprelu")
ACTIVATIONS = TOPK_ACTIVATIONS + THRESHOLD_ACTIVATIONS
INFERENCES = ("topk", "threshold")
NORMALIZERS = ("none", "b_pre", "standardize")
HOOKPOINT_IOS = ("output", "input", "diff")


@dataclass(frozen=True)
class SAEConfig:
    """Checked when it is made, so that an `SAEConfig` in hand is a valid one.

    d_model, n_latents: width of an activation row, number of latents.
    activation: `z` from the pre-activation `pre = W_enc (x - b_pre) + b_enc`:
        "topk"         the k largest `pre`, then ReLU. Selecting after the ReLU gives the same values; the two differ
                       only in which indices, all of value 0, fill a row with fewer than k positives.
        "signed_topk"  the k largest `|pre|`, sign kept.
        "raw_topk"     the k largest `pre`, no ReLU: values may be negative.
        "batch_topk"   in training mode the `k * rows` largest of the whole batch, then ReLU (arXiv 2412.06410);
                       at inference what `inference` says.
        "jumprelu"     `relu(pre)` where `pre > threshold`, one threshold a latent (arXiv 2407.14435).
        "relu"         `relu(pre)`.
    k: active latents a row (mean over the batch for batch_topk in training); None for relu and jumprelu.
    inference: batch_topk only: "topk" (k a row) or "threshold" (`relu(pre)` where `pre >` one learned scalar).
    normalizer: "none" (nothing is subtracted; `b_pre` is zero), "b_pre" (subtracted), or "standardize" (every row has
        its mean subtracted and is divided by its unbiased standard deviation + `eps`, then `b_pre` is subtracted; the
        reconstruction is scaled and shifted back).
    hookpoint: where the activations come from, `path[:output|input|diff]`; base_model: whose activations they are.
    metadata: anything else worth keeping that JSON can hold.
    """

    d_model: int
    n_latents: int
    activation: str = "topk"
    k: int | None = None
    inference: str = "topk"
    normalizer: str = "b_pre"
    eps: float = 1e-5
    hookpoint: str | None = None
    base_model: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        for name in ("d_model", "n_latents"):
            _check_positive_int(name, getattr(self, name))
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_choice("inference", self.inference, INFERENCES)
        _check_choice("normalizer", self.normalizer, NORMALIZERS)
        if self.activation in TOPK_ACTIVATIONS:
            if self.k is None:
                raise ValueError(f"k is None but activation {self.activation!r} needs it: pass k, 1 to n_latents")
            _check_positive_int("k", self.k)
            if self.k > self.n_latents:
                raise ValueError(f"k is {self.k} but n_latents is {self.n_latents}: choose k no larger than n_latents")
        elif self.k is not None:
            raise ValueError(f"k is {self.k} but activation {self.activation!r} has none: leave k out")
        if self.inference == "threshold" and self.activation != "batch_topk":
            raise ValueError(
                f"inference is 'threshold' but activation is {self.activation!r}: only 'batch_topk' has that choice, "
                "leave inference out"
            )
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)) or not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps is {self.eps!r}: pass a finite number that is not negative")
        if self.normalizer == "standardize" and self.d_model < 2:
            raise ValueError("normalizer 'standardize' needs d_model of at least 2: one value has no spread")
        for name in ("hookpoint", "base_model"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name} is {value!r}: pass a name, or None if it is not known")
        if self.hookpoint is not None:
            _, colon, io = self.hookpoint.rpartition(":")
            if colon and io not in HOOKPOINT_IOS:
                raise ValueError(
                    f"hookpoint {self.hookpoint!r} ends in ':{io}': after the colon write output, input or diff"
                )
        try:
            plain = json.loads(json.dumps(self.metadata, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata cannot be JSON ({error}): keep strings, numbers, lists and dicts") from None
        if not isinstance(plain, dict):
            raise ValueError(f"metadata is a {type(self.metadata).__name__}: pass a dict")
        object.__setattr__(self, "metadata", plain)  # as it will read back: tuples are lists, keys are strings

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SAEConfig:
        """The inverse of `to_json`; unknown and missing keys are refused by name."""
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown keys {unknown} in an SAE config: a newer sparsefeat may know them")
        missing = sorted({"d_model", "n_latents", "activation"} - set(values))
        if missing:
            raise ValueError(f"the SAE config lacks {missing}: add them to config.json")
        return cls(**values)

    @property
    def uses_threshold(self) -> bool:
        """Whether inference compares with thresholds instead of selecting k."""
        return self.activation in THRESHOLD_ACTIVATIONS or self.inference == "threshold"

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the state, the same in memory and on disk."""
        shapes: dict[str, tuple[int, ...]] = {
            "W_enc": (self.n_latents, self.d_model),
            "b_enc": (self.n_latents,),
            "W_dec": (self.n_latents, self.d_model),
            "b_pre": (self.d_model,),
            "b_out": (self.d_model,),
        }
        if self.activation == "jumprelu":
            shapes["threshold"] = (self.n_latents,)
        elif self.activation == "batch_topk":
            shapes["threshold"] = ()
        return shapes


def _check_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r}: pass a whole number of at least 1")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r}: choose one of {', '.join(choices)}")
