"""The shapes that are measured: those of published systems, and what of them two CPU cores can do in ten minutes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sparsefeat.measure.figures import HERE
from sparsefeat.measure.timing import OURS

# d_model, n_latents, k of published SAEs. Concept Steerers have no top-k (a plain ReLU): k = 32 stands in for the
# latents that are active. TIDE's k is 5 % of its latents.
SAES: dict[str, tuple[int, int, int]] = {
    "sdxl-unbox, k 10": (1280, 5120, 10),
    "sdxl-unbox, k 160": (1280, 5120, 160),
    "SAeUron": (1280, 20480, 32),
    "Steerers, SD 1.4": (768, 3072, 32),
    "Steerers, SDXL": (2048, 32768, 64),
    "Steerers, FLUX": (4096, 65536, 64),
    "ItD": (768, 524288, 64),
    "FLUX": (3072, 65536, 64),
    "TIDE": (1152, 18432, 922),
    "768 wide": (768, 32768, 64),
    "3072 wide": (3072, 16384, 64),
}
ROWS = (256, 1024, 4096, 16384)
TARGETS = ("SAeUron", "768 wide", "3072 wide")

# batch (two for classifier-free guidance), heads, image positions, text tokens, head width
CROSS = {
    "SD 1.5, 64 x 64": {"batch": 2, "heads": 8, "n": 4096, "t": 77, "d": 40},
    "SD 1.5, 32 x 32": {"batch": 2, "heads": 8, "n": 1024, "t": 77, "d": 80},
    "SD 1.5, 16 x 16": {"batch": 2, "heads": 8, "n": 256, "t": 77, "d": 160},
    "SDXL, 64 x 64": {"batch": 2, "heads": 10, "n": 4096, "t": 77, "d": 64},
    "SDXL, 32 x 32": {"batch": 2, "heads": 20, "n": 1024, "t": 77, "d": 64},
}
JOINT = {
    "SD 3.5 medium": {"batch": 2, "heads": 24, "n": 4096, "t": 333, "d": 64},
    "SD 3.5 large": {"batch": 2, "heads": 38, "n": 4096, "t": 333, "d": 64},
    "FLUX": {"batch": 1, "heads": 24, "n": 4096, "t": 512, "d": 128},
}
SELECTED = 8
# Of a joint attention: all positions among themselves, and a few concepts beside the image's.
WHOLE = {name: {**of, "n": of["n"] + of["t"], "t": of["n"] + of["t"]} for name, of in JOINT.items()}
CONCEPTS = {name: {**of, "t": 8} for name, of in JOINT.items()}
# Maps of the layers and heads of one level of SD 1.5, of 8 words and of all tokens.
ENLARGED = {f"SD 1.5, {t} tokens": {"maps": 64, "t": t, "side": 32, "to": 64} for t in (8, 77)}


@dataclass(frozen=True)
class Wanted:
    """A figure to measure, and the seconds its rounds may take. compiled: torch.compile's 10 s and more are worth it.
    only: the providers of a figure that takes long, () for all."""

    op: str
    shape: Mapping[str, int]
    dtype: str
    seconds: float
    compiled: bool = False
    only: tuple[str, ...] = ()


def sae_shape(name: str, rows: int) -> dict[str, int]:
    d_model, n_latents, k = SAES[name]
    return {"rows": rows, "d_model": d_model, "n_latents": n_latents, "k": k}


def cpu_figures() -> Iterator[Wanted]:
    """The most wanted first: what a budget cuts off is the end."""
    for name in TARGETS:
        rows = 1024 if name == "SAeUron" else 512
        for op in ("topk_encode", "forward", "sparse_decode"):
            yield Wanted(op, sae_shape(name, rows), "float32", 6.0, compiled=name == "SAeUron")
    yield Wanted("training_step", sae_shape("SAeUron", 256), "float32", 8.0, compiled=True)
    for name in TARGETS[1:]:
        yield Wanted("training_step", sae_shape(name, 256), "float32", 6.0)
    # The batch that SAeUron and sdxl-unbox are trained with, beside the fastest other: a step takes seconds.
    yield Wanted("training_step", sae_shape("SAeUron", 4096), "float32", 1.0, only=(OURS, "sparsify"))
    for op in ("sparse_edit", "feature_stats", "weight_gradient", "threshold_encode", "attention_map", "attention_tap",
               "attention_rows", "attention_column_sums"):  # fmt: skip
        yield Wanted(op, HERE[op], "float32", 3.0)
    yield Wanted("attention_map", CROSS["SD 1.5, 64 x 64"], "float32", 3.0)
    for op in ("concept_attention", "concept_map", "attention_map_gradient", "resize_add"):
        yield Wanted(op, HERE[op], "float32", 3.0)
    yield Wanted("matching_pursuit", HERE["matching_pursuit"], "float32", 4.0)
    # Where the dense way should win: a large share of few latents.
    yield Wanted("sparse_decode", sae_shape("TIDE", 256), "float32", 4.0)
    yield Wanted("sparse_decode", sae_shape("sdxl-unbox, k 160", 1024), "float32", 3.0)
    for name in ("sdxl-unbox, k 10", "Steerers, SD 1.4"):
        for op in ("topk_encode", "forward"):
            yield Wanted(op, sae_shape(name, 1024), "float32", 3.0)
    yield Wanted("topk_encode", sae_shape("sdxl-unbox, k 160", 1024), "float32", 3.0)
    yield Wanted("topk_encode", sae_shape("SAeUron", 256), "float32", 3.0)
    yield Wanted("topk_encode", sae_shape("SAeUron", 1024), "bfloat16", 4.0)


def gpu_figures() -> Iterator[Wanted]:
    """bf16, as diffusion models run; fp32 where its product is the comparison. The most wanted first, and of equally
    wanted ones the cheap: a training step has a dense reference in fp64, and compiling takes 10 s and more."""
    for name in TARGETS:
        yield Wanted("topk_encode", sae_shape(name, 4096), "bfloat16", 0.4)
    for name in CROSS:
        yield Wanted("attention_map", CROSS[name], "bfloat16", 0.4)
    for name in TARGETS:
        for op in ("threshold_encode", "sparse_decode", "forward"):
            yield Wanted(op, sae_shape(name, 4096), "bfloat16", 0.4)
    for name in JOINT:
        for selected in (SELECTED, JOINT[name]["t"]):
            yield Wanted("attention_tap", {**JOINT[name], "selected": selected}, "bfloat16", 0.4)
    for op in ("sparse_edit", "feature_stats", "weight_gradient"):
        yield Wanted(op, sae_shape("SAeUron", 4096), "bfloat16", 0.4)
    for name in TARGETS[:2]:
        yield Wanted("topk_encode", sae_shape(name, 4096), "float32", 0.6)
    for name in ("FLUX", "sdxl-unbox, k 10", "Steerers, SDXL", "Steerers, SD 1.4", "Steerers, FLUX", "ItD"):
        for op in ("topk_encode", "sparse_decode"):
            yield Wanted(op, sae_shape(name, 1024 if name == "ItD" else 4096), "bfloat16", 0.4)
    yield Wanted("training_step", sae_shape("SAeUron", 4096), "bfloat16", 0.6)
    for rows in ROWS:
        for name in ("SAeUron", "FLUX"):
            if rows != 4096:
                for op in ("topk_encode", "sparse_decode"):
                    yield Wanted(op, sae_shape(name, rows), "bfloat16", 0.4)
    yield Wanted("matching_pursuit", {"rows": 4096, "d_model": 768, "n_latents": 16384, "k": 16}, "float32", 0.6)
    for name in ("sdxl-unbox, k 160", "TIDE"):
        for op in ("topk_encode", "sparse_decode", "forward"):
            yield Wanted(op, sae_shape(name, 4096), "bfloat16", 0.4)
    for name in ("sdxl-unbox, k 10", "768 wide", "FLUX"):
        yield Wanted("training_step", sae_shape(name, 4096), "bfloat16", 0.6)
    for op in ("topk_encode", "forward", "training_step"):
        yield Wanted(op, sae_shape("SAeUron", 2048), "bfloat16", 0.4, compiled=True)


def name_of(shape: Mapping[str, int]) -> str:
    """The published system a shape belongs to, or ""."""
    if "d_model" in shape:
        sizes = (shape["d_model"], shape["n_latents"], shape["k"])
        return next((name for name, found in SAES.items() if found == sizes), "")
    attended = {key: value for key, value in shape.items() if key != "selected"}
    return next((name for name, found in (*CROSS.items(), *JOINT.items()) if found == attended), "")
