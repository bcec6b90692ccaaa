"""Compiles every kernel as its launcher would, without a GPU. Run by test_ahead_of_time.py in a process of its own,
since the interpreter and the compiler cannot share one.

The launchers themselves run, on meta tensors; each kernel call is caught where Triton would launch it, and compiled with
the specialisation Triton would have given it (divisibility by 16, ones as constants). For sm_90, where there is a compiler
of C, it is then launched after all, on a driver that only looks at it (pretended_driver.c).

    python ahead_of_time.py FOLDER ARCHITECTURE    prints a JSON line a kernel: what it is and what it costs
    python ahead_of_time.py again                  prints the kernels that are compiled again because the rows are others

What is compiled: every kernel at the first shape; on the architectures in FULL, at the others what runs there without a
tuning table, in fp32 what differs from bf16 by more than the width of its loads, and what is selected from stored
pre-activations. `AHEAD_OF_TIME=full` in the environment, as `make card` sets it, has sm_80 among these and adds sizes of
selections whose code is that of others: they take the compiler longest.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

assert not os.environ.get("TRITON_INTERPRET"), "the interpreter cannot compile"

import torch  # noqa: E402
import triton  # noqa: E402
from sparsefeat_kernels import dispatch, tuning_table  # noqa: E402
from sparsefeat_kernels.tuning import measure as tuning  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from bench.pretended_driver import pretend  # noqa: E402
from bench.sass import Code, disassembled, units  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_89": GPUTarget("cuda", 89, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
TYPES = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int8: "*i8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
# d_model, n_latents, k: SAeUron, Concept Steerers (SD 1.4), FLUX SAE
SHAPES = {"1280/20480/32": (1280, 20480, 32), "768/3072/32": (768, 3072, 32), "3072/65536/64": (3072, 65536, 64)}
EVERYTHING = os.environ.get("AHEAD_OF_TIME") == "full"
# n_latents, k, selection, how many are dead: what is selected from stored pre-activations. sdxl-unbox, in fp32 also SAeUron,
# the dead of SAeUron; all latents, by their magnitude. TIDE and, in fp32 too, Concept Steerers (SDXL).
STORED = (
    (5120, 160, "relu", 0),
    (20480, 32, "raw", 0),
    (20480, 640, "relu", 2560),
    (32768, 1024, "signed", 0),
)
STORED += ((18432, 922, "relu", 0), (32768, 64, "relu", 0)) if EVERYTHING else ()
# batch, heads, n, d, key heads, t: cross-attention of SD 1.5 (first and last level), SDXL, SD 1.5 with a prompt of two
# windows, Sana; joint attention of FLUX (the text's keys)
ATTENTION = (
    (2, 8, 4096, 40, 8, 77),
    (2, 8, 256, 160, 8, 77),
    (2, 10, 4096, 64, 10, 77),
    (2, 8, 256, 160, 8, 154),
    (2, 20, 1024, 112, 20, 300),
    (1, 24, 4096, 128, 24, 512),
)
# In fp32, and where no spills are asserted: a head of 40, one of 160, and 512 keys.
EXTREMES = (ATTENTION[0], ATTENTION[1], ATTENTION[-1])
# The one head of a VAE: what a program keeps of a head must still fit. Compiled where shared memory is smallest.
ONE_WIDE_HEAD = (1, 1, 4096, 512, 1, 300)
# Of the other shapes: what depends on them, and runs there without a tuning table.
SHAPED = (
    "_threshold_encode_product_kernel",
    "_topk_encode_product_kernel",
    "_topk_encode_repair_kernel",
    "_topk_encode_select_kernel",
    "_topk_encode_stored_kernel",
)
# What follows the product whose blocks a tuning table chooses.
SELECTIONS = ("_topk_encode_repair_kernel", "_topk_encode_select_kernel")
# In fp32: products, whose tiles are others.
PRODUCTS = (
    "_attention_column_kernel",
    "_attention_flash_kernel",
    "_attention_gradient_keys_kernel",
    "_attention_gradient_rows_kernel",
    "_attention_map_kernel",
    "_attention_rows_kernel",
    "_attention_tap_kernel",
    "_concept_attention_kernel",
    "_concept_map_kernel",
    "_threshold_encode_product_kernel",
    "_topk_encode_product_kernel",
    "_topk_encode_repair_kernel",
)
# Also the configuration of fp32 (the kernels that only read wider values are left out).
FULL = ("sm_80", "sm_90") if EVERYTHING else ("sm_90",)
# Of what the others stand for in the rest.
ENCODERS_ALONE = ("sm_89", "sm_120")
ROWS = 128  # one chunk at every shape
# Of those with a copy engine, the shared memory that a program may have.
SHARED = {"sm_90": 227 << 10, "sm_100": 227 << 10, "sm_120": 99 << 10}
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


Launch = tuple[str, str, Any, dict[str, Any]]  # shape, dtype, kernel, arguments


@contextlib.contextmanager
def recorded() -> Iterator[list[tuple[Any, dict[str, Any]]]]:
    """(kernel, arguments) of every call that is made inside the block; none is launched."""
    calls: list[tuple[Any, dict[str, Any]]] = []

    def record(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        calls.append((self, dict(zip(self.arg_names, args, strict=False)) | kwargs | {"grid": grid}))

    original = triton.runtime.jit.JITFunction.run
    triton.runtime.jit.JITFunction.run = record
    try:
        yield calls
    finally:
        triton.runtime.jit.JITFunction.run = original


def tuned_launches(architecture: str) -> Iterator[Launch]:
    """Shape, dtype, kernel and arguments of every call that the packaged tuning tables of this architecture lead to."""
    for path in sorted(tuning_table.FOLDER.glob("*.json")):
        table = tuning_table.read_table(path)
        if table.backend != TARGETS[architecture].backend or architecture != "sm_{}{}".format(*table.capability):
            continue
        for entry in table.entries:
            shape = tuning.Shape(entry.rows, entry.d, entry.n_latents, entry.k, entry.dtype)
            chosen = tuning.Configuration(entry.design, entry.blocks)
            with recorded() as calls:
                tuning.call_of(entry.op, shape, tuning.inputs_without_data(shape), chosen)()
            calls = [call for call in calls if EVERYTHING or call[0].fn.__name__ not in SELECTIONS]
            yield from ((f"{entry.d}/{entry.n_latents}/{entry.k}", entry.dtype, *call) for call in calls)


def launches(
    shape: str, dtype: torch.dtype, rows: int = ROWS, attention: tuple[tuple[int, ...], ...] = ATTENTION
) -> list[tuple[Any, dict[str, Any]]]:
    """(kernel, arguments) of every call that the launchers make at this shape."""
    names = (
        "encode.gpu.topk",
        "encode.gpu.stored",
        "decode.sparse_decode",
        "decode.auxk_dense",
        "decode.sparse_edit",
        "feature_stats",
        "gradient.weight_gradient",
        "encode.gpu.threshold",
    )
    encode, stored, decode, dense, edit, stats, gradient, threshold = (
        importlib.import_module(f"sparsefeat_kernels.{name}") for name in names
    )
    d, n, k = SHAPES[shape]
    with torch.device("meta"):
        x, W = torch.empty(rows, d, dtype=dtype), torch.empty(n, d, dtype=dtype)
        b, c = torch.empty(n, dtype=dtype), torch.empty(d, dtype=dtype)
        values, indices = torch.empty(rows, k), torch.empty(rows, k, dtype=torch.int32)
        latents, rule, weight = torch.empty(8, dtype=torch.int64), (torch.empty(8),) * 5, torch.empty(rows)
        tables = torch.empty(4, n), torch.empty(4, n, dtype=torch.int32), torch.empty(4, n)
        group = torch.empty(rows, dtype=torch.int32)
        with recorded() as calls:
            encode.topk_encode_triton(x, W, b, c, k, "relu")
            encode.topk_encode_triton(x, W, b, c, k, "signed")
            stored.topk_stored(x, W, torch.empty(n), c, k, "relu")
            threshold.threshold_encode_triton(x, W, b, c, b, k)
            for marked in threshold.marked_chunks(
                x, W, b, c, b, None, 1
            ):  # the CSR form, whose host waits for a number
                marked.compact(group, values, indices, torch.empty(rows + 1, dtype=torch.int64))
            decode.sparse_decode_triton(values, indices, W, c)
            decode._grad_values_triton(x, values, indices, W)
            places, dots = torch.empty(n, dtype=torch.int32), torch.empty(rows, 16 * (d // 8 + 1))
            dense._dense_triton(values, indices, places, 2 * d, dots.shape[1], dtype)
            dense._picked_triton(dots, values, indices, places, torch.empty(rows, k))
            gradient._weight_gradient_triton(values, indices, x, c, n)
            edit._edit_triton(x, values, indices, latents, W[:8], *rule, weight)
            stats._feature_stats_triton(*tables, values, indices, group)
            attention_launches(dtype, attention)
    return calls


def stored_launches() -> Iterator[Launch]:
    """Of the selection from stored pre-activations, at published sizes."""
    stored = importlib.import_module("sparsefeat_kernels.encode.gpu.stored")
    for n, k, selection, n_dead in STORED:
        for dtype in (torch.bfloat16, torch.float32) if k in (32, 64) else (torch.bfloat16,):
            with torch.device("meta"), recorded() as calls:
                x, W = torch.empty(ROWS, 64, dtype=dtype), torch.empty(n, 64, dtype=dtype)
                dead = torch.empty(n_dead, dtype=torch.int64) if n_dead else None
                stored.topk_stored(x, W, torch.empty(n), x[0], k, selection, dead)
            yield from ((f"{n_dead or n}/{k}", str(dtype).removeprefix("torch."), *call) for call in calls)


def attention_launches(dtype: torch.dtype, shapes: tuple[tuple[int, ...], ...]) -> None:
    """Every attention op at its shapes, as modules call them: heads side by side in memory."""
    maps_of, tap, rows, columns, concept, concept_map, resize, gradient = (
        importlib.import_module(f"sparsefeat_kernels.attention.{name}")
        for name in ("map", "tap", "rows", "columns", "concept", "concept_map", "resize", "map_gradient")
    )
    for batch, heads, n, d, key_heads, t in shapes:
        query = torch.empty(batch, n, heads, d, dtype=dtype).transpose(1, 2)
        key, value = (torch.empty(batch, t, key_heads, d, dtype=dtype).transpose(1, 2) for _ in range(2))
        group, lse = torch.empty(batch, dtype=torch.int32), torch.empty(batch, heads, n)
        out = maps_of._empty_output(query, value)
        for v, o in ((None, None), (value, out)):
            maps_of._attention_triton(torch.empty(batch, n, t), query, key, v, d**-0.5, None, None, group, None, o)
        if d in (40, 128):  # eight words, the padding masked, heads weighted: every optional argument
            tokens, weight = torch.empty(8, dtype=torch.int64), torch.empty(heads)
            mask = torch.empty(batch, t, dtype=torch.bool)
            maps = torch.empty(batch, n, 8)
            maps_of._attention_triton(maps, query, key, None, d**-0.5, mask, weight, group, tokens, None)
            slots = torch.empty(t, dtype=torch.int64)
            gradient._gradient_triton(maps, query, key, d**-0.5, mask, weight, slots)
        if d in (160, 128, 512):
            gradient._gradient_triton(torch.empty(batch, n, t), query, key, d**-0.5, None, None, None)
            maps = torch.empty(batch, n, 8)
            image = torch.empty(batch, n, key_heads, d, dtype=dtype).transpose(1, 2)
            marked = torch.empty(n, dtype=torch.bool)
            tap.attention_tap_triton(maps, query, key[:, :, :8], lse, d**-0.5, None, None, group)
            rows._attention_rows_triton(query, image, d**-0.5, None, marked)
            sums = torch.empty(batch, n)
            columns._attention_column_sums_triton(sums, query, image, lse, d**-0.5, None, None, group)
        if d in (64, 128):  # of eight concepts
            few, out = (torch.empty(batch, 8, heads, d, dtype=dtype).transpose(1, 2) for _ in range(2))
            concept._concept_attention_triton(few, few, few, query, query, d**-0.5, out)
            concept_map._concept_map_triton(torch.empty(batch, n, 8), query, out, torch.empty(heads), group, True)
        if d == 40:
            maps = torch.empty(heads, 16, 16, t).permute(0, 3, 1, 2)
            resize._resize_add_triton(torch.empty(t, 64, 64), maps, torch.empty(heads), True)


def specialised(kernel: Any, arguments: dict[str, Any]) -> tuple[ASTSource, dict[str, Any]]:
    """The source and options of a call, as Triton's own launcher specialises them."""
    constants, attributes = {}, {}

    def of(value: Any, path: tuple[int, ...], constant: bool, special: bool) -> Any:
        """A value's type; a tuple's is the tuple of its own."""
        if isinstance(value, tuple) and not constant:
            return type(value)(*(of(inner, (*path, i), constant, special) for i, inner in enumerate(value)))
        if type(value).__name__ == "TensorDescriptor":  # from Triton 3.4
            return f"tensordesc<{TYPES[value.base.dtype][1:]}{list(value.block_shape)}>"
        if constant or value is None or (isinstance(value, int) and value == 1 and special):
            constants[path] = value
            return "constexpr"
        if isinstance(value, torch.Tensor):
            attributes[path] = [["tt.divisibility", 16]]  # torch's allocations are aligned
            return TYPES[value.dtype]
        if isinstance(value, float):
            return "fp32"
        if value % 16 == 0 and special:
            attributes[path] = [["tt.divisibility", 16]]
        return "i32" if -(2**31) <= value < 2**31 else "i64"

    signature = {
        parameter.name: of(
            arguments[parameter.name], (position,), parameter.is_constexpr, not parameter.do_not_specialize
        )
        for position, parameter in enumerate(kernel.params)
    }
    options = {name: arguments[name] for name in ("num_warps", "num_stages") if name in arguments}
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes), options


