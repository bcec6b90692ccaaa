"""What a result was measured on."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path

import torch

CPUINFO = Path("/proc/cpuinfo")


def _cpuinfo() -> str:
    """What Linux says of its processors, each a paragraph; elsewhere nothing."""
    return CPUINFO.read_text() if CPUINFO.is_file() else ""


def device_name() -> str:
    """The machine in words: the GPU's name, or the processor's and its cores.

    A virtual machine may call every AMD processor "AMD EPYC", of which one multiplies bf16 twice as fast as the other: a name
    without a number is told by family and model.
    """
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    first = _cpuinfo().split("\n\n")[0]
    says = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in first.splitlines())}
    model = says.get("model name") or platform.processor() or platform.machine()
    if not any(letter.isdigit() for letter in model) and {"cpu family", "model"} <= says.keys():
        model += f" (family {says['cpu family']}, model {says['model']})"
    threads = torch.get_num_threads()
    return f"{model}, {threads} thread{'s' if threads > 1 else ''}"


def has_bfloat16() -> bool:
    """Whether this CPU has bfloat16 matrix instructions (Linux only): the embedded pipeline then draws in half the time."""
    flags = _cpuinfo()
    return "avx512_bf16" in flags or "amx_bf16" in flags


def precision() -> str:
    """What `draw_precision` draws in: "bfloat16 autocast" or "float32"."""
    return "bfloat16 autocast" if has_bfloat16() else "float32"


def draw_precision() -> AbstractContextManager[object]:
    """Autocast to bfloat16 where the CPU has instructions for it; instruments stay in float32 either way."""
    return torch.autocast("cpu", torch.bfloat16) if has_bfloat16() else nullcontext()


def versions_of(distributions: Iterable[str]) -> dict[str, str]:
    """Of sparsefeat, Python, torch, and of those distributions that are installed."""
    import sparsefeat

    found = {"sparsefeat": sparsefeat.__version__, "python": platform.python_version(), "torch": torch.__version__}
    for name in distributions:
        with suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def versions() -> dict[str, str]:
    """What pictures depend on."""
    return versions_of(("diffusers", "transformers"))
