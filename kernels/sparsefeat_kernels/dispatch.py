"""What the ops are called, which implementation of one runs, and the one place where Triton is asked for.

Triton is imported when a kernel is first asked for: importing it and reading the kernels' sources takes a quarter of the
time that importing torch takes (`python -m bench.imports`), and most processes launch none.
Triton is optional: without it, or for tensors that are not on a GPU, every op runs its torch implementation, called the
CPU path because it is written for a CPU's caches. It is made of plain torch calls in chunks of rows, so it is also what a
GPU gets: for float64, which has no kernel, and of every op whose kernel has not been found right and faster on such a card
(PROVEN), unless kernels are asked for (`force_triton`).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import json
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch

from .launch import Launcher
from .precision import products_are_rounded, whole_products
from .replay import Replayed

__all__ = [
    "INTERPRETED",
    "NAMESPACE",
    "PROVEN",
    "TRITON_AVAILABLE",
    "backend",
    "block_bytes",
    "check_kind",
    "force_triton",
    "has_copy_engine",
    "has_warp_groups",
    "implementation",
    "jit",
    "jit_over_rows",
    "next_power_of_2",
    "ops",
    "register",
    "registered",
    "replayed",
    "row_chunks",
    "shared_memory",
    "sum_dtype",
    "tensor_descriptor",
    "tl",
    "triton_version",
]

NAMESPACE = "sparsefeat"  # every op is NAMESPACE::its name
registered = getattr(torch.ops, NAMESPACE)
# The same ops for those who call them; see `_direct`.
ops: Any = SimpleNamespace()


def _triton_is_here() -> bool:
    """Of version 3.4 or later, which is the first that has tensor descriptors of the host's."""
    found = importlib.util.find_spec("triton")
    places = (found and found.submodule_search_locations) or ()
    return any(Path(place, "tools", "tensor_descriptor.py").is_file() for place in places)


TRITON_AVAILABLE = _triton_is_here()
# `triton.language`, in the globals of a kernel from when it is made.
tl: Any = None
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# What no card has found right is not the default on one. By backend and op: the record in bench/results with which
# `python -m bench.gpu smoke` found the op's kernels right and faster than plain torch, and a digest of these kernels;
# `python -m bench.gpu prove` writes it, and a test compares.
PROVEN: Mapping[str, Mapping[str, Mapping[str, str]]] = json.loads(Path(__file__).with_name("proven.json").read_text())
# What has kernels and a torch implementation, of which one runs.
SWITCHED = frozenset(
    (
        "attention_column_sums", "attention_map", "attention_map_gradient", "attention_rows", "attention_tap",
        "concept_attention", "concept_map", "feature_stats", "resize_add", "sparse_decode", "sparse_edit",
        "threshold_encode", "topk_encode", "topk_encode_stored", "weight_gradient",
    )
)  # fmt: skip
# The largest block of a GPU's plain path: a CPU's caches are no reason there, and every block is some launches.
GPU_BLOCK_BYTES = 8 << 20

_asked: bool | None = True if os.environ.get("SPARSEFEAT_FORCE_TRITON", "0") not in ("", "0") else None
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")
# Of a batch of codes, from call to call. A kernel made for their being 1, or divisible by 16, would be compiled again in
# the middle of somebody's run. (Attention's sizes change with the resolution only, and its kernels spill without this.)
_UNSPECIALISED = (
    "entries", "first_row", "k", "n_dead", "n_rules", "places", "rows", "segment_length", "stride_code_row", "width",
)  # fmt: skip