def evidence(compiled: Any, architecture: str) -> dict[str, Any]:
    found: dict[str, Any] = {"shared": compiled.metadata.shared}
    if architecture == "gfx942":
        found["spills"] = sum(int(n) for n in re.findall(r"\.[sv]gpr_spill_count:\s*(\d+)", compiled.asm["amdgcn"]))
        found["matrix_unit"] = "mfma" in compiled.asm["amdgcn"]
    return found


# Instructions on local memory, but for a zero that is stored and never read: no register is spilled so. On sm_120 the
# assembler of Triton 3.6 guards every copy by a branch, to a routine whose argument on the stack is one.
SPILL = re.compile(r"\b(?:STL|LDL)\b(?![.\w]*\s+\[[^\]]*\],\s*RZ\b)")


def of_instructions(sass: str) -> dict[str, Any]:
    return {
        "spills": len(SPILL.findall(sass)),
        "matrix_unit": bool(re.search(r"\b(?:HMMA|HGMMA|UTCHMMA|UTCQMMA)\b", sass)),
        "copies": len(re.findall(r"\bUTMALDG", sass)),
        "warp_groups": len(re.findall(r"\bHGMMA", sass)),
        "wide_loads": len(re.findall(r"\b(?:LDG|LDGSTS)\.[\w.]*128|\bUTMALDG", sass)),
    }


