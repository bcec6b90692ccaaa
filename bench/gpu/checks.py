"""What every op is tried on by a GPU run: the shapes of published systems, odd ones, float64, Triton and plain torch.

`checks(op)` is a list of steps, the most telling first. `rehearse` makes the same steps for a CPU, where Triton is
interpreted: tiny shapes, and float32 for half precision, which the interpreter does not multiply right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial

from bench.gpu import faults
from bench.gpu.children import Step
from bench.gpu.faults import Shape, figure_fault
from bench.shapes import CONCEPTS, CROSS, JOINT, SELECTED, TARGETS, sae_shape
from sparsefeat.measure.answers import HALF

Check = Callable[[], str]
Made = Iterator[tuple[str, Check]]
Maker = Callable[[str, bool], Made]  # of an op's name, and whether it is a rehearsal

PUBLISHED = {name: sae_shape(name, 4096) for name in TARGETS[:2]} | {"FLUX": sae_shape("FLUX", 1024)}
# No size a multiple of 16, the last tile of everything nearly empty; and one row, which Triton makes a constant.
ODD = {"rows": 259, "d_model": 203, "n_latents": 1999, "k": 7}
ONE_ROW = {"rows": 1, "d_model": 96, "n_latents": 640, "k": 5}
# batch, heads, key heads, n, t, d
ATTENTION = {"odd": (2, 6, 3, 197, 77, 40), "two windows": (2, 4, 4, 130, 154, 160)}
TINY = {"rows": 5, "d_model": 24, "n_latents": 320, "k": 4}
TINY_ODD = {"rows": 3, "d_model": 19, "n_latents": 131, "k": 3}
# Of ops that go through the dictionary latent by latent, each a launch of many programs.
SLOW = ("training_step", "weight_gradient")
SMALLEST = {"rows": 4, "d_model": 8, "n_latents": 32, "k": 2}
SMALLEST_ODD = {"rows": 3, "d_model": 5, "n_latents": 17, "k": 2}
TINY_ATTENTION = {"batch": 2, "heads": 2, "n": 9, "t": 7, "d": 8}


def figure_checks(
    op: str, published: Mapping[str, Shape], odd: Mapping[str, Shape], dtypes: tuple[str, ...], double: bool
) -> Made:
    def one(label: str, shape: Shape, dtype: str, triton: bool = True) -> tuple[str, Check]:
        way = "" if triton else ", plain torch"
        return f"{label}, {dtype}{way}", partial(figure_fault, op, shape, dtype, triton)

    first = next(iter(published.items()))
    yield one(*first, dtypes[0])
    yield one(*first, dtypes[0], triton=False)
    for name, shape in odd.items():
        for dtype in dtypes:
            yield one(name, shape, dtype)
    for name, shape in list(published.items())[1:]:
        yield one(name, shape, dtypes[0])
    if double:
        yield one(*next(iter(odd.items())), "float64", triton=False)


def sae_checks(
    dtypes: tuple[str, ...] = ("bfloat16", "float32", "float16"), shapes: tuple[str, ...] = (), double: bool = True
) -> Maker:
    """shapes: of PUBLISHED; () for SAeUron's alone."""

    def of(op: str, rehearse: bool) -> Made:
        if rehearse:
            tiny = SMALLEST if op in SLOW else TINY
            return figure_checks(
                op, {"tiny": tiny}, {"odd": SMALLEST_ODD if op in SLOW else TINY_ODD}, ("float32",), double
            )
        published = {name: PUBLISHED[name] for name in shapes or (TARGETS[0],)}
        return figure_checks(op, published, {"odd": ODD, "one row": ONE_ROW}, dtypes, double)

    return of


def attention_checks(shapes: Mapping[str, Shape]) -> Maker:
    def of(op: str, rehearse: bool) -> Made:
        selected = {"selected": 3} if op == "attention_tap" else {}
        tiny: Shape = TINY_ATTENTION | selected
        if rehearse:
            return figure_checks(op, {"tiny": tiny}, {}, ("float32",), double=False)
        odd: Shape = {"batch": 2, "heads": 3, "n": 199, "t": 77, "d": 40} | selected
        return figure_checks(op, shapes, {"odd": odd}, HALF, double=False)

    return of


def each(
    run: Callable[..., str],
    dtypes: tuple[str, ...] = ("bfloat16", "float32"),
    published: Shape | None = None,
    double: bool = True,
) -> Maker:
    """`run(shape, dtype, triton)` at a published and an odd shape of an SAE."""

    def of(_: str, rehearse: bool) -> Made:
        wanted = {"SAeUron": published or sae_shape("SAeUron", 1024), "odd": ODD, "one row": ONE_ROW}
        first, *others = ("float32",) if rehearse else dtypes
        for name, shape in ({"odd": TINY_ODD} if rehearse else wanted).items():
            yield f"{name}, {first}", partial(run, shape, first, True)
            if name != "one row":
                for dtype in others:
                    yield f"{name}, {dtype}", partial(run, shape, dtype, True)
            if name == "odd":
                plain = shape
                yield f"{name}, {first}, plain torch", partial(run, shape, first, False)
        if double:
            yield "odd, float64, plain torch", partial(run, plain, "float64", False)

    return of


def each_attention(run: Callable[..., str]) -> Maker:
    def of(_: str, rehearse: bool) -> Made:
        for name, shape in ({"odd": (2, 4, 2, 9, 7, 8)} if rehearse else ATTENTION).items():
            for dtype in ("float32",) if rehearse else (*HALF, "float32"):
                yield f"{name}, {dtype}", partial(run, shape, dtype, True)
            for dtype in ("float32", "float64"):
                yield f"{name}, {dtype}, plain torch", partial(run, shape, dtype, False)

    return of


