"""What a result was measured on."""

from __future__ import annotations

import platform
from pathlib import Path

import torch


def device_name() -> str:
    """The machine in words: the GPU's name, or the processor's and its cores."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name(0)
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        model = names[0] if names else model
    return f"{model}, {torch.get_num_threads()} threads"


def versions() -> dict[str, str]:
    import diffusers
    import transformers

    import sparsefeat

    return {
        "sparsefeat": sparsefeat.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "transformers": transformers.__version__,
    }