class _Kernel:
    """What `triton.jit` makes of a function, made when somebody first asks for it, together with all others: kernels call
    functions by the names in their modules, which from then on are Triton's own. A name that ends in "_kernel" is launched
    from Python alone, and stays."""

    waiting: ClassVar[list[_Kernel]] = []
    _making = threading.RLock()

    def __init__(self, function: Callable[..., Any], **options: Any):
        self.function, self.options, self.made = function, options, None
        self.launcher: Launcher | None = None
        _Kernel.waiting.append(self)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        launcher = self.launcher
        if launcher is None:
            launcher = self.launcher = Launcher(self._kernel())
        return lambda *args, **options: launcher(grid, args, options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kernel(), name)

    def _kernel(self) -> Any:
        if self.made is None:
            triton = importlib.import_module("triton")
            with _Kernel._making:
                for kernel in _Kernel.waiting:
                    kernel.made = triton.jit(kernel.function, **kernel.options)
                for kernel in _Kernel.waiting:
                    names = kernel.function.__globals__
                    own = {name: value for name, value in names.items() if isinstance(value, _Kernel)}
                    names |= {name: value.made for name, value in own.items() if not name.endswith("_kernel")}
                    names["tl"] = triton.language
                _Kernel.waiting.clear()
        return self.made


def jit(function: Callable[..., Any]) -> Any:
    """`triton.jit`, once the kernel is asked for, or the plain function where Triton is not installed."""
    return _Kernel(function) if TRITON_AVAILABLE else function


def jit_over_rows(function: Callable[..., Any]) -> Any:
    """`jit` of a kernel over rows of a code: one program, however many there are."""
    return _Kernel(function, do_not_specialize=_UNSPECIALISED) if TRITON_AVAILABLE else function


@functools.cache
def triton_version() -> tuple[int, ...]:
    """Its first two numbers; (0, 0) without it."""
    if not TRITON_AVAILABLE:
        return 0, 0
    return tuple(map(int, importlib.import_module("triton").__version__.split(".")[:2]))


@functools.cache
def _imported(name: str) -> Any:
    """importlib's own look takes microseconds."""
    return importlib.import_module(name)


def tensor_descriptor(t: torch.Tensor, block: list[int]) -> Any:
    """What a kernel reads blocks of `t` through."""
    return _imported("triton.tools.tensor_descriptor").TensorDescriptor(t, list(t.shape), list(t.stride()), block)


def implementation(op: str, x: torch.Tensor) -> Literal["torch", "triton"]:
    """The implementation of `op` ("topk_encode") that runs for inputs like `x`.

    "torch" for tensors on a CPU and for float64. On a CUDA or ROCm device "triton" where `PROVEN` has the op for it or
    kernels were asked for, by `force_triton()` or with SPARSEFEAT_FORCE_TRITON=1 in the environment at import. With
    TRITON_INTERPRET=1, asked for, also tensors on a CPU take the Triton launchers.
    """
    if op not in SWITCHED:
        raise ValueError(f"op must be one of {', '.join(sorted(SWITCHED))}, got {op!r:.80}")
    if not TRITON_AVAILABLE or x.dtype not in KERNEL_DTYPES or not (x.is_cuda or INTERPRETED):
        return "torch"
    by_triton = (x.is_cuda and op in PROVEN[backend()]) if _asked is None else _asked
    return "triton" if by_triton else "torch"


def _settings() -> tuple[Any, ...]:
    """What an op's launches depend on besides its arguments."""
    return _asked, os.environ.get("SPARSEFEAT_TUNING")


def replayed(run: Callable[..., Any]) -> Callable[..., Any]:
    """Of a part of an op that is nothing but allocations and launches, where torch computes something before it: see replay.py."""
    return Replayed(run, _settings)


def block_bytes(x: torch.Tensor, of_cpu: int) -> int:
    """Bytes of what the torch implementation makes at a time: `of_cpu`, made for its caches, or GPU_BLOCK_BYTES."""
    return of_cpu if x.device.type == "cpu" else max(of_cpu, GPU_BLOCK_BYTES)