def all_launches(architecture: str) -> Iterator[Launch]:
    """Of the ops, with the blocks they take without a tuning table. See the top of the file for what is left out."""
    first, *others = SHAPES
    if architecture in ENCODERS_ALONE:
        calls = launches(first, torch.bfloat16, attention=())
        yield from ((first, "bfloat16", *call) for call in calls if "encode" in call[0].fn.__name__)
        return
    attention = ATTENTION if architecture in FULL else EXTREMES
    yield from ((first, "bfloat16", *call) for call in launches(first, torch.bfloat16, attention=attention))
    if architecture in FULL:
        wide = launches(first, torch.float32, attention=EXTREMES)
        yield from ((first, "float32", *call) for call in wide if call[0].fn.__name__ in PRODUCTS)
        for shape in others:
            calls = launches(shape, torch.bfloat16, attention=())
            yield from ((shape, "bfloat16", *call) for call in calls if call[0].fn.__name__ in SHAPED)
        yield from stored_launches()
    if architecture == "sm_80":
        with torch.device("meta"), recorded() as calls:
            attention_launches(torch.bfloat16, (ONE_WIDE_HEAD,))
        yield from (("d 512", "bfloat16", *call) for call in calls)
    if architecture == "sm_90":
        yield from ((first, "bfloat16", *call) for call in small_tile_launches(first))


