"""Benchmarks: `python -m bench.run`, `python -m bench.scaling`, `python -m bench.gpu`, `pytest bench --benchmark-only`."""

import importlib.util
import sys
from pathlib import Path

# Where the package is not installed (a bare GPU machine), the second root is found here.
if importlib.util.find_spec("sparsefeat_kernels") is None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