def register(
    name: str,
    schema: str,
    run: Callable[..., Any],
    *,
    fake: Callable[..., Any],
    mutates: tuple[str, ...] = (),
    backward: Callable[..., Any] | None = None,
    setup_context: Callable[..., Any] | None = None,
) -> None:
    """Make `run` the op NAMESPACE::name. Its products have the precision that its docstring says also where autocast
    or a setting of torch's would lower it. Without `backward` it has no gradient."""

    again = replayed(run)

    @functools.wraps(run)
    def as_said(*args: Any) -> Any:
        device = args[0].device.type
        lowered, rounded = torch.is_autocast_enabled(device), products_are_rounded(device)
        if not lowered and not rounded:  # a context costs as much as a small op
            of_kernels = TRITON_AVAILABLE and (args[0].is_cuda or INTERPRETED)
            return again(*args) if of_kernels else run(*args)
        with (
            torch.autocast(device, enabled=False) if lowered else contextlib.nullcontext(),
            whole_products() if rounded else contextlib.nullcontext(),
        ):
            return run(*args)

    op = torch.library.custom_op(f"{NAMESPACE}::{name}", as_said, mutates_args=mutates, schema=schema)
    op.register_fake(fake)
    if backward is not None:
        op.register_autograd(backward, setup_context=setup_context)
    packet = getattr(registered, name)
    arguments = packet.default._schema.arguments
    places = [i for i, argument in enumerate(arguments) if argument.name in mutates]
    taken = {argument.name: str(argument.type) for argument in arguments}
    setattr(ops, name, _direct(name, packet, as_said, places, taken))


# The plain types of an argument, by its type in the schema. Others (numpy's numbers, symbols) go by the dispatcher.
_PLAIN: dict[str, tuple[type, ...]] = {
    "Tensor": (),
    "Optional[Tensor]": (type(None),),
    "int": (int,),
    "float": (float, int),
    "Optional[float]": (float, int, type(None)),
    "bool": (bool,),
    "str": (str,),
}


_STRIDED = torch.strided


def _direct(
    name: str, packet: Any, run: Callable[..., Any], mutated: list[int], taken: dict[str, str]
) -> Callable[..., Any]:
    """The op, without torch's dispatcher where nobody would see it run there: the way through it takes the host as long
    as half of a launch, and a call of few rows is nothing but its launches. `taken`: the arguments and their types."""
    plain = [_PLAIN[kind] for kind in taken.values()]

    def call(*args: Any) -> Any:
        if not _unwatched(args, plain):
            if not torch.compiler.is_compiling():
                for (argument, kind), given in zip(taken.items(), args, strict=False):
                    check_kind(argument, kind, given)
                _check_differentiable(name, args)
            return packet(*args)
        found = run(*args)
        for place in mutated:
            if not args[place].is_inference():
                torch.autograd.graph.increment_version(args[place])
        return found

    return call


def check_kind(argument: str, kind: str, given: Any) -> None:
    """Refuse an array, or None, where there must be a tensor, and what is no number where there must be one."""
    optional = " or None" if kind.startswith("Optional") else ""
    if given is None and optional:
        return
    if "Tensor" in kind:
        if not isinstance(given, torch.Tensor):
            remedy = f"torch.as_tensor({argument})" if isinstance(given, Iterable) else f"one{optional}"
            raise TypeError(f"{argument} must be a tensor, got {type(given).__name__}; pass {remedy}")
        if given.layout is not torch.strided:
            raise TypeError(f"{argument} must be dense, got layout {given.layout}; pass {argument}.to_dense()")
    elif kind == "int" and (isinstance(given, bool) or not hasattr(given, "__index__")):
        raise TypeError(f"{argument} must be a whole number, got {given!r:.80}")
    elif "float" in kind and (isinstance(given, str) or not hasattr(given, "__float__")):
        raise TypeError(f"{argument} must be a number{optional}, got {given!r:.80}")
    elif kind == "bool" and not isinstance(given, bool):
        raise TypeError(f"{argument} must be True or False, got {given!r:.80}")
    elif kind == "str" and not isinstance(given, str):
        raise TypeError(f"{argument} must be a text, got {given!r:.80}")