def small_tile_launches(shape: str) -> list[tuple[Any, dict[str, Any]]]:
    """Of the tile that runs where large ones would be few."""
    encode, threshold, tiles = (
        importlib.import_module(f"sparsefeat_kernels.encode.gpu.{name}") for name in ("topk", "threshold", "tiles")
    )
    d, n, k = SHAPES[shape]
    with torch.device("meta"), recorded() as calls:
        x, W = torch.empty(ROWS, d, dtype=torch.bfloat16), torch.empty(n, d, dtype=torch.bfloat16)
        weights = torch.empty(n, dtype=torch.bfloat16), torch.empty(d, dtype=torch.bfloat16)
        multiprocessors, tiles.multiprocessors = tiles.multiprocessors, lambda _: n
        encode.topk_encode_triton(x, W, *weights, k, "relu")
        threshold.threshold_encode_triton(x, W, *weights, weights[0], k)
        tiles.multiprocessors = multiprocessors
    return [call for call in calls if call[0].fn.__name__.endswith("product_kernel")]


def launched(kernel: Any, arguments: dict[str, Any], source: ASTSource) -> Any:
    """What Triton's own launcher compiles and launches, which must be the program that `specialised` says."""
    compiled = kernel.run(warmup=False, **arguments)
    said, own = (
        (of.signature, of.constants, {path: found for path, found in of.attrs.items() if found})
        for of in (source, compiled.src)
    )
    assert said == own, f"{kernel.fn.__name__}: {said}, and the launcher's own {own}"
    return compiled


