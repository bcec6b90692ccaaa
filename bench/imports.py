"""What importing takes, in processor time: `python -m bench.imports`. Beside it how many modules that loads.

Each in processes of its own, in turn with the others, compiled files kept; the median of some.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from statistics import median

REPEATS = 7
IMPORTS = {
    "nothing": "pass",
    "sparsefeat": "import sparsefeat",
    "torch": "import torch",
    "sparsefeat_kernels": "import sparsefeat_kernels",
    "torch and triton": "import torch, triton",
}


def once(code: str, folder: str) -> tuple[float, int]:
    """Seconds, and the number of modules."""
    told = f"{code}; import sys, time; print(time.process_time(), len(sys.modules))"
    environment = {**os.environ, "PYTHONPYCACHEPREFIX": folder, "PYTHONDONTWRITEBYTECODE": ""}
    out = subprocess.run([sys.executable, "-c", told], capture_output=True, text=True, check=True, env=environment)
    seconds, modules = out.stdout.split()
    return float(seconds), int(modules)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        for code in IMPORTS.values():
            once(code, folder)  # compiles
        rounds = [{name: once(code, folder) for name, code in IMPORTS.items()} for _ in range(REPEATS)]
    for name in IMPORTS:
        seconds = median(one[name][0] for one in rounds)
        print(f"{name}: {seconds:.2f} s, {rounds[0][name][1]} modules", flush=True)


if __name__ == "__main__":
    main()