def resize_checks(_: str, rehearse: bool) -> Made:
    for name, shape in (
        {"odd": (2, 3, 5, 7)} if rehearse else {"odd": (3, 77, 15, 9), "SD 1.5": (8, 77, 32, 32)}
    ).items():
        for dtype in ("float32", "float64"):
            if dtype == "float32":
                yield f"{name}, {dtype}", partial(faults.resized, shape, dtype, True)
            yield f"{name}, {dtype}, plain torch", partial(faults.resized, shape, dtype, False)


def encode_checks(op: str, rehearse: bool) -> Made:
    yield from sae_checks(shapes=tuple(PUBLISHED))(op, rehearse)
    shape, dtype = (TINY_ODD, "float32") if rehearse else (ODD, "bfloat16")
    for how in ("signed", "raw"):
        yield f"{how}, {dtype}", partial(faults.selection, shape, dtype, how, True)
        yield f"{how}, {dtype}, plain torch", partial(faults.selection, shape, dtype, how, False)
    yield f"NaN, {dtype}", partial(faults.not_finite, shape, dtype, True)
    yield f"NaN, {dtype}, plain torch", partial(faults.not_finite, shape, dtype, False)


def stored_checks(_: str, rehearse: bool) -> Made:
    """topk_encode from stored pre-activations: where k is a large part of the latents, and of float32."""
    part, dtypes = (0.4, ("float32",)) if rehearse else (0.3, ("bfloat16", "float32", "float16"))
    odd = TINY_ODD if rehearse else ODD
    odd = {**odd, "k": int(part * odd["n_latents"])}
    wanted: dict[str, Shape] = {"tiny": TINY | {"k": 90}}
    if not rehearse:
        wanted = {"sdxl-unbox, k 160": sae_shape("sdxl-unbox, k 160", 4096), "TIDE": sae_shape("TIDE", 1024),
                  "one row": ONE_ROW | {"k": 300}, "three pieces": {**ODD, "n_latents": 70001, "k": 300}}  # fmt: skip
        yield "SAeUron, float32", partial(faults.stored_fault, sae_shape("SAeUron", 4096), "float32")
    for name, shape in wanted.items():
        yield f"{name}, {dtypes[0]}", partial(faults.stored_fault, shape, dtypes[0])
    for dtype in dtypes:
        yield f"odd, {dtype}", partial(faults.stored_fault, odd, dtype)
        yield f"ties, {dtype}", partial(faults.ties, odd, dtype, True)
    yield f"ties, {dtypes[0]}, plain torch", partial(faults.ties, odd, dtypes[0], False)
    yield f"NaN, {dtypes[0]}", partial(faults.not_finite, odd, dtypes[0], True)
    if not rehearse:
        yield "of the dead, bfloat16", partial(faults.auxk, sae_shape("SAeUron", 4096), "bfloat16", True)


def path_checks(fault: Callable[[Shape, str], str]) -> Maker:
    """Of a way of topk_encode that its own checks do not take, at every published shape."""

    def of(_: str, rehearse: bool) -> Made:
        dtype = "float32" if rehearse else "bfloat16"
        for name, shape in ({"tiny": TINY} if rehearse else PUBLISHED).items():
            yield f"{name}, {dtype}", partial(fault, shape, dtype)
        if not rehearse:
            for wide in ("float32", "float16"):
                yield f"odd, {wide}", partial(fault, ODD, wide)

    return of


# Every op, the most wanted first: what no time is left for is the end.
CHECKS: dict[str, Maker] = {
    "topk_encode": encode_checks,
    "topk_encode, rows without a proof": path_checks(faults.unproved_fault),
    "topk_encode, bias kept": path_checks(faults.bias_fault),
    "topk_encode_stored": stored_checks,
    "sparse_decode": sae_checks(shapes=("SAeUron", "FLUX")),
    "attention_map": attention_checks(CROSS),
    "threshold_encode": sae_checks(shapes=("SAeUron", "768 wide")),
    "training_step": sae_checks(dtypes=("bfloat16", "float32")),
    "attention_tap": attention_checks(
        {name: {**JOINT[name], "selected": SELECTED} for name in ("FLUX", "SD 3.5 medium")}
    ),
    "concept_attention": attention_checks({"FLUX": CONCEPTS["FLUX"]}),
    "sparse_edit": sae_checks(),
    "weight_gradient": sae_checks(),
    "feature_stats": sae_checks(dtypes=("float32",), double=False),
    "auxk_encode": each(faults.auxk),
    "auxk_decode": each(faults.aux_decode),
    "auxk_weight_gradient": each(faults.aux_gradient),
    "gradients": each(faults.gradients, published=sae_shape("SAeUron", 256)),
    "sparse_edit_delta": each(faults.edit),
    "attention_map, all options": each_attention(faults.maps),
    "attention_map_gradient": each_attention(faults.map_gradient),
    "attention_rows": each_attention(faults.rows),
    "attention_column_sums": each_attention(faults.column_sums),
    "attention_tap, all options": each_attention(faults.tapped),
    "concept_attention, all dtypes": each_attention(faults.concept_outputs),
    "concept_map": each_attention(faults.concepts),
    "resize_add": resize_checks,
    "threshold_encode_csr": each(faults.threshold_csr),
    "matching_pursuit": sae_checks(dtypes=("float32",)),
    "latent_major": each(faults.by_latent, dtypes=("float32",), double=False),
}


def checks(name: str, rehearse: bool = False) -> list[Step]:
    def step(label: str, check: Check) -> Step:
        return Step(label, lambda: {"fault": check()})

    return [step(*made) for made in CHECKS[name](name, rehearse)]