def main(folder: Path, architecture: str) -> None:
    for name in ("encode.product", "encode.gpu.tiles", "attention.map"):
        importlib.import_module(f"sparsefeat_kernels.{name}").backend = lambda: TARGETS[architecture].backend
    copies = TARGETS[architecture].backend == "cuda" and TARGETS[architecture].arch >= 90
    tiles = importlib.import_module("sparsefeat_kernels.encode.gpu.tiles")
    tiles.has_copy_engine, tiles.shared_memory = lambda: copies, lambda: SHARED[architecture]
    tiles.has_warp_groups = lambda: architecture == "sm_90"
    on_driver = architecture == "sm_90" and pretend(folder)
    seen, rows, cubins = set(), [], []
    tuned = ((launch, {"tuned": True}) for launch in tuned_launches(architecture))
    for (shape, dtype, kernel, arguments), more in (*((launch, {}) for launch in all_launches(architecture)), *tuned):
        source, options = specialised(kernel, arguments)
        if (key := key_of(kernel, source, options)) in seen:
            continue
        seen.add(key)
        if on_driver:
            compiled = launched(kernel, arguments, source)
        else:
            compiled = triton.compile(source, target=TARGETS[architecture], options=options)
        row = {"architecture": architecture, "kernel": kernel.fn.__name__, "shape": shape, "dtype": dtype} | more
        row |= evidence(compiled, architecture) | ({"launched": True} if on_driver else {})
        if row["kernel"].endswith("_encode_product_kernel"):
            row |= {"large": arguments["BLOCK_LATENTS"] > 128, "signed": arguments.get("SIGNED", False)}
        if architecture == "sm_90" and "large" in row:
            tile = arguments["BLOCK_ROWS"], arguments["BLOCK_LATENTS"]
            entries = tile[0] * tile[1] / (32 * arguments["num_warps"])  # of a thread
            (folder / "kernel.cubin").write_bytes(compiled.asm["cubin"])
            alone = Code(folder / "kernel.cubin", TOOLS / "cuobjdump")
            row |= {"epilogue": units(alone.after_product())["integer"] / entries, "products": alone.ops.count("HGMMA")}
        rows.append(row)
        cubins.append(compiled.asm.get("cubin"))
    if TARGETS[architecture].backend == "cuda":
        of = disassembled(
            cubins, f"SM{TARGETS[architecture].arch}{'a' * copies}", TOOLS / "nvdisasm", folder / "all.bin"
        )
        rows = [row | of_instructions(sass) for row, sass in zip(rows, of, strict=True)]
    print(*map(json.dumps, rows), sep="\n")


def key_of(kernel: Any, source: ASTSource, options: dict[str, Any]) -> str:
    """Two calls with this in common are one program."""
    return f"{kernel.fn.__name__} {source.signature} {source.constants} {source.attrs} {options}"


def compiled_again() -> list[str]:
    """Names of kernels that are another program for one row, an odd number of rows, or a number that 16 divides."""
    programs: dict[str, set[frozenset[str]]] = {}
    tiles = importlib.import_module("sparsefeat_kernels.encode.gpu.tiles")
    tiles.has_copy_engine = tiles.has_warp_groups = lambda: True
    tiles.shared_memory = lambda: SHARED["sm_90"]
    for rows in (1, 48, 77, 300):
        found: dict[str, set[str]] = {}
        for kernel, arguments in launches(next(iter(SHAPES)), torch.bfloat16, rows, attention=()):
            found.setdefault(kernel.fn.__name__, set()).add(key_of(kernel, *specialised(kernel, arguments)))
        for name, keys in found.items():
            programs.setdefault(name, set()).add(frozenset(keys))
    return sorted(name for name, sets in programs.items() if len(sets) > 1)


if __name__ == "__main__":
    assert dispatch.TRITON_AVAILABLE
    if sys.argv[1] == "again":
        print(json.dumps(compiled_again()))
    else:
        main(Path(sys.argv[1]), sys.argv[2])
