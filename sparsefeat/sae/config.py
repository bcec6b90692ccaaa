"""What an SAE is, apart from its weights: shapes, activation, normaliser, and its place in a pipeline."""

from __future__ import annotations

import contextlib
import json
import operator
from dataclasses import asdict, dataclass, field, fields
from typing import Any

TOPK_ACTIVATIONS = ("topk", "signed_topk", "raw_topk", "batch_topk")
THRESHOLD_ACTIVATIONS = ("relu", "jumprelu")
PURSUITS = ("matching_pursuit", "gradient_pursuit")
FACTORS = ("nnls",)
ACTIVATIONS = (*TOPK_ACTIVATIONS, "groupmax", *PURSUITS, *FACTORS, *THRESHOLD_ACTIVATIONS)
INFERENCES = ("topk", "threshold")
NORMALIZERS = ("none", "b_pre", "standardize", "unit_norm", "constant_norm", "pca", "affine", "timestep")
# Normalisers whose numbers are part of the SAE.
FITTED = ("pca", "affine")
HOOKPOINT_IOS = ("output", "input", "diff")
HOOKPOINT_STREAMS = ("image", "text")


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
        "groupmax"     the largest `pre` of each of k groups of n_latents / k neighbours, then ReLU (sparsify).
        "matching_pursuit", "gradient_pursuit"   no encoder: k greedy steps over the decoder rows, which should have
                       unit norm (ITDA, arXiv 2505.24360; see `sparsefeat_kernels.matching_pursuit`). Values are signed.
        "nnls"         the non-negative code that is nearest in both signs of x - b_pre, of a non-negative factorisation
                       (`factorise`): W_dec is the difference of a latent's two parts and W_enc their sum. k is n_latents.
        "jumprelu"     `relu(pre)` where `pre > threshold`, one threshold a latent (arXiv 2407.14435). A gated SAE with
                       tied encoders (arXiv 2404.16014) is one: with W' = exp(r_mag) W, b' = b_mag, its threshold is
                       b_mag - exp(r_mag) b_gate.
        "relu"         `relu(pre)`.
    k: active latents a row (mean over the batch for batch_topk in training); None for relu and jumprelu.
    inference: batch_topk only: "topk" (k a row) or "threshold" (`relu(pre)` where `pre >` one learned scalar).
    normalizer: what is done to a row first: "none" (nothing is subtracted; `b_pre` is zero), "b_pre" (it is
        subtracted), "standardize", "unit_norm", "constant_norm", "pca", "affine" or "timestep" (see `sparsefeat.sae.normalizers`;
        `b_pre` is subtracted after each of these, and the reconstruction put back). eps is standardize's, clip is of
        "pca" and "affine", time_width of "timestep": how wide the embedding of the timestep is, an even number.
    transcoder: the rows are a module's input and the reconstruction is its output, not the rows again.
    skip: the reconstruction has `x W_skip^T` added to it (skip transcoders, arXiv 2501.18823).
    statistics: names of numbers kept for every latent beside the weights, `SAE.statistic(name)`, such as
        "mean_nonzero", the mean activation where the latent is active.
    hookpoint: where the activations come from, `path[:output|input|diff][:image|text]`, the image where a block has both
        and it is not said; base_model: whose activations they are.
    metadata: anything else worth keeping that JSON can hold.

    Raises:
        ValueError: a value that cannot be, by its name; values that contradict each other.
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
    clip: float | None = None
    transcoder: bool = False
    skip: bool = False
    statistics: tuple[str, ...] = ()
    time_width: int | None = None

    def __post_init__(self) -> None:
        for name in ("d_model", "n_latents", "k"):
            value: Any = getattr(self, name)
            if not isinstance(value, int) and value is not None:  # a number of numpy, which JSON would not hold
                with contextlib.suppress(TypeError):
                    object.__setattr__(self, name, operator.index(value))
        for name in ("d_model", "n_latents"):
            _check_positive_int(name, getattr(self, name))
        _check_choice("activation", self.activation, ACTIVATIONS)
        _check_choice("inference", self.inference, INFERENCES)
        _check_choice("normalizer", self.normalizer, NORMALIZERS)
        self._check_k()
        self._check_normalizer()
        for name in ("transcoder", "skip"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)!r:.100}: pass True or False")
        if self.skip and self.activation in PURSUITS:
            raise ValueError("skip is True but a pursuit reconstructs its input by itself: leave skip out")
        self._check_names()
        try:
            plain = json.loads(json.dumps(self.metadata, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata cannot be JSON ({error}): keep strings, numbers, lists and dicts") from None
        if not isinstance(plain, dict):
            raise ValueError(f"metadata is a {type(self.metadata).__name__}: pass a dict")
        object.__setattr__(self, "metadata", plain)  # as it will read back: tuples are lists, keys are strings

    def _check_k(self) -> None:
        if self.activation not in THRESHOLD_ACTIVATIONS:
            if self.k is None:
                raise ValueError(f"k is None but activation {self.activation!r:.100} needs it: pass k, 1 to n_latents")
            _check_positive_int("k", self.k)
            if self.k > self.n_latents:
                raise ValueError(f"k is {self.k} but n_latents is {self.n_latents}: choose k no larger than n_latents")
            if self.activation in FACTORS and self.k != self.n_latents:
                raise ValueError(
                    f"k is {self.k} but every latent of an 'nnls' code may be active: pass k={self.n_latents}"
                )
            if self.activation == "groupmax" and self.n_latents % self.k:
                raise ValueError(f"k is {self.k} but n_latents is {self.n_latents}: groupmax needs k equal groups")
        elif self.k is not None:
            raise ValueError(f"k is {self.k} but activation {self.activation!r:.100} has none: leave k out")
        if self.inference == "threshold" and self.activation != "batch_topk":
            raise ValueError(
                f"inference is 'threshold' but activation is {self.activation!r:.100}: only 'batch_topk' has that choice, "
                "leave inference out"
            )

    def _check_normalizer(self) -> None:
        if isinstance(self.eps, bool) or not isinstance(self.eps, (int, float)) or not 0 <= self.eps < float("inf"):
            raise ValueError(f"eps is {self.eps!r:.100}: pass a finite number that is not negative")
        if self.normalizer == "standardize" and self.d_model < 2:
            raise ValueError("normalizer 'standardize' needs d_model of at least 2: one value has no spread")
        if self.clip is not None and (self.normalizer not in FITTED or not _is_positive(self.clip)):
            raise ValueError(
                f"clip is {self.clip!r:.100}: a positive number, for normalizer 'pca' or 'affine', else None"
            )
        if (self.normalizer == "timestep") != (self.time_width is not None):
            raise ValueError(
                f"time_width is {self.time_width!r:.100}: a whole number for normalizer 'timestep', else None"
            )
        if self.time_width is not None:
            _check_positive_int("time_width", self.time_width)
            if self.time_width % 2 or self.time_width < 4:
                raise ValueError(
                    f"time_width is {self.time_width}: an even number of at least 4, half sines, half cosines"
                )

    def _check_names(self) -> None:
        statistics = self.statistics
        if not isinstance(statistics, (tuple, list)) or not all(
            isinstance(s, str) and s and "." not in s for s in statistics
        ):
            raise ValueError(f"statistics is {statistics!r:.200}: pass a tuple of names, without dots")
        object.__setattr__(self, "statistics", tuple(sorted(statistics)))
        for name in ("hookpoint", "base_model"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, str) or not value):
                raise ValueError(f"{name} is {value!r:.100}: pass a name, or None if it is not known")
        if self.hookpoint is not None and not is_hookpoint(self.hookpoint):
            said = self.hookpoint.partition(":")[2]
            raise ValueError(
                f"hookpoint {self.hookpoint!r:.100} ends in ':{said:.40}': after the colon write output, input or diff, and text "
                "after these (or alone) where a joint block's text is meant"
            )

    def to_json(self) -> dict[str, Any]:
        values = {**asdict(self), "statistics": list(self.statistics)}
        if self.time_width is None:  # the files of other SAEs stay as they were
            del values["time_width"]
        return values

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> SAEConfig:
        """The inverse of `to_json`; unknown and missing keys are refused by name.

        Raises:
            ValueError: unknown or missing keys; as the class.
        """
        known = {f.name for f in fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ValueError(f"unknown keys {unknown[:8]} in an SAE config: a newer sparsefeat may know them")
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
        n, d = self.n_latents, self.d_model
        dictionary, square, latents, row = (n, d), (d, d), (n,), (d,)
        shapes: dict[str, tuple[int, ...]] = {"W_dec": dictionary, "b_pre": row, "b_out": row}
        if self.activation not in PURSUITS:
            shapes = {"W_enc": dictionary, "b_enc": latents, **shapes}
        if self.skip:
            shapes["W_skip"] = square
        if self.normalizer == "pca":
            shapes["pca_basis"] = square
        if self.normalizer in FITTED:
            shapes |= {"pca_mean": row, "pca_std": row}
        if self.time_width is not None:
            e = self.time_width
            for name, size in (("time_in", e), ("time_out", e), ("modulation", 2 * d)):
                shapes |= {f"{name}_weight": (size, e), f"{name}_bias": (size,)}
        shapes |= {f"statistic_{name}": latents for name in self.statistics}
        if self.activation == "jumprelu":
            shapes["threshold"] = latents
        elif self.activation == "batch_topk":
            shapes["threshold"] = ()
        return shapes


def is_hookpoint(name: str) -> bool:
    """Whether what stands after the first colon, if there is one, says which tensor is meant."""
    said = name.split(":")[1:]
    if said and said[-1] in HOOKPOINT_STREAMS:
        said.pop()
    return not said or (len(said) == 1 and said[0] in HOOKPOINT_IOS)


def _check_positive_int(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} is {value!r:.100}: pass a whole number of at least 1")


def _is_positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < float("inf")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {value!r:.100}: choose one of {', '.join(choices)}")