def _check_differentiable(name: str, args: tuple[Any, ...]) -> None:
    """Refuse derivatives that torch does not take of a custom op: forward ones would be zero without a word."""
    forward = torch.autograd.forward_ad._current_level >= 0
    transforms: Any = torch._C._functorch
    for tensor in args:
        if not isinstance(tensor, torch.Tensor):
            continue
        while transforms.is_batchedtensor(tensor):
            tensor = transforms.get_unwrapped(tensor)
        if transforms.is_gradtrackingtensor(tensor):
            wanted = forward or (torch.is_grad_enabled() and tensor.requires_grad)
        else:
            wanted = forward and torch.autograd.forward_ad.unpack_dual(tensor).tangent is not None
        if wanted:
            raise NotImplementedError(
                f"{name} has no derivative under torch.func (grad, jvp, jacrev) or forward_ad; use torch.autograd.grad"
            )


def watched() -> bool:
    """Whether something compiles, traces, transforms, profiles or takes forward derivatives."""
    return (
        torch.compiler.is_compiling()
        or bool(torch._C._len_torch_dispatch_stack())
        or bool(torch._C._len_torch_function_stack())
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or torch.autograd.forward_ad._current_level >= 0
    )


def _unwatched(args: tuple[Any, ...], plain: list[tuple[type, ...]]) -> bool:
    """Whether nothing compiles, traces, transforms, profiles or differentiates, and arguments are what `run` takes: dense
    tensors with data, and numbers."""
    if watched():
        return False
    graded = torch.is_grad_enabled()
    for argument, others in zip(args, plain, strict=False):
        kind = type(argument)
        if kind is torch.Tensor or kind is torch.nn.Parameter:
            if argument.is_meta or argument.layout is not _STRIDED or argument.is_neg():
                return False
            if graded and argument.requires_grad:
                return False
        elif kind not in others:
            return False
    return True


def backend() -> Literal["cuda", "hip"]:
    """What the Triton kernels are compiled for: shared memory and pipelining differ."""
    return "hip" if torch.version.hip else "cuda"


def has_copy_engine() -> bool:
    """Whether the current GPU reads tiles through tensor descriptors: compute capability 9.0 and later."""
    return _architecture() >= 90


def has_warp_groups() -> bool:
    """Whether its matrix units take the products of four warps together and leave the sums in registers: 9.0 alone."""
    return _architecture() // 10 == 9


def _architecture() -> int:
    """Of the current GPU, ten times its compute capability; 0 of AMD's."""
    driver = _imported("triton").runtime.driver.active
    return _architecture_of(driver, driver.get_current_device())


@functools.cache
def _architecture_of(driver: Any, device: int) -> int:
    target = driver.get_current_target()
    return int(target.arch) if target.backend == "cuda" else 0


def shared_memory() -> int:
    """Bytes that one program may have of the current GPU's."""
    driver = _imported("triton").runtime.driver.active
    return _shared_memory(driver, driver.get_current_device())


@functools.cache
def _shared_memory(driver: Any, device: int) -> int:
    return int(driver.utils.get_device_properties(device)["max_shared_mem"])


@contextlib.contextmanager
def force_triton(enabled: bool = True) -> Iterator[None]:
    """Inside the block, every op on a GPU runs its Triton kernels, or with `enabled` False plain torch, whatever the
    default there. It holds for the whole process: gradients are computed in threads of torch's own."""
    global _asked
    check_kind("enabled", "bool", enabled)
    before, _asked = _asked, enabled
    try:
        yield
    finally:
        _asked = before


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n` (1 for n <= 1)."""
    return 1 << max(n - 1, 0).bit_length()


def sum_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """What sums over `tensors` are held in: float64 where one of them is, float32 for all others."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def row_chunks(rows: int, bytes_a_row: int, most_bytes: int, block: int = 1) -> list[slice]:
    """`rows` rows in as few chunks as `most_bytes` allow, of equal size but the last; of whole blocks of `block` rows
    where more than one fits."""
    most = max(1, min(rows, most_bytes // max(bytes_a_row, 1)))
    if rows > most > block:
        most -= most % block
    size = -(-rows // -(-rows // most)) if rows else 1
    if most > block:
        size = -(-size // block) * block
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]
