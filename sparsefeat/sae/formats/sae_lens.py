"""SAELens: `cfg.json`, `sae_weights.safetensors`, and beside them `sparsity.safetensors`, `activation_scaler.json`.

`W_enc` is [d_in, d_sae], `W_dec` [d_sae, d_in]; `b_enc`, `b_dec`.

| architecture | here | its own tensors |
|---|---|---|
| standard | relu | |
| topk, abstopk | topk, signed_topk | |
| jumprelu, also what trained batchtopk and matryoshka_batchtopk SAEs are saved as | jumprelu | threshold; log_threshold in training checkpoints before 6.48 |
| gated | jumprelu (see `SAEConfig`) | b_gate, r_mag, b_mag in the place of b_enc |
| batchtopk, matryoshka_batchtopk: training checkpoints | batch_topk, inference by threshold | topk_threshold |
| transcoder, skip_transcoder, and jumprelu_ before either | relu or jumprelu, `transcoder` | W_skip |

| cfg.json | meaning |
|---|---|
| apply_b_dec_to_input | b_dec is subtracted, after the normaliser; true where there is no such key, never in transcoders |
| normalize_activations | none, layer_norm (standardize), constant_norm_rescale (constant_norm), or expected_average_only_in: one number for all rows, folded into the weights when training ends; until then it is `scaling_factor` in activation_scaler.json |
| rescale_acts_by_decoder_norm | pre-activations are multiplied by the norms of the decoder's rows, which are divided out of them; false where there is no such key: versions before 6.13 had no such thing, later ones always write it |
| metadata | model_name, hook_name, … |

Before 6.0 all keys lay side by side, the hookpoint was `hook_point`, and TopK was a standard SAE with `activation_fn_str`
"topk" and `activation_fn_kwargs` {"k": …}; `scaling_factor`, from 3.0 on `finetuning_scaling_factor`, a tensor, multiplied
the code on the way to the decoder.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsefeat.sae.config import SAEConfig, is_hookpoint
from sparsefeat.sae.files import Described, Weights, listed, read_json, shown, weights
from sparsefeat.sae.formats.fold import AFFINE, cannot_express, encoder_bias, wide
from sparsefeat.sae.formats.foreign_config import config_of, flag, whole_number
from sparsefeat.sae.formats.format import Format, Given

NAME, TITLE = "sae_lens", "SAELens"
CONFIG, WEIGHTS, SPARSITY, SCALER = (
    "cfg.json",
    "sae_weights.safetensors",
    "sparsity.safetensors",
    "activation_scaler.json",
)
DENSITY = "log10_density"

ACTIVATIONS = {
    "standard": "relu",
    "topk": "topk",
    "abstopk": "signed_topk",
    "jumprelu": "jumprelu",
    "gated": "jumprelu",
    "batchtopk": "batch_topk",
    "matryoshka_batchtopk": "batch_topk",
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
}
NORMALIZERS = {
    "none": "none",
    "layer_norm": "standardize",
    "constant_norm_rescale": "constant_norm",
    "expected_average_only_in": "none",
}
LAYER_NORM_EPS = 1e-5  # a constant of the package

# What the SAEConfig says in its own words, or what says nothing about the SAE; the rest is kept as metadata.
TRANSLATED = {
    "d_in",
    "d_sae",
    "d_out",
    "architecture",
    "k",
    "apply_b_dec_to_input",
    "normalize_activations",
    "metadata",
}
TRANSLATED |= {"rescale_acts_by_decoder_norm", "activation_fn", "activation_fn_str", "activation_fn_kwargs"}
TRANSLATED |= {"dtype", "device", "model_name", "hook_point", "hook_name", "hf_hook_name", "finetuning_scaling_factor"}
# What the scale of a finetuned SAE's code is called: before 3.0, and from then on to 5.
SCALES = ("scaling_factor", "finetuning_scaling_factor")
# Keys about training and data whose words do not show it; `reshape_activations` is of the hook, not of its rows.
HARMLESS = listed(
    "reshape_activations model_from_pretrained_kwargs model_class_name seqpos_slice expansion_factor "
    "normalize_sae_decoder jumprelu_bandwidth use_sparse_activations matryoshka_widths autocast autocast_lm "
    "compile_llm compile_sae llm_compilation_mode feature_reinit_scale streaming verbose resume hook_head_index "
    "hook_head_index_out use_cached_activations disable_concat_sequences sequence_separator_token "
    "exclude_bos_from_loss begin_sequence_token model_kwargs n_restart_cycles n_shuffles_final "
    "n_shuffles_in_entire_dir shuffle split num_proc n_shuffles_with_last_section shuffle_every_n_buffers "
    "sae_compilation_mode finetuning_method hook_point_head_index autocast_data autocast_sae prefetch_llm_batches "
    "use_chat_formatting activations_mixing_fraction d_head git_hash"
)


def detect(place: Path) -> bool:
    if (place / WEIGHTS).exists():
        return True
    no_others = (place / CONFIG).exists() and not (place / "sae.safetensors").exists()
    return no_others and "d_sae" in read_json(place / CONFIG)


def read(place: Path, given: Given) -> tuple[SAEConfig, dict[str, Tensor]]:
    path = place / CONFIG
    values, only_said = _flattened(path)
    with weights(place / WEIGHTS) as held:
        config, tensors = _read(place, given, values, held)
    values.check(HARMLESS | only_said)
    return config, tensors


def _read(place: Path, given: Given, values: Described, held: Weights) -> tuple[SAEConfig, dict[str, Tensor]]:
    path = values.path
    architecture = values["architecture"]
    d, n = whole_number(path, values, "d_in"), whole_number(path, values, "d_sae")
    transcoder = "transcoder" in architecture
    if transcoder and values.get("d_out", d) != d:
        raise ValueError(f"d_out in {path} is {shown(values['d_out'])} and d_in {d}: transcoders here keep the width")
    normalization = values["normalize_activations"]
    if str(normalization) not in NORMALIZERS or (transcoder and normalization != "none"):
        raise ValueError(
            f"normalize_activations in {path} is {shown(normalization)}, which is not read for {architecture!r}: fold it into "
            "the weights with SAELens, or use one of none, layer_norm, constant_norm_rescale, expected_average_only_in"
        )
    subtracts = flag(path, values, "apply_b_dec_to_input", default=True) and not transcoder
    normalizer = NORMALIZERS[normalization]
    statistics = (DENSITY,) if (place / SPARSITY).exists() else ()
    activation = ACTIVATIONS[architecture]
    base_model = values.get("model_name")
    config = config_of(
        path,
        d_model=d,
        n_latents=n,
        activation=activation,
        k=_k(path, values, activation) if given.k is None else given.k,
        inference="threshold" if activation == "batch_topk" else "topk",
        normalizer="b_pre" if normalizer == "none" and subtracts else normalizer,
        eps=LAYER_NORM_EPS,
        transcoder=transcoder,
        skip="skip" in architecture,
        statistics=statistics,
        hookpoint=_hookpoint(values),
        base_model=base_model if isinstance(base_model, str) and base_model else None,
        metadata={"architecture": architecture, **_rest(values)},
    )
    tensors = _tensors(path, held, values, config)
    b_dec = tensors["b_out"]
    tensors["b_pre"] = b_dec if subtracts else torch.zeros_like(b_dec)
    if flag(path, values, "rescale_acts_by_decoder_norm"):
        _fold_decoder_norms(tensors)
    if normalization == "expected_average_only_in":
        _fold_scale(tensors, _scale(place))
    if statistics:
        with weights(place / SPARSITY) as sparsity:
            density = sparsity.take({"sparsity": (n,)})["sparsity"]
        # The trainer's own floor is log10(1e-10); files of before it had one have -inf for a dead latent.
        tensors[f"statistic_{DENSITY}"] = density.clamp(min=-10)
    return config, tensors


def _flattened(path: Path) -> tuple[Described, frozenset[str]]:
    """cfg.json as before 6.0, all keys side by side, under the names of after 6.0; and those of the metadata alone."""
    values = read_json(path)
    metadata = values.get("metadata")
    metadata = metadata if isinstance(metadata, dict) else {}
    only_said = frozenset(metadata) - frozenset(values)
    values = {**metadata, **values}
    values.setdefault("hook_name", values.get("hook_point"))
    function = values.get("activation_fn", values.get("activation_fn_str", "relu"))
    if "k" in values and not {"architecture", "activation_fn", "activation_fn_str"} & set(values):
        raise ValueError(f"{path} gives k and no architecture, without which k means nothing: say topk, or what it is")
    values.setdefault("architecture", "standard")
    if function == "topk":
        arguments = values.get("activation_fn_kwargs")
        values["architecture"] = "topk"
        if isinstance(arguments, dict) and "k" in arguments:
            values["k"] = arguments["k"]
    elif function != "relu":
        raise ValueError(f"the activation function in {path} is {shown(function)}: relu and topk are read")
    if str(values["architecture"]) not in ACTIVATIONS:
        raise ValueError(
            f"architecture in {path} is {shown(values['architecture'])}, which is no encoder, selection and decoder: one of "
            f"{', '.join(ACTIVATIONS)} can be read"
        )
    normalization = values.get("normalize_activations")
    if normalization is None or isinstance(normalization, bool):
        normalization = "expected_average_only_in" if normalization else "none"
    values["normalize_activations"] = normalization
    read = Described(path, values)
    read.asked |= TRANSLATED
    return read, only_said


def _hookpoint(values: Mapping[str, Any]) -> str | None:
    name = values.get("hf_hook_name") or values.get("hook_name")
    one_head = any(values.get(key) is not None for key in ("hook_head_index", "hook_point_head_index"))
    if not isinstance(name, str) or not name or one_head:
        return None
    return name if is_hookpoint(name) else None


def _rest(values: Described) -> dict[str, Any]:
    return {name: value for name, value in values.plain.items() if name not in TRANSLATED and value is not None}


def _k(path: Path, values: Mapping[str, Any], activation: str) -> int | None:
    if activation not in ("topk", "signed_topk", "batch_topk"):
        return None
    k = values.get("k")
    if activation == "batch_topk" and isinstance(k, float) and math.isfinite(k):  # a mean over the batch
        return max(1, round(k))
    return whole_number(path, values, "k")


def _tensors(path: Path, held: Weights, values: Mapping[str, Any], config: SAEConfig) -> dict[str, Tensor]:
    """Everything but `b_pre` and statistics, as the file has it."""
    n, d, architecture = config.n_latents, config.d_model, values["architecture"]
    shapes: dict[str, tuple[int, ...]] = {"W_enc": (d, n), "W_dec": (n, d), "b_dec": (d,)}
    if architecture == "gated":
        shapes |= {"b_gate": (n,), "b_mag": (n,), "r_mag": (n,)}
    else:
        shapes["b_enc"] = (n,)
    if config.activation == "batch_topk":
        shapes["topk_threshold"] = ()
    elif config.activation == "jumprelu" and architecture != "gated":
        shapes["log_threshold" if "log_threshold" in held.plain and "threshold" not in held.plain else "threshold"] = (
            n,
        )
    if config.skip:
        shapes["W_skip"] = (d, d)
    scale = next((name for name in SCALES if name in held), None)
    if scale is not None:
        shapes[scale] = (n,)
    elif flag(path, values, "finetuning_scaling_factor"):
        raise ValueError(
            f"finetuning_scaling_factor in {path} is true but {held.path} has none: copy the right file there"
        )
    t = held.take(shapes)

    tensors = {"W_enc": t["W_enc"].T.contiguous(), "W_dec": t["W_dec"], "b_out": t["b_dec"]}
    if architecture == "gated":
        dtype, growth = wide(t["W_enc"].dtype), t["r_mag"].double().exp()
        tensors["W_enc"] = tensors["W_enc"].to(dtype) * growth.to(dtype).unsqueeze(1)
        tensors["b_enc"] = t["b_mag"]
        tensors["threshold"] = (t["b_mag"].double() - growth * t["b_gate"].double()).to(dtype)
    else:
        tensors["b_enc"] = t["b_enc"]
    if "topk_threshold" in t:
        tensors["threshold"] = t["topk_threshold"]
    elif "log_threshold" in t:
        tensors["threshold"] = t["log_threshold"].double().exp().to(wide(t["log_threshold"].dtype))
    elif "threshold" in t:
        tensors["threshold"] = t["threshold"]
    if config.skip:
        tensors["W_skip"] = t["W_skip"]
    finetuned = flag(path, values, "finetuning_scaling_factor")
    if scale is not None and not bool((t[scale] == 1).all()):
        if not finetuned:
            raise ValueError(
                f"{held.path} has a {scale} but finetuning_scaling_factor in {path} is not true: correct it"
            )
        dtype = wide(t["W_dec"].dtype)
        tensors["W_dec"] = tensors["W_dec"].to(dtype) * t[scale].to(dtype).unsqueeze(1)
    return tensors


def _fold_decoder_norms(tensors: dict[str, Tensor]) -> None:
    """`(W_enc x + b_enc) |w_dec|` and `w_dec / |w_dec|`: thresholds and k are of these products."""
    norms = torch.linalg.vector_norm(tensors["W_dec"], dim=1, dtype=torch.float64)
    for name, factor in (("W_enc", norms), ("b_enc", norms), ("W_dec", 1 / norms.clamp(min=1e-8))):
        tensor = tensors[name].to(wide(tensors[name].dtype))
        tensors[name] = tensor * factor.to(tensor.dtype).view(-1, *[1] * (tensor.ndim - 1))


def _fold_scale(tensors: dict[str, Tensor], scale: float) -> None:
    """The SAE of `scale x`, as one of `x`."""
    for name, factor in (("W_enc", scale), ("W_dec", 1 / scale), ("b_pre", 1 / scale), ("b_out", 1 / scale)):
        tensors[name] = tensors[name].to(wide(tensors[name].dtype)) * factor


def _scale(place: Path) -> float:
    path = place / SCALER
    if not path.exists():
        raise FileNotFoundError(
            f"{place / CONFIG} says expected_average_only_in but there is no {SCALER} with its scaling_factor: copy it "
            'there, or write {"scaling_factor": sqrt(d_in) / mean norm of the activations}'
        )
    scale = read_json(path).get("scaling_factor")
    if isinstance(scale, bool) or not isinstance(scale, (int, float)) or not 0 < scale < math.inf:
        raise ValueError(f"scaling_factor in {path} is {shown(scale)}: a positive number was expected")
    return float(scale)


def write(folder: Path, config: SAEConfig, tensors: Mapping[str, Tensor]) -> None:
    """An inference SAE of the architectures above; biases are folded into theirs, a scalar threshold is spread out."""
    transcoder = config.transcoder
    architecture = {"relu": "standard", "topk": "topk", "signed_topk": "abstopk", "jumprelu": "jumprelu"}.get(
        config.activation, "jumprelu" if config.inference == "threshold" else ""
    )
    if transcoder:
        kind = "skip_transcoder" if config.skip else "transcoder"
        architecture = {"standard": kind, "jumprelu": f"jumprelu_{kind}"}.get(architecture, "")
    if not architecture:
        raise cannot_express(TITLE + ("'s transcoders" if transcoder else ""), config)
    normalization = {
        "none": "none",
        "b_pre": "none",
        "standardize": "layer_norm",
        "constant_norm": "constant_norm_rescale",
    }
    affine = config.normalizer in AFFINE
    if config.normalizer not in normalization or (transcoder and not affine) or (config.skip and not transcoder):
        raise ValueError(
            f"{TITLE} cannot express normalizer {config.normalizer!r} with skip {config.skip} and transcoder {transcoder}: "
            "save in the native format instead"
        )
    if config.normalizer == "standardize" and config.eps != LAYER_NORM_EPS:
        raise ValueError(
            f"{TITLE} cannot express eps {config.eps}, its own is {LAYER_NORM_EPS}: save in the native format"
        )
    t = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    tied = not transcoder and torch.equal(t["b_pre"], t["b_out"])
    state = {
        "W_enc": t["W_enc"].T,
        "b_enc": encoder_bias(t, t["b_out"] if tied else None),
        "W_dec": t["W_dec"],
        "b_dec": t["b_out"],
    }
    if "jumprelu" in architecture:
        state["threshold"] = t["threshold"].expand(config.n_latents)
    if config.skip:
        state["W_skip"] = t["W_skip"]
    described: dict[str, Any] = {
        "architecture": architecture,
        "d_in": config.d_model,
        "d_sae": config.n_latents,
        "dtype": str(t["W_dec"].dtype).removeprefix("torch."),
        "device": "cpu",
        "apply_b_dec_to_input": tied,
        "normalize_activations": normalization[config.normalizer],
        "reshape_activations": "none",
        # Without a version of at least 6.0 the package takes the keys for older ones.
        "metadata": {"sae_lens_version": "6.0.0", "model_name": config.base_model, "hook_name": config.hookpoint},
    }
    if transcoder:
        described["d_out"] = config.d_model
    if config.k is not None and "jumprelu" not in architecture:
        described |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    save_file(
        {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in state.items()}, folder / WEIGHTS
    )
    if DENSITY in config.statistics:
        save_file({"sparsity": t[f"statistic_{DENSITY}"].contiguous()}, folder / SPARSITY)
    (folder / CONFIG).write_text(json.dumps(described) + "\n", encoding="utf-8")


FORMAT = Format(NAME, TITLE, (CONFIG, WEIGHTS), detect, read, write, optional=(SPARSITY, SCALER))
