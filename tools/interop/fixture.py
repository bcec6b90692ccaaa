"""What every fixture of a foreign format has beside the files that its library wrote.

Run the scripts as modules from the checkout's root, `.venv-peers/bin/python -m tools.interop.NAME [FOLDER]`: several are
named like the package they import, which would not be found from a script's own folder.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "sae" / "formats" / "fixtures"
ROWS = 7


def rows(d_model: int, seed: int, n_rows: int = ROWS) -> Tensor:
    """Inputs whose mean is not zero, so that a bias that is forgotten shows."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n_rows, d_model, generator=generator) + 0.5 * torch.randn(d_model, generator=generator)


def fill(module: torch.nn.Module, seed: int, scale: float = 0.5) -> None:
    """Every parameter random and different, biases too: a swapped sign, order or orientation changes the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))


def new_case(folder: Path) -> Path:
    """An empty folder in the place of an earlier one."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def write_expected(
    case: Path, x: Tensor, code: Tensor, reconstruction: Tensor, script: str, package: str | None, **more: object
) -> None:
    """`expected.safetensors` and `made_by.json`.

    code: dense, `[rows, n_latents]`; package: the distribution that computed it, None where there is none to install and
    the script computes it from the format's description.
    """
    state = {"x": x, "code": code, "reconstruction": reconstruction}
    save_file(
        {name: t.detach().float().clone().contiguous() for name, t in state.items()}, case / "expected.safetensors"
    )
    made_by = {
        "script": f"tools/interop/{script}.py",
        "package": package,
        "version": version(package) if package else None,
        "torch": torch.__version__.split("+")[0],
        **more,
    }
    (case / "made_by.json").write_text(json.dumps(made_by, indent=2) + "\n")


def main(name: str, make: Callable[[Path], None]) -> None:
    """The command line of a script: the fixtures' own folder, or another."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else FIXTURES / name
    make(folder)
    print(f"wrote {', '.join(sorted(p.name for p in folder.iterdir()))} into {folder}")
